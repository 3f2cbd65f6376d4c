//! Whole passes and training on the emulated card against the CPU: every LoRA target, dropout, both losses, both starts of the
//! gradient; recomputation, micro-batches and runs that end in the same bits.

use std::path::{Path, PathBuf};

use crate::common::{command, path, tiny_data, tiny_model};
use crate::cuda::{link_emulator, load_emulator};
use crate::model::{
    LABELS, Prompts, adapter, all, close, dropped_once, pass, pass_in, same, shared_and_not, vectors, weights,
};
use collm_engine::checkpoint::{Tensor, read_tensors};
use collm_engine::cie::Mapping;
use collm_engine::device::Device;
use collm_engine::device::cpu::optimizer::Adam;
use collm_engine::device::cuda::Precision;
use collm_engine::device::ops::{Dropout, Loss};
use collm_engine::llm::batch::{GradientFrom, PackedBatch};
use collm_engine::llm::cuda::{Demand, MicroBatch, Rules, Training};
use collm_engine::llm::model::{Model, Workspace};
use collm_engine::llm::peft::LoraTensors;
use collm_engine::rng::Rng;
use tempfile::TempDir;

pub fn on_card(precision: Precision) -> Model {
    load_emulator();
    Model::on(Device::cuda(0, precision), weights(16), 7, 9, 64).unwrap()
}

#[test]
fn passes_agree_with_the_cpu() {
    let (cpu, card, vectors) = (Model::new(weights(16), 7, 9, 64), on_card(Precision::F32), vectors());
    let lora = adapter(&cpu);
    let mut workspace = Workspace::default();
    for (loss, dropout, from) in [
        (Loss::YesLogitBce, None, GradientFrom::Start),
        (Loss::YesNoSoftmax, None, GradientFrom::FirstSlot),
        (Loss::YesLogitBce, Some(Dropout { p: 0.3, seed: 2, step: 5 }), GradientFrom::Start),
        (Loss::YesNoSoftmax, Some(Dropout { p: 0.3, seed: 2, step: 6 }), GradientFrom::FirstSlot),
    ] {
        let want = pass(&cpu, &lora, &vectors, loss, dropout, from, &all());
        let got = pass_in(&mut workspace, &card, &lora, &vectors, loss, dropout, from, &all());
        let case = format!("{loss:?} {dropout:?} {from:?}");
        assert!((got.0 - want.0).abs() < 1e-5 * want.0.abs(), "{case}: loss {} and {}", got.0, want.0);
        close(&got.2, &want.2, 1e-4, &format!("{case}: d_vectors"));
        for ((name, g), (_, w)) in got.1.named().into_iter().zip(want.1.named()) {
            close(g, w, 1e-4, &format!("{case}: {name}"));
        }
    }
}

#[test]
fn sharing_changes_no_score_and_no_gradient() {
    let card = on_card(Precision::F32);
    let lora = adapter(&card);
    for from in [GradientFrom::Start, GradientFrom::FirstSlot] {
        let [apart, shared] = shared_and_not(&card, &lora, from);
        same(&shared, &apart, &format!("{from:?}"));
    }
}

#[test]
fn a_shared_token_is_dropped_once_however_the_step_is_cut() {
    let card = on_card(Precision::F32);
    let [whole, shared, cut] = dropped_once(&card, &adapter(&card));
    same(&shared, &whole, "shared");
    same(&cut, &whole, "cut within a group");
}

#[test]
fn the_same_bits_recomputed_and_repeated() {
    let (card, vectors) = (on_card(Precision::Bf16), vectors());
    let lora = adapter(&card);
    let dropout = Some(Dropout { p: 0.3, seed: 2, step: 5 });
    let run =
        |w: &mut Workspace| pass_in(w, &card, &lora, &vectors, Loss::YesLogitBce, dropout, GradientFrom::Start, &all());
    let mut workspace = Workspace::default();
    let want = run(&mut workspace);
    assert_eq!(run(&mut workspace), want, "a second pass in the same buffers");
    let mut recomputing = Workspace::default();
    recomputing.recompute_blocks(&card).unwrap();
    assert_eq!(run(&mut recomputing), want, "blocks recomputed");
    // Prompts apart: the sums of the gradients are taken in another order, the vectors' gradients are not.
    let apart = pass(&card, &lora, &vectors, Loss::YesLogitBce, dropout, GradientFrom::Start, &[0..1, 1..3, 3..4]);
    assert_eq!(apart.2, want.2, "batch mates change a prompt's gradient");
}

