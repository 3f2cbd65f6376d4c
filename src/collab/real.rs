//! The number type of the collaborative models: float32, in which they are trained and kept, or float64, in which the same code is
//! held against PyTorch and finite differences.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use crate::device::cpu::gemm::{Dense, Operand, Output, gemm, gemm_serial};

/// A floating point number.
pub trait Real:
    Copy
    + Default
    + Debug
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// Widened.
    fn wide(self) -> f64;
    /// Rounded.
    fn from_wide(x: f64) -> Self;
    /// eˣ.
    fn exp(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;

    /// `C = A B` or, with `add`, `C += A B`; `size`: rows of A and C, columns of B and C, inner dimension. `serial`: on the calling
    /// thread, for products inside a task. `stride`: of C. The bits do not depend on the number of threads.
    fn product(
        serial: bool,
        size: [usize; 3],
        a: Matrix<Self>,
        b: Matrix<Self>,
        add: bool,
        c: &mut [Self],
        stride: usize,
    );
}

/// A row-major matrix, or the transpose of one.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: &'a [T],
    stride: usize,
    transposed: bool,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows `stride` elements apart.
    pub fn rows(data: &'a [T], stride: usize) -> Self {
        Matrix { data, stride, transposed: false }
    }

    /// The transpose of [`Self::rows`].
    pub fn transposed(data: &'a [T], stride: usize) -> Self {
        Matrix { data, stride, transposed: true }
    }
}

impl<'a> Matrix<'a, f32> {
    fn dense(self) -> Dense<'a> {
        let make = if self.transposed { Dense::transposed } else { Dense::rows };
        make(self.data, self.stride)
    }
}

impl Real for f32 {
    fn wide(self) -> f64 {
        self.into()
    }
    fn from_wide(x: f64) -> f32 {
        x as f32
    }
    fn exp(self) -> f32 {
        f32::exp(self)
    }
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }

    fn product(
        serial: bool,
        [m, n, k]: [usize; 3],
        a: Matrix<f32>,
        b: Matrix<f32>,
        add: bool,
        c: &mut [f32],
        stride: usize,
    ) {
        let (a, b) = (a.dense(), Operand::Dense(b.dense()));
        let c = if add { Output::add(c, stride) } else { Output::set(c, stride) };
        if serial { gemm_serial(m, n, k, a, b, c) } else { gemm(m, n, k, a, b, c) }
    }
}

impl Real for f64 {
    fn wide(self) -> f64 {
        self
    }
    fn from_wide(x: f64) -> f64 {
        x
    }
    fn exp(self) -> f64 {
        f64::exp(self)
    }
    fn sqrt(self) -> f64 {
        f64::sqrt(self)
    }

    /// The plain sum: nothing large is computed in float64.
    fn product(
        _: bool,
        [m, n, k]: [usize; 3],
        a: Matrix<f64>,
        b: Matrix<f64>,
        add: bool,
        c: &mut [f64],
        stride: usize,
    ) {
        let at = |x: &Matrix<f64>, i: usize, j: usize| {
            let (i, j) = if x.transposed { (j, i) } else { (i, j) };
            x.data[i * x.stride + j]
        };
        for i in 0..m {
            for j in 0..n {
                let sum: f64 = (0..k).map(|l| at(&a, i, l) * at(&b, l, j)).sum();
                let c = &mut c[i * stride + j];
                *c = if add { *c + sum } else { sum };
            }
        }
    }
}
