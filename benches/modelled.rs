//! What the kernels cost at the shapes of real models, from the emulator's counters: the tables of PERFORMANCE.md.
//!
//! `cargo bench --bench modelled` runs passes of a cut-down model (one whole block and the trimmed last one, random weights) on the emulated
//! card, one process a pass, and writes the tables between the marks of PERFORMANCE.md. `-- --show` prints them instead. Minutes.
//! Modelled, not measured: how a time is made from counters is said in `tests/cuda-emulator/README.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use collm_engine::device::Device;
use collm_engine::device::cpu::optimizer::Decay;
use collm_engine::device::cuda::mapping::{Mapped, Mapping, Widths};
use collm_engine::device::cuda::optimizer::{Optimizer, Step, Trained};
use collm_engine::device::cuda::{Buffer, Cuda, Precision};
use collm_engine::device::ops::{Dropout, Loss};
use collm_engine::llm::ModelConfig;
use collm_engine::llm::batch::{GradientFrom, PackedBatch};
use collm_engine::llm::model::{Model, TrainPass, Workspace};
use collm_engine::llm::peft::{LoraTensors, Target};
use collm_engine::llm::weights::ModelWeights;
use collm_engine::prompt::{PromptRef, Slot, SlotKind};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Tokens of an ML-1M prompt, on average, and where its two vectors are put: titles come before them.
const PROMPT: usize = 186;
const SLOTS: [u32; 2] = [120, 165];
/// Prompts of a pass: 372 tokens fill three tiles of 128 rows but for 12.
const PROMPTS: usize = 2;
/// Prompts of an optimizer step.
const STEP: usize = 16;
const RANK: usize = 8;
/// Width of the collaborative vectors and of the mapping's hidden layer.
const DIM: usize = 256;
const MID: usize = 10 * DIM;
const CARDS: [&str; 2] = ["A100", "H100"];

struct Shape {
    key: &'static str,
    name: &'static str,
    kind: &'static str,
    hidden: usize,
    inter: usize,
    heads: [usize; 2],
    layers: usize,
    /// Multiprocessors that the emulated card shows: so few that 372 tokens get the tiles that a full batch gets on a whole
    /// card, so many that the last block's few rows get small ones.
    multiprocessors: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        key: "qwen",
        name: "Qwen2-1.5B",
        kind: "qwen2",
        hidden: 1536,
        inter: 8960,
        heads: [12, 2],
        layers: 28,
        multiprocessors: 34,
    },
    Shape {
        key: "vicuna",
        name: "Vicuna-7B",
        kind: "llama",
        hidden: 4096,
        inter: 11008,
        heads: [32, 32],
        layers: 32,
        multiprocessors: 80,
    },
];

/// Kernel and goal, to the worst figure and what it is.
type Misses = BTreeMap<(String, &'static str), (f64, &'static str)>;

const TASKS: [&str; 3] = ["stage1", "stage2", "step"];
/// Blocks of the cut-down model. The gradient of the inputs is asked for, so that the first has all that a middle one has.
const BLOCKS: usize = 2;

