//! Layers that the neural models share: named weights, linear layers, layer norm, dropout, each with its backward.
//!
//! A batch is cut into chunks of rows that do not depend on the number of threads; everything here works on one chunk, on one thread,
//! unless it says otherwise. Buffers are row-major, `[rows, width]`.

use std::path::Path;
use std::sync::Arc;

use super::Error;
use super::mf::save_tensors;
use super::real::{Matrix, Real};
use crate::checkpoint::{Tensor, read_tensors, take_tensor};
use crate::device::ops::Dropout;
use crate::rng::{Rng, philox4x32_lanes};

/// How a tensor begins.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    /// All the same.
    Constant(f64),
    /// Normal with this deviation.
    Normal(f64),
    /// As [`Self::Normal`], with the first row zero (padding).
    Table(f64),
    /// Uniform between minus and plus this.
    Uniform(f64),
}

/// Named tensors of a model, or gradients of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights<T> {
    /// Names and shapes.
    pub names: Arc<Vec<(String, Vec<usize>)>>,
    /// Their values.
    pub values: Vec<Vec<T>>,
}

impl<T: Real> Weights<T> {
    /// Draws tensors of these names, shapes and beginnings: a stream of random numbers each.
    pub fn init(plan: Vec<(String, Vec<usize>, Init)>, seed: u64) -> Self {
        let draw = |(i, (_, shape, init)): (usize, &(String, Vec<usize>, Init))| {
            let n: usize = shape.iter().product();
            let mut rng = Rng::new(seed, 0x3f30_0000 + i as u64);
            let mut values: Vec<T> = (0..n)
                .map(|_| match *init {
                    Init::Constant(x) => T::from_wide(x),
                    Init::Normal(deviation) | Init::Table(deviation) => T::from_wide(deviation * rng.normal()),
                    Init::Uniform(bound) => T::from_wide(bound * (2.0 * rng.uniform() - 1.0)),
                })
                .collect();
            if matches!(init, Init::Table(_)) {
                values[..shape[1]].fill(T::default());
            }
            values
        };
        let values = plan.iter().enumerate().map(draw).collect();
        Weights { names: Arc::new(plan.into_iter().map(|(name, shape, _)| (name, shape)).collect()), values }
    }
}

impl Weights<f32> {
    /// As tensors of a file.
    pub fn tensors(&self) -> Vec<Tensor> {
        let parts = self.names.iter().zip(&self.values);
        parts.map(|((name, shape), values)| Tensor::new(name.as_str(), shape.clone(), values.clone())).collect()
    }

    /// The values, to be changed.
    pub fn values_mut(&mut self) -> Vec<&mut [f32]> {
        self.values.iter_mut().map(Vec::as_mut_slice).collect()
    }

    /// Writes the tensors, with facts as metadata.
    pub fn save(&self, path: &Path, facts: &[(&str, String)]) -> Result<(), Error> {
        save_tensors(&self.tensors(), path, facts)
    }

