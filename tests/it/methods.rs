//! Methods and strategies end to end on tiny data: what each trains, that it resumes, scores and is judged; and the gradient of the
//! loss from the LLM's answer back into the collaborative model's tables.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use crate::common::{command, fails, ok, path, run, tiny_data, tiny_model};
use crate::model::{LABELS, Prompts, adapter, weights};
use collm_engine::checkpoint::{Tensor, read_tensors};
use collm_engine::cie::Mapping;
use collm_engine::collab::CollabConfig;
use collm_engine::collab::slots::Tuned;
use collm_engine::data::{Dataset, Samples};
use collm_engine::device::ops::Loss;
use collm_engine::llm::batch::{GradientFrom, PackedBatch};
use collm_engine::llm::model::{Model, TrainPass, Workspace};
use collm_engine::rng::Rng;

const DIM: usize = 8;

/// Twelve users, nine items.
fn dataset() -> Dataset {
    let mut rng = Rng::new(2, 2);
    let mut split = |n: i64| {
        let mut s = Samples::empty();
        for i in 0..n {
            s.push(i, 1 + rng.below(12), 1 + rng.below(9), rng.below(2) as u8, i, &[]);
        }
        s
    };
    let (train, valid, test) = (split(60), split(10), split(10));
    let titles = Arc::new(vec![String::new(); 10]);
    let (n_users, n_items, fingerprint) = (13, 10, "twelve".into());
    Dataset { valid_small: valid.clone(), train, valid, test, titles, n_users, n_items, fingerprint }
}

/// The mean loss of four rows, through slots, mapping and LLM; with the gradients of the tuned model where they are asked for.
fn loss(model: &Model, cie: &Mapping, tuned: &mut dyn Tuned, data: &Dataset, backward: bool) -> f64 {
    let (prompts, rows, lora) = (Prompts::new(), [5, 17, 33, 48], adapter(model));
    let x = tuned.slots(&data.train, &rows, 0);
    let pass = cie.forward(&x);
    let batch = PackedBatch::new(&prompts.refs(), 1, GradientFrom::FirstSlot, 0);
    let mut d_vectors = vec![0.0; pass.output.len()];
    let train = TrainPass {
        lora: Some(&lora),
        dropout: None,
        batch: &batch,
        vectors: &pass.output,
        labels: &LABELS,
        weight: 0.25,
        loss: Loss::YesLogitBce,
        d_lora: None,
        d_vectors: Some(&mut d_vectors),
        d_inputs: None,
    };
    let total = model.train_pass(train, &mut Workspace::default()).unwrap().1 * 0.25;
    if backward {
        let mut gradient = Mapping::zeros(cie.dim, cie.mid, cie.out);
        let d_x = cie.backward(&x, &pass, &d_vectors, &mut gradient);
        tuned.backward(&data.train, &rows, 0, &d_x);
    }
    total
}

/// Along the gradient of a table, the loss changes as fast as the gradient is long.
#[test]
fn gradients_reach_the_tables_through_mapping_and_llm() {
    let (model, data) = (Model::new(weights(10), 7, 9, 64), dataset());
    let mut config = CollabConfig::default();
    (config.mf.dim, config.lightgcn.dim) = (DIM, DIM);
    let mut cie = Mapping::init(DIM, 3 * DIM, 40, 4);
    // A fresh mapping is so flat that float32 sees nothing of a small step.
    cie.tensors.iter_mut().for_each(|t| t.iter_mut().for_each(|w| *w *= 3.0));
    for name in ["mf", "lightgcn"] {
        config.model = name.into();
        let mut tuned = config.tuned(&data, None).unwrap();
        // LightGCN begins with tables a tenth as large.
        let scale = if name == "mf" { 1.0 } else { 10.0 };
        tuned.values_mut().into_iter().flatten().for_each(|w| *w *= scale);
        loss(&model, &cie, &mut *tuned, &data, true);
        let gradients: Vec<Vec<f32>> = tuned.trained_mut().into_iter().map(|t| t.1.to_vec()).collect();
        for (i, g) in gradients.iter().enumerate() {
            let length = g.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            assert!(length > 1e-4, "{name}, table {i}: no gradient at all");
            let step = (1e-3 / length).min(0.02);
            let mut moved = |by: f64| {
                let before = tuned.values_mut()[i].to_vec();
                let shifted = before.iter().zip(g).map(|(&w, &g)| w + (by * f64::from(g) / length) as f32);
                tuned.values_mut()[i].iter_mut().zip(shifted).for_each(|(to, w)| *to = w);
                let l = loss(&model, &cie, &mut *tuned, &data, false);
                tuned.values_mut()[i].copy_from_slice(&before);
                l
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope / length - 1.0).abs() < 0.02, "{name}, table {i}: slope {slope:e}, gradient {length:e}");
        }
    }
}