impl Shape {
    fn config(&self, layers: usize) -> Result<ModelConfig> {
        let text = json!({
            "model_type": self.kind, "hidden_act": "silu", "vocab_size": 1024, "hidden_size": self.hidden,
            "intermediate_size": self.inter, "num_hidden_layers": layers, "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1], "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": false,
            "max_position_embeddings": 512,
        });
        Ok(ModelConfig::from_json(&text.to_string(), Path::new("made here"))?)
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [run, shape, task] = &arguments[..]
        && run == "run"
    {
        let shape = SHAPES.iter().find(|s| s.key == shape).ok_or("no such model")?;
        return pass(shape, task);
    }
    let dir = tempfile::tempdir()?;
    let deps = std::env::current_exe()?.parent().ok_or("an executable lies in a folder")?.to_owned();
    std::os::unix::fs::symlink(deps.join("libcuda_emulator.so"), dir.path().join("libcuda.so.1"))?;
    let mut text = String::new();
    let mut misses: Misses = BTreeMap::new();
    for shape in &SHAPES {
        eprintln!("{}: {} ...", shape.name, TASKS.join(", "));
        let all = std::thread::scope(|scope| {
            // The emulator has one thread where it models the cache: the passes run side by side.
            let started =
                TASKS.map(|task| scope.spawn(|| launches(dir.path(), shape, task).map_err(|e| e.to_string())));
            started.map(|pass| pass.join().map_err(|_| "a pass panicked".to_owned()).and_then(|result| result))
        });
        let mut runs = BTreeMap::new();
        for (task, launches) in TASKS.into_iter().zip(all) {
            runs.insert(task, launches?);
        }
        describe(shape, &runs, &mut text, &mut misses)?;
    }
    let mut goals = String::from("### Goals missed\n\n");
    if misses.is_empty() {
        goals += "None.\n";
    }
    for ((kernel, goal), (worst, says)) in &misses {
        goals += &format!("- `{kernel}`: {goal}: {says}, at worst {worst:.2}\n");
    }
    let tables = format!("{text}{goals}");
    if arguments.iter().any(|a| a == "--show") {
        println!("{tables}");
        return Ok(());
    }
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("PERFORMANCE.md");
    let old = std::fs::read_to_string(&path)?;
    let (begin, end) = ("<!-- tables: cargo bench --bench modelled -->\n", "<!-- end of tables -->\n");
    let (before, rest) = old.split_once(begin).ok_or("PERFORMANCE.md has no mark where the tables begin")?;
    let (_, after) = rest.split_once(end).ok_or("PERFORMANCE.md has no mark where the tables end")?;
    Ok(collm_engine::files::write_atomic(&path, |w| {
        use std::io::Write as _;
        w.write_all(format!("{before}{begin}\n{tables}\n{end}{after}").as_bytes())
    })?)
}

/// Runs one pass in a process of its own; what the emulator reports of its launches.
fn launches(dir: &Path, shape: &Shape, task: &str) -> Result<Vec<Value>> {
    let report = dir.join(format!("{task}.json"));
    let status = Command::new(std::env::current_exe()?)
        .args(["run", shape.key, task])
        .env("LD_LIBRARY_PATH", dir)
        .env("CUEMU_REPORT", &report)
        .env("CUEMU_CARD", "A100")
        .env("CUEMU_SMS", shape.multiprocessors.to_string())
        .env("CUEMU_TIMEOUT", "3600")
        .env("CUEMU_L2", "1")
        .status()?;
    if !status.success() {
        return Err(format!("{} {task} failed", shape.name).into());
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(report)?)?;
    let launches = report["launches"].as_array().ok_or("the report lists launches")?;
    if let Some(bad) = launches.iter().find(|l| l["findings"].as_array().is_some_and(|f| !f.is_empty())) {
        return Err(format!("{}: {}", bad["kernel"], bad["findings"]).into());
    }
    Ok(launches.clone())
}

/// The pass itself, in the child.
fn pass(shape: &Shape, task: &str) -> Result<()> {
    if task == "step" {
        return step(shape);
    }
    let config = shape.config(BLOCKS)?;
    let weights = ModelWeights::random(&config, 1);
    let model = Model::on(Device::cuda(0, Precision::Bf16), weights, 7, 9, 512)?;
    let mut lora = LoraTensors::init(&config, &[Target::Q, Target::V], RANK, 16.0, 0.05, 1);
    lora.tensors.values_mut().for_each(|p| p.b.iter_mut().enumerate().for_each(|(i, b)| *b = 1e-3 * (i % 7) as f32));
    // No token twice: rows of the embedding that prompts share would pass for rows that are read again.
    let ids: [Vec<u32>; PROMPTS] =
        std::array::from_fn(|p| (0..PROMPT).map(|t| 10 + ((p * PROMPT + t) * 37 % 1000) as u32).collect());
    let slots = [SlotKind::User, SlotKind::Item];
    let slots: Vec<Slot> =
        slots.into_iter().zip(SLOTS).map(|(kind, position)| Slot { position, kind, part: 0 }).collect();
    // Stage 1 is text alone.
    let stage1 = task == "stage1";
    let prompts = ids.each_ref().map(|ids| PromptRef { ids, slots: if stage1 { &[] } else { &slots } });
    let from = if stage1 { GradientFrom::Start } else { GradientFrom::FirstSlot };
    let batch = PackedBatch::new(&prompts, 1, from, 0);
    let vectors = vec![0.01; if stage1 { 0 } else { 2 * PROMPTS * config.hidden_size }];
    let mut workspace = Workspace::default();
    let (mut d_lora, mut d_vectors, mut d_inputs) = (lora.zeros_like(), vec![0.0; vectors.len()], Vec::new());
    let pass = TrainPass {
        lora: Some(&lora),
        dropout: stage1.then_some(Dropout { p: 0.05, seed: 1, step: 1 }),
        batch: &batch,
        vectors: &vectors,
        labels: &[1.0, 0.0],
        weight: 1.0 / STEP as f32,
        loss: Loss::YesLogitBce,
        d_lora: stage1.then_some(&mut d_lora),
        d_vectors: (!stage1).then_some(&mut d_vectors),
        d_inputs: Some(&mut d_inputs),
    };
    model.train_pass(pass, &mut workspace)?;
    Ok(())
}

/// What a step has besides its passes: AdamW over all of LoRA (stage 1); the mapping both ways for users and items, and AdamW
/// over it (stage 2).
fn step(shape: &Shape) -> Result<()> {
    let cuda = Cuda::open(0, Precision::Bf16)?;
    let floats = |n: usize| Buffer::<f32>::zeros(&cuda, n, "a model");
    let kv = shape.heads[1] * 128;
    let per_layer = [RANK * shape.hidden, shape.hidden * RANK, RANK * shape.hidden, kv * RANK];
    let adam = |lengths: &[usize]| -> Result<()> {
        let tensors: Vec<_> = lengths.iter().map(|&n| Ok((floats(n)?, floats(n)?))).collect::<Result<_>>()?;
        let trained: Vec<Trained> = tensors.iter().map(|(w, g)| Trained::new(w, g, 1e-3)).collect();
        let mut optimizer = Optimizer::new(&cuda, Decay::Decoupled, &trained)?;
        optimizer.step(&cuda, Step { lr: 1e-3, scale: 1.0, max_norm: 1.0, zero_gradients: true })?;
        Ok(cuda.synchronize()?)
    };
    adam(&per_layer.repeat(shape.layers))?;
    let widths = Widths { dim: DIM, mid: MID, out: shape.hidden };
    let (n, tensors) = (2 * STEP, widths.lengths().map(floats));
    let [w1, b1, w2, b2] = tensors;
    let (w1, b1, w2, b2) = (w1?, b1?, w2?, b2?);
    let [g1, h1, g2, h2] = widths.lengths().map(floats);
    let (g1, h1, g2, h2) = (g1?, h1?, g2?, h2?);
    let (x, activated, d_activated) = (floats(n * DIM)?, floats(n * MID)?, floats(n * MID)?);
    let (y, d_y) = (floats(n * shape.hidden)?, floats(n * shape.hidden)?);
    let mapping = Mapping::new(&cuda)?;
    let output = Mapped { floats: Some(&y), elements: None };
    mapping.forward(&cuda, widths, [&w1, &b1, &w2, &b2], n, &x, &activated, output)?;
    let (tensors, gradient) = ([&w1, &b1, &w2, &b2], [&g1, &h1, &g2, &h2]);
    mapping.backward(&cuda, widths, tensors, n, &x, &activated, &d_y, gradient, &d_activated, None)?;
    adam(&widths.lengths())
}

fn name(launch: &Value) -> &str {
    launch["kernel"].as_str().unwrap_or_default()
}

fn seconds(launch: &Value, card: &str) -> f64 {
    launch["cards"][card]["seconds"].as_f64().unwrap_or_default()
}

fn number(launch: &Value, path: [&str; 2]) -> f64 {
    launch[path[0]][path[1]].as_f64().unwrap_or_default()
}

fn total(launches: &[Value], card: &str) -> f64 {
    launches.iter().map(|l| seconds(l, card)).sum()
}

/// The launches of the whole block, forward and backward.
///
/// A block's forward begins with the first of its two norms, its backward ends with the second of its two.
fn whole_block(launches: &[Value]) -> Result<[&[Value]; 2]> {
    let places = |kernel: &str| -> Vec<usize> {
        (0..launches.len()).filter(|&i| name(&launches[i]).starts_with(kernel)).collect()
    };
    let (forward, backward) = (places("rms_norm_fwd"), places("rms_norm_bwd"));
    let ([first, _, next, ..], Some([_, last, _, end])) = (&forward[..], backward.get(..2 * BLOCKS)) else {
        return Err("a pass has two norms a block and direction".into());
    };
    Ok([&launches[*first..*next], &launches[last + 1..=*end]])
}

/// Up to and including the head: what scoring is.
fn forward_pass(launches: &[Value]) -> &[Value] {
    let head = launches.iter().position(|l| name(l).starts_with("yes_head"));
    &launches[..head.map_or(launches.len(), |h| h + 1)]
}

/// A tiled product: its operands come through the cache more than once.
fn is_tiled(kernel: &str) -> bool {
    ["gemm", "attention", "mapping", "lora_grad_"].iter().any(|k| kernel.starts_with(k)) && !kernel.contains("_delta")
}

fn describe(shape: &Shape, runs: &BTreeMap<&str, Vec<Value>>, text: &mut String, misses: &mut Misses) -> Result<()> {
    let tokens = PROMPTS * PROMPT;
    writeln!(
        text,
        "### {}: hidden {}, MLP {}, heads {}/{} of 128, {} blocks; {PROMPTS} prompts of {PROMPT} tokens = {tokens} rows\n",
        shape.name, shape.hidden, shape.inter, shape.heads[0], shape.heads[1], shape.layers
    )?;
    let (stage1, stage2, step) = (&runs["stage1"], &runs["stage2"], &runs["step"]);
    writeln!(text, "A block in stage 1, forward and backward, in order:\n")?;
    kernels(&whole_block(stage1)?.concat(), text, misses)?;
    let others: Vec<Value> = stage2.iter().filter(|l| !is_block(name(l))).chain(step).cloned().collect();
    writeln!(text, "\nOutside the blocks (stage 2) and once a step (AdamW over LoRA, the mapping, AdamW over it):\n")?;
    kernels(&others, text, misses)?;

    let mapping = step.iter().position(|l| name(l).starts_with("mapping")).unwrap_or(step.len());
    let (adam, with_mapping) = step.split_at(mapping);
    let (block1, block2) = (whole_block(stage1)?.concat(), whole_block(stage2)?);
    // Scoring keeps nothing for a backward, which is not taken off here.
    let scored = (forward_pass(stage2), block2[0]);
    let block2 = block2.concat();
    writeln!(text, "\n| {} | launches | A100 | H100 |\n|---|---|---|---|", shape.name)?;
    for (what, pass, block, step) in [
        ("stage 1", &stage1[..], &block1[..], adam),
        ("stage 2", &stage2[..], &block2[..], with_mapping),
        ("scoring", scored.0, scored.1, &step[..0]),
    ] {
        let mut line = |what: String, count: usize, times: [f64; 2]| {
            writeln!(text, "| {what} | {count} | {:.3} ms | {:.3} ms |", times[0] * 1e3, times[1] * 1e3)
        };
        let more = shape.layers - BLOCKS;
        let whole = CARDS.map(|card| total(pass, card) + more as f64 * total(block, card));
        let count = pass.len() + more * block.len();
        line(format!("{what}: a block, {PROMPTS} prompts"), block.len(), CARDS.map(|card| total(block, card)))?;
        line(format!("{what}: the model, one sample of {PROMPTS}"), count, whole.map(|t| t / PROMPTS as f64))?;
        if !step.is_empty() {
            let passes = STEP / PROMPTS;
            let all = [0, 1].map(|i| whole[i] * passes as f64 + total(step, CARDS[i]));
            line(format!("{what}: a step of {STEP} samples"), passes * count + step.len(), all)?;
        }
    }
    writeln!(text)?;
    Ok(())
}

/// Kernels that run in blocks.
fn is_block(kernel: &str) -> bool {
    let of_blocks =
        ["gemm", "attention", "rms_norm", "rope", "lora_grad", "lora_d_u", "dropout", "gather", "scatter", "zero"];
    of_blocks.iter().any(|k| kernel.starts_with(k))
}

/// One line for launches of the same kernel, grid and traffic.
fn kernels(launches: &[Value], text: &mut String, misses: &mut Misses) -> Result<()> {
    writeln!(
        text,
        "| kernel | blocks | times | coalesced | conflicts | moved, MB | distinct, MB | moved / distinct | DRAM / distinct | tensor share | A100, us | H100, us |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|---|---|---|---|")?;
    let mut lines: Vec<(String, String, usize)> = Vec::new();
    for l in launches {
        let kernel = name(l).trim_end_matches("_bf16");
        let blocks: u64 = l["grid"].as_array().into_iter().flatten().filter_map(Value::as_u64).product();
        let sectors = number(l, ["global_loads", "sectors"]) + number(l, ["global_stores", "sectors"]);
        let (moved, asked) =
            (sectors * 32.0, number(l, ["global_loads", "bytes"]) + number(l, ["global_stores", "bytes"]));
        let distinct = number(l, ["distinct_bytes", "read"]) + number(l, ["distinct_bytes", "written"]);
        // Lanes that share bytes ask for more than is moved.
        let coalesced = (100.0 * asked / moved.max(1.0)).min(100.0);
        let conflicts = number(l, ["shared", "conflict_passes"]);
        let passes = number(l, ["shared", "passes"]);
        let ratio = moved / distinct.max(1.0);
        let memory = number(l, ["memory_bytes", "read"]) + number(l, ["memory_bytes", "written"]);
        let memory_ratio = memory / distinct.max(1.0);
        let share = 100.0 * number(l, ["main_loop", "tensor_warps"]) / number(l, ["main_loop", "warps"]).max(1.0);
        let tensor = if share > 0.0 { format!("{share:.0} %") } else { String::new() };
        let conflicts =
            if conflicts > 0.0 { format!("{conflicts} ({:.1} %)", 100.0 * conflicts / passes) } else { "0".to_owned() };
        let time = |card: &str| {
            let bound = l["cards"][card]["bound"].as_str().unwrap_or_default();
            format!("{:.1} ({bound})", seconds(l, card) * 1e6)
        };
        let line = format!(
            "{coalesced:.0} % | {conflicts} | {:.2} | {:.2} | {ratio:.2} | {memory_ratio:.2} | {tensor} | {} | {} |",
            moved / 1e6,
            distinct / 1e6,
            time("A100"),
            time("H100")
        );
        let head = format!("| {kernel} | {blocks} |");
        match lines.iter_mut().find(|(h, rest, _)| *h == head && *rest == line) {
            Some((.., times)) => *times += 1,
            None => {
                lines.push((head, line, 1));
                let mut miss = |goal, figure: f64, is: &'static str| {
                    let worst = misses.entry((kernel.to_owned(), goal)).or_insert((figure, is));
                    // Of ratios the largest is the worst, of shares the smallest.
                    worst.0 = if is.contains("times") { worst.0.max(figure) } else { worst.0.min(figure) };
                };
                if coalesced < 94.5 {
                    miss("95 % coalesced", coalesced / 100.0, "a share");
                }
                if !is_tiled(kernel) && ratio > 1.15 {
                    miss("moves 1.15 times its distinct bytes between multiprocessors and L2", ratio, "times");
                }
                if memory_ratio > 1.15 {
                    miss("moves 1.15 times its distinct bytes from and to memory", memory_ratio, "times");
                }
                if number(l, ["shared", "conflict_passes"]) > 0.01 * passes {
                    let part =
                        number(l, ["shared", "conflict_passes"]) / (passes - number(l, ["shared", "conflict_passes"]));
                    miss("no bank conflicts", 1.0 + part, "times the passes needed");
                }
                if kernel.starts_with("gemm") && share < 49.5 {
                    miss("half of the main loop's PTX instructions tensor ones", share / 100.0, "a share");
                }
            }
        }
    }
    for (head, line, times) in lines {
        writeln!(text, "{head} {times} | {line}")?;
    }
    Ok(())
}
