//! Weights of a Hugging Face model directory: memory-mapped safetensors, checked against the configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

use super::{Error, ModelConfig};
use crate::rng::Rng;

#[derive(Clone)]
enum Data {
    /// Bytes `start..end` of a mapped file, aligned for their type.
    Mapped(Arc<Mmap>, usize, usize),
    F32(Arc<Vec<f32>>),
    Half(Arc<Vec<u16>>),
}

/// A row-major matrix in the type of its file, usually borrowed from the memory map.
#[derive(Clone)]
pub struct WeightMatrix {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    data: Data,
}

impl std::fmt::Debug for WeightMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightMatrix[{}, {}] {:?}", self.rows, self.cols, self.dtype)
    }
}

impl WeightMatrix {
    /// A float32 matrix. Panics if the length is not `rows · cols`.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), rows * cols);
        WeightMatrix { rows, cols, dtype: Dtype::F32, data: Data::F32(Arc::new(values)) }
    }

    /// A matrix of raw bf16 bits. Panics if the length is not `rows · cols`.
    pub fn from_bf16(rows: usize, cols: usize, bits: Vec<u16>) -> Self {
        assert_eq!(bits.len(), rows * cols);
        WeightMatrix { rows, cols, dtype: Dtype::BF16, data: Data::Half(Arc::new(bits)) }
    }

    /// A matrix of raw f16 bits. Panics if the length is not `rows · cols`.
    pub fn from_f16(rows: usize, cols: usize, bits: Vec<u16>) -> Self {
        assert_eq!(bits.len(), rows * cols);
        WeightMatrix { rows, cols, dtype: Dtype::F16, data: Data::Half(Arc::new(bits)) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The elements, if they are float32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::F32(v) => Some(v),
            Data::Mapped(map, start, end) if self.dtype == Dtype::F32 => Some(bytemuck::cast_slice(&map[*start..*end])),
            _ => None,
        }
    }

    /// The raw bits, if the elements are bf16.
    pub fn as_bf16(&self) -> Option<&[u16]> {
        if self.dtype == Dtype::BF16 { self.half_bits() } else { None }
    }

    /// The raw bits, if the elements are f16.
    pub fn as_f16(&self) -> Option<&[u16]> {
        if self.dtype == Dtype::F16 { self.half_bits() } else { None }
    }

    fn half_bits(&self) -> Option<&[u16]> {
        match &self.data {
            Data::Half(v) => Some(v),
            Data::Mapped(map, start, end) => Some(bytemuck::cast_slice(&map[*start..*end])),
            Data::F32(_) => None,
        }
    }

    /// Row `r` widened to float32; `out` holds `cols` elements.
    pub fn read_row(&self, r: usize, out: &mut [f32]) {
        let at = r * self.cols..(r + 1) * self.cols;
        if let Some(values) = self.as_f32() {
            out.copy_from_slice(&values[at]);
        } else if let Some(bits) = self.as_bf16() {
            out.iter_mut().zip(&bits[at]).for_each(|(o, &b)| *o = half::bf16::from_bits(b).to_f32());
        } else if let Some(bits) = self.as_f16() {
            out.iter_mut().zip(&bits[at]).for_each(|(o, &b)| *o = half::f16::from_bits(b).to_f32());
        }
    }

    /// All elements widened to float32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.rows * self.cols];
        all.chunks_exact_mut(self.cols.max(1)).enumerate().for_each(|(r, row)| self.read_row(r, row));
        all
    }
}

/// The weights of one block, matrices `[out, in]` as in the file.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Norm before attention, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// Norm before the MLP, `[hidden]`.
    pub post_norm: Vec<f32>,
    /// Query projection.
    pub q: WeightMatrix,
    /// Key projection.
    pub k: WeightMatrix,
    /// Value projection.
    pub v: WeightMatrix,
    /// Output projection.
    pub o: WeightMatrix,
    /// Gate projection.
    pub gate: WeightMatrix,
    /// Up projection.
    pub up: WeightMatrix,
    /// Down projection.
    pub down: WeightMatrix,
    /// Biases of q, k, v, o, gate, up, down, where the configuration has them.
    pub biases: [Option<Vec<f32>>; 7],
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct ModelWeights {
    /// The architecture.
    pub config: ModelConfig,
    /// `[vocab_size, hidden]`.
    pub embed_tokens: WeightMatrix,
    /// Blocks in order.
    pub layers: Vec<LayerWeights>,
    /// Norm after the last block, `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab_size, hidden]`; `None` when tied to the input embedding.
    pub lm_head: Option<WeightMatrix>,
    /// SHA-256 over the headers, the lengths, and 4 KiB of every 256 KiB of the data: enough to tell models apart, cheap
    /// enough for every start.
    pub fingerprint: String,
}

