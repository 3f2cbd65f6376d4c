//! How fast the operations are, at the shapes of a model's layer, beside the best rates of the same run.
//!
//! Matrix products and attention are judged by their arithmetic and the best matrix product, everything else by the bytes it
//! has to move and a large copy. A card's time is its own (events), without the host's.

use std::time::Instant;

use super::random;
use crate::bench::gemm_ceiling;
use crate::device::cpu;
use crate::device::cpu::gemm::{Dense, FrozenMatrix, Operand, Output};
use crate::device::cuda::attention::{Attention, Backward, Tables};
use crate::device::cuda::gemm::{Epilogue, Gemm, Weight};
use crate::device::cuda::lora::{Adapter, GradTarget, Lora};
use crate::device::cuda::mask::{Mask, Numbers, mask_words};
use crate::device::cuda::memory::{Elements, to_elements};
use crate::device::cuda::norm::Norm;
use crate::device::cuda::rope::{Part, Rope};
use crate::device::cuda::rows::RowMoves;
use crate::device::cuda::{Buffer, Cuda, GemmChoice, Precision, Result, Rows};
use crate::device::ops::{Dropout, HeadShape, Segment};
use crate::llm::weights::WeightMatrix;

/// What was measured.
#[derive(Clone, Debug)]
pub struct Bench {
    /// Model, tokens.
    pub shape: String,
    /// Times mean nothing.
    pub emulated: bool,
    /// In the order of a layer.
    pub rows: Vec<Timed>,
    /// Bytes read and written each second by a copy far larger than the caches.
    pub copy_bytes_per_s: f64,
}

impl Bench {
    /// Rate of the best matrix product, flop/s.
    pub fn best_flops(&self) -> f64 {
        self.rows.iter().map(|r| r.flops / r.seconds).fold(0.0, f64::max)
    }
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Timed {
    /// Operation.
    pub operation: String,
    /// Of one run.
    pub seconds: f64,
    /// The same by cuBLASLt, where that is there and can.
    pub cublaslt: Option<f64>,
    /// Arithmetic, or 0 where bytes decide.
    pub flops: f64,
    /// Bytes read and written at least.
    pub bytes: f64,
}

/// Tokens of an ML-1M prompt, on average.
const PROMPT: usize = 186;
/// Rank of the adapters.
const RANK: usize = 8;

/// A layer's widths.
struct Layer {
    name: &'static str,
    hidden: usize,
    inter: usize,
    heads: HeadShape,
    prompts: usize,
}

impl Layer {
    fn new(name: &'static str, [hidden, inter]: [usize; 2], heads: [usize; 3], prompts: usize) -> Self {
        let [n_heads, n_kv_heads, head_dim] = heads;
        Layer { name, hidden, inter, heads: HeadShape { n_heads, n_kv_heads, head_dim }, prompts }
    }

    /// The largest that fits well into `bytes`.
    fn for_memory(bytes: usize) -> Self {
        match bytes >> 30 {
            0..2 => Layer::new("SmolLM2-135M", [576, 1536], [9, 3, 64], 16),
            2..8 => Layer::new("Qwen2-1.5B", [1536, 8960], [12, 2, 128], 16),
            _ => Layer::new("Vicuna-7B", [4096, 11008], [32, 32, 128], 16),
        }
    }

    fn tokens(&self) -> usize {
        self.prompts * PROMPT
    }

    fn qkv(&self) -> usize {
        self.heads.q_width() + 2 * self.heads.kv_width()
    }

    fn segments(&self) -> Vec<Segment> {
        (0..self.prompts)
            .map(|i| {
                let rows = i * PROMPT..(i + 1) * PROMPT;
                Segment { q: rows.clone(), kv: rows, prefix: 0..0 }
            })
            .collect()
    }

    /// Of scores and outputs, in the part below the diagonal.
    fn attention_flops(&self) -> f64 {
        let pairs = self.prompts * PROMPT * (PROMPT + 1) / 2;
        (4 * pairs * self.heads.q_width()) as f64
    }

