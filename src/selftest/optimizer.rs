//! Steps of AdamW and of Adam with L2 over tensors of odd lengths, clipped and not, and a gradient that is not finite.
//!
//! The limit is twice the error of the formula in float32, one rounding after the other. Where nothing is clipped, the bits are
//! those of the CPU's optimizer.

use super::floats::Floats;
use super::{Outcome, random, relative_error};
use crate::device::cpu::optimizer::{Adam, Decay};
use crate::device::cuda::optimizer::{Optimizer, Step, Trained};
use crate::device::cuda::{Cuda, Precision, Result};

/// Shorter than a vector, a chunk exactly, a chunk and a bit, several.
pub(super) const LENGTHS: [usize; 5] = [3, 4096, 4101, 1, 9000];
pub(super) const STEPS: usize = 4;

/// The formula, in the arithmetic of `round`.
pub(super) struct Oracle {
    pub w: Vec<f64>,
    pub m: Vec<f64>,
    pub v: Vec<f64>,
}

impl Oracle {
    pub fn step(&mut self, t: usize, lr: f64, way: Decay, decay: &[f64], g: &[f64], round: fn(f64) -> f64) {
        let (c1, c2) = (1.0 - 0.9f64.powi(t as i32), 1.0 - 0.999f64.powi(t as i32));
        for (i, (&g, &decay)) in g.iter().zip(decay).enumerate() {
            let w = &mut self.w[i];
            let mut g = round(g);
            match way {
                Decay::Decoupled => *w = round(*w * round(1.0 - lr * decay)),
                Decay::Coupled => g = round(g + round(decay * *w)),
            }
            self.m[i] = round(round(0.9 * self.m[i]) + round(0.1 * g));
            self.v[i] = round(round(0.999 * self.v[i]) + round(round(0.001 * g) * g));
            let root = round(round(round(self.v[i].sqrt()) / round(c2.sqrt())) + 1e-8);
            *w = round(*w - round(round(round(lr / c1) * self.m[i]) / root));
        }
    }
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for way in [Decay::Decoupled, Decay::Coupled] {
        for (scale, max_norm) in [(1.0, f64::INFINITY), (0.25, f64::INFINITY), (0.25, 3.0), (1.0, 1e6)] {
            outcomes.extend(steps(cuda, way, scale, max_norm)?);
        }
        outcomes.push(not_finite(cuda, way)?);
    }
    Ok(outcomes)
}

/// Decay differs from tensor to tensor.
pub(super) fn decay_of(tensor: usize) -> f64 {
    [1e-3, 0.0, 0.02][tensor % 3]
}