const SETTINGS: [&str; 16] = [
    "prompt.style.max_history=2",
    "prompt.style.max_tokens=512",
    "collab.mf.dim=8",
    "collab.mf.learning_rate=0.05",
    "collab.mf.max_epochs=20",
    "collab.mf.min_epochs=5",
    "collab.lightgcn.dim=8",
    "collab.lightgcn.max_epochs=5",
    "stage1.batch_rows=4",
    "stage1.steps_per_epoch=2",
    "stage1.max_epochs=1",
    "stage2.batch_rows=4",
    "stage2.steps_per_epoch=3",
    "stage2.warmup_lr=0.001",
    "checkpoint.every_steps=2",
    "eval.valid_rows=12",
];

struct Tiny {
    dir: tempfile::TempDir,
    data: PathBuf,
    model: PathBuf,
}

impl Tiny {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (data, model) = (tiny_data(dir.path()), tiny_model(dir.path()));
        Tiny { dir, data, model }
    }

    fn args<'a>(&'a self, run: &'a Path, extra: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["train", "--data", path(&self.data), "--llm", path(&self.model), "--run", path(run)];
        for setting in SETTINGS.iter().chain(&["stage2.max_epochs=2", "eval.test_rows=20"]) {
            args.extend(["--set", setting]);
        }
        args.extend(extra);
        args
    }

    /// Trains; the run, what was printed, what was told.
    fn train(&self, name: &str, extra: &[&str]) -> (PathBuf, String, String) {
        let dir = self.dir.path().join(name);
        let out = run(&self.args(&dir, extra));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let (stdout, stderr) = (text(out.stdout), text(out.stderr));
        assert!(out.status.success(), "{name}: {stderr}");
        (dir, stdout, stderr)
    }
}

fn tensors(file: PathBuf) -> Vec<Tensor> {
    read_tensors(&file).unwrap().0
}

fn named<'t>(tensors: &'t [Tensor], name: &str) -> Option<&'t Tensor> {
    tensors.iter().find(|t| t.name.ends_with(name))
}

fn stage2(run: &Path, which: &str) -> Vec<Tensor> {
    tensors(run.join("stage2/checkpoints").join(which).join("model.safetensors"))
}

