//! Whole passes on a small random model: gradients of every LoRA target with dropout against differences of the loss, and what
//! must not change a result: micro-batches, batch mates, where the gradient starts.

use collm_engine::device::ops::{Dropout, Loss};
use collm_engine::llm::ModelConfig;
use collm_engine::llm::batch::{GradientFrom, MAX_PROMPT_TOKENS, PackedBatch, frozen_tokens};
use collm_engine::llm::model::{Model, TrainPass, Workspace};
use collm_engine::llm::peft::{LoraTensors, Target};
use collm_engine::llm::prefix_cache::{self, Plan, PrefixCache};
use collm_engine::llm::sharing::{Sharing, within};
use collm_engine::llm::weights::ModelWeights;
use collm_engine::prompt::{PromptRef, Slot, SlotKind};
use collm_engine::rng::Rng;

pub const HIDDEN: usize = 40;

fn model() -> Model {
    Model::new(weights(10), 7, 9, 64)
}

pub fn weights(head_dim: usize) -> ModelWeights {
    let json = r#"{"model_type":"qwen2","vocab_size":50,"hidden_size":40,"intermediate_size":56,"num_hidden_layers":3,
        "num_attention_heads":6,"num_key_value_heads":2,"head_dim":10,"rms_norm_eps":1e-5,"max_position_embeddings":64}"#;
    let json = json.replace("\"head_dim\":10", &format!("\"head_dim\":{head_dim}"));
    let config = ModelConfig::from_json(&json, "config.json".as_ref()).unwrap();
    let mut weights = ModelWeights::random(&config, 3);
    let mut rng = Rng::new(5, 0);
    // Larger than the 0.02 of a fresh model, so that the layers matter; biases too.
    for layer in &mut weights.layers {
        let m =
            [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o, &mut layer.gate, &mut layer.up, &mut layer.down];
        for w in m {
            let values = w.to_f32().iter().map(|x| 8.0 * x).collect();
            *w = collm_engine::llm::weights::WeightMatrix::from_f32(w.rows(), w.cols(), values);
        }
        for bias in layer.biases.iter_mut().flatten() {
            bias.iter_mut().for_each(|b| *b = 0.3 * rng.normal() as f32);
        }
    }
    weights.embed_tokens = collm_engine::llm::weights::WeightMatrix::from_f32(
        50,
        HIDDEN,
        weights.embed_tokens.to_f32().iter().map(|x| 30.0 * x).collect(),
    );
    weights
}

pub fn adapter(model: &Model) -> LoraTensors {
    let mut lora = LoraTensors::init(model.config(), &Target::ALL, 4, 6.0, 0.2, 1);
    let mut rng = Rng::new(8, 0);
    lora.slices_mut().into_iter().for_each(|t| t.iter_mut().for_each(|x| *x = 0.15 * rng.normal() as f32));
    lora
}

pub struct Prompts(Vec<(Vec<u32>, Vec<Slot>)>);

impl Prompts {
    pub fn new() -> Self {
        let mut rng = Rng::new(4, 0);
        let prompt = |(len, user, item): (usize, u32, u32)| {
            let ids = (0..len).map(|_| rng.below(50)).collect();
            (
                ids,
                vec![
                    Slot { position: user, kind: SlotKind::User, part: 0 },
                    Slot { position: item, kind: SlotKind::Item, part: 0 },
                ],
            )
        };
        Prompts([(13, 4, 9), (7, 0, 5), (21, 15, 16), (1 + 2, 0, 1)].into_iter().map(prompt).collect())
    }
    pub fn refs(&self) -> Vec<PromptRef<'_>> {
        self.0.iter().map(|(ids, slots)| PromptRef { ids, slots }).collect()
    }
}

pub const LABELS: [f32; 4] = [1.0, 0.0, 0.0, 1.0];

pub fn vectors() -> Vec<f32> {
    let mut rng = Rng::new(6, 0);
    (0..4 * 2 * HIDDEN).map(|_| rng.normal() as f32).collect()
}

