//! Passes as graphs on the emulated card: the same bits as kernel by kernel, in all sizes of batches; how many graphs there are; and
//! the memory that is planned for them and for the rest.

use std::ops::Range;

use crate::cuda_model::{DIM, Learned, Tiny, begin, learned, losses, on_card};
use crate::model::{HIDDEN, LABELS, Prompts, adapter, all, vectors};
use collm_engine::checkpoint::read_tensors;
use collm_engine::device::cuda::Precision;
use collm_engine::device::ops::{Dropout, Loss};
use collm_engine::llm::batch::{GradientFrom, PackedBatch};
use collm_engine::llm::cuda::{Counts, Demand, MicroBatch, Plan, Rules, Training};
use collm_engine::llm::model::{Model, TrainPass, Workspace};
use collm_engine::prompt::PromptRef;
use collm_engine::rng::Rng;

/// `n` prompts: the four of [`Prompts`] again and again, cut to other lengths. The third has no slots.
fn prompts(of: &Prompts, n: usize) -> Vec<PromptRef<'_>> {
    let four = of.refs();
    let mut all: Vec<_> = (0..n).map(|i| four[i % 4]).collect();
    for (i, prompt) in all.iter_mut().enumerate() {
        if i % 4 == 2 {
            let len = prompt.ids.len() - i % 7;
            *prompt = PromptRef { ids: &prompt.ids[..len], slots: &[] };
        }
    }
    all
}

#[test]
fn scores_as_graphs_have_the_same_bits() {
    let of = Prompts::new();
    let batches = [1..3, 0..4, 0..20, 2..40, 0..9];
    let run = |graphs: bool| {
        let mut card = on_card(Precision::Bf16);
        card.use_graphs(graphs);
        let (lora, mut workspace) = (adapter(&card), Workspace::default());
        let refs = prompts(&of, 40);
        let vectors: Vec<f32> = vectors().into_iter().cycle().take(40 * 2 * HIDDEN).collect();
        let mut scores = Vec::new();
        for round in 0..4 {
            for run in &batches {
                // Other prompts of the same lengths come next.
                let shifted = &refs[run.start..run.end];
                let batch = PackedBatch::new(shifted, 1, GradientFrom::Start, 0);
                let v = &vectors[round * HIDDEN..];
                scores.push(card.scores(Some(&lora), &batch, v, Loss::YesLogitBce, &mut workspace).unwrap());
            }
        }
        (scores, workspace.cuda_counts())
    };
    let ((want, plain), (got, counts)) = (run(false), run(true));
    assert!(want.iter().zip(&batches).all(|(s, run)| s.len() == run.len()));
    assert_ne!(want[0], want[batches.len()], "the vectors are others");
    assert!(got == want, "graphs change scores");
    assert_eq!(plain, Counts::default());
    // Four shapes, the first two batches having one. Buffers grow with the first, third and fourth batch, which drops the graph that
    // the second made. The first, fourth and fifth batch's shapes become graphs in the second round, the third's in the third.
    assert_eq!(counts, Counts { plain: 6, made: 5, replayed: 14 });
}

const RULES: Rules = Rules { lora: true, cie: true, weight_decay: 1e-2, max_norm: 1.0, loss: Loss::YesLogitBce };

fn sizes() -> Demand<'static> {
    Demand {
        tokens: 240,
        prompts: 24,
        frozen: true,
        dropout: true,
        score_tokens: 400,
        score_prompts: 32,
        ..Demand::default()
    }
}

fn train<'a>(card: &'a Model, start: &Learned, rules: Rules) -> (Training<'a>, Plan) {
    card.training(&sizes(), &start.0, Some(&start.1), rules).unwrap().unwrap()
}

/// An optimizer step over `n` prompts in the given micro-batches.
fn step(training: &mut Training, number: u64, runs: &[Range<usize>], from: GradientFrom) -> (f64, f64) {
    let of = Prompts::new();
    let n = runs.last().unwrap().end;
    let refs = prompts(&of, n);
    let mut rng = Rng::new(3, number);
    let x: Vec<f32> = (0..n * 2 * DIM).map(|_| rng.normal() as f32).collect();
    training.begin_step(n).unwrap();
    for run in runs {
        let batch = PackedBatch::new(&refs[run.clone()], 1, from, run.start);
        let labels: Vec<f32> = run.clone().map(|i| LABELS[i % 4]).collect();
        let x = &x[run.start * 2 * DIM..run.end * 2 * DIM];
        let dropout = Some(Dropout { p: 0.3, seed: 2, step: number });
        let weight = 1.0 / n as f32;
        training.micro_batch(MicroBatch { batch: &batch, x, labels: &labels, weight, dropout }, None).unwrap();
    }
    training.finish_step(1e-2).unwrap()
}

