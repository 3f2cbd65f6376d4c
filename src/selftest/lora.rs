//! LoRA's kernels: packing, d_u, the gradients of A and B, SwiGLU with adapters.

use super::floats::Floats;
use super::gemm::{factor, silu};
use super::{Guarded, Outcome, add_adapter, columns, epsilon, limit, random, relative_error, round, transposed};
use crate::device::cuda::lora::{Adapter, GradTarget, InputMask, Lora, Pack};
use crate::device::cuda::mask::{Mask, Numbers, mask_words};
use crate::device::cuda::{Buffer, Cuda, Precision, Result};
use crate::device::ops::Dropout;

/// All cases.
pub fn cases(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let lora = Lora::new(cuda)?;
    let mut outcomes = pack(cuda, &lora)?;
    for (n, width) in [(1, 8), (5, 72), (3, 2056), (2, 4104)] {
        for rank in [8, 16, 40, 64] {
            for beside in [false, true] {
                outcomes.push(d_u(cuda, &lora, n, width, rank, beside)?);
            }
        }
    }
    for (n, columns) in [(1, 8), (33, 72), (257, 200), (700, 136)] {
        for (rank, padded) in [(8, 8), (4, 8), (16, 16), (33, 40), (64, 64)] {
            for masked in [false, true] {
                outcomes.push(gradient_of_a(cuda, &lora, n, columns, rank, padded, masked)?);
            }
            outcomes.push(gradient_of_b(cuda, &lora, n, columns, rank, padded)?);
        }
    }
    for (n, width) in [(1, 8), (5, 72), (9, 1032)] {
        for ranks in [[8, 0], [0, 16], [40, 16], [64, 64]] {
            outcomes.push(swiglu(cuda, &lora, n, width, ranks)?);
        }
    }
    Ok(outcomes)
}

/// One launch for a table of matrices: padded in rows and columns, transposed, into every second place, scaled.
fn pack(cuda: &Cuda, lora: &Lora) -> Result<Vec<Outcome>> {
    let p = cuda.precision();
    // rows, columns, padded rows, padded columns, transposed, spread, offset, scale
    let shapes = [
        (5, 72, 8, 72, false, 1, 0, 1.0f32),
        (72, 5, 72, 8, true, 1, 0, 4.0),
        (72, 33, 72, 40, true, 2, 1, 0.3),
        (72, 16, 72, 16, true, 2, 0, -1.5),
        (1, 3, 1, 8, false, 1, 0, -1.5),
        (200, 136, 208, 136, false, 1, 2, 1.0),
        (1030, 64, 1032, 64, true, 1, 0, 2.0),
    ];
    let mut table = Vec::new();
    let mut held = Vec::new();
    for (i, (rows, columns, rows_padded, columns_padded, transpose, spread, offset, scale)) in
        shapes.into_iter().enumerate()
    {
        let master = random(Precision::F32, rows * columns, i as u64);
        let from = Buffer::from_host(cuda, &master, "a master")?;
        // What is written, with other rows or every second column around it.
        let (to_rows, to_columns) =
            if transpose { (columns_padded, rows_padded * spread) } else { (rows_padded + offset, columns_padded) };
        let before = random(p, to_rows * to_columns, 9);
        let to = Guarded::filled(cuda, to_rows, to_columns, to_columns + 8, &before)?;
        let ld = to.rows().stride;
        let steps = if transpose { [spread, ld, offset] } else { [ld, 1, offset * ld] };
        let [row_step, column_step, first] = steps.map(|s| s as i32);
        table.push(Pack {
            from: from.address(),
            to: to.rows().address,
            rows: rows as i32,
            columns: columns as i32,
            rows_padded: rows_padded as i32,
            columns_padded: columns_padded as i32,
            row_step,
            column_step,
            offset: first,
            scale,
        });
        let mut want = columns_of(&before);
        for r in 0..rows_padded {
            for c in 0..columns_padded {
                let inside = r < rows && c < columns;
                let value = if inside { round(p, master[r * columns + c] * scale) } else { 0.0 };
                let (to_r, to_c) = if transpose { (c, r * spread + offset) } else { (r + offset, c) };
                want[to_r * to_columns + to_c] = f64::from(value);
            }
        }
        let case = format!(
            "{rows} x {columns} to {rows_padded} x {columns_padded}{}, {spread} i + {offset}",
            if transpose { " transposed" } else { "" }
        );
        held.push((from, to, want, case));
    }
    lora.pack(cuda, &Buffer::from_host(cuda, &table, "a table")?)?;
    held.into_iter()
        .map(|(_, to, want, case)| {
            let (got, contained) = to.read(cuda)?;
            // One multiplication and one rounding: the same bits.
            Ok(Outcome { operation: "lora_pack", case, error: relative_error(&got, &want), limit: 0.0, contained })
        })
        .collect()
}