/// Loss and gradients of the prompts in one batch, or in micro-batches.
pub fn pass(
    model: &Model,
    lora: &LoraTensors,
    vectors: &[f32],
    loss: Loss,
    dropout: Option<Dropout>,
    from: GradientFrom,
    runs: &[std::ops::Range<usize>],
) -> (f64, LoraTensors, Vec<f32>) {
    pass_in(&mut Workspace::default(), model, lora, vectors, loss, dropout, from, runs)
}

/// As [`pass`], in buffers that other passes have used.
#[allow(clippy::too_many_arguments)] // everything a pass depends on
pub fn pass_in(
    workspace: &mut Workspace,
    model: &Model,
    lora: &LoraTensors,
    vectors: &[f32],
    loss: Loss,
    dropout: Option<Dropout>,
    from: GradientFrom,
    runs: &[std::ops::Range<usize>],
) -> (f64, LoraTensors, Vec<f32>) {
    let prompts = Prompts::new();
    let (mut d_lora, mut d_vectors, mut total) = (lora.zeros_like(), Vec::new(), 0.0);
    for run in runs {
        let batch = PackedBatch::new(&prompts.refs()[run.clone()], 1, from, run.start);
        let vectors = &vectors[run.start * 2 * HIDDEN..run.end * 2 * HIDDEN];
        let mut d = vec![0.0; vectors.len()];
        let train = TrainPass {
            lora: Some(lora),
            dropout,
            batch: &batch,
            vectors,
            labels: &LABELS[run.clone()],
            weight: 0.25,
            loss,
            d_lora: (from == GradientFrom::Start).then_some(&mut d_lora),
            d_vectors: Some(&mut d),
            d_inputs: None,
        };
        total += model.train_pass(train, workspace).unwrap().1 * 0.25;
        d_vectors.extend(d);
    }
    (total, d_lora, d_vectors)
}

pub fn all() -> [std::ops::Range<usize>; 1] {
    std::array::from_fn(|_| 0..4)
}

/// Along the gradient of one tensor, the loss must change as fast as the gradient is long.
#[test]
fn gradients_of_every_target_follow_the_loss() {
    let (model, vectors) = (model(), vectors());
    let lora = adapter(&model);
    for (loss, dropout) in [
        (Loss::YesLogitBce, None),
        (Loss::YesNoSoftmax, None),
        (Loss::YesLogitBce, Some(Dropout { p: 0.3, seed: 2, step: 5 })),
    ] {
        let (_, gradient, d_vectors) = pass(&model, &lora, &vectors, loss, dropout, GradientFrom::Start, &all());
        let total = |lora: &LoraTensors, v: &[f32]| pass(&model, lora, v, loss, dropout, GradientFrom::Start, &all()).0;
        let check = |name: &str, g: &[f32], moved: &dyn Fn(f32) -> f64| {
            let length = g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
            assert!(length > 1e-5, "{name}: no gradient at all");
            // A step that changes the loss by about 0.002: far above rounding, near enough to be straight.
            let step = (1e-3 / length).min(0.02);
            let slope = (moved((step / length) as f32) - moved((-step / length) as f32)) / (2.0 * step);
            assert!(
                (slope / length - 1.0).abs() < 0.02,
                "{name} {loss:?} {dropout:?}: slope {slope:e}, gradient {length:e}"
            );
        };
        for (i, (name, g)) in gradient.named().into_iter().enumerate() {
            check(&name, g, &|t| {
                let mut moved = lora.clone();
                moved.slices_mut()[i].iter_mut().zip(g).for_each(|(x, g)| *x += t * g);
                total(&moved, &vectors)
            });
        }
        check("vectors", &d_vectors, &|t| {
            total(&lora, &vectors.iter().zip(&d_vectors).map(|(v, g)| v + t * g).collect::<Vec<_>>())
        });
    }
}

