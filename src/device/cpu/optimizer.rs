//! AdamW, and Adam with coupled L2, with PyTorch's arithmetic; and the clipping of gradients by their global norm.

use rayon::prelude::*;

use super::simd::per_isa;
use crate::device::profile::{Group, span};

/// How weight decay enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// AdamW: weights shrink by `lr · decay` beside the step (Loshchilov & Hutter 2019).
    Decoupled,
    /// Adam's `weight_decay` in PyTorch: `decay · w` is added to the gradient.
    Coupled,
}

/// State of the optimizer: moments of every tensor, and the number of steps taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Adam {
    /// How `weight_decay` enters.
    pub decay: Decay,
    /// Steps taken.
    pub step: u64,
    /// First moments, one vector a tensor.
    pub m: Vec<Vec<f32>>,
    /// Second moments.
    pub v: Vec<Vec<f32>>,
}

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;
/// Elements a task updates.
const CHUNK: usize = 1 << 14;

impl Adam {
    /// Zero moments for tensors of the given lengths.
    pub fn new(decay: Decay, lengths: impl IntoIterator<Item = usize>) -> Self {
        let m: Vec<Vec<f32>> = lengths.into_iter().map(|n| vec![0.0; n]).collect();
        Adam { decay, step: 0, v: m.clone(), m }
    }

    /// One step. `tensors`: weights, gradients and weight decay of every tensor, in the order of [`Self::new`].
    pub fn step(&mut self, tensors: Vec<(&mut [f32], &[f32], f64)>, lr: f64) {
        let _span = span(Group::Optimizer, || 0.0);
        self.step += 1;
        let t = self.step as i32;
        assert!(tensors.len() == self.m.len(), "{} tensors for the moments of {}", tensors.len(), self.m.len());
        for (((w, g, decay), m), v) in tensors.into_iter().zip(&mut self.m).zip(&mut self.v) {
            assert!(w.len() == g.len() && g.len() == m.len(), "a tensor changed its length");
            let numbers = Numbers {
                shrink: if self.decay == Decay::Decoupled { (1.0 - lr * decay) as f32 } else { 1.0 },
                coupled: if self.decay == Decay::Coupled { decay as f32 } else { 0.0 },
                step_size: (lr / (1.0 - BETA1.powi(t))) as f32,
                correction: (1.0 - BETA2.powi(t)).sqrt() as f32,
            };
            let chunks = w.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
            chunks
                .zip(m.par_chunks_mut(CHUNK))
                .zip(v.par_chunks_mut(CHUNK))
                .for_each(|(((w, g), m), v)| update(w, g, m, v, numbers));
        }
    }
}

/// What a step is for every element of a tensor.
#[derive(Clone, Copy)]
struct Numbers {
    /// Factor of decoupled decay.
    shrink: f32,
    /// Coupled L2.
    coupled: f32,
    /// Learning rate over the first moment's bias correction.
    step_size: f32,
    /// Root of the second moment's bias correction.
    correction: f32,
}

per_isa! {
    /// `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `w ← w − step_size · m / (√v / correction + ε)`.
    fn update(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], n: Numbers) {
        const B1: f32 = BETA1 as f32;
        const B2: f32 = BETA2 as f32;
        const C1: f32 = (1.0 - BETA1) as f32;
        const C2: f32 = (1.0 - BETA2) as f32;
        for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            *w *= n.shrink;
            let g = g + n.coupled * *w;
            *m = B1 * *m + C1 * g;
            *v = B2 * *v + C2 * g * g;
            *w -= n.step_size * *m / (v.sqrt() / n.correction + EPS as f32);
        }
    }
}

/// Scales all gradients so that their global L2 norm is at most `max`. Returns the norm before.
pub fn clip_global_norm(gradients: &mut [&mut [f32]], max: f64) -> f64 {
    let _span = span(Group::Optimizer, || 0.0);
    let norm = gradients.iter().flat_map(|g| g.iter()).map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if norm > max {
        let factor = (max / (norm + 1e-6)) as f32;
        gradients.iter_mut().for_each(|g| g.iter_mut().for_each(|x| *x *= factor));
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn load(file: &SafeTensors, name: &str) -> Vec<f32> {
        let t = file.tensor(name).unwrap();
        match t.dtype() {
            safetensors::Dtype::F64 => {
                bytemuck::pod_collect_to_vec::<u8, f64>(t.data()).iter().map(|&x| x as f32).collect()
            }
            _ => bytemuck::pod_collect_to_vec(t.data()),
        }
    }

    fn close(got: &[f32], want: &[f32], what: &str) {
        let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= 1e-6 * largest, "{what}: {g} against {w}");
        }
    }

    /// Steps of torch.optim.AdamW and torch.optim.Adam.
    #[test]
    fn golden_steps() {
        let bytes = include_bytes!("../../../tests/fixtures/golden/collab-optim/golden.safetensors");
        let file = SafeTensors::deserialize(bytes).unwrap();
        let (mut w, mut b) = (load(&file, "w0"), load(&file, "b0"));
        let steps = (0..).take_while(|t| file.tensor(&format!("gw{t}")).is_ok()).count();
        assert!(steps >= 6);
        let mut adam = Adam::new(Decay::Decoupled, [w.len(), b.len()]);
        for t in 0..steps {
            let (gw, gb) = (load(&file, &format!("gw{t}")), load(&file, &format!("gb{t}")));
            let lr = load(&file, &format!("lr{t}"))[0];
            adam.step(vec![(&mut w, &gw, 1e-3), (&mut b, &gb, 0.0)], lr.into());
            close(&w, &load(&file, &format!("w{}", t + 1)), "w");
            close(&b, &load(&file, &format!("b{}", t + 1)), "b");
        }
        let mut w = load(&file, "w0");
        let mut adam = Adam::new(Decay::Coupled, [w.len()]);
        for t in 0..6 {
            adam.step(vec![(&mut w, &load(&file, &format!("gw{t}")), 1e-4)], 1e-3);
        }
        close(&w, &load(&file, "adam_l2.w6"), "Adam with L2");
    }

    #[test]
    fn clipping_keeps_direction() {
        let (mut a, mut b) = (vec![3.0f32, 0.0], vec![4.0f32]);
        assert_eq!(clip_global_norm(&mut [&mut a, &mut b], 1.0), 5.0);
        assert!((a[0] - 0.6).abs() < 1e-6 && (b[0] - 0.8).abs() < 1e-6);
        assert_eq!(clip_global_norm(&mut [&mut a], 1.0), f64::from(a[0]));
    }
}