    fn describe(&self) -> String {
        format!(
            "One layer of {}: hidden {}, MLP {}, heads {}/{} of {}, {} prompts of {PROMPT} tokens, LoRA of rank {RANK}.",
            self.name,
            self.hidden,
            self.inter,
            self.heads.n_heads,
            self.heads.n_kv_heads,
            self.heads.head_dim,
            self.prompts
        )
    }
}

/// Operations of a layer on a card.
struct CardBench<'a> {
    cuda: &'a Cuda,
    gemm: Gemm,
    rows: Vec<Timed>,
}

impl CardBench<'_> {
    /// Random numbers: a card computes zeros faster than they deserve.
    fn matrix(&self, rows: usize, columns: usize) -> Result<(Elements, Rows)> {
        let p = self.cuda.precision();
        let block = to_elements(p, &random(p, 1 << 14, 1));
        let bytes = rows * columns * p.bytes();
        let host: Vec<u8> = block.iter().copied().cycle().take(bytes).collect();
        let buffer = Buffer::from_host(self.cuda, &host, "a benchmark")?;
        let view = Rows::new(&buffer, p, rows, columns);
        Ok((buffer, view))
    }

    /// The best of three rounds, each long enough for the clock, after one to warm up.
    fn time(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        let once = self.cuda.seconds(1, &mut work)?;
        if self.cuda.is_emulated() {
            return Ok(once);
        }
        let runs = (0.02 / self.cuda.seconds(1, &mut work)?.max(1e-6)).ceil().clamp(1.0, 500.0);
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            best = best.min(self.cuda.seconds(runs as usize, &mut work)? / runs);
        }
        Ok(best)
    }

    fn flops(&mut self, operation: &str, flops: f64, work: impl FnMut() -> Result<()>) -> Result<()> {
        let seconds = self.time(work)?;
        self.rows.push(Timed { operation: operation.to_owned(), seconds, cublaslt: None, flops, bytes: 0.0 });
        Ok(())
    }

    /// A matrix product by our kernels, then by cuBLASLt.
    fn gemm(&mut self, operation: &str, flops: f64, work: impl Fn(&Gemm) -> Result<()>) -> Result<()> {
        self.gemm.choice = GemmChoice::Ours;
        let seconds = self.time(|| work(&self.gemm))?;
        self.gemm.choice = GemmChoice::CublasLt;
        let cublaslt = self.gemm.has_cublaslt().then(|| self.time(|| work(&self.gemm))).transpose()?;
        self.rows.push(Timed { operation: operation.to_owned(), seconds, cublaslt, flops, bytes: 0.0 });
        Ok(())
    }

    /// `elements` of the kernels' type, and `others` bytes.
    fn bytes(
        &mut self,
        operation: &str,
        elements: usize,
        others: usize,
        work: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let seconds = self.time(work)?;
        let bytes = (elements * self.cuda.precision().bytes() + others) as f64;
        self.rows.push(Timed { operation: operation.to_owned(), seconds, cublaslt: None, flops: 0.0, bytes });
        Ok(())
    }

    /// `[m, k]` times `[n, k]` or `[k, n]`.
    fn product(&mut self, operation: &str, way: Weight, [m, n, k]: [usize; 3], add: bool) -> Result<()> {
        let cuda = self.cuda;
        let (_a, a) = self.matrix(m, k)?;
        let (_b, b) = if way == Weight::Transposed { self.matrix(n, k)? } else { self.matrix(k, n)? };
        let (_c, c) = self.matrix(m, n)?;
        let epilogue = Epilogue::Plain { bias: 0, addend: add.then_some(c), masks: None };
        self.gemm(operation, 2.0 * (m * n * k) as f64, |gemm| gemm.run(cuda, a, b, way, c, epilogue))
    }

    fn products(&mut self, layer: &Layer) -> Result<()> {
        let (n, hidden, inter, q) = (layer.tokens(), layer.hidden, layer.inter, layer.heads.q_width());
        let (forward, backward) = (Weight::Transposed, Weight::Plain);
        self.product("gemm q, k, v", forward, [n, layer.qkv(), hidden], false)?;
        self.product("gemm output + residual", forward, [n, hidden, q], true)?;
        let cuda = self.cuda;
        let (_x, x) = self.matrix(n, hidden)?;
        let (_w, w) = self.matrix(2 * inter, hidden)?;
        let (_c, c) = self.matrix(n, 2 * inter)?;
        let (_act, act) = self.matrix(n, inter)?;
        let swiglu = Epilogue::Swiglu { bias: 0, act, keep: true };
        let flops = 4.0 * (n * inter * hidden) as f64;
        self.gemm("gemm gate, up, SwiGLU", flops, |gemm| gemm.run(cuda, x, w, forward, c, swiglu))?;
        self.product("gemm down + residual", forward, [n, hidden, inter], true)?;
        let (_down, down) = self.matrix(hidden, inter)?;
        let (_saved, gate_up) = self.matrix(n, 2 * inter)?;
        let through = Epilogue::SwigluBackward { gate_up, masks: None };
        // cuBLASLt has no part in this one.
        self.gemm.choice = GemmChoice::Ours;
        let seconds = self.time(|| self.gemm.run(cuda, x, down, backward, c, through))?;
        let operation = "gemm down backward, SwiGLU backward".to_owned();
        self.rows.push(Timed { operation, seconds, cublaslt: None, flops: flops / 2.0, bytes: 0.0 });
        self.product("gemm gate, up backward", backward, [n, hidden, 2 * inter], false)?;
        self.product("gemm output backward", backward, [n, q, hidden], false)?;
        self.product("gemm q, k, v backward", backward, [n, hidden, layer.qkv()], false)?;
        if !cuda.is_emulated() {
            self.product("gemm of 4096 cubed", forward, [4096; 3], false)?;
        }
        Ok(())
    }

    fn attention(&mut self, layer: &Layer) -> Result<()> {
        let (cuda, shape, n) = (self.cuda, layer.heads, layer.tokens());
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        let (_qkv, qkv) = self.matrix(n, layer.qkv())?;
        let (_out, out) = self.matrix(n, q_width)?;
        let (_d_out, d_out) = self.matrix(n, q_width)?;
        let (_d_qkv, d_qkv) = self.matrix(n, layer.qkv())?;
        let parts = |rows: Rows| {
            (rows.columns(0, q_width), rows.columns(q_width, kv_width), rows.columns(q_width + kv_width, kv_width))
        };
        let ((q, k, v), (d_q, d_k, d_v)) = (parts(qkv), parts(d_qkv));
        let lse = Buffer::new(cuda, n * shape.n_heads, "a benchmark")?;
        let delta = Buffer::new(cuda, n * shape.n_heads, "a benchmark")?;
        let attention = Attention::new(cuda, shape.head_dim)?;
        let mut tables = Tables::default();
        tables.prepare(cuda, &layer.segments(), &layer.segments(), 0)?;
        let flops = layer.attention_flops();
        self.flops("attention", flops, || attention.forward(cuda, shape, &tables, q, k, v, out, &lse))?;
        let backward = Backward { q, k, v, out, lse: &lse, lse_first: 0, d_out, delta: &delta, d_q, d_k, d_v };
        // Scores again, then the gradients of two products: five where the forward has two.
        self.flops("attention backward", 2.5 * flops, || attention.backward(cuda, shape, &tables, &backward))
    }

    fn row_operations(&mut self, layer: &Layer) -> Result<()> {
        let (cuda, n, hidden, heads) = (self.cuda, layer.tokens(), layer.hidden, layer.heads);
        let (q_width, qkv) = (heads.q_width(), layer.qkv());
        let (_x, x) = self.matrix(n, hidden)?;
        let (_h, h) = self.matrix(n, hidden)?;
        let (_w, w) = self.matrix(1, hidden)?;
        let inv_rms = Buffer::zeros(cuda, n, "a benchmark")?;
        let norm = Norm::new(cuda)?;
        let values = n * hidden;
        self.bytes("RMSNorm", 2 * values, 0, || norm.forward(cuda, x, w.address, 1e-5, h, &inv_rms, None))?;
        let address = inv_rms.address();
        self.bytes("RMSNorm backward", 4 * values, 0, || norm.backward(cuda, x, w.address, address, h, x))?;

        // Rows of [q | k | v | u of q | u of v].
        let (_rows, rows) = self.matrix(n, qkv + 2 * RANK)?;
        let (_b, b) = self.matrix(RANK, qkv)?;
        let positions: Vec<u32> = (0..n).map(|t| (t % PROMPT) as u32).collect();
        let positions = Buffer::from_host(cuda, &positions, "a benchmark")?;
        let inv_freq: Vec<f64> =
            (0..heads.head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / heads.head_dim as f64)).collect();
        let rope = Rope::new(cuda, &inv_freq, PROMPT)?;
        let adapter = |place: usize| Some(Adapter::new(qkv + place * RANK, RANK, b.address));
        let parts = [
            Part::turned(0, heads.n_heads, adapter(0)),
            Part::turned(q_width, heads.n_kv_heads, None),
            Part::plain(q_width + heads.kv_width(), heads.n_kv_heads, adapter(1)),
        ];
        let at = positions.address();
        let moved = 2 * n * (qkv + RANK);
        self.bytes("RoPE with LoRA's B on q and v", moved, 0, || rope.forward(cuda, rows, at, &parts))?;
        self.bytes("RoPE backward with d_u", moved, 0, || rope.backward(cuda, rows, at, &parts))?;

        let lora = Lora::new(cuda)?;
        let partials = Buffer::new(cuda, Lora::partials(n, hidden), "a benchmark")?;
        let gradient: Buffer<f32> = Buffer::zeros(cuda, RANK * hidden, "a benchmark")?;
        let target = GradTarget { to: gradient.address(), rank: RANK, is_b: false, scale: 1.0, stride: 1, offset: 0 };
        let u = rows.columns(qkv, RANK);
        self.bytes("LoRA gradient of A", values + n * RANK, 0, || {
            lora.gradient(cuda, u, x, None, &partials, &[target])
        })?;

        let (dropout, mask) = (Dropout { p: 0.05, seed: 1, step: 1 }, Mask::new(cuda)?);
        let numbers = Numbers::upload(cuda, &dropout)?;
        let bits = Buffer::new(cuda, n * mask_words(hidden), "a benchmark")?;
        self.bytes("dropout mask", 0, n * hidden / 8, || mask.run(cuda, &numbers, 0, &positions, 0, n, hidden, &bits))?;
        let order: Vec<i32> = (0..n as i32).rev().collect();
        let (order, moves) = (Buffer::from_host(cuda, &order, "a benchmark")?, RowMoves::new(cuda)?);
        self.bytes("gather rows", 2 * values, 0, || moves.gather(cuda, &order, x, h))
    }
}