#[test]
fn micro_batches_and_the_start_of_the_gradient_change_nothing() {
    let (model, vectors) = (model(), vectors());
    let lora = adapter(&model);
    for dropout in [None, Some(Dropout { p: 0.3, seed: 2, step: 5 })] {
        let run = |from, runs: &[_]| pass(&model, &lora, &vectors, Loss::YesLogitBce, dropout, from, runs);
        let whole = run(GradientFrom::Start, &all());
        let parts = run(GradientFrom::Start, &[0..1, 1..3, 3..4]);
        assert!((whole.0 - parts.0).abs() < 1e-6);
        for ((name, a), (_, b)) in parts.1.named().into_iter().zip(whole.1.named()) {
            close(a, b, 2e-5, &name);
        }
        close(&parts.2, &whole.2, 2e-5, "vectors");
        let suffix = run(GradientFrom::FirstSlot, &all());
        assert!((whole.0 - suffix.0).abs() < 1e-6);
        close(&suffix.2, &whole.2, 2e-5, "vectors from the first slot on");
    }
}

#[test]
fn a_score_does_not_depend_on_batch_mates() {
    let (model, vectors, prompts) = (model(), vectors(), Prompts::new());
    let lora = adapter(&model);
    let mut workspace = Workspace::default();
    let mut scores = |refs: &[PromptRef], vectors: &[f32]| {
        let batch = PackedBatch::new(refs, 1, GradientFrom::Start, 0);
        model.scores(Some(&lora), &batch, vectors, Loss::YesLogitBce, &mut workspace).unwrap()
    };
    let refs = prompts.refs();
    let together = scores(&refs, &vectors);
    for i in 0..4 {
        let alone = scores(&refs[i..=i], &vectors[i * 2 * HIDDEN..(i + 1) * 2 * HIDDEN]);
        assert_eq!(alone[0].to_bits(), together[i].to_bits(), "prompt {i}");
    }
}

/// Prompts of two users that begin alike: (tokens and slots, user and item).
fn alike() -> (Prompts, Vec<(u32, u32)>) {
    let mut rng = Rng::new(14, 0);
    let mut tokens = |n: usize| (0..n).map(|_| rng.below(50)).collect::<Vec<u32>>();
    let (first, second) = (tokens(12), tokens(9));
    let mut prompts = Vec::new();
    let mut ids = Vec::new();
    for (user, own) in [(3, 4), (5, 6), (3, 2), (3, 7), (5, 3)] {
        let start = if user == 3 { &first } else { &second };
        let item = start.len() as u32 + 1;
        prompts.push((
            [start.clone(), tokens(own)].concat(),
            vec![
                Slot { position: 6, kind: SlotKind::User, part: 0 },
                Slot { position: item, kind: SlotKind::Item, part: 0 },
            ],
        ));
        ids.push((user, 10 + own as u32));
    }
    (Prompts(prompts), ids)
}

/// Scores, gradients of the adapter, gradients of the users' and the items' vectors, summed over the prompts of a user.
type Found = (Vec<f32>, LoraTensors, Vec<f32>);

/// A pass over [`alike`]'s prompts in the order of `sharing`, in the batches that `pack` makes of runs of them.
fn train_alike(
    model: &Model,
    lora: &LoraTensors,
    from: GradientFrom,
    dropout: Option<Dropout>,
    sharing: &Sharing,
    runs: &[std::ops::Range<usize>],
    mut pack: impl FnMut(&[PromptRef], std::ops::Range<usize>) -> PackedBatch,
) -> Found {
    let (prompts, ids) = alike();
    let vector = |id: u32| {
        let mut rng = Rng::new(id.into(), 21);
        (0..HIDDEN).map(|_| rng.normal() as f32).collect::<Vec<_>>()
    };
    let refs: Vec<_> = sharing.order.iter().map(|&i| prompts.refs()[i]).collect();
    let mut d_lora = lora.zeros_like();
    let (mut scores, mut by_id) = (vec![0.0; refs.len()], vec![0.0; 64 * HIDDEN]);
    for run in runs {
        let here = &sharing.order[run.clone()];
        let vectors: Vec<f32> = here.iter().flat_map(|&i| [vector(ids[i].0), vector(ids[i].1)].concat()).collect();
        let labels: Vec<f32> = here.iter().map(|&i| (i % 2) as f32).collect();
        let batch = pack(&refs, run.clone());
        let mut d_vectors = vec![0.0; vectors.len()];
        let pass = TrainPass {
            lora: Some(lora),
            dropout,
            batch: &batch,
            vectors: &vectors,
            labels: &labels,
            weight: 0.2,
            loss: Loss::YesLogitBce,
            d_lora: (from == GradientFrom::Start).then_some(&mut d_lora),
            d_vectors: Some(&mut d_vectors),
            d_inputs: None,
        };
        let (found, _) = model.train_pass(pass, &mut Workspace::default()).unwrap();
        for (place, &i) in here.iter().enumerate() {
            scores[i] = found[place];
            for (slot, id) in [ids[i].0, ids[i].1].into_iter().enumerate() {
                let d = &d_vectors[(2 * place + slot) * HIDDEN..][..HIDDEN];
                by_id[id as usize * HIDDEN..][..HIDDEN].iter_mut().zip(d).for_each(|(a, d)| *a += d);
            }
        }
    }
    (scores, d_lora, by_id)
}

