//! Rotary embedding with adapters: every head size, grouped queries, parts with and without an adapter.

use super::{Guarded, Outcome, add_adapter, columns, epsilon, limit, random, relative_error, transposed};
use crate::device::cuda::lora::Adapter;
use crate::device::cuda::rope::{Part, Rope};
use crate::device::cuda::{Buffer, Cuda, Result};

/// One part of a row in float64.
pub(super) struct Oracle {
    pub column: usize,
    pub heads: usize,
    pub turned: bool,
    pub u: usize,
    pub rank: usize,
    /// `[heads · head_dim, rank]`.
    pub b: Vec<f64>,
}

/// The angles of a head's pairs.
pub(super) struct Angles {
    pub positions: Vec<u32>,
    pub inv_freq: Vec<f64>,
}

impl Oracle {
    fn width(&self, angles: &Angles) -> usize {
        self.heads * 2 * angles.inv_freq.len()
    }

    /// Turns pairs (i, i + d / 2) of `y: [n, heads · d]` by +1 or −1 times their angle.
    fn turn(&self, y: &mut [f64], angles: &Angles, sign: f64) {
        let half = angles.inv_freq.len();
        for (row, position) in y.chunks_exact_mut(self.width(angles)).zip(&angles.positions) {
            for head in row.chunks_exact_mut(2 * half) {
                let (a, b) = head.split_at_mut(half);
                for ((a, b), f) in a.iter_mut().zip(b).zip(&angles.inv_freq) {
                    let (sin, cos) = (sign * f64::from(*position) * f).sin_cos();
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }

    /// turn(y + u Bᵀ).
    pub fn forward(&self, y: &[f64], u: &[f64], angles: &Angles) -> Vec<f64> {
        let mut y = y.to_vec();
        if self.rank > 0 {
            add_adapter(&mut y, self.width(angles), u, &self.b);
        }
        if self.turned {
            self.turn(&mut y, angles, 1.0);
        }
        y
    }

    /// The gradients of y and of u.
    pub fn backward(&self, d_y: &[f64], angles: &Angles) -> (Vec<f64>, Vec<f64>) {
        let mut d_y = d_y.to_vec();
        if self.turned {
            self.turn(&mut d_y, angles, -1.0);
        }
        let mut d_u = vec![0.0; angles.positions.len() * self.rank];
        for (i, d_u) in d_u.iter_mut().enumerate() {
            let row = d_y.chunks_exact(self.width(angles)).nth(i / self.rank).into_iter().flatten();
            *d_u = row.zip(self.b.iter().skip(i % self.rank).step_by(self.rank)).map(|(d, b)| d * b).sum();
        }
        (d_y, d_u)
    }
}

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let ranks = [[0, 0, 0], [8, 0, 16], [0, 40, 0], [64, 8, 40], [0, 0, 8]];
    for (head_dim, n_heads, n_kv_heads) in
        [(8, 3, 1), (16, 4, 2), (24, 5, 5), (64, 9, 3), (80, 4, 4), (96, 6, 2), (128, 3, 1), (128, 36, 2)]
    {
        let inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| 1e4f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
        let rope = Rope::new(cuda, &inv_freq, 64)?;
        for (i, ranks) in ranks.into_iter().enumerate() {
            // Rows come four a block.
            let n = [1, 5, 7, 8, 4][i];
            let angles =
                Angles { positions: (0..n as u32).map(|t| (t * 37 + 11) % 64).collect(), inv_freq: inv_freq.clone() };
            for backward in [false, true] {
                outcomes.push(case(cuda, &rope, &angles, [n_heads, n_kv_heads], ranks, backward)?);
            }
        }
    }
    Ok(outcomes)
}

/// Rows of [q | k | v | u_v | u_k | u_q], the u eight columns apart.
fn case(
    cuda: &Cuda,
    rope: &Rope,
    angles: &Angles,
    [n_heads, n_kv_heads]: [usize; 2],
    ranks: [usize; 3],
    backward: bool,
) -> Result<Outcome> {
    let p = cuda.precision();
    let (n, head_dim) = (angles.positions.len(), 2 * angles.inv_freq.len());
    let mut oracles = Vec::new();
    let (mut column, mut u) = (0, (n_heads + 2 * n_kv_heads) * head_dim + 8);
    for (i, heads) in [n_heads, n_kv_heads, n_kv_heads].into_iter().enumerate() {
        let b = columns(&random(p, heads * head_dim * ranks[i], 2 + i as u64), 1, 0, 1);
        oracles.push(Oracle { column, heads, turned: i < 2, u: 0, rank: ranks[i], b });
        column += heads * head_dim;
    }
    for oracle in oracles.iter_mut().rev() {
        oracle.u = u;
        u += oracle.rank + 8;
    }
    let total = u;
    let before = random(p, n * total, 1);
    let rows = Guarded::filled(cuda, n, total, total + 8, &before)?;
    let mut parts = Vec::new();
    let mut packed = Vec::new();
    for o in &oracles {
        let b: Vec<f32> = o.b.iter().map(|b| *b as f32).collect();
        let d_b = Guarded::filled(cuda, o.rank, o.width(angles), o.width(angles), &transposed(&b, o.rank))?;
        let lora = (o.rank > 0).then(|| Adapter::new(o.u, o.rank, d_b.rows().address));
        parts.push(if o.turned { Part::turned(o.column, o.heads, lora) } else { Part::plain(o.column, o.heads, lora) });
        packed.push(d_b);
    }
    let positions = Buffer::from_host(cuda, &angles.positions, "positions")?;
    if backward {
        rope.backward(cuda, rows.rows(), positions.address(), &parts)?;
    } else {
        rope.forward(cuda, rows.rows(), positions.address(), &parts)?;
    }

    let (after, mut contained) = rows.read(cuda)?;
    let narrow = |first, count| columns(&after, total, first, count).iter().map(|x| *x as f32).collect::<Vec<_>>();
    let mut error = 0f64;
    let mut untouched = vec![true; total];
    let mut touch = |first: usize, count: usize| untouched[first..first + count].fill(false);
    for o in &oracles {
        let y = columns(&before, total, o.column, o.width(angles));
        let want = if backward {
            let (d_y, d_u) = o.backward(&y, angles);
            if o.rank > 0 {
                error = error.max(relative_error(&narrow(o.u, o.rank), &d_u));
                touch(o.u, o.rank);
            }
            d_y
        } else {
            o.forward(&y, &columns(&before, total, o.u, o.rank), angles)
        };
        error = error.max(relative_error(&narrow(o.column, o.width(angles)), &want));
        if o.turned || (o.rank > 0 && !backward) {
            touch(o.column, o.width(angles));
        }
    }
    contained &= before.iter().zip(&after).enumerate().all(|(i, (a, b))| !untouched[i % total] || a == b);
    // Naive: the sum with the adapter, or the turned gradient, is rounded before what follows.
    let terms = if backward { n_heads * head_dim } else { ranks.into_iter().max().unwrap_or(0) };
    let limit = limit(p, terms) + 2.0 * epsilon(p);
    let way = if backward { "backward" } else { "forward" };
    let case = format!("{way} n {n} heads {n_heads}/{n_kv_heads} of {head_dim} ranks {ranks:?}");
    Ok(Outcome { operation: "rope", case, error, limit, contained })
}

#[cfg(test)]
mod tests {
    use super::super::{assert_close, columns, differences, random};
    use super::{Angles, Oracle};
    use crate::device::cuda::Precision;

    #[test]
    fn the_oracles_gradients_are_those_of_its_forward() {
        let numbers = |n, seed| columns(&random(Precision::F32, n, seed), n, 0, n);
        let angles = Angles { positions: vec![3, 0, 9], inv_freq: vec![1.0, 0.1, 0.03, 0.01] };
        for turned in [false, true] {
            let oracle = Oracle { column: 0, heads: 2, turned, u: 0, rank: 3, b: numbers(48, 1) };
            let (y, u, d) = (numbers(48, 2), numbers(9, 3), numbers(48, 4));
            let loss = |y: &[f64], u: &[f64]| oracle.forward(y, u, &angles).iter().zip(&d).map(|(y, d)| y * d).sum();
            let (d_y, d_u) = oracle.backward(&d, &angles);
            assert_close(&d_y, &differences(|y| loss(y, &u), &y));
            assert_close(&d_u, &differences(|u| loss(&y, u), &u));
        }
    }
}
