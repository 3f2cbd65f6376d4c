//! Batches as the official code makes them (reference, sections 2.2 and 3): every prompt padded on the left to the batch's longest,
//! the answer token behind it, all vocabulary logits of all positions.
//!
//! Pads are rows like others, in a segment of their own: they go through every product, and no prompt sees them. What this leaves
//! out, in favour of the official way: its attention computes a whole square of scores where ours stops at a block's last visible
//! key, pads are masked there and not skipped, and the language-modelling loss over all logits, which is computed and thrown away.

use crate::device::cpu::splice::Source;
use crate::device::ops::Segment;
use crate::llm::batch::{GradientFrom, MAX_PROMPT_TOKENS, PackedBatch};
use crate::prompt::PromptRef;

/// Packs `prompts` with their `answers`. Slots as in [`PackedBatch::new`]; positions count from the padding on, as officially
/// (scores do not change: RoPE knows differences only). Gradients begin at the first row. A prompt's rows are its answer, its pads and
/// itself: the batch ends in a token that is read in the last block, as a card's tables of work want it.
pub fn padded(prompts: &[PromptRef], answers: &[u32], pad: u32, tokens_per_vector: usize) -> PackedBatch {
    let longest = prompts.iter().map(|p| p.ids.len()).max().unwrap_or(0);
    let mut batch = PackedBatch { every_position: true, ..PackedBatch::default() };
    let mut own = Vec::new();
    for (i, (prompt, &answer)) in prompts.iter().zip(answers).enumerate() {
        let unpadded = PackedBatch::new(std::slice::from_ref(prompt), tokens_per_vector, GradientFrom::Start, 0);
        let pads = longest - prompt.ids.len();
        let first = batch.sources.len();
        let sources = unpadded.sources.into_iter().map(|source| match source {
            Source::Vector(v) => Source::Vector(v + (2 * i * tokens_per_vector) as u32),
            token => token,
        });
        batch.sources.push(Source::Token(answer));
        batch.sources.extend(std::iter::repeat_n(Source::Token(pad), pads));
        batch.sources.extend(sources);
        let positions = || std::iter::once(longest).chain(0..longest);
        batch.positions.extend(positions().map(|t| t as u32));
        batch.step_tokens.extend(positions().map(|t| (i * MAX_PROMPT_TOKENS + t) as u32));
        let (padding, start, end) = (first + 1, first + 1 + pads, first + 1 + longest);
        if pads > 0 {
            batch.segments.push(Segment { q: padding..start, kv: padding..start, prefix: 0..0 });
        }
        batch.segments.push(Segment { q: first..padding, kv: first..padding, prefix: start..end });
        own.push(Segment { q: start..end, kv: start..end, prefix: 0..0 });
        batch.last_rows.push(end - 1);
    }
    batch.segments.extend(own);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::ops::Loss;
    use crate::device::profile::{self, Group, product};
    use crate::llm::ModelConfig;
    use crate::llm::model::{Model, TrainPass, Workspace};
    use crate::llm::peft::{LoraTensors, Target};
    use crate::llm::weights::ModelWeights;
    use crate::prompt::{Slot, SlotKind};

    const HIDDEN: usize = 24;
    const INTER: usize = 40;
    const VOCAB: usize = 50;
    const LAYERS: usize = 2;

    fn model() -> Model {
        let json = format!(
            r#"{{"model_type":"llama","vocab_size":{VOCAB},"hidden_size":{HIDDEN},"intermediate_size":{INTER},
            "num_hidden_layers":{LAYERS},"num_attention_heads":4,"num_key_value_heads":2,"head_dim":6,"rms_norm_eps":1e-5,
            "max_position_embeddings":64}}"#
        );
        let config = ModelConfig::from_json(&json, "config.json".as_ref()).unwrap();
        let mut weights = ModelWeights::random(&config, 3);
        for layer in &mut weights.layers {
            for w in [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o, &mut layer.down] {
                let values = w.to_f32().iter().map(|x| 10.0 * x).collect();
                *w = crate::llm::weights::WeightMatrix::from_f32(w.rows(), w.cols(), values);
            }
        }
        Model::new(weights, 7, 9, 32)
    }

    fn adapter(model: &Model) -> LoraTensors {
        let mut lora = LoraTensors::init(model.config(), &[Target::Q, Target::V], 4, 8.0, 0.0, 1);
        lora.slices_mut().into_iter().flatten().enumerate().for_each(|(i, x)| *x = 0.1 * ((i % 7) as f32 - 3.0));
        lora
    }

    fn slots(user: u32, item: u32) -> [Slot; 2] {
        [SlotKind::User, SlotKind::Item].map(|kind| {
            let position = if kind == SlotKind::User { user } else { item };
            Slot { position, kind, part: 0 }
        })
    }

    #[test]
    fn pads_come_before_the_prompt_and_the_answer_sees_the_prompt() {
        let (a, b) = (slots(1, 2), slots(0, 1));
        let prompts = [PromptRef { ids: &[10, 0, 0, 11], slots: &a }, PromptRef { ids: &[0, 0], slots: &b }];
        let batch = padded(&prompts, &[7, 9], 3, 1);
        use Source::{Token as T, Vector as V};
        assert_eq!(batch.sources, [T(7), T(10), V(0), V(1), T(11), T(9), T(3), T(3), V(2), V(3)]);
        assert_eq!(batch.positions, [4, 0, 1, 2, 3, 4, 0, 1, 2, 3]);
        assert_eq!((batch.n_prompts(), &batch.last_rows[..], batch.first_gradient), (2, &[4, 9][..], 0));
        assert_eq!(batch.segments[1], Segment { q: 6..8, kv: 6..8, prefix: 0..0 });
        assert_eq!(batch.segments[2], Segment { q: 5..6, kv: 5..6, prefix: 8..10 });
        assert_eq!(batch.segments[4], Segment { q: 8..10, kv: 8..10, prefix: 0..0 });
    }

    /// Padding, the answer token, the whole last block and the whole vocabulary change no score, no loss and no gradient.
    #[test]
    fn scores_and_gradients_are_those_of_packed_prompts() {
        let model = model();
        let lora = adapter(&model);
        let (a, b) = (slots(2, 5), slots(0, 1));
        let prompts =
            [PromptRef { ids: &[5, 6, 0, 8, 9, 0, 11], slots: &a }, PromptRef { ids: &[0, 0, 14], slots: &b }];
        let vectors: Vec<f32> = (0..4 * HIDDEN).map(|i| ((i * 37 % 19) as f32 - 9.0) / 9.0).collect();
        let run = |batch: &PackedBatch, loss: Loss| {
            let mut workspace = Workspace::default();
            let scores = model.scores(Some(&lora), batch, &vectors, loss, &mut workspace).unwrap();
            let (mut d_lora, mut d_vectors) = (lora.zeros_like(), vec![0.0; vectors.len()]);
            let pass = TrainPass {
                lora: Some(&lora),
                dropout: None,
                batch,
                vectors: &vectors,
                labels: &[1.0, 0.0],
                weight: 0.5,
                loss,
                d_lora: Some(&mut d_lora),
                d_vectors: Some(&mut d_vectors),
                d_inputs: None,
            };
            let (again, loss) = model.train_pass(pass, &mut workspace).unwrap();
            assert_eq!(again, scores);
            let mut all = scores;
            all.push(loss as f32);
            all.extend(d_vectors);
            all.extend(d_lora.named().iter().flat_map(|n| n.1).copied());
            all
        };
        for loss in [Loss::YesLogitBce, Loss::YesNoSoftmax] {
            let want = run(&PackedBatch::new(&prompts, 1, GradientFrom::Start, 0), loss);
            let got = run(&padded(&prompts, &[7, 9], 3, 1), loss);
            let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(largest > 0.01, "the model says something: {largest}");
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() <= 2e-6 * largest, "{loss:?}, value {i}: {g} against {w}");
            }
        }
    }

    /// Both ways against a count by hand: of 7 + 3 tokens, the padded batch computes 2 · (7 + 1).
    #[test]
    fn arithmetic_is_what_a_count_by_hand_says() {
        let model = model();
        let lora = adapter(&model);
        let prompts =
            [PromptRef { ids: &[5, 6, 1, 8, 9, 2, 11], slots: &[] }, PromptRef { ids: &[1, 2, 14], slots: &[] }];
        let tally = |batch: &PackedBatch, train: bool| {
            let (mut workspace, mut d_lora) = (Workspace::default(), lora.zeros_like());
            profile::start();
            if train {
                let pass = TrainPass {
                    lora: Some(&lora),
                    dropout: None,
                    batch,
                    vectors: &[],
                    labels: &[1.0, 0.0],
                    weight: 0.5,
                    loss: Loss::YesLogitBce,
                    d_lora: Some(&mut d_lora),
                    d_vectors: None,
                    d_inputs: None,
                };
                model.train_pass(pass, &mut workspace).unwrap();
            } else {
                model.scores(Some(&lora), batch, &[], Loss::YesLogitBce, &mut workspace).unwrap();
            }
            let tally = profile::stop();
            (tally.rows, tally.groups.map(|g| g.flop))
        };
        // Multiply-adds of a token in a block: q, o are 24 × 24; k and v 12 × 24; gate, up, down 24 × 40.
        let (kv, rest) = (2 * 12 * 24, 2 * 24 * 24 + 3 * 24 * 40);
        // LoRA on q (24 → 24) and v (24 → 12), rank 4.
        let (on_q, on_v) = (4 * 48, 4 * 36);
        let (packed, padded) = (PackedBatch::new(&prompts, 1, GradientFrom::Start, 0), padded(&prompts, &[7, 9], 3, 1));

        let (rows, flop) = tally(&padded, false);
        assert_eq!(rows, 16);
        assert_eq!(flop[Group::Linear as usize], product(LAYERS * 16, kv + rest, 1));
        assert_eq!(flop[Group::Adapter as usize], product(LAYERS * 16, on_q + on_v, 1));
        assert_eq!(flop[Group::Head as usize], product(16, VOCAB, HIDDEN));
        // Pairs of a query and a key in a block of queries: prompts 7 · 7 and 3 · 3, pads 4 · 4, answers 8 and 4.
        let pairs = 49 + 9 + 16 + 8 + 4;
        assert_eq!(flop[Group::Attention as usize], product(2 * LAYERS * 4, pairs, 6));

        // Training: the first block passes nothing on to its inputs; v's adapter and q's do so in the second only.
        let (_, train) = tally(&padded, true);
        let back = (kv + rest) + (rest - 24 * 24);
        assert_eq!(train[Group::Linear as usize] - flop[Group::Linear as usize], product(16, back, 1));
        assert_eq!(train[Group::Head as usize], 2.0 * flop[Group::Head as usize]);
        assert_eq!(train[Group::Attention as usize], 3.5 * flop[Group::Attention as usize]);
        // d_u, d_B of both; d_A of both; d_x in one block.
        let both = LAYERS * (2 * 4 * (24 + 12) + 2 * 4 * 24) + 2 * 4 * 24;
        assert_eq!(train[Group::Adapter as usize] - flop[Group::Adapter as usize], product(16, both, 1));

        // The engine: ten tokens, and in the last block the last two alone beyond keys and values.
        let (rows, flop) = tally(&packed, false);
        assert_eq!(rows, 10);
        assert_eq!(flop[Group::Linear as usize], product(10, 2 * kv + rest, 1) + product(2, rest, 1));
        assert_eq!(flop[Group::Adapter as usize], product(10, on_q + 2 * on_v, 1) + product(2, on_q, 1));
        assert_eq!(flop[Group::Head as usize], product(2, 1, HIDDEN));
        assert_eq!(flop[Group::Attention as usize], product(2 * 4, 49 + 9 + 7 + 3, 6));
    }
}
