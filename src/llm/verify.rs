//! Checks the engine against a golden file: what Hugging Face + PEFT computed for the same weights and tokens.
//!
//! A golden file holds inputs (`input_ids [B, T]` left padded, `lengths`, `slot_positions`, `labels`, `yes_id`, and the
//! vectors or the mapping of the spliced cases) and, for the cases `base` (no adapter), `text` (adapter), `cie` (adapter,
//! given vectors spliced) and `mlp` (vectors from the mapping), outputs and gradients in float32 and in float64 (`.f64`).
//! Every output the file holds is computed and compared with its float64 form where there is one; names that are not
//! understood are listed, never passed over in silence.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use crate::cie::Mapping;
use crate::device::Device;
use crate::device::cuda::Precision;
use crate::device::ops::Loss;
use crate::llm::Error;
use crate::llm::batch::{GradientFrom, PackedBatch};
use crate::llm::model::{Model, TrainPass, Workspace};
use crate::llm::peft::LoraTensors;
use crate::llm::weights::ModelWeights;
use crate::prompt::{PromptRef, Slot, SlotKind};

/// Limits of the relative error, of values and of gradients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Hidden states, logits, losses.
    pub value: f64,
    /// Gradients.
    pub gradient: f64,
}

impl Limits {
    /// For float32 arithmetic.
    pub const F32: Limits = Limits { value: 2e-5, gradient: 1e-4 };
    /// For bf16 elements: twice the largest error of Hugging Face's own bf16 on the golden models
    /// (`tests/fixtures/golden/bf16.json`; the tests hold each tensor to twice its own).
    pub const BF16: Limits = Limits { value: 8e-2, gradient: 2e-1 };
}

/// One compared tensor.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Name in the golden file.
    pub name: String,
    /// max |a − b| / max |b|.
    pub error: f64,
    /// What `error` may be.
    pub limit: f64,
}

impl Comparison {
    /// Within the limit? (NaN is not.)
    pub fn passes(&self) -> bool {
        self.error <= self.limit
    }
}

/// The outcome for one golden file.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Tensors compared, in the order computed.
    pub comparisons: Vec<Comparison>,
    /// Tensors of the file that were neither inputs nor compared.
    pub unchecked: Vec<String>,
}

impl Report {
    /// Something was compared, and all of it within its limit.
    pub fn passes(&self) -> bool {
        !self.comparisons.is_empty() && self.comparisons.iter().all(Comparison::passes)
    }
}

/// Loads the model in `model_dir` (and the adapter in `adapter_dir`, if any), and compares with the file `golden`.
pub fn verify(model_dir: &Path, adapter_dir: Option<&Path>, golden: &Path, device: Device) -> Result<Report, Error> {
    let golden = Golden::load(golden)?;
    let ids = golden.integers("input_ids")?;
    let lengths = golden.integers("lengths")?;
    let n_prompts = lengths.len();
    let padded = ids.len() / n_prompts.max(1);
    let bad = |what: String| Error::Golden { path: golden.path.clone(), what };
    if n_prompts == 0 || ids.len() != n_prompts * padded {
        return Err(bad(format!("input_ids has {} entries, lengths {n_prompts}: not [B, T] and [B]", ids.len())));
    }
    if let Some(l) = lengths.iter().find(|&&l| l < 1 || l as usize > padded) {
        return Err(bad(format!("a length of {l} in rows of {padded} columns")));
    }
    let slots = if golden.has("slot_positions") { golden.integers("slot_positions")? } else { Vec::new() };
    let weights = ModelWeights::load(model_dir)?;
    let vocab = weights.config.vocab_size as i64;
    let yes_id = golden.integers("yes_id")?.first().copied().filter(|&y| (0..vocab).contains(&y));
    let yes_id = yes_id.ok_or_else(|| bad(format!("yes_id is missing or not in 0..{vocab}")))? as u32;
    let mut prompts = Vec::new();
    for (b, &length) in lengths.iter().enumerate() {
        let start = padded - length as usize;
        let row = &ids[b * padded + start..(b + 1) * padded];
        if let Some(id) = row.iter().find(|&&id| !(0..vocab).contains(&id)) {
            return Err(bad(format!("token id {id} in row {b} is not in the vocabulary of {vocab}")));
        }
        let mut row_slots = Vec::new();
        for (kind, &position) in [SlotKind::User, SlotKind::Item].into_iter().zip(slots.chunks(2).nth(b).unwrap_or(&[]))
        {
            if position < start as i64 || position >= padded as i64 {
                return Err(bad(format!("slot position {position} of row {b} lies outside its tokens")));
            }
            row_slots.push(Slot { position: position as u32 - start as u32, kind, part: 0 });
        }
        prompts.push((row.iter().map(|&id| id as u32).collect::<Vec<_>>(), row_slots));
    }
    let adapter = adapter_dir.map(|dir| LoraTensors::load(dir, &weights.config)).transpose()?;
    let check = Check {
        model: Model::on(device, weights, yes_id, yes_id, padded)?,
        limits: match device {
            Device::Cuda { precision: Precision::Bf16, .. } => Limits::BF16,
            _ => Limits::F32,
        },
        labels: golden.floats("labels")?.iter().map(|&x| x as f32).collect(),
        adapter,
        prompts,
        padded,
        golden,
        workspace: Workspace::default(),
        report: Report::default(),
    };
    check.run()
}

