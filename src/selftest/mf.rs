//! MF's scores, loss and gradients: users and items that occur often, once and never, padding, several widths, scores so large that
//! their exponential would overflow.
//!
//! The limit is twice the error of the same formulas in float32, term after term.

use super::floats::Floats;
use super::{Outcome, limit, random, relative_error};
use crate::device::cuda::mf::{BatchLists, Mf, Tables};
use crate::device::cuda::{Buffer, Cuda, Precision, Result};
use crate::rng::Rng;

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (n_users, n_items, dim, n, scale) in
        [(5, 7, 8, 3, 1.0), (30, 41, 64, 301, 0.5), (13, 90, 72, 67, 1.0), (50, 20, 256, 512, 4.0), (9, 9, 132, 1, 1.0)]
    {
        for padding in [false, true] {
            outcomes.extend(batch(cuda, [n_users, n_items], dim, n, scale, padding)?);
        }
    }
    Ok(outcomes)
}

fn batch(
    cuda: &Cuda,
    [n_users, n_items]: [usize; 2],
    dim: usize,
    n: usize,
    scale: f32,
    padding: bool,
) -> Result<Vec<Outcome>> {
    let table = |rows: usize, seed: u64| -> Vec<f32> {
        random(Precision::F32, rows * dim, seed).iter().map(|x| x * scale).collect()
    };
    let (p, q) = (table(n_users, 1), table(n_items, 2));
    let mut rng = Rng::new(3, n as u64);
    // Half of the ids are never drawn.
    let mut ids = |rows: usize| -> Vec<u32> { (0..n).map(|_| rng.below(rows.div_ceil(2) as u32)).collect() };
    let (users, items) = (ids(n_users), ids(n_items));
    let labels: Vec<u8> = (0..n).map(|i| (i % 3 == 0).into()).collect();

    let batch = Batch { dim, users: &users, items: &items, labels: &labels };
    let (want, naive) =
        (batch.formula(&p, &q, padding, |x| x), batch.formula(&p, &q, padding, |x| f64::from(x as f32)));

    let (dp, dq) = (Floats::filled(cuda, &p)?, Floats::filled(cuda, &q)?);
    let (gp, gq) = (Floats::new(cuda, p.len())?, Floats::new(cuda, q.len())?);
    let out = Floats::new(cuda, n)?;
    let mf = Mf::new(cuda, n + 5)?;
    let mut lists = BatchLists::new(cuda, n_users, n_items, n + 5)?;
    // A batch before it leaves nothing behind.
    lists.set(cuda, &vec![0; n + 5], &vec![0; n + 5], &vec![1; n + 5])?;
    lists.set(cuda, &users, &items, &labels)?;
    let tables = Tables::new(dim, n_users, n_items, &dp.buffer, &dq.buffer)?;
    let gradient = Tables::new(dim, n_users, n_items, &gp.buffer, &gq.buffer)?;
    mf.loss_and_gradient(cuda, tables, &lists, gradient, padding)?;
    let (du, di) = (Buffer::from_host(cuda, &users, "users")?, Buffer::from_host(cuda, &items, "items")?);
    mf.scores(cuda, tables, n, &du, &di, &out.buffer)?;

    let ((got, inside), (got_p, inside_p), (got_q, inside_q)) = (out.read(cuda)?, gp.read(cuda)?, gq.read(cuda)?);
    let case = |what: &str| format!("users {n_users} items {n_items} dim {dim} rows {n} padding {padding}: {what}");
    let outcome = |what: &str, got: &[f32], want: &[f64], naive: &[f64], contained: bool| {
        let narrow: Vec<f32> = naive.iter().map(|&x| x as f32).collect();
        let limit = (2.0 * relative_error(&narrow, want)).max(limit(Precision::F32, 1));
        Outcome { operation: "mf", case: case(what), error: relative_error(got, want), limit, contained }
    };
    let loss = [mf.loss(cuda)? as f32];
    Ok(vec![
        outcome("scores", &got, &want.scores, &naive.scores, inside),
        outcome("loss", &loss, &[want.loss], &[naive.loss], true),
        outcome("d_users", &got_p, &want.d_users, &naive.d_users, inside_p),
        outcome("d_items", &got_q, &want.d_items, &naive.d_items, inside_q),
    ])
}

pub(super) struct Batch<'a> {
    pub dim: usize,
    pub users: &'a [u32],
    pub items: &'a [u32],
    pub labels: &'a [u8],
}

pub(super) struct Values {
    pub scores: Vec<f64>,
    pub loss: f64,
    pub d_users: Vec<f64>,
    pub d_items: Vec<f64>,
}

impl Batch<'_> {
    /// The formulas, in the arithmetic of `round`.
    pub fn formula(&self, p: &[f32], q: &[f32], padding: bool, round: fn(f64) -> f64) -> Values {
        let (dim, n) = (self.dim, self.labels.len() as f64);
        let row = |id: u32| id as usize * dim..(id as usize + 1) * dim;
        let mut v = Values { scores: Vec::new(), loss: 0.0, d_users: vec![0.0; p.len()], d_items: vec![0.0; q.len()] };
        let add = |sum: &mut f64, a: f64, b: f32| *sum = round(*sum + round(a * f64::from(b)));
        for ((&u, &i), &label) in self.users.iter().zip(self.items).zip(self.labels) {
            let (p, q, label) = (&p[row(u)], &q[row(i)], f64::from(label));
            let mut score = 0.0;
            p.iter().zip(q).for_each(|(&p, &q)| add(&mut score, p.into(), q));
            v.scores.push(score);
            let small = round((-score.abs()).exp());
            let softplus = round(score.max(0.0) + round(small.ln_1p()));
            v.loss = round(v.loss + round(softplus - round(label * score)));
            let sigmoid = round(if score < 0.0 { small } else { 1.0 } / round(1.0 + small));
            let d = round(round(sigmoid - label) / n);
            v.d_users[row(u)].iter_mut().zip(q).for_each(|(sum, &q)| add(sum, d, q));
            v.d_items[row(i)].iter_mut().zip(p).for_each(|(sum, &p)| add(sum, d, p));
        }
        v.loss = round(v.loss / n);
        if padding {
            v.d_users[..dim].fill(0.0);
            v.d_items[..dim].fill(0.0);
        }
        v
    }
}