fn columns_of(values: &[f32]) -> Vec<f64> {
    columns(values, 1, 0, 1)
}

/// d_u = d_y B, in rows of its own or beside d_y.
fn d_u(cuda: &Cuda, lora: &Lora, n: usize, width: usize, rank: usize, beside: bool) -> Result<Outcome> {
    let p = cuda.precision();
    let total = width + if beside { rank + 8 } else { 0 };
    let (rows, b) = (random(p, n * total, 1), random(p, width * rank, 2));
    let d_rows = Guarded::filled(cuda, n, total, total + 8, &rows)?;
    let db = Guarded::filled(cuda, rank, width, width, &transposed(&b, rank))?;
    let apart = Guarded::new(cuda, n, rank, rank + 8)?;
    let out = if beside { d_rows.rows().columns(width + 8, rank) } else { apart.rows() };
    lora.d_u(cuda, d_rows.rows().columns(0, width), db.rows().address, out)?;
    let (after, mut contained) = d_rows.read(cuda)?;
    let (mut got, inside) = apart.read(cuda)?;
    contained &= inside;
    if beside {
        got = after.chunks_exact(total).flat_map(|row| row[width + 8..].to_vec()).collect();
    }
    let read = if beside { width + 8 } else { width };
    contained &= columns(&after, total, 0, read) == columns(&rows, total, 0, read);
    let d_y = columns(&rows, total, 0, width);
    let mut want = vec![0.0; n * rank];
    for (i, want) in want.iter_mut().enumerate() {
        let row = &d_y[i / rank * width..][..width];
        *want = row.iter().enumerate().map(|(c, d)| d * f64::from(b[c * rank + i % rank])).sum();
    }
    let case = format!("n {n} width {width} rank {rank}{}", if beside { " in the same rows" } else { "" });
    Ok(Outcome { operation: "lora_d_u", case, error: relative_error(&got, &want), limit: limit(p, width), contained })
}

/// Σ_t u[t, r] x[t, c], `[rank, columns]`.
pub(super) fn outer(u: &[f64], x: &[f64], n: usize) -> Vec<f64> {
    let (rank, columns) = (u.len() / n, x.len() / n);
    let mut sum = vec![0.0; rank * columns];
    for (u, x) in u.chunks_exact(rank).zip(x.chunks_exact(columns)) {
        for (u, sum) in u.iter().zip(sum.chunks_exact_mut(columns)) {
            sum.iter_mut().zip(x).for_each(|(s, x)| *s += u * x);
        }
    }
    sum
}

/// The limit of a float32 sum of `terms` products of elements.
fn sum_limit(terms: usize) -> f64 {
    limit(Precision::F32, terms)
}

/// d_A += d_uᵀ drop(x): u beside other columns, dropped by the mask of the module.
#[allow(clippy::too_many_arguments)] // one case, its sizes
fn gradient_of_a(
    cuda: &Cuda,
    lora: &Lora,
    n: usize,
    width: usize,
    rank: usize,
    padded: usize,
    masked: bool,
) -> Result<Outcome> {
    let p = cuda.precision();
    let (u, x) = (random(p, n * (padded + 16), 1), random(p, n * width, 2));
    let before = random(Precision::F32, rank * width, 3);
    let d_u = Guarded::filled(cuda, n, padded + 16, padded + 24, &u)?;
    let d_x = Guarded::filled(cuda, n, width, width + 8, &x)?;
    let to = Floats::filled(cuda, &before)?;
    let partials = Floats::new(cuda, Lora::partials(n, width))?;
    let dropout = Dropout { p: 0.3, seed: 77, step: 5 };
    let tokens: Vec<u32> = (0..n as u32).map(|t| 5 * t + 2).collect();
    let d_tokens = Buffer::from_host(cuda, &tokens, "tokens")?;
    let mask = Buffer::new(cuda, n * mask_words(width), "a mask")?;
    let mut dropped = columns(&x, width, 0, width);
    if masked {
        Mask::new(cuda)?.run(cuda, &Numbers::upload(cuda, &dropout)?, 6, &d_tokens, 0, n, width, &mask)?;
        for (i, x) in dropped.iter_mut().enumerate() {
            *x *= factor(&dropout, 6, tokens[i / width], i % width, width);
        }
    }
    let applied = masked.then(|| InputMask { mask: mask.address(), scale: dropout.scale() });
    let target = GradTarget { to: to.buffer.address(), rank, is_b: false, scale: 1.0, stride: 1, offset: 0 };
    lora.gradient(cuda, d_u.rows().columns(8, padded), d_x.rows(), applied, &partials.buffer, &[target])?;
    let mut want = outer(&columns(&u, padded + 16, 8, rank), &dropped, n);
    want.iter_mut().zip(&before).for_each(|(w, b)| *w += f64::from(*b));
    let ((got, inside), (_, contained)) = (to.read(cuda)?, partials.read(cuda)?);
    let case = format!("d_A n {n} width {width} rank {rank} of {padded}{}", if masked { " dropout" } else { "" });
    let (error, contained) = (relative_error(&got, &want), contained && inside);
    Ok(Outcome { operation: "lora_grad", case, error, limit: sum_limit(n), contained })
}