struct Check {
    model: Model,
    limits: Limits,
    adapter: Option<LoraTensors>,
    prompts: Vec<(Vec<u32>, Vec<Slot>)>,
    padded: usize,
    labels: Vec<f32>,
    golden: Golden,
    workspace: Workspace,
    report: Report,
}

impl Check {
    fn run(mut self) -> Result<Report, Error> {
        let hidden = self.model.config().hidden_size;
        for case in ["base", "text", "cie", "mlp"] {
            let prefix = format!("{case}.");
            if !self.golden.tensors.keys().any(|k| k.starts_with(&prefix)) {
                continue;
            }
            if case != "base" && self.adapter.is_none() {
                return Err(self.golden.error(format!("case {case} needs the adapter: pass --adapter DIR")));
            }
            let mapping = if case == "mlp" { Some(self.mapping(hidden)?) } else { None };
            let vectors = match &mapping {
                Some((mapping, x)) => {
                    let mapped = mapping.forward(x).output;
                    self.compare("mlp.cie_vectors", &mapped, self.limits.value)?;
                    mapped
                }
                None if case == "cie" => self.golden.floats("cie_vectors")?.iter().map(|&x| x as f32).collect(),
                None => Vec::new(),
            };
            if !vectors.is_empty() && vectors.len() != self.prompts.len() * 2 * hidden {
                let want =
                    format!("{case}: {} vector elements for [{}, 2, {hidden}]", vectors.len(), self.prompts.len());
                return Err(self.golden.error(want));
            }
            self.values(case, &vectors)?;
            self.gradients(case, &vectors, mapping)?;
        }
        let known =
            ["input_ids", "attention_mask", "position_ids", "lengths", "slot_positions", "labels", "yes_id", "unk_id"];
        let inputs = known.iter().copied().chain(["cie_vectors", "cf_vectors"]).chain(Mapping::NAMES);
        let seen: Vec<&str> = inputs.chain(self.report.comparisons.iter().map(|c| c.name.as_str())).collect();
        let names = self.golden.tensors.keys();
        let unchecked = names.filter(|k| !seen.contains(&k.strip_suffix(".f64").unwrap_or(k))).cloned().collect();
        self.report.unchecked = unchecked;
        Ok(self.report)
    }

    fn mapping(&self, hidden: usize) -> Result<(Mapping, Vec<f32>), Error> {
        let get = |name: &str| -> Result<Vec<f32>, Error> {
            Ok(self.golden.floats(name)?.iter().map(|&x| x as f32).collect())
        };
        let x = get("cf_vectors")?;
        let dim = x.len() / (2 * self.prompts.len());
        let mid = self.golden.floats(Mapping::NAMES[1])?.len();
        let mut mapping = Mapping::zeros(dim, mid, hidden);
        for (tensor, name) in mapping.tensors.iter_mut().zip(Mapping::NAMES) {
            let values = get(name)?;
            if values.len() != tensor.len() {
                let what = format!(
                    "{name} has {} elements; d = {dim}, mid = {mid}, hidden = {hidden} need {}",
                    values.len(),
                    tensor.len()
                );
                return Err(self.golden.error(what));
            }
            *tensor = values;
        }
        Ok((mapping, x))
    }

