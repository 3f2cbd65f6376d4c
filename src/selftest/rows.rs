//! Moving rows: bits are moved, so all but the addition is exact.

use super::floats::Floats;
use super::{Guarded, Outcome, columns, limit, random, relative_error, round};
use crate::device::cuda::rows::RowMoves;
use crate::device::cuda::{Buffer, Cuda, Precision, Result};

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let moves = RowMoves::new(cuda)?;
    let mut outcomes = Vec::new();
    for (n, width) in [(1, 8), (7, 72), (5, 1032), (3, 2056)] {
        outcomes.extend(splice(cuda, &moves, n, width)?);
        outcomes.extend(picked(cuda, &moves, n, width)?);
    }
    Ok(outcomes)
}

fn outcome(case: String, got: &[f32], want: &[f32], limit: f64, contained: bool) -> Outcome {
    Outcome { operation: "rows", case, error: relative_error(got, &columns(want, 1, 0, 1)), limit, contained }
}

/// Tokens and vectors in one pass, and the gradient of the vectors.
fn splice(cuda: &Cuda, moves: &RowMoves, n: usize, width: usize) -> Result<[Outcome; 2]> {
    let p = cuda.precision();
    let (vocabulary, n_vectors) = (11, 3);
    let embed = random(p, vocabulary * width, 1);
    let vectors = random(Precision::F32, n_vectors * width, 2);
    // Every third is a vector, a token may come twice.
    let sources: Vec<i32> = (0..n as i32).map(|t| if t % 3 == 0 { -1 - t / 3 % 3 } else { (t * 7) % 5 * 2 }).collect();
    let x = Guarded::new(cuda, n, width, width + 16)?;
    let d_embed = Guarded::filled(cuda, vocabulary, width, width, &embed)?;
    let d_vectors = Buffer::from_host(cuda, &vectors, "vectors")?;
    let d_sources = Buffer::from_host(cuda, &sources, "sources")?;
    moves.splice(cuda, &d_sources, d_embed.rows(), &d_vectors, x.rows())?;
    let mut want = Vec::new();
    for &s in &sources {
        match usize::try_from(s) {
            Ok(token) => want.extend_from_slice(&embed[token * width..][..width]),
            Err(_) => want.extend(vectors[(-1 - s) as usize * width..][..width].iter().map(|&x| round(p, x))),
        }
    }
    let (got, contained) = x.read(cuda)?;
    let forward = outcome(format!("splice n {n} width {width}"), &got, &want, 0.0, contained);

    let d_x = Guarded::filled(cuda, n, width, width + 8, &want)?;
    // The last vector is read by no row.
    let read = (0..n as i32).rev().filter(|&t| sources[t as usize] < 0);
    let slots: Vec<i32> = read.chain([-1]).collect();
    let d_slots = Buffer::from_host(cuda, &[slots.clone(), vec![0]].concat(), "slots")?;
    let gradient = Floats::new(cuda, slots.len() * width)?;
    moves.splice_backward(cuda, &d_slots, slots.len(), d_x.rows(), width, &gradient.buffer)?;
    let row = |t: usize| want[t * width..][..width].to_vec();
    let picked: Vec<f32> =
        slots.iter().flat_map(|&t| usize::try_from(t).map_or_else(|_| vec![0.0; width], row)).collect();
    let (got, contained) = gradient.read(cuda)?;
    let backward = outcome(format!("splice backward n {n} width {width}"), &got, &picked, 0.0, contained);
    Ok([forward, backward])
}

/// Rows picked out of a larger matrix, put back, added, zeroed.
fn picked(cuda: &Cuda, moves: &RowMoves, n: usize, width: usize) -> Result<Vec<Outcome>> {
    let p = cuda.precision();
    let all = 3 * n + 2;
    let (large, small) = (random(p, all * width, 3), random(p, n * width, 4));
    let rows: Vec<i32> = (0..n as i32).map(|i| all as i32 - 1 - 3 * i).collect();
    let d_rows = Buffer::from_host(cuda, &rows, "rows")?;
    let place = |i: usize| rows[i] as usize * width;
    let mut outcomes = Vec::new();

    let from = Guarded::filled(cuda, all, width, width + 8, &large)?;
    let to = Guarded::new(cuda, n, width, width + 16)?;
    moves.gather(cuda, &d_rows, from.rows(), to.rows())?;
    let want: Vec<f32> = (0..n).flat_map(|i| large[place(i)..][..width].to_vec()).collect();
    let (got, contained) = to.read(cuda)?;
    outcomes.push(outcome(format!("gather n {n} width {width}"), &got, &want, 0.0, contained));

    for add in [false, true] {
        let from = Guarded::filled(cuda, n, width, width + 16, &small)?;
        let to = Guarded::filled(cuda, all, width, width + 8, &large)?;
        moves.scatter(cuda, &d_rows, from.rows(), to.rows(), add)?;
        let mut want = columns(&large, 1, 0, 1);
        for i in 0..n {
            for c in 0..width {
                let old = if add { want[place(i) + c] } else { 0.0 };
                want[place(i) + c] = old + f64::from(small[i * width + c]);
            }
        }
        let (got, contained) = to.read(cuda)?;
        let limit = if add { limit(p, 1) } else { 0.0 };
        let case = format!("scatter n {n} width {width}{}", if add { " add" } else { "" });
        outcomes.push(Outcome { operation: "rows", case, error: relative_error(&got, &want), limit, contained });
    }

    // Some columns of some rows.
    let to = Guarded::filled(cuda, all, width + 8, width + 24, &random(p, all * (width + 8), 5))?;
    let (mut want, _) = to.read(cuda)?;
    moves.zero(cuda, to.rows().rows(1, n).columns(8, width))?;
    want.chunks_exact_mut(width + 8).skip(1).take(n).for_each(|row| row[8..].fill(0.0));
    let (got, contained) = to.read(cuda)?;
    outcomes.push(outcome(format!("zero n {n} width {width}"), &got, &want, 0.0, contained));
    Ok(outcomes)
}