/// d_B += scale · d_yᵀ u of two targets whose columns lie in turn, and of one that has all.
fn gradient_of_b(cuda: &Cuda, lora: &Lora, n: usize, width: usize, rank: usize, padded: usize) -> Result<Outcome> {
    let p = cuda.precision();
    let (u, d_y) = (random(p, n * padded, 1), random(p, n * width, 2));
    let (du, dy) = (Guarded::filled(cuda, n, padded, padded, &u)?, Guarded::filled(cuda, n, width, width + 8, &d_y)?);
    let partials = Floats::new(cuda, Lora::partials(n, width))?;
    let sum = outer(&columns(&u, padded, 0, rank), &columns(&d_y, width, 0, width), n);
    let kinds = [(1, 0, 0.25f32), (2, 0, 4.0), (2, 1, 0.7)];
    let mut held = Vec::new();
    for (stride, offset, scale) in kinds {
        let before = random(Precision::F32, width / stride * rank, 3 + offset as u64);
        let mut want = columns_of(&before);
        for (i, want) in want.iter_mut().enumerate() {
            *want += f64::from(scale) * sum[i % rank * width + i / rank * stride + offset];
        }
        held.push((Floats::filled(cuda, &before)?, want));
    }
    let targets: Vec<GradTarget> = kinds
        .iter()
        .zip(&held)
        .map(|(&(stride, offset, scale), (to, _))| GradTarget {
            to: to.buffer.address(),
            rank,
            is_b: true,
            scale,
            stride,
            offset,
        })
        .collect();
    lora.gradient(cuda, du.rows(), dy.rows(), None, &partials.buffer, &targets)?;
    let (mut error, mut contained) = (0f64, partials.read(cuda)?.1);
    for (to, want) in &held {
        let (got, inside) = to.read(cuda)?;
        error = error.max(relative_error(&got, want));
        contained &= inside;
    }
    let case = format!("d_B n {n} width {width} rank {rank} of {padded}, all and every second column");
    Ok(Outcome { operation: "lora_grad", case, error, limit: sum_limit(n), contained })
}

/// Rows of [gate and up in turn | u_gate | u_up], B with zeros where a row's adapter is the other one.
fn swiglu(cuda: &Cuda, lora: &Lora, n: usize, width: usize, [r_gate, r_up]: [usize; 2]) -> Result<Outcome> {
    let p = cuda.precision();
    let (rank, first_u) = (r_gate + r_up, 2 * width + 8);
    let total = first_u + rank;
    let before = random(p, n * total, 1);
    let mut b = random(p, 2 * width * rank, 2);
    for (row, b) in b.chunks_exact_mut(rank).enumerate() {
        let other = if row % 2 == 0 { r_gate..rank } else { 0..r_gate };
        b[other].fill(0.0);
    }
    let rows = Guarded::filled(cuda, n, total, total + 8, &before)?;
    let db = Guarded::filled(cuda, rank, 2 * width, 2 * width, &transposed(&b, rank))?;
    let act = Guarded::new(cuda, n, width, width + 8)?;
    lora.swiglu(cuda, rows.rows(), act.rows(), Adapter::new(first_u, rank, db.rows().address))?;
    let mut gate_up = columns(&before, total, 0, 2 * width);
    add_adapter(&mut gate_up, 2 * width, &columns(&before, total, first_u, rank), &columns_of(&b));
    let want: Vec<f64> = gate_up.chunks_exact(2).map(|gu| silu(gu[0]) * gu[1]).collect();
    let ((after, inside), (got, contained)) = (rows.read(cuda)?, act.read(cuda)?);
    let kept: Vec<f32> = after.chunks_exact(total).flat_map(|row| row[..2 * width].to_vec()).collect();
    let error = relative_error(&got, &want).max(relative_error(&kept, &gate_up));
    let beside = |rows: &[f32]| columns(rows, total, 2 * width, total - 2 * width);
    // Naive: gate and up are rounded, then silu, then the product.
    let limit = limit(p, rank) + 2.0 * 3.0 * epsilon(p);
    let contained = contained && inside && beside(&after) == beside(&before);
    let case = format!("n {n} width {width} ranks {r_gate} and {r_up}");
    Ok(Outcome { operation: "swiglu_lora", case, error, limit, contained })
}