    /// The prompts of a case: in `base` and `text` the slots hold the ordinary embedding of their token.
    fn prompts(&self, case: &str) -> Vec<PromptRef<'_>> {
        let spliced = matches!(case, "cie" | "mlp");
        self.prompts.iter().map(|(ids, slots)| PromptRef { ids, slots: if spliced { slots } else { &[] } }).collect()
    }

    fn adapter(&self, case: &str) -> Option<LoraTensors> {
        if case == "base" { None } else { self.adapter.clone() }
    }

    fn values(&mut self, case: &str, vectors: &[f32]) -> Result<(), Error> {
        let batch = PackedBatch::new(&self.prompts(case), 1, GradientFrom::Start, 0);
        let mut residual: Vec<Vec<f32>> = Vec::new();
        let mut tap = |x: &[f32]| residual.push(x.to_vec());
        let adapter = self.adapter(case);
        let y = self.model.hidden(adapter.as_ref(), &batch, vectors, &mut self.workspace, Some(&mut tap))?;
        residual.pop();
        let hidden: Vec<f32> = residual.concat().into_iter().chain(y.iter().copied()).collect();
        let logits = self.model.logits(&y)?;
        let scores = self.model.scores(adapter.as_ref(), &batch, vectors, Loss::YesLogitBce, &mut self.workspace)?;
        self.compare(&format!("{case}.hidden_last"), &hidden, self.limits.value)?;
        self.compare(&format!("{case}.logits_last"), &logits, self.limits.value)?;
        let vocab = self.model.config().vocab_size;
        let every16: Vec<f32> = logits.chunks(vocab).flat_map(|row| row.iter().step_by(16)).copied().collect();
        self.compare(&format!("{case}.logits_last.every16"), &every16, self.limits.value)?;
        let argmax = |row: &[f32]| (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as f32;
        let argmax: Vec<f32> = logits.chunks(vocab).map(argmax).collect();
        self.compare(&format!("{case}.logits_last.argmax"), &argmax, 0.0)?;
        self.compare(&format!("{case}.yes_logit"), &scores, self.limits.value)
    }

    fn gradients(&mut self, case: &str, vectors: &[f32], mapping: Option<(Mapping, Vec<f32>)>) -> Result<(), Error> {
        let hidden = self.model.config().hidden_size;
        let adapter = self.adapter(case);
        // Everything at once, from the first token on.
        let batch = PackedBatch::new(&self.prompts(case), 1, GradientFrom::Start, 0);
        let mut d_lora = adapter.as_ref().map(LoraTensors::zeros_like);
        let mut d_vectors = vec![0.0; vectors.len()];
        let mut d_rows = Vec::new();
        let loss = self.train(&batch, adapter.as_ref(), vectors, d_lora.as_mut(), &mut d_vectors, Some(&mut d_rows))?;
        self.compare(&format!("{case}.loss"), &[loss], self.limits.value)?;
        if let Some(d_lora) = &d_lora {
            for (key, values) in d_lora.named() {
                self.compare(&format!("{case}.grad.{key}"), values, self.limits.gradient)?;
            }
        }
        if vectors.is_empty() {
            return Ok(());
        }
        self.compare(&format!("{case}.grad.cie_vectors"), &d_vectors, self.limits.gradient)?;
        let mut embeds = vec![0.0; self.prompts.len() * self.padded * hidden];
        let mut d_embeds = embeds.clone();
        let input = self.model.inputs(&batch, vectors, &mut self.workspace)?;
        for (segment, b) in batch.segments.iter().zip(1..) {
            let at = (b * self.padded - segment.kv.len()) * hidden;
            let rows = segment.kv.start * hidden..segment.kv.end * hidden;
            embeds[at..at + rows.len()].copy_from_slice(&input[rows.clone()]);
            d_embeds[at..at + rows.len()].copy_from_slice(&d_rows[rows]);
        }
        // The golden's padding rows hold the padding token's embedding, which nobody reads: only real rows are compared.
        self.compare_rows(&format!("{case}.inputs_embeds"), &embeds, self.limits.value)?;
        self.compare_rows(&format!("{case}.grad.inputs_embeds"), &d_embeds, self.limits.gradient)?;
        // Stage 2's way: the text before the first slot is a prefix without gradient, the adapter is frozen.
        let batch = PackedBatch::new(&self.prompts(case), 1, GradientFrom::FirstSlot, 0);
        let mut d_suffix = vec![0.0; vectors.len()];
        self.train(&batch, adapter.as_ref(), vectors, None, &mut d_suffix, None)?;
        self.compare(&format!("{case}.grad.cie_vectors"), &d_suffix, self.limits.gradient)?;
        if let Some((mapping, x)) = mapping {
            let pass = mapping.forward(&x);
            let mut gradient = Mapping::zeros(mapping.dim, mapping.mid, mapping.out);
            mapping.backward(&x, &pass, &d_suffix, &mut gradient);
            for (values, name) in gradient.tensors.iter().zip(Mapping::NAMES) {
                self.compare(&format!("{case}.grad.{name}"), values, self.limits.gradient)?;
            }
        }
        Ok(())
    }

    fn train(
        &mut self,
        batch: &PackedBatch,
        lora: Option<&LoraTensors>,
        vectors: &[f32],
        d_lora: Option<&mut LoraTensors>,
        d_vectors: &mut [f32],
        d_inputs: Option<&mut Vec<f32>>,
    ) -> Result<f32, Error> {
        let n = self.prompts.len();
        let pass = TrainPass {
            lora,
            dropout: None,
            batch,
            vectors,
            labels: &self.labels,
            weight: 1.0 / n as f32,
            loss: Loss::YesLogitBce,
            d_lora,
            d_vectors: Some(d_vectors),
            d_inputs,
        };
        Ok((self.model.train_pass(pass, &mut self.workspace)?.1 / n as f64) as f32)
    }

    fn compare(&mut self, name: &str, got: &[f32], limit: f64) -> Result<(), Error> {
        let Some(want) = self.golden.best(name)? else { return Ok(()) };
        self.push(name, got, &want, limit)
    }

    /// Compares `[B, T, hidden]` without the padding.
    fn compare_rows(&mut self, name: &str, got: &[f32], limit: f64) -> Result<(), Error> {
        let Some(mut want) = self.golden.best(name)? else { return Ok(()) };
        let hidden = self.model.config().hidden_size;
        if want.len() == got.len() {
            for (row, (ids, _)) in want.chunks_mut(self.padded * hidden).zip(&self.prompts) {
                row[..(self.padded - ids.len()) * hidden].fill(0.0);
            }
        }
        self.push(name, got, &want, limit)
    }

    fn push(&mut self, name: &str, got: &[f32], want: &[f64], limit: f64) -> Result<(), Error> {
        if got.len() != want.len() {
            return Err(self.golden.error(format!(
                "{name} has {} elements, the engine computes {}",
                want.len(),
                got.len()
            )));
        }
        let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let differences = got.iter().zip(want).map(|(&g, &w)| (f64::from(g) - w).abs());
        // NaN must not hide: f64::max would drop it.
        let worst = differences.fold(0.0f64, |m, d| if d.is_nan() || m.is_nan() { f64::NAN } else { m.max(d) });
        let error = if largest > 0.0 { worst / largest } else { worst };
        self.report.comparisons.push(Comparison { name: name.to_string(), error, limit });
        Ok(())
    }
}