#[test]
fn strategies_train_what_they_say() {
    let tiny = Tiny::new();
    let score = |run: &Path| ok(&["score", "--run", path(run), "--split", "test", "--out", "-"]);

    let (plain, table, told) = tiny.train("default", &[]);
    assert!(table.contains("| MF |") && table.contains("| TALLRec (stage 1) |") && table.contains("| CoLLM-MF |"));
    let line = |told: &str, start: &str| {
        told.lines().find(|l| l.contains(start)).unwrap_or_else(|| panic!("{told}")).to_string()
    };
    assert!(line(&told, "stage1:   LLM").ends_with("frozen"));
    assert!(line(&told, "stage1:   adapter").contains("trained, learning rate up to 0.001, weight decay 0.001"));
    assert!(
        line(&told, "stage2:   adapter").ends_with("frozen")
            && line(&told, "stage2:   MF").ends_with("448 parameters  frozen")
    );
    assert!(line(&told, "stage2:   mapping").ends_with("weight decay 0.001 (biases: 0)"));
    assert!(named(&stage2(&plain, "best"), "user_embedding.weight").is_none());

    for (model, file) in [("mf", "user_embedding.weight"), ("lightgcn", "embedding_user.weight")] {
        let choice = format!("collab.model={model}");
        let (t1, table, told) = tiny.train(&format!("{model}-t1"), &["--set", &choice, "--set", "strategy=t1"]);
        assert!(table.contains("(T1) |") && told.contains("448 parameters  trained"), "{table}{told}");
        let pretrained = tensors(t1.join(format!("collab/{model}.safetensors")));
        let (before, after) = (named(&pretrained, file).unwrap(), stage2(&t1, "last"));
        let after = named(&after, file).unwrap();
        assert_eq!(after.name, format!("rec_encoder.{file}"));
        let moved = after.values.iter().zip(&before.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Six steps of a learning rate up to .001.
        assert!(moved > 5e-4 && moved < 8e-3, "{model}: moved by {moved}");
        assert!(named(&stage2(&t1, "best"), file).is_some());
        // What is judged and scored is the best checkpoint's model.
        let csv = tiny.dir.path().join("scores.csv");
        std::fs::write(&csv, score(&t1)).unwrap();
        let scores = std::fs::read_to_string(&csv).unwrap();
        assert!(scores.lines().skip(1).all(|l| l.rsplit(',').next().unwrap().parse::<f32>().unwrap().is_finite()));
        let text = std::fs::read_to_string(t1.join("config.toml")).unwrap();
        std::fs::write(t1.join("config.toml"), text.replace("strategy = \"t1\"", "strategy = \"default\"")).unwrap();
        assert_ne!(score(&t1), scores, "{model}: the pretrained model scores otherwise than the tuned one");
    }

    let (t2, table, _) = tiny.train("t2", &["--set", "strategy=t2"]);
    assert!(!t2.join("collab").exists() && !table.contains("| MF |") && table.contains("| CoLLM-MF (T2) |"), "{table}");
    assert!(named(&stage2(&t2, "best"), "item_embedding.weight").is_some());

    let (t3, table, told) = tiny.train("t3", &["--set", "strategy=t3"]);
    assert!(
        !t3.join("stage1").exists() && !table.contains("TALLRec") && table.contains("| CoLLM-MF (T3) |"),
        "{table}"
    );
    assert!(line(&told, "stage2:   adapter").contains("trained") && line(&told, "stage2:   MF").ends_with("frozen"));
    let last = stage2(&t3, "last");
    assert!(last.iter().filter(|t| t.name.contains("lora_B")).all(|t| t.values.iter().any(|&x| x != 0.0)));
    assert!(named(&last, "user_embedding.weight").is_none());
}

/// Killed in stage 2, resumed: model, moments and results are those of a run that was not.
#[test]
fn a_tuned_model_resumes_in_the_same_bits() {
    let tiny = Tiny::new();
    let settings = ["--set", "collab.model=lightgcn", "--set", "strategy=t1", "--no-test"];
    let (whole, ..) = tiny.train("whole", &settings);
    let killed = tiny.dir.path().join("killed");
    let mut child =
        command(&tiny.args(&killed, &settings)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let last = killed.join("stage2/checkpoints/last/state.json");
    while !last.exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (killed, ..) = tiny.train("killed", &[&settings[..], &["--resume"]].concat());
    for which in ["best", "last"] {
        assert!(stage2(&killed, which) == stage2(&whole, which), "{which}");
    }
    let moments = |run: &Path| tensors(run.join("stage2/checkpoints/last/optimizer.safetensors"));
    assert!(moments(&whole).iter().any(|t| t.name == "rec_v1") && moments(&killed) == moments(&whole));
}

#[test]
fn other_methods_train_and_are_judged() {
    let tiny = Tiny::new();
    let (tallrec, table, _) = tiny.train("tallrec", &["--set", "method=tallrec"]);
    assert!(table.contains("| TALLRec (stage 1) |") && !table.contains("| MF |"), "{table}");
    assert!(!tallrec.join("stage2").exists() && !tallrec.join("collab").exists());

    let (icl, table, _) = tiny.train("icl", &["--set", "method=icl"]);
    assert!(table.contains("| ICL |") && !icl.join("stage1").exists(), "{table}");
    let scored = |run: &Path| ok(&["score", "--run", path(run), "--split", "test", "--stage", "stage1", "--out", "-"]);
    assert_eq!(scored(&icl).lines().count(), scored(&tallrec).lines().count());
    assert_ne!(scored(&icl), scored(&tallrec));

    // Two answered examples make it another prompt; a short template leaves room for them.
    let short = tiny.dir.path().join("short.txt");
    std::fs::write(&short, "<ItemTitleList> and <TargetItemTitle>?\n").unwrap();
    let short = format!("prompt.stage1={}", path(&short));
    let asked = ["0", "2"].map(|n| {
        let examples = format!("prompt.examples={n}");
        let (run, table, _) =
            tiny.train(&format!("icl-{n}"), &["--set", "method=icl", "--set", &short, "--set", &examples]);
        assert!(table.contains("| ICL |"), "{table}");
        scored(&run)
    });
    assert_ne!(asked[0], asked[1]);

    let (tokens, table, told) = tiny.train("ui-token", &["--set", "method=ui-token"]);
    assert!(table.contains("| w/ UI-token |") && told.contains("user and item tokens"), "{table}{told}");
    let last = stage2(&tokens, "last");
    assert_eq!(named(&last, "rec_encoder.user_tokens").unwrap().shape[0], 25);
    assert!(named(&last, "llama_proj.0.weight").is_none());

    let soft = ["--set", "method=prompt4nr", "--set", "strategy=t3", "--set", "prompt.stage2=softprompt"];
    let soft = [&soft[..], &["--set", "prompt.style.tokens_per_vector=3"]].concat();
    let (soft, table, told) = tiny.train("prompt4nr", &soft);
    assert!(table.contains("| Prompt4NR |") && told.contains("soft tokens"), "{table}{told}");
    let hidden = named(&last, "user_tokens").unwrap().shape[1];
    let last = stage2(&soft, "last");
    assert_eq!(named(&last, "user_tokens").unwrap().shape, [1, 3 * hidden]);
    assert!(last.iter().filter(|t| t.name.contains("lora_B")).all(|t| t.values.iter().any(|&x| x != 0.0)));
    let csv = ok(&["score", "--run", path(&soft), "--split", "test", "--out", "-"]);
    assert!(csv.lines().count() > 20);

    let refused = fails(&tiny.args(&tiny.dir.path().join("x"), &["--set", "method=icl", "--set", "strategy=t1"]));
    assert!(refused.contains("strategy is t1, which method icl does not have; set it to default"), "{refused}");
}

#[test]
fn ensembles_are_judged_beside_their_parts() {
    let tiny = Tiny::new();
    let (dir, table, _) = tiny.train("run", &[]);
    assert!(!table.contains('+'));
    let table = ok(&["eval", "--run", path(&dir), "--ensemble"]);
    for name in ["| MF |", "| CoLLM-MF |", "| MF + TALLRec (stage 1) |", "| MF + CoLLM-MF |"] {
        assert!(table.contains(name), "{name}: {table}");
    }
}