/// One layer on a card; on the emulator a small one.
pub fn cuda(cuda: &Cuda) -> Result<Bench> {
    let emulated = cuda.is_emulated();
    let mut layer = Layer::for_memory(cuda.memory()?.0);
    if emulated {
        layer = Layer { prompts: 1, ..Layer::for_memory(0) };
    }
    let mut bench = CardBench { cuda, gemm: Gemm::new(cuda)?, rows: Vec::new() };
    bench.products(&layer)?;
    bench.attention(&layer)?;
    bench.row_operations(&layer)?;
    // Far larger than any cache, unless it is emulated.
    let bytes = if emulated { 1 << 20 } else { (cuda.memory()?.0 / 8).min(1 << 30) };
    let (from, mut to) = (Buffer::zeros(cuda, bytes, "a benchmark")?, Buffer::<u8>::new(cuda, bytes, "a benchmark")?);
    let seconds = bench.time(|| to.copy_from(cuda, 0, &from, bytes))?;
    let shape = format!("{}: {}", cuda.description().name, layer.describe());
    Ok(Bench { shape, emulated, rows: bench.rows, copy_bytes_per_s: 2.0 * bytes as f64 / seconds })
}

/// The best of five runs.
fn clock(mut work: impl FnMut()) -> f64 {
    let run = |_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    };
    (0..5).map(run).fold(f64::INFINITY, f64::min)
}

