//! Every operation on a device against a float64 oracle: one table of cases, one file an operation.
//!
//! The limit of a case is not a chosen number: it is twice the error of a naive version that rounds to the device's element
//! type after each step and sums in float32 (for float32 elements, the error that sums of that length may have). Outputs lie
//! between sentinels. `collm-engine selftest` prints the table; the tests run the same cases on the emulator. [`cpu`] holds the
//! CPU's operations against the same oracles.

pub mod attention;
pub mod bench;
pub mod cpu;
mod floats;
pub mod gemm;
pub mod head;
pub mod lightgcn;
pub mod lora;
pub mod mapping;
pub mod mask;
pub mod mf;
pub mod norm;
pub mod optimizer;
pub mod rope;
pub mod rows;

use crate::device::cuda::memory::{Elements, from_elements, to_elements};
use crate::device::cuda::{Buffer, Cuda, Precision, Result, Rows};
use crate::rng::Rng;

/// One case's outcome.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Operation.
    pub operation: &'static str,
    /// Its shape.
    pub case: String,
    /// Largest |got − oracle| over the largest |oracle|.
    pub error: f64,
    /// What it may be.
    pub limit: f64,
    /// Nothing was written outside the outputs.
    pub contained: bool,
}

impl Outcome {
    /// Within its limit and its buffers.
    pub fn passed(&self) -> bool {
        self.contained && self.error <= self.limit
    }
}

/// The cases of one operation.
pub type Cases = fn(&Cuda) -> Result<Vec<Outcome>>;

/// Every operation.
pub const OPERATIONS: [(&str, Cases); 12] = [
    ("gemm", gemm::cases),
    ("attention", attention::cases),
    ("norm", norm::cases),
    ("rope", rope::cases),
    ("lora", lora::cases),
    ("rows", rows::cases),
    ("head", head::cases),
    ("mask", mask::cases),
    ("mapping", mapping::cases),
    ("optimizer", optimizer::cases),
    ("mf", mf::cases),
    ("lightgcn", lightgcn::cases),
];

/// The outcomes of one operation.
#[derive(Clone, Debug)]
pub struct Summary<'a> {
    /// Operation.
    pub operation: &'static str,
    /// How many.
    pub cases: usize,
    /// The one with the largest error for its limit.
    pub worst: &'a Outcome,
    /// How many did not pass.
    pub failed: usize,
}

/// Outcomes by operation, in the order in which operations first occur.
pub fn summarize(outcomes: &[Outcome]) -> Vec<Summary<'_>> {
    // An exact case has limit 0: any error of it is the worst.
    let strain = |o: &Outcome| if o.error == 0.0 { 0.0 } else { o.error / o.limit };
    let mut list: Vec<Summary> = Vec::new();
    for o in outcomes {
        let failed = usize::from(!o.passed());
        match list.iter_mut().find(|s| s.operation == o.operation) {
            None => list.push(Summary { operation: o.operation, cases: 1, worst: o, failed }),
            Some(s) => {
                s.cases += 1;
                s.failed += failed;
                if strain(o) > strain(s.worst) {
                    s.worst = o;
                }
            }
        }
    }
    list
}

/// Runs all cases on a card.
pub fn run(cuda: &Cuda) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (_, cases) in OPERATIONS {
        outcomes.extend(cases(cuda)?);
    }
    Ok(outcomes)
}

/// Largest |got − want| over the largest |want|.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    got.iter().zip(want).fold(0.0, |m, (g, w)| {
        let error = (f64::from(*g) - w).abs() / largest;
        // A NaN is as wrong as can be.
        if error.is_nan() { f64::INFINITY } else { m.max(error) }
    })
}

/// Standard normal numbers as the device will see them: rounded to its element type.
pub(crate) fn random(precision: Precision, n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0x5e1f);
    (0..n).map(|_| round(precision, rng.normal() as f32)).collect()
}

/// A number as an element.
pub(crate) fn round(precision: Precision, x: f32) -> f32 {
    match precision {
        Precision::Bf16 => half::bf16::from_f32(x).to_f32(),
        Precision::F32 => x,
    }
}

/// Unit of rounding.
pub(crate) fn epsilon(precision: Precision) -> f64 {
    match precision {
        Precision::Bf16 => 1.0 / 256.0,
        Precision::F32 => f64::from(f32::EPSILON) / 2.0,
    }
}

/// The limit for one rounding of a sum of `terms` products: twice what naive summation in float32 and that rounding may err.
pub(crate) fn limit(precision: Precision, terms: usize) -> f64 {
    let sum = f64::from(f32::EPSILON) * (terms as f64).sqrt().max(4.0);
    2.0 * (epsilon(precision) + sum)
}

/// Columns `first..first + count` of a dense matrix of `width` columns, for an oracle.
pub(crate) fn columns(values: &[f32], width: usize, first: usize, count: usize) -> Vec<f64> {
    values.chunks_exact(width).flat_map(|row| &row[first..first + count]).map(|&x| f64::from(x)).collect()
}