fn alike_shared(from: GradientFrom) -> Sharing {
    let (prompts, ids) = alike();
    let sharing = Sharing::best(&prompts.refs(), &ids, from);
    assert!(sharing.groups.len() == 2 && sharing.groups[0].members.len() == 3, "{sharing:?}");
    sharing
}

/// Each prompt whole, and prompts that begin alike sharing that part.
pub fn shared_and_not(model: &Model, lora: &LoraTensors, from: GradientFrom) -> [Found; 2] {
    let sharing = alike_shared(from);
    [Sharing::none(5), sharing].map(|sharing| {
        train_alike(model, lora, from, None, &sharing, &all_of(5), |refs, _| {
            PackedBatch::grouped(refs, &sharing.groups, 1, from, 0, Vec::new())
        })
    })
}

fn all_of(n: usize) -> [std::ops::Range<usize>; 1] {
    std::array::from_fn(|_| 0..n)
}

/// With dropout: each prompt whole, but the tokens it shares under the numbers of its group's first prompt; shared in one batch; shared
/// in two batches, of which the first ends within a group.
pub fn dropped_once(model: &Model, lora: &LoraTensors) -> [Found; 3] {
    let from = GradientFrom::Start;
    let sharing = alike_shared(from);
    let dropout = Some(Dropout { p: 0.3, seed: 2, step: 5 });
    let whole = train_alike(model, lora, from, dropout, &sharing, &all_of(5), |refs, _| {
        let mut batch = PackedBatch::new(refs, 1, from, 0);
        for group in &sharing.groups {
            for rows in group.members.clone().map(|m| batch.segments[m].q.clone()) {
                for (t, number) in batch.step_tokens[rows][..group.prefix].iter_mut().enumerate() {
                    *number = (group.members.start * MAX_PROMPT_TOKENS + t) as u32;
                }
            }
        }
        batch
    });
    let shared = |runs: &[_]| {
        train_alike(model, lora, from, dropout, &sharing, runs, |refs, run| {
            PackedBatch::grouped(&refs[run.clone()], &sharing.groups, 1, from, run.start, Vec::new())
        })
    };
    [whole, shared(&all_of(5)), shared(&[0..2, 2..5])]
}

pub fn same(got: &Found, want: &Found, what: &str) {
    close(&got.0, &want.0, 1e-5, &format!("{what}: scores"));
    close(&got.2, &want.2, 2e-5, &format!("{what}: gradients of the vectors"));
    for ((name, g), (_, w)) in got.1.named().into_iter().zip(want.1.named()) {
        close(g, w, 2e-5, &format!("{what}: {name}"));
    }
}

pub fn close(got: &[f32], want: &[f32], limit: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-30f32, |m, x| m.max(x.abs()));
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= limit * largest, "{what}: {g} against {w}, largest {largest}");
    }
}

#[test]
fn sharing_changes_no_score_and_no_gradient() {
    let model = model();
    let lora = adapter(&model);
    for from in [GradientFrom::Start, GradientFrom::FirstSlot] {
        let [apart, shared] = shared_and_not(&model, &lora, from);
        same(&shared, &apart, &format!("{from:?}"));
    }
}