    /// Reads a file. `plan` is told how many rows each of the file's tensors has, and names what is expected.
    pub fn load(
        path: &Path,
        plan: impl Fn(&dyn Fn(&str) -> usize) -> Vec<(String, Vec<usize>, Init)>,
    ) -> Result<Self, Error> {
        let (mut tensors, _) = read_tensors(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let rows =
            |name: &str| tensors.iter().find(|t| t.name == name).and_then(|t| t.shape.first().copied()).unwrap_or(0);
        let names: Vec<_> = plan(&rows).into_iter().map(|(name, shape, _)| (name, shape)).collect();
        let take = |(name, shape): &(String, Vec<usize>)| {
            take_tensor(&mut tensors, name, shape).map_err(|what| Error::Model { path: path.into(), what })
        };
        let values = names.iter().map(take).collect::<Result<_, _>>()?;
        Ok(Weights { names: Arc::new(names), values })
    }
}

/// `y = x Wᵀ + b`, W: `[out, in]`.
pub fn linear<T: Real>(serial: bool, x: &[T], w: &[T], b: &[T]) -> Vec<T> {
    let (out, n_in) = (b.len(), w.len() / b.len());
    let n = x.len() / n_in;
    let mut y = b.repeat(n);
    T::product(serial, [n, out, n_in], Matrix::rows(x, n_in), Matrix::transposed(w, n_in), true, &mut y, out);
    y
}

/// Adds the gradients of W and b of [`linear`] to `d_w` and `d_b`; returns that of x.
pub fn linear_backward<T: Real>(serial: bool, x: &[T], w: &[T], d_y: &[T], d_w: &mut [T], d_b: &mut [T]) -> Vec<T> {
    let (out, n_in) = (d_b.len(), w.len() / d_b.len());
    let n = x.len() / n_in;
    T::product(serial, [out, n_in, n], Matrix::transposed(d_y, out), Matrix::rows(x, n_in), true, d_w, n_in);
    sum_rows(d_y, d_b);
    let mut d_x = vec![T::default(); x.len()];
    T::product(serial, [n, n_in, out], Matrix::rows(d_y, out), Matrix::rows(w, n_in), false, &mut d_x, n_in);
    d_x
}

/// `sum += Σ rows`.
pub fn sum_rows<T: Real>(rows: &[T], sum: &mut [T]) {
    for row in rows.chunks_exact(sum.len()) {
        add(row, sum);
    }
}

/// `to += from`.
pub fn add<T: Real>(from: &[T], to: &mut [T]) {
    to.iter_mut().zip(from).for_each(|(t, &f)| *t += f);
}

/// `x *= factors`; no factors: x stays.
pub fn scale<T: Real>(x: &mut [T], factors: &[T]) {
    x.iter_mut().zip(factors).for_each(|(x, &f)| *x *= f);
}

/// What the backward pass of [`layer_norm`] needs.
#[derive(Debug)]
pub struct NormPass<T> {
    /// Normalised rows.
    x_hat: Vec<T>,
    /// Reciprocal deviation of each row.
    r: Vec<T>,
}

/// PyTorch's LayerNorm of each row, biased variance; `eps` as officially, 1e-8.
pub fn layer_norm<T: Real>(x: &[T], weight: &[T], bias: &[T]) -> (Vec<T>, NormPass<T>) {
    let d = weight.len();
    let scale = T::from_wide(1.0 / d as f64);
    let (mut x_hat, mut r, mut y) = (x.to_vec(), Vec::with_capacity(x.len() / d), vec![T::default(); x.len()]);
    for (x_hat, y) in x_hat.chunks_exact_mut(d).zip(y.chunks_exact_mut(d)) {
        let mean = sum(x_hat.len(), |i| x_hat[i]) * scale;
        x_hat.iter_mut().for_each(|x| *x = *x - mean);
        let variance = sum(x_hat.len(), |i| x_hat[i] * x_hat[i]) * scale;
        let inverse = T::from_wide(1.0) / (variance + T::from_wide(1e-8)).sqrt();
        for (i, x) in x_hat.iter_mut().enumerate() {
            *x *= inverse;
            y[i] = *x * weight[i] + bias[i];
        }
        r.push(inverse);
    }
    (y, NormPass { x_hat, r })
}

/// Adds the gradients of weight and bias to `d_weight` and `d_bias`; returns that of x.
pub fn layer_norm_backward<T: Real>(
    pass: &NormPass<T>,
    weight: &[T],
    d_y: &[T],
    d_weight: &mut [T],
    d_bias: &mut [T],
) -> Vec<T> {
    let d = weight.len();
    let scale = T::from_wide(1.0 / d as f64);
    let mut d_x = d_y.to_vec();
    for ((d_x, x_hat), &r) in d_x.chunks_exact_mut(d).zip(pass.x_hat.chunks_exact(d)).zip(&pass.r) {
        for i in 0..d {
            d_weight[i] += d_x[i] * x_hat[i];
            d_bias[i] += d_x[i];
            d_x[i] *= weight[i];
        }
        let mean = sum(d, |i| d_x[i]) * scale;
        let along = sum(d, |i| d_x[i] * x_hat[i]) * scale;
        for i in 0..d {
            d_x[i] = (d_x[i] - mean - x_hat[i] * along) * r;
        }
    }
    d_x
}

/// `Σ f(0..n)` in eight lanes: a fixed order that vectorises.
#[inline]
pub fn sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    let mut lanes = [T::default(); 8];
    let whole = n / 8 * 8;
    for i in (0..whole).step_by(8) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    lanes.into_iter().fold(T::default(), |a, b| a + b)
}

/// What dropout multiplies the `n` elements of place `site` of chunk `chunk` with: 0, or 1 / (1 − p). A function of seed, step, chunk,
/// site and element. Nothing where nothing is dropped.
pub fn factors<T: Real>(dropout: Option<Dropout>, chunk: usize, site: usize, n: usize) -> Vec<T> {
    let Some(dropout) = dropout else { return Vec::new() };
    const LANES: usize = 16;
    let (threshold, kept) = (dropout.threshold(), T::from_wide(1.0 / (1.0 - f64::from(dropout.p))));
    let mut out = Vec::with_capacity(n + 4 * LANES);
    for block in (0..n.div_ceil(4)).step_by(LANES) {
        let counter = [block as u32, site as u32, chunk as u32, dropout.step as u32];
        let words = philox4x32_lanes::<LANES>(dropout.key(), counter);
        let factor = |word: &u32| if *word < threshold { T::default() } else { kept };
        out.extend(words.as_flattened().iter().map(factor));
    }
    out.truncate(n);
    out
}
