//! The mapping `g`: `Linear(d → mid) → ReLU → Linear(mid → hidden · tokens_per_vector)`, one MLP for users and items
//! (CoLLM, section 4.2; tensor names as in the official checkpoint, `llama_proj.{0,2}.{weight,bias}`).

use crate::device::cpu::gemm::{Dense, Operand, Output, gemm};
use crate::device::profile::{Group, product, span};
use crate::rng::Rng;

/// Parameters of the mapping, or gradients of them (same shapes).
#[derive(Clone, Debug, PartialEq)]
pub struct Mapping {
    /// Width of a collaborative vector.
    pub dim: usize,
    /// Width of the hidden layer.
    pub mid: usize,
    /// Width of the output: the LLM's hidden size times tokens per vector.
    pub out: usize,
    /// `llama_proj.0.weight [mid, dim]`, `.0.bias [mid]`, `.2.weight [out, mid]`, `.2.bias [out]`.
    pub tensors: [Vec<f32>; 4],
}

/// What [`Mapping::forward`] keeps for [`Mapping::backward`].
#[derive(Clone, Debug, Default)]
pub struct MappingPass {
    /// Mapped vectors, `[n, out]`.
    pub output: Vec<f32>,
    activated: Vec<f32>,
}

impl Mapping {
    /// Names of the four tensors.
    pub const NAMES: [&'static str; 4] =
        ["llama_proj.0.weight", "llama_proj.0.bias", "llama_proj.2.weight", "llama_proj.2.bias"];

    /// PyTorch's default initialisation of `nn.Linear`: weights and biases uniform in ±1/√fan_in.
    pub fn init(dim: usize, mid: usize, out: usize, seed: u64) -> Self {
        let mut rng = Rng::new(seed, 0xc1e);
        let mut mapping = Mapping::zeros(dim, mid, out);
        for (tensor, fan_in) in mapping.tensors.iter_mut().zip([dim, dim, mid, mid]) {
            let bound = 1.0 / (fan_in as f64).sqrt();
            tensor.iter_mut().for_each(|w| *w = ((2.0 * rng.uniform() - 1.0) * bound) as f32);
        }
        mapping
    }

    /// Weight decay of the four tensors: on matrices, not on biases, as officially.
    pub fn decays(weight_decay: f64) -> [f64; 4] {
        [weight_decay, 0.0, weight_decay, 0.0]
    }

    /// All zero: a gradient to add to.
    pub fn zeros(dim: usize, mid: usize, out: usize) -> Self {
        Mapping { dim, mid, out, tensors: [mid * dim, mid, out * mid, out].map(|n| vec![0.0; n]) }
    }

    /// Shapes of the four tensors.
    pub fn shapes(&self) -> [Vec<usize>; 4] {
        [vec![self.mid, self.dim], vec![self.mid], vec![self.out, self.mid], vec![self.out]]
    }

    /// Maps `x: [n, dim]`.
    pub fn forward(&self, x: &[f32]) -> MappingPass {
        let n = x.len() / self.dim;
        let _span = span(Group::Mapping, || product(n, self.mid, self.dim + self.out));
        let [w1, b1, w2, b2] = &self.tensors;
        let linear = |x: &[f32], n_in: usize, w: &[f32], b: &[f32]| {
            let mut y: Vec<f32> = b.iter().copied().cycle().take(n * b.len()).collect();
            let w = Operand::Dense(Dense::transposed(w, n_in));
            gemm(n, b.len(), n_in, Dense::rows(x, n_in), w, Output::add(&mut y, b.len()));
            y
        };
        let mut activated = linear(x, self.dim, w1, b1);
        activated.iter_mut().for_each(|a| *a = a.max(0.0));
        MappingPass { output: linear(&activated, self.mid, w2, b2), activated }
    }

    /// Adds the gradients for `d_output: [n, out]` to `gradient`. Returns `d_x: [n, dim]`.
    pub fn backward(&self, x: &[f32], pass: &MappingPass, d_output: &[f32], gradient: &mut Mapping) -> Vec<f32> {
        let n = x.len() / self.dim;
        let (dim, mid, out) = (self.dim, self.mid, self.out);
        let _span = span(Group::Mapping, || 2.0 * product(n, mid, dim + out));
        let [g1, gb1, g2, gb2] = &mut gradient.tensors;
        let parameters = |x: &[f32], n_in: usize, d_y: &[f32], n_out: usize, g: &mut [f32], gb: &mut [f32]| {
            let x = Operand::Dense(Dense::rows(x, n_in));
            gemm(n_out, n_in, n, Dense::transposed(d_y, n_out), x, Output::add(g, n_in));
            for d_y in d_y.chunks_exact(n_out) {
                gb.iter_mut().zip(d_y).for_each(|(g, d)| *g += d);
            }
        };
        parameters(&pass.activated, mid, d_output, out, g2, gb2);
        let mut d_mid = vec![0.0; n * mid];
        let w2 = Operand::Dense(Dense::rows(&self.tensors[2], mid));
        gemm(n, mid, out, Dense::rows(d_output, out), w2, Output::set(&mut d_mid, mid));
        d_mid.iter_mut().zip(&pass.activated).for_each(|(d, &a)| *d = if a > 0.0 { *d } else { 0.0 });
        parameters(x, dim, &d_mid, mid, g1, gb1);
        let mut d_x = vec![0.0; n * dim];
        let w1 = Operand::Dense(Dense::rows(&self.tensors[0], dim));
        gemm(n, dim, mid, Dense::rows(&d_mid, mid), w1, Output::set(&mut d_x, dim));
        d_x
    }
}