#[test]
fn a_shared_token_is_dropped_once_however_the_step_is_cut() {
    let model = model();
    let [whole, shared, cut] = dropped_once(&model, &adapter(&model));
    same(&shared, &whole, "shared");
    same(&cut, &whole, "cut within a group");
}

/// The adapter in the weights or beside them: the same scores and gradients to rounding.
#[test]
fn a_merged_adapter_changes_nothing() {
    let model = model();
    let (lora, vectors, prompts) = (adapter(&model), vectors(), Prompts::new());
    let merged = model.merged(&lora).unwrap();
    assert_ne!(merged.fingerprint(), model.fingerprint());
    let batch = PackedBatch::new(&prompts.refs(), 1, GradientFrom::FirstSlot, 0);
    let [apart, merged] = [(&model, Some(&lora)), (&merged, None)].map(|(model, lora)| {
        let mut d_vectors = vec![0.0; vectors.len()];
        let pass = TrainPass {
            lora,
            dropout: None,
            batch: &batch,
            vectors: &vectors,
            labels: &LABELS,
            weight: 0.25,
            loss: Loss::YesLogitBce,
            d_lora: None,
            d_vectors: Some(&mut d_vectors),
            d_inputs: None,
        };
        (model.train_pass(pass, &mut Workspace::default()).unwrap().0, d_vectors)
    });
    close(&merged.0, &apart.0, 1e-5, "scores");
    close(&merged.1, &apart.1, 2e-5, "gradients of the vectors");
}

/// Kept keys and values stand for the text before the first slot, up to their rounding to f16; and what the cache held before, or
/// has room for, does not change a bit.
#[test]
fn kept_keys_and_values_stand_for_the_frozen_text() {
    let model = model();
    let lora = adapter(&model);
    let from = GradientFrom::FirstSlot;
    let sharing = alike_shared(from);
    let [_, exact] = shared_and_not(&model, &lora, from);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prefixes.kv");
    let (prompts, _) = alike();
    let prefixes = prompts.refs().into_iter().map(|p| &p.ids[..frozen_tokens(&p)]).collect::<Vec<_>>();
    // Two prefixes of 6 tokens; 3 blocks of 2 · 2 heads of 10, in f16.
    let needed = prefix_cache::needed(&model, prefixes.iter().copied());
    assert_eq!(needed, 2 * 6 * 3 * 40 * 2);
    let mut all = Vec::new();
    for (disk, limit) in [(false, needed), (false, needed / 2), (false, 0), (true, 1 << 20), (true, 1 << 20)] {
        let plan = Plan { disk, limit, needed };
        let mut cache = PrefixCache::open(&model, Some(&lora), plan, &path).unwrap();
        for runs in [&all_of(5)[..], &[0..2, 2..5]] {
            let found = train_alike(&model, &lora, from, None, &sharing, runs, |refs, run| {
                let refs = &refs[run.clone()];
                let firsts = within(&sharing.groups, run.clone()).map(|(_, members)| refs[members.start - run.start]);
                let given = cache.fetch(&firsts.map(|p| &p.ids[..frozen_tokens(&p)]).collect::<Vec<_>>()).unwrap();
                PackedBatch::grouped(refs, &sharing.groups, 1, from, run.start, given)
            });
            all.push((found, runs.len()));
        }
        let counts = cache.counts();
        // The first run asks for 2, the second for 3 (one group is cut).
        let want = match (disk, limit) {
            (false, 0) => (0, 5),
            (false, l) if l < needed => (2, 3),
            (true, _) if all.len() > 8 => (5, 0),
            _ => (3, 2),
        };
        assert_eq!(counts, want, "disk {disk}, limit {limit}");
    }
    for (found, parts) in &all {
        let (close_to, limit) = (&all[0].0, if *parts == 2 { 1e-6 } else { 0.0 });
        assert_eq!(found.0, close_to.0, "scores");
        close(&found.2, &close_to.2, limit, "gradients of the vectors");
    }
    close(&all[0].0.0, &exact.0, 2e-3, "scores");
    close(&all[0].0.2, &exact.2, 5e-3, "gradients of the vectors");
    assert_ne!(all[0].0.0, exact.0, "rounding is visible, or the cache was not used");
}