fn steps(cuda: &Cuda, way: Decay, scale: f32, max_norm: f64) -> Result<Vec<Outcome>> {
    let draw = |seed: usize| -> Vec<Vec<f32>> {
        LENGTHS.iter().enumerate().map(|(i, &n)| random(Precision::F32, n, (seed * 16 + i) as u64)).collect()
    };
    let mut on_cpu = draw(0);
    let weights: Vec<Floats> = on_cpu.iter().map(|w| Floats::filled(cuda, w)).collect::<Result<_>>()?;
    let mut gradients: Vec<Floats> = LENGTHS.iter().map(|&n| Floats::new(cuda, n)).collect::<Result<_>>()?;
    let trained: Vec<Trained> = weights
        .iter()
        .zip(&gradients)
        .zip(LENGTHS)
        .enumerate()
        .map(|(i, ((w, g), len))| Trained { len, ..Trained::new(&w.buffer, &g.buffer, decay_of(i)) })
        .collect();
    let mut optimizer = Optimizer::new(cuda, way, &trained)?;
    let mut adam = Adam::new(way, LENGTHS);
    let decay: Vec<f64> = LENGTHS.iter().enumerate().flat_map(|(i, &n)| vec![decay_of(i); n]).collect();
    let start: Vec<f64> = on_cpu.concat().iter().map(|&w| w.into()).collect();
    let zeros = vec![0.0; start.len()];
    let mut exact = Oracle { w: start.clone(), m: zeros.clone(), v: zeros.clone() };
    let mut naive = Oracle { w: start, m: zeros.clone(), v: zeros };
    let (mut norm_error, mut clipped) = (0.0f64, false);
    for t in 1..=STEPS {
        let lr = 1e-2 / t as f64;
        let drawn = draw(t);
        for (to, g) in gradients.iter_mut().zip(&drawn) {
            to.buffer.upload(cuda, g)?;
        }
        optimizer.step(cuda, Step { lr, scale, max_norm, zero_gradients: t == STEPS })?;
        let wide: Vec<f64> = drawn.concat().iter().map(|&g| f64::from(g) * f64::from(scale)).collect();
        let norm = wide.iter().map(|g| g * g).sum::<f64>().sqrt();
        norm_error = norm_error.max((optimizer.norm(cuda)? - norm).abs() / norm);
        clipped |= norm > max_norm;
        let clip = if norm > max_norm { max_norm / (norm + 1e-6) } else { 1.0 };
        let wide: Vec<f64> = wide.iter().map(|g| g * clip).collect();
        exact.step(t, lr, way, &decay, &wide, |x| x);
        naive.step(t, lr, way, &decay, &wide, |x| f64::from(x as f32));
        let scaled: Vec<Vec<f32>> = drawn.iter().map(|g| g.iter().map(|g| g * scale).collect()).collect();
        let tensors = on_cpu.iter_mut().zip(&scaled).enumerate();
        adam.step(tensors.map(|(i, (w, g))| (w.as_mut_slice(), g.as_slice(), decay_of(i))).collect(), lr);
    }
    let (mut got, mut contained) = (Vec::new(), true);
    for w in &weights {
        let (values, inside) = w.read(cuda)?;
        got.extend(values);
        contained &= inside;
    }
    for g in &gradients {
        let (values, inside) = g.read(cuda)?;
        contained &= inside && values.iter().all(|&g| g == 0.0);
    }
    let state = optimizer.state(cuda)?;
    let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
    let error = |w: &[f32], m: &[f32], v: &[f32]| {
        relative_error(w, &exact.w).max(relative_error(m, &exact.m)).max(relative_error(v, &exact.v))
    };
    let limit = 2.0 * error(&narrow(&naive.w), &narrow(&naive.m), &narrow(&naive.v));
    let case = format!("{way:?} scale {scale} max norm {max_norm}");
    let mut outcomes = vec![
        Outcome {
            operation: "adam",
            case: case.clone(),
            error: error(&got, &state.m.concat(), &state.v.concat()),
            limit,
            contained,
        },
        Outcome {
            operation: "gradient norm",
            case: case.clone(),
            error: norm_error,
            limit: f64::from(f32::EPSILON),
            contained: true,
        },
    ];
    if !clipped {
        let same = got == on_cpu.concat() && state == adam;
        outcomes.push(Outcome {
            operation: "adam, bits of the CPU",
            case,
            error: if same { 0.0 } else { 1.0 },
            limit: 0.0,
            contained: true,
        });
    }
    // What was saved is what goes on.
    optimizer.restore(cuda, &adam)?;
    if let Some(outcome) = outcomes.first_mut() {
        outcome.contained &= optimizer.state(cuda)? == adam;
    }
    Ok(outcomes)
}

/// One gradient is infinite: nothing moves.
fn not_finite(cuda: &Cuda, way: Decay) -> Result<Outcome> {
    let start = random(Precision::F32, 70, 1);
    let mut gradient = start.clone();
    gradient[68] = f32::INFINITY;
    let (weights, g) = (Floats::filled(cuda, &start)?, Floats::filled(cuda, &gradient)?);
    let trained = Trained { len: 70, ..Trained::new(&weights.buffer, &g.buffer, 0.1) };
    let mut optimizer = Optimizer::new(cuda, way, &[trained])?;
    optimizer.step(cuda, Step { lr: 1.0, scale: 1.0, max_norm: 1.0, zero_gradients: true })?;
    let ((w, contained), state) = (weights.read(cuda)?, optimizer.state(cuda)?);
    let still = w == start && state.m[0].iter().chain(&state.v[0]).all(|&x| x == 0.0);
    let reported = !optimizer.norm(cuda)?.is_finite();
    let error = if still && reported { 0.0 } else { 1.0 };
    Ok(Outcome { operation: "adam", case: format!("{way:?} infinite gradient"), error, limit: 0.0, contained })
}