/// Losses and norms, scores, what was learned, and how it was run.
type Course = (Vec<(f64, f64)>, Vec<Vec<f32>>, Learned, Counts);

/// Ten steps of micro-batches of several sizes, evaluations in between; what was learned, and the card's memory.
fn ten_steps(graphs: bool, lora: bool, from: GradientFrom) -> Course {
    let mut card = on_card(Precision::Bf16);
    card.use_graphs(graphs);
    let start = begin(&card);
    let before = card.cuda_allocated();
    let (mut training, plan) = train(&card, &start, Rules { lora, ..RULES });
    let reserved = card.cuda_allocated();
    assert!(reserved - before <= plan.needed(), "{} allocated, {} planned: {plan}", reserved - before, plan.needed());
    assert!(100 * (reserved - before) >= 95 * plan.needed(), "{} allocated, {plan}", reserved - before);
    let of = Prompts::new();
    let (refs, mut evaluations) = (prompts(&of, 20), Vec::new());
    let reports = (0..10u64)
        .map(|s| {
            let runs: &[Range<usize>] = if s % 3 == 2 { &[0..2, 2..9, 9..30] } else { &[0..12, 12..16] };
            let report = step(&mut training, s, runs, from);
            if s % 2 == 1 {
                let batch = PackedBatch::new(&refs, 1, GradientFrom::Start, 0);
                evaluations.push(training.scores(&batch, &[0.25; 20 * 2 * DIM]).unwrap());
            }
            report
        })
        .collect();
    assert_eq!(card.cuda_allocated(), reserved, "a pass has allocated");
    (reports, evaluations, learned(&training, &start), training.counts())
}

#[test]
fn ten_steps_as_graphs_have_the_same_bits() {
    for (lora, from) in [(true, GradientFrom::Start), (false, GradientFrom::FirstSlot)] {
        let (want, got) = (ten_steps(false, lora, from), ten_steps(true, lora, from));
        assert_eq!(got.0, want.0, "losses and norms");
        assert!(got.1 == want.1, "scores");
        assert!(got.2 == want.2, "tensors or moments");
        assert_ne!(want.1[0], want.1[4], "something was learned");
        assert_eq!(want.3, Counts::default());
        let counts = got.3;
        // 7 · 2 + 3 · 3 micro-batches, 10 steps, 5 evaluations: all but the first of each shape as graphs.
        assert_eq!(counts.plain + counts.replayed, 23 + 10 + 5);
        assert_eq!(counts.plain, counts.made, "{counts:?}: every shape comes again");
        // 128 rows with 8 and with 16 prompts, 256 with 24, an evaluation, and the optimizer's step.
        assert_eq!(counts.made, 5);
    }
}

/// Rows that fill a batch up change no bit of the gradients: first moments after one step against a pass over the batch as it is.
#[test]
fn filling_up_changes_no_gradient() {
    let card = on_card(Precision::Bf16);
    let mut start = begin(&card);
    // Adam's first moments are the gradients times a constant, if nothing is clipped.
    let rules = Rules { max_norm: f64::INFINITY, cie: false, ..RULES };
    let (mut training, _) = train(&card, &start, rules);
    let of = Prompts::new();
    let refs: Vec<_> = of.refs().into_iter().map(|p| PromptRef { slots: &[], ..p }).collect();
    let batch = PackedBatch::new(&refs, 1, GradientFrom::Start, 0);
    let dropout = Some(Dropout { p: 0.3, seed: 2, step: 0 });
    training.begin_step(4).unwrap();
    training.micro_batch(MicroBatch { batch: &batch, x: &[], labels: &LABELS, weight: 0.25, dropout }, None).unwrap();
    let (loss, _) = training.finish_step(1e-2).unwrap();
    start = learned(&training, &start);
    let lora = adapter(&card);
    let mut gradient = lora.zeros_like();
    let pass = TrainPass {
        lora: Some(&lora),
        dropout,
        batch: &batch,
        vectors: &[],
        labels: &LABELS,
        weight: 0.25,
        loss: Loss::YesLogitBce,
        d_lora: Some(&mut gradient),
        d_vectors: None,
        d_inputs: None,
    };
    let (_, sum) = card.train_pass(pass, &mut Workspace::default()).unwrap();
    assert_eq!(loss, sum / 4.0);
    for ((name, g), m) in gradient.named().into_iter().zip(&start.2.m) {
        assert!(g.iter().any(|g| *g != 0.0), "{name}");
        let want: Vec<f32> = g.iter().map(|g| (1.0 - 0.9f64) as f32 * g).collect();
        assert!(want == *m, "{name}");
    }
}