#[test]
fn the_memory_plan_covers_what_is_allocated() {
    let card = on_card(Precision::Bf16);
    let lora = adapter(&card);
    let mut workspace = Workspace::default();
    let tokens = 13 + 7 + 21 + 3;
    let demand = Demand { lora: Some(&lora), tokens, prompts: 4, dropout: true, vectors: 2, ..Demand::default() };
    let plan = card.cuda_plan(&demand).unwrap().unwrap();
    let line = plan.to_string();
    assert!(line.contains("to allocate") && !line.contains("recomputed"), "{line}");
    let before = card.cuda_allocated();
    let dropout = Some(Dropout { p: 0.3, seed: 2, step: 5 });
    pass_in(&mut workspace, &card, &lora, &vectors(), Loss::YesLogitBce, dropout, GradientFrom::Start, &all());
    let used = card.cuda_allocated() - before;
    // Verification's passes are not filled up to 128 rows.
    assert!(used <= plan.needed(), "{used} bytes allocated, {} planned", plan.needed());
    assert!(5 * used >= plan.needed(), "{used} bytes allocated, {} planned", plan.needed());
}

/// What a stage learns, and where it begins.
pub type Learned = (LoraTensors, Mapping, Adam);

pub const DIM: usize = 8;

fn training<'a>(card: &'a Model, from: &Learned, lora: bool) -> Training<'a> {
    let demand = Demand {
        tokens: 64,
        prompts: 4,
        frozen: true,
        dropout: true,
        score_tokens: 64,
        score_prompts: 4,
        ..Demand::default()
    };
    let rules = Rules { lora, cie: true, weight_decay: 1e-2, max_norm: 1.0, loss: Loss::YesLogitBce };
    card.training(&demand, &from.0, Some(&from.1), rules).unwrap().unwrap().0
}

/// One optimizer step over all prompts, in the given micro-batches. The third prompt has no slots: nobody reads its vectors.
fn step(training: &mut Training, number: u64, runs: &[std::ops::Range<usize>], from: GradientFrom) -> (f64, f64) {
    let mut rng = Rng::new(3, number);
    let x: Vec<f32> = (0..4 * 2 * DIM).map(|_| rng.normal() as f32).collect();
    let prompts = Prompts::new();
    let mut refs = prompts.refs();
    refs[2].slots = &[];
    training.begin_step(4).unwrap();
    for run in runs {
        let batch = PackedBatch::new(&refs[run.clone()], 1, from, run.start);
        let x = &x[run.start * 2 * DIM..run.end * 2 * DIM];
        let dropout = Some(Dropout { p: 0.3, seed: 2, step: number });
        let labels = &LABELS[run.clone()];
        training.micro_batch(MicroBatch { batch: &batch, x, labels, weight: 0.25, dropout }, None).unwrap();
    }
    training.finish_step(1e-2).unwrap()
}

pub fn learned(training: &Training, like: &Learned) -> Learned {
    let mut learned = like.clone();
    training.read(&mut learned.0, Some(&mut learned.1)).unwrap();
    learned.2 = training.adam().unwrap();
    learned
}

pub fn begin(card: &Model) -> Learned {
    let hidden = card.config().hidden_size;
    let adam = Adam::new(collm_engine::device::cpu::optimizer::Decay::Decoupled, []);
    (adapter(card), Mapping::init(DIM, 16, hidden, 1), adam)
}

#[test]
fn a_stage_on_the_card_resumes_in_the_same_bits() {
    let card = on_card(Precision::Bf16);
    let start = begin(&card);
    for (lora, from) in [(true, GradientFrom::Start), (false, GradientFrom::FirstSlot)] {
        let mut whole = training(&card, &start, lora);
        let reports: Vec<_> = (0..3).map(|s| step(&mut whole, s, &[0..2, 2..4], from)).collect();
        let mut first = training(&card, &start, lora);
        assert_eq!(step(&mut first, 0, &[0..2, 2..4], from), reports[0]);
        let saved = learned(&first, &start);
        assert_eq!(saved.2.step, 1);
        assert_eq!(saved.0 != start.0, lora, "the adapter is trained only if it should be");
        let mut second = training(&card, &start, lora);
        second.restore(&saved.0, Some(&saved.1), &saved.2).unwrap();
        assert_eq!([1, 2].map(|s| step(&mut second, s, &[0..2, 2..4], from)), reports[1..]);
        let (got, want) = (learned(&second, &start), learned(&whole, &start));
        assert!(got == want, "resumed: lora {}, tensors or moments differ", lora);
        assert!(want.1 != saved.1, "it goes on learning");
    }
}