pub(super) const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl ModelWeights {
    /// Maps the weights of a directory with `config.json` and `model.safetensors`, or shards and their index.
    ///
    /// Every tensor the configuration asks for must be there with its shape, and no other. All problems are named at once.
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let config = ModelConfig::from_dir(dir)?;
        let mut loader = Loader { dir, problems: Vec::new(), tensors: BTreeMap::new(), hash: Sha256::new() };
        loader.open_all()?;
        let hidden = config.hidden_size;
        let embed_tokens = loader.matrix("model.embed_tokens.weight", config.vocab_size, hidden);
        let final_norm = loader.vector("model.norm.weight", hidden);
        let lm_head = match config.tie_word_embeddings {
            true => {
                // Some exporters write the tied head again.
                loader.tensors.remove("lm_head.weight");
                None
            }
            false => Some(loader.matrix("lm_head.weight", config.vocab_size, hidden)),
        };
        let layers = (0..config.n_layers).map(|l| loader.layer(&config, l)).collect();
        let (path, mut problems) = (dir.to_path_buf(), loader.problems);
        // Old checkpoints carry the rotary frequencies as a buffer; they follow from the configuration.
        let extra = loader.tensors.into_keys().filter(|k| !k.ends_with("rotary_emb.inv_freq"));
        problems.extend(extra.map(|name| format!("unexpected tensor {name}: the configuration has no such weight")));
        if !problems.is_empty() {
            return Err(Error::Weights { path, problems });
        }
        let fingerprint = loader.hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(ModelWeights { config, embed_tokens, layers, final_norm, lm_head, fingerprint })
    }

    /// Random bf16 weights N(0, 0.02²) of a configuration, norms 1: for benchmarks and tests where weights cannot be had.
    pub fn random(config: &ModelConfig, seed: u64) -> Self {
        let mut stream = 0;
        let mut matrix = |rows: usize, cols: usize| {
            stream += 1;
            let mut rng = Rng::new(seed, stream);
            let bits = (0..rows * cols).map(|_| half::bf16::from_f64(0.02 * rng.normal()).to_bits()).collect();
            WeightMatrix::from_bf16(rows, cols, bits)
        };
        let shapes = module_shapes(config);
        let layers = (0..config.n_layers)
            .map(|_| {
                let [q, k, v, o, gate, up, down] = shapes.map(|(rows, cols)| matrix(rows, cols));
                let (input_norm, post_norm) = (vec![1.0; config.hidden_size], vec![1.0; config.hidden_size]);
                let has = bias_flags(config);
                let biases = std::array::from_fn(|m| has[m].then(|| vec![0.0; shapes[m].0]));
                LayerWeights { input_norm, post_norm, q, k, v, o, gate, up, down, biases }
            })
            .collect();
        ModelWeights {
            embed_tokens: matrix(config.vocab_size, config.hidden_size),
            layers,
            final_norm: vec![1.0; config.hidden_size],
            lm_head: (!config.tie_word_embeddings).then(|| matrix(config.vocab_size, config.hidden_size)),
            fingerprint: format!("random-{seed}"),
            config: config.clone(),
        }
    }
}

/// (out, in) of q, k, v, o, gate, up, down.
pub(super) fn module_shapes(config: &ModelConfig) -> [(usize, usize); 7] {
    let (h, i) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim);
    [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]
}

/// Which of q, k, v, o, gate, up, down have a bias.
pub(super) fn bias_flags(config: &ModelConfig) -> [bool; 7] {
    let (qkv, o, mlp) = (config.qkv_bias, config.o_bias, config.mlp_bias);
    [qkv, qkv, qkv, o, mlp, mlp, mlp]
}

struct Found {
    dtype: Dtype,
    shape: Vec<usize>,
    file: PathBuf,
    map: Arc<Mmap>,
    start: usize,
    end: usize,
}

struct Loader<'a> {
    dir: &'a Path,
    problems: Vec<String>,
    tensors: BTreeMap<String, Found>,
    hash: Sha256,
}