/// The tensors of a golden file.
struct Golden {
    path: std::path::PathBuf,
    tensors: BTreeMap<String, (Dtype, Vec<u8>)>,
}

impl Golden {
    fn load(path: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let parsed = SafeTensors::deserialize(&bytes);
        let parsed = parsed
            .map_err(|e| Error::Golden { path: path.to_path_buf(), what: format!("not a safetensors file: {e}") })?;
        let tensors =
            parsed.iter().map(|(name, view)| (name.to_string(), (view.dtype(), view.data().to_vec()))).collect();
        Ok(Golden { path: path.to_path_buf(), tensors })
    }

    fn error(&self, what: String) -> Error {
        Error::Golden { path: self.path.clone(), what }
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The float64 form if there is one, else what there is.
    fn best(&self, name: &str) -> Result<Option<Vec<f64>>, Error> {
        let exact = format!("{name}.f64");
        match (self.has(&exact), self.has(name)) {
            (true, _) => self.floats(&exact).map(Some),
            (_, true) => self.floats(name).map(Some),
            _ => Ok(None),
        }
    }

    fn floats(&self, name: &str) -> Result<Vec<f64>, Error> {
        let (dtype, bytes) = self.tensors.get(name).ok_or_else(|| self.error(format!("no tensor {name}")))?;
        Ok(match dtype {
            Dtype::F64 => bytemuck::pod_collect_to_vec(bytes),
            Dtype::F32 => bytemuck::pod_collect_to_vec(bytes).into_iter().map(|x: f32| f64::from(x)).collect(),
            Dtype::I64 => bytemuck::pod_collect_to_vec(bytes).into_iter().map(|x: i64| x as f64).collect(),
            other => return Err(self.error(format!("{name} has type {other:?}; expected F32, F64 or I64"))),
        })
    }

    fn integers(&self, name: &str) -> Result<Vec<i64>, Error> {
        Ok(self.floats(name)?.into_iter().map(|x| x as i64).collect())
    }
}