/// Shapes that do not come again leave no graph, and graphs whose buffers have moved are made anew.
#[test]
fn graphs_follow_their_buffers() {
    let card = on_card(Precision::Bf16);
    let start = begin(&card);
    let (mut training, _) = train(&card, &start, RULES);
    for s in 0..3 {
        step(&mut training, s, &all(), GradientFrom::Start);
    }
    assert_eq!(training.counts(), Counts { plain: 2, made: 2, replayed: 4 });
    // More than was planned for: buffers grow.
    step(&mut training, 3, &[0..40, 40..44], GradientFrom::Start);
    let report = |training: &mut Training| step(training, 4, &all(), GradientFrom::Start);
    report(&mut training);
    report(&mut training);
    let counts = training.counts();
    assert!(counts.made > 2 && counts.plain > 3, "{counts:?}");
}

/// The line of a stage's plan, and the numbers of what is to be allocated and what is free, MiB.
fn planned(stderr: &[u8], stage: &str) -> (String, [f64; 2]) {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().find(|l| l.starts_with(&format!("{stage}: device memory"))).expect(&text).to_owned();
    let number = |before: &str| line.split_once(before).unwrap().0.rsplit(' ').next().unwrap().parse().unwrap();
    let numbers = [number(" MiB to allocate"), number(" free")];
    (line, numbers)
}

/// The mapping's scratch goes with the multiprocessors; with all of an A100's, it would be most of what stage 2 needs here.
const SMALL: (&str, &str) = ("CUEMU_SMS", "8");

/// On a tight card blocks are recomputed, and training ends in the same bits; on one that is too small it is refused with the plan.
#[test]
fn a_tight_card_recomputes_and_a_small_one_refuses() {
    let tiny = Tiny::new(4, 2, 2, 4);
    let bits = |name: &str| {
        let run = tiny.dir.path().join(name);
        (losses(&run, "train"), read_tensors(&run.join("adapter/adapter_model.safetensors")).unwrap().0)
    };
    let ample = tiny.try_train("ample", "cuda", &[SMALL, ("CUEMU_MEMORY", "256MiB")]);
    let (line, [needed, free]) = planned(&ample.stderr, "stage1");
    assert!(ample.status.success() && !line.contains("recomputed"), "{line}");
    let memory = |mib: f64| format!("{}KiB", ((256.0 - free + mib) * 1024.0) as usize);
    let tight = tiny.try_train("tight", "cuda", &[SMALL, ("CUEMU_MEMORY", &memory(needed))]);
    let (line, [less, _]) = planned(&tight.stderr, "stage1");
    assert!(tight.status.success() && line.contains("(blocks recomputed)") && less < 0.97 * needed, "{line}");
    assert!(bits("tight") == bits("ample"));
    let small = tiny.try_train("small", "cuda", &[SMALL, ("CUEMU_MEMORY", &memory(0.9 * less))]);
    let text = String::from_utf8_lossy(&small.stderr);
    assert!(!small.status.success() && text.contains("tokens at once do not fit"), "{text}");
    assert!(text.contains("(blocks recomputed)"), "{text}");
}

/// `COLLM_GRAPHS=off` runs kernel by kernel.
#[test]
fn graphs_can_be_switched_off() {
    let tiny = Tiny::new(3, 2, 2, 2);
    let train = |name: &str, graphs: &str| {
        let out = tiny.try_train(name, "cuda", &[("COLLM_GRAPHS", graphs), ("CUEMU_TRACE", "1")]);
        let run = tiny.dir.path().join(name);
        let tensors = read_tensors(&run.join("cie.safetensors")).unwrap().0;
        let calls = String::from_utf8_lossy(&out.stderr).matches("cuGraphLaunch -> 0").count();
        ((losses(&run, "train"), tensors), calls)
    };
    let (on, off) = (train("on", "on"), train("off", "off"));
    assert!(on.0 == off.0, "graphs change bits");
    assert!(on.1 > 0 && off.1 == 0, "{} graphs launched, {} when off", on.1, off.1);
}