/// One layer on the CPU, frozen weights in bf16.
pub fn cpu() -> Bench {
    let layer = Layer { prompts: 4, ..Layer::for_memory(0) };
    let (n, hidden, inter, heads) = (layer.tokens(), layer.hidden, layer.inter, layer.heads);
    let mut rows = Vec::new();
    let mut push = |operation: &str, flops: f64, values: usize, seconds: f64| {
        rows.push(Timed {
            operation: operation.to_owned(),
            seconds,
            cublaslt: None,
            flops,
            bytes: 4.0 * values as f64,
        });
    };
    let (q_width, kv_width) = (heads.q_width(), heads.kv_width());
    for (name, out, width) in [
        ("q, k, v", layer.qkv(), hidden),
        ("output", hidden, q_width),
        ("gate, up", 2 * inter, hidden),
        ("down", hidden, inter),
    ] {
        let bits = random(Precision::Bf16, out * width, 1).iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect();
        let weight = FrozenMatrix::stack(vec![WeightMatrix::from_bf16(out, width, bits)]);
        let (x, d_y) = (random(Precision::F32, n * width, 2), random(Precision::F32, n * out, 3));
        let (mut y, mut d_x) = (vec![0.0; n * out], vec![0.0; n * width]);
        let flops = 2.0 * (n * out * width) as f64;
        let forward = clock(|| {
            let (x, w) = (Dense::rows(&x, width), Operand::Transposed(&weight));
            cpu::gemm::gemm(n, out, width, x, w, Output::set(&mut y, out));
        });
        push(&format!("gemm {name}"), flops, 0, forward);
        let backward = clock(|| {
            let (d_y, w) = (Dense::rows(&d_y, out), Operand::Weight(&weight));
            cpu::gemm::gemm(n, width, out, d_y, w, Output::set(&mut d_x, width));
        });
        push(&format!("gemm {name} backward"), flops, 0, backward);
    }
    let ceiling = gemm_ceiling() * 1e9;
    push("gemm 1024 x 2048 x 2048", 2.0 * (1024.0 * 2048.0 * 2048.0), 0, 2.0 * (1024.0 * 2048.0 * 2048.0) / ceiling);

    let segments = layer.segments();
    let [q, d_out] = [1, 2].map(|seed| random(Precision::F32, n * q_width, seed));
    let kv = random(Precision::F32, n * 2 * kv_width, 3);
    let (mut out, mut lse) = (vec![0.0; n * q_width], vec![0.0; n * heads.n_heads]);
    let (mut d_q, mut d_kv) = (vec![0.0; n * q_width], vec![0.0; n * 2 * kv_width]);
    let flops = layer.attention_flops();
    push("attention", flops, 0, clock(|| cpu::attention::attention(heads, &segments, &q, &kv, &mut out, &mut lse)));
    let backward = clock(|| {
        cpu::attention::attention_backward(heads, &segments, &q, &kv, &out, &lse, &d_out, 0, &mut d_q, &mut d_kv);
    });
    push("attention backward", 2.5 * flops, 0, backward);

    let [x, d_y] = [4, 5].map(|seed| random(Precision::F32, n * hidden, seed));
    let (w, mut y, mut inv_rms) = (vec![1.0; hidden], vec![0.0; n * hidden], vec![0.0; n]);
    let values = n * hidden;
    push("RMSNorm", 0.0, 2 * values, clock(|| cpu::norm::rms_norm(&x, &w, 1e-5, &mut y, &mut inv_rms)));
    let backward = clock(|| cpu::norm::rms_norm_backward(&x, &w, &inv_rms, &d_y, &mut y));
    push("RMSNorm backward", 0.0, 4 * values, backward);
    let gate_up = random(Precision::F32, n * 2 * inter, 6);
    let (mut act, mut d_gate_up) = (vec![0.0; n * inter], vec![0.0; n * 2 * inter]);
    push("SwiGLU", 0.0, 3 * n * inter, clock(|| cpu::swiglu::swiglu(&gate_up, &mut act, inter)));
    let backward = clock(|| cpu::swiglu::swiglu_backward(&gate_up, &act, &mut d_gate_up, inter));
    push("SwiGLU backward", 0.0, 5 * n * inter, backward);

    let (from, mut to) = (vec![1.0f32; 1 << 26], vec![0.0f32; 1 << 26]);
    let seconds = clock(|| cpu::copy(&from, &mut to));
    let copy_bytes_per_s = 8.0 * from.len() as f64 / seconds;
    let shape = format!("{} threads: {}", rayon::current_num_threads(), layer.describe());
    Bench { shape, emulated: false, rows, copy_bytes_per_s }
}