impl Loader<'_> {
    fn open_all(&mut self) -> Result<(), Error> {
        let index = self.dir.join("model.safetensors.index.json");
        if !index.exists() {
            return self.open(&self.dir.join("model.safetensors"));
        }
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
        let problem = |what: String| Error::Weights { path: index.clone(), problems: vec![what] };
        let parsed: Index = serde_json::from_str(&text).map_err(|e| problem(format!("not a shard index: {e}")))?;
        let shards: BTreeSet<&String> = parsed.weight_map.values().collect();
        for shard in shards {
            if shard.contains(['/', '\\']) {
                return Err(problem(format!("shard {shard:?} is not a file name in this directory")));
            }
            let path = self.dir.join(shard);
            if !path.exists() {
                return Err(problem(format!("shard {shard} is named in the index but absent; download it again")));
            }
            self.open(&path)?;
        }
        for (name, shard) in &parsed.weight_map {
            if self.tensors.get(name).is_none_or(|t| !t.file.ends_with(shard)) {
                self.problems.push(format!("{name} is not in {shard}, where the index puts it"));
            }
        }
        Ok(())
    }

    fn open(&mut self, path: &Path) -> Result<(), Error> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read only; changing a model file under a running process is the user's to avoid.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(Error::io(path))?);
        let broken = |e: safetensors::SafeTensorError| Error::Weights {
            path: path.to_path_buf(),
            problems: vec![format!("not a whole safetensors file ({e}); {} bytes; copy it again", map.len())],
        };
        let (header_len, _) = SafeTensors::read_metadata(&map).map_err(broken)?;
        let parsed = SafeTensors::deserialize(&map).map_err(broken)?;
        self.hash.update(&map[..header_len + 8]);
        self.hash.update((map.len() as u64).to_le_bytes());
        for block in map[header_len + 8..].chunks(1 << 18) {
            self.hash.update(&block[..block.len().min(4096)]);
        }
        for (name, view) in parsed.iter() {
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let found = Found {
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                file: path.to_path_buf(),
                map: map.clone(),
                start,
                end: start + view.data().len(),
            };
            if self.tensors.insert(name.to_string(), found).is_some() {
                self.problems.push(format!("{name} is in two shards"));
            }
        }
        Ok(())
    }

    fn layer(&mut self, config: &ModelConfig, l: usize) -> LayerWeights {
        let shapes = module_shapes(config);
        let has_bias = bias_flags(config);
        let hidden = config.hidden_size;
        let at = |name: &str| format!("model.layers.{l}.{name}");
        let [q, k, v, o, gate, up, down] = std::array::from_fn(|m| {
            let (rows, cols) = shapes[m];
            self.matrix(&at(&format!("{}.weight", MODULES[m])), rows, cols)
        });
        let biases = std::array::from_fn(|m| {
            has_bias[m].then(|| self.vector(&at(&format!("{}.bias", MODULES[m])), shapes[m].0))
        });
        LayerWeights {
            input_norm: self.vector(&at("input_layernorm.weight"), hidden),
            post_norm: self.vector(&at("post_attention_layernorm.weight"), hidden),
            q,
            k,
            v,
            o,
            gate,
            up,
            down,
            biases,
        }
    }

    fn vector(&mut self, name: &str, len: usize) -> Vec<f32> {
        self.take(name, &[len]).map(|m| m.to_f32()).unwrap_or_default()
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> WeightMatrix {
        self.take(name, &[rows, cols]).unwrap_or_else(|| WeightMatrix::from_f32(0, cols, Vec::new()))
    }

    /// The tensor, or a problem noted.
    fn take(&mut self, name: &str, shape: &[usize]) -> Option<WeightMatrix> {
        let Some(found) = self.tensors.remove(name) else {
            self.problems.push(format!("missing tensor {name}, shape {shape:?}"));
            return None;
        };
        if found.shape != shape {
            self.problems.push(format!("{name} has shape {:?}; the configuration needs {shape:?}", found.shape));
            return None;
        }
        let width = match found.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => {
                self.problems.push(format!("{name} has type {other:?}; supported: F32, F16, BF16"));
                return None;
            }
        };
        let (rows, cols) = if let [rows, cols] = *shape { (rows, cols) } else { (1, shape[0]) };
        let bytes = &found.map[found.start..found.end];
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(width);
        let data = match (aligned, width) {
            (true, _) => Data::Mapped(found.map.clone(), found.start, found.end),
            (false, 4) => Data::F32(Arc::new(bytemuck::pod_collect_to_vec(bytes))),
            (false, _) => Data::Half(Arc::new(bytemuck::pod_collect_to_vec(bytes))),
        };
        Some(WeightMatrix { rows, cols, dtype: found.dtype, data })
    }
}