#[test]
fn gradients_accumulate_over_micro_batches() {
    let card = on_card(Precision::F32);
    let start = begin(&card);
    let whole = all();
    let runs: [&[_]; 3] = [&whole, &[0..1, 1..2, 2..3, 3..4], &[0..3, 3..4]];
    let ends = runs.map(|runs| {
        let mut training = training(&card, &start, true);
        let reports = [0, 1].map(|s| step(&mut training, s, runs, GradientFrom::Start));
        (reports, learned(&training, &start))
    });
    for (reports, (_, _, adam)) in &ends[1..] {
        for (got, want) in reports.iter().zip(&ends[0].0) {
            assert!((got.0 - want.0).abs() < 1e-6 * want.0.abs(), "loss {got:?}, in one piece {want:?}");
            assert!((got.1 - want.1).abs() < 1e-5 * want.1.abs(), "norm {got:?}, in one piece {want:?}");
        }
        // First moments are sums of the steps' gradients.
        for (got, want) in adam.m.iter().zip(&ends[0].1.2.m) {
            close(got, want, 1e-4, "first moments");
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let card = on_card(Precision::F32);
    let mut start = begin(&card);
    let mut training = training(&card, &start, true);
    step(&mut training, 0, &all(), GradientFrom::Start);
    let before = learned(&training, &start);
    start.1.tensors[3][0] = f32::NAN;
    training.restore(&before.0, Some(&start.1), &before.2).unwrap();
    let (loss, norm) = step(&mut training, 1, &all(), GradientFrom::Start);
    assert!(!loss.is_finite() && !norm.is_finite(), "loss {loss}, norm {norm}");
    let after = learned(&training, &start);
    assert!(after.0 == before.0 && after.2.m == before.2.m && after.2.v == before.2.v);
}

/// (loss, AUC…) of every line of a run's metrics.
pub fn losses(run: &Path, phase: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
    lines.filter(|l| l["phase"] == phase).filter_map(|l| l["loss"].as_f64()).collect()
}

/// Trains on tiny data with `train --device`, the emulator being the driver, and returns where the run lies. `rows` of a batch,
/// `steps` a stage, `mf_epochs`, `valid_rows`. The checks are off for time's sake: the same kernels run checked in the other tests.
pub struct Tiny {
    pub dir: TempDir,
    data: PathBuf,
    model: PathBuf,
    settings: Vec<String>,
}

impl Tiny {
    pub fn new(rows: usize, steps: usize, mf_epochs: usize, valid_rows: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
        link_emulator(dir.path());
        let mut settings = vec![
            "prompt.style.max_history=2".to_owned(),
            "prompt.style.max_tokens=512".to_owned(),
            "collab.mf.dim=8".to_owned(),
            format!("collab.mf.max_epochs={mf_epochs}"),
            format!("eval.valid_rows={valid_rows}"),
        ];
        for stage in ["stage1", "stage2"] {
            settings.push(format!("{stage}.batch_rows={rows}"));
            settings.push(format!("{stage}.steps_per_epoch={steps}"));
            settings.push(format!("{stage}.max_epochs=1"));
            settings.push(format!("{stage}.group=shuffle-groups"));
        }
        Tiny { dir, data, model, settings }
    }

    pub fn train(&self, name: &str, device: &str, environment: &[(&str, &str)]) -> PathBuf {
        let out = self.try_train(name, device, environment);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        self.dir.path().join(name)
    }

    /// As [`Self::train`], whatever becomes of it.
    pub fn try_train(&self, name: &str, device: &str, environment: &[(&str, &str)]) -> std::process::Output {
        let run = self.dir.path().join(name);
        let mut args = vec!["train", "--data", path(&self.data), "--llm", path(&self.model), "--run", path(&run)];
        args.extend(["--device", device, "--no-test"]);
        self.settings.iter().for_each(|s| args.extend(["--set", s]));
        let mut command = command(&args);
        command.env("LD_LIBRARY_PATH", self.dir.path()).env("CUEMU_CHECK", "off").envs(environment.iter().copied());
        command.output().unwrap()
    }
}

#[test]
fn training_follows_the_cpu() {
    let tiny = Tiny::new(4, 10, 20, 4);
    let train = |device: &str| losses(&tiny.train(&device.replace(':', "-"), device, &[]), "train");
    let cpu = train("cpu");
    assert!(cpu.len() >= 20, "{cpu:?}");
    for (device, limit) in [("cuda:0:f32", 1e-4), ("cuda", 3e-2)] {
        for (step, (got, want)) in train(device).iter().zip(&cpu).enumerate() {
            assert!(
                (got - want).abs() <= limit * want.abs().max(0.1),
                "{device}, line {step}: {got}, on the CPU {want}"
            );
        }
    }
}

/// Gradients come back from the card into the tables: a tuned collaborative model and free tokens learn as on the CPU.
#[test]
fn what_fills_the_slots_is_tuned_as_on_the_cpu() {
    let mut tiny = Tiny::new(4, 3, 2, 4);
    tiny.settings.extend(["stage2.warmup_lr=0.001".to_owned(), String::new()]);
    for (name, settings) in [("t1", "strategy=t1"), ("ui", "method=ui-token")] {
        *tiny.settings.last_mut().unwrap() = settings.to_owned();
        if name == "ui" {
            tiny.settings.push("stage2.train_lora=true".to_owned());
        }
        let train = |device: &str| {
            let run = tiny.train(&format!("{name}-{}", device.replace(':', "-")), device, &[]);
            let last = read_tensors(&run.join("stage2/checkpoints/last/optimizer.safetensors")).unwrap().0;
            (losses(&run, "train"), last)
        };
        let (cpu, card) = (train("cpu"), train("cuda:0:f32"));
        for (got, want) in card.0.iter().zip(&cpu.0) {
            assert!((got - want).abs() <= 1e-4 * want.abs().max(0.1), "{name}: loss {got}, on the CPU {want}");
        }
        // Adam's first moments are sums of the steps' gradients; its steps are not, where a gradient is nearly zero.
        let moments =
            |tensors: &[Tensor]| tensors.iter().filter(|t| t.name.starts_with("rec_m")).cloned().collect::<Vec<_>>();
        let (card, cpu) = (moments(&card.1), moments(&cpu.1));
        assert_eq!((card.len(), cpu.len()), (2, 2));
        for (got, want) in card.iter().zip(&cpu) {
            let largest = want.values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let off = got.values.iter().zip(&want.values).fold(0.0f32, |m, (g, w)| m.max((g - w).abs()));
            assert!(largest > 0.0 && off <= 1e-3 * largest, "{name}, {}: off by {off:e} of {largest:e}", got.name);
        }
    }
}

/// What a run writes does not depend on the order of blocks and warps, on the moment at which copies land, or on the host's threads.
#[test]
fn the_same_bits_in_any_order_of_blocks() {
    let tiny = Tiny::new(3, 2, 2, 2);
    let train = |name: &str, environment: &[(&str, &str)]| {
        let run = tiny.train(name, "cuda", environment);
        let files = ["collab/mf.safetensors", "adapter/adapter_model.safetensors", "cie.safetensors"];
        let tensors: Vec<_> = files.iter().map(|f| read_tensors(&run.join(f)).unwrap().0).collect();
        (losses(&run, "train"), tensors)
    };
    let want = train("in-order", &[]);
    assert_eq!(want.0.len(), 4);
    for (name, environment) in [
        ("permuted", &[("CUEMU_SEED", "7")][..]),
        ("permuted-eager", &[("CUEMU_SEED", "3"), ("CUEMU_COPIES", "eager")]),
        ("one-thread", &[("CUEMU_THREADS", "1")]),
    ] {
        let got = train(name, environment);
        assert_eq!(got.0, want.0, "{name}: losses");
        assert!(got.1 == want.1, "{name}: tensors");
    }
}