/// `y += u Bᵀ`: `y: [n, width]`, `u: [n, rank]`, `b: [width, rank]`.
pub(crate) fn add_adapter(y: &mut [f64], width: usize, u: &[f64], b: &[f64]) {
    let rank = b.len() / width;
    for (y, u) in y.chunks_exact_mut(width).zip(u.chunks_exact(rank)) {
        for (y, b) in y.iter_mut().zip(b.chunks_exact(rank)) {
            *y += u.iter().zip(b).map(|(u, b)| u * b).sum::<f64>();
        }
    }
}

/// B `[width, rank]` as packed for the kernels: `[rank, width]`.
pub(crate) fn transposed(b: &[f32], rank: usize) -> Vec<f32> {
    (0..rank).flat_map(|k| b.iter().skip(k).step_by(rank).copied()).collect()
}

/// Gradient of `f` by central differences: what the oracles' own gradients are held against.
#[cfg(test)]
pub(crate) fn differences(f: impl Fn(&[f64]) -> f64, at: &[f64]) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let moved = |i: usize, by: f64| {
        let mut x = at.to_vec();
        x[i] += by;
        f(&x)
    };
    (0..at.len()).map(|i| (moved(i, STEP) - moved(i, -STEP)) / (2.0 * STEP)).collect()
}

/// Every number within 1e-8 of the largest.
#[cfg(test)]
pub(crate) fn assert_close(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= 1e-8 * largest, "element {i}: {g} for {w}, the largest {largest}");
    }
}

const SENTINEL: u8 = 0x5a;
/// Bytes of sentinel on each side.
const MARGIN: usize = 256;

/// A matrix on the device between sentinels. It starts as sentinels too: what is not written shows.
pub(crate) struct Guarded {
    buffer: Elements,
    precision: Precision,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Guarded {
    /// `rows` of `columns` elements, `stride` apart.
    pub fn new(cuda: &Cuda, rows: usize, columns: usize, stride: usize) -> Result<Self> {
        let bytes = rows * stride * cuda.precision().bytes() + 2 * MARGIN;
        let buffer = Buffer::from_host(cuda, &vec![SENTINEL; bytes], "a test")?;
        Ok(Guarded { buffer, precision: cuda.precision(), rows, columns, stride })
    }

    /// Holding `values`, dense `[rows, columns]`.
    pub fn filled(cuda: &Cuda, rows: usize, columns: usize, stride: usize, values: &[f32]) -> Result<Self> {
        let mut guarded = Guarded::new(cuda, rows, columns, stride)?;
        let mut bytes = vec![SENTINEL; guarded.buffer.len()];
        let size = cuda.precision().bytes();
        for (r, row) in values.chunks_exact(columns).enumerate() {
            let at = MARGIN + r * stride * size;
            bytes[at..at + columns * size].copy_from_slice(&to_elements(cuda.precision(), row));
        }
        guarded.buffer.upload(cuda, &bytes)?;
        Ok(guarded)
    }

    /// As an operand.
    pub fn rows(&self) -> Rows {
        Rows {
            address: self.buffer.at(MARGIN),
            rows: self.rows,
            columns: self.columns,
            stride: self.stride,
            precision: self.precision,
        }
    }

    /// The values, and whether all that lies around them is untouched.
    pub fn read(&self, cuda: &Cuda) -> Result<(Vec<f32>, bool)> {
        let bytes = self.buffer.download(cuda, self.buffer.len())?;
        let size = self.precision.bytes();
        let mut contained = bytes[..MARGIN].iter().chain(&bytes[bytes.len() - MARGIN..]).all(|&b| b == SENTINEL);
        let mut values = Vec::with_capacity(self.rows * self.columns);
        for row in bytes[MARGIN..bytes.len() - MARGIN].chunks_exact(self.stride * size) {
            let (used, rest) = row.split_at(self.columns * size);
            values.extend(from_elements(self.precision, used));
            contained &= rest.iter().all(|&b| b == SENTINEL);
        }
        Ok((values, contained))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_case_is_the_one_nearest_to_its_limit() {
        let case =
            |operation, error, limit, contained| Outcome { operation, case: String::new(), error, limit, contained };
        let outcomes = [
            case("a", 1e-3, 1e-2, true),
            case("b", 0.0, 0.0, true),
            case("a", 1e-6, 1e-6, true),
            case("a", 5e-3, 1e-2, false),
            case("b", 1e-9, 0.0, true),
        ];
        let list = summarize(&outcomes);
        let shown: Vec<_> = list.iter().map(|s| (s.operation, s.cases, s.worst.error, s.failed)).collect();
        assert_eq!(shown, [("a", 3, 1e-6, 1), ("b", 2, 1e-9, 1)]);
    }
}
