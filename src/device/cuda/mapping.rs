//! The mapping from collaborative vectors to the LLM's (`kernels/mapping.cu`): `relu(x W1ᵀ + b1) W2ᵀ + b2`, forward and backward, in
//! float32. Tensors lie as in [`crate::cie::Mapping`].

use super::context::Cuda;
use super::error::{Result, require};
use super::launch::{Kernel, arguments};
use super::memory::{Buffer, Rows};

const THREADS: u32 = 128;
/// Rows and columns of a tile.
const TILE: usize = 64;
/// Steps of K of a tile.
const BK: usize = 16;
/// K is cut until each multiprocessor has this many blocks,
const BLOCKS_PER_SM: usize = 3;
/// but not into parts shorter than this, whose sums would cost more to pass on than to make.
const MIN_PART: usize = 128;

/// Widths of the mapping: multiples of 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Of a collaborative vector.
    pub dim: usize,
    /// Of the hidden layer.
    pub mid: usize,
    /// Of the output.
    pub out: usize,
}

impl Widths {
    /// Elements of the four tensors: `[mid, dim]`, `[mid]`, `[out, mid]`, `[out]`.
    pub fn lengths(&self) -> [usize; 4] {
        [self.mid * self.dim, self.mid, self.out * self.mid, self.out]
    }
}

/// Where the mapped vectors go: float32 `[n, out]`, rows of elements, or both.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mapped<'a> {
    /// float32.
    pub floats: Option<&'a Buffer<f32>>,
    /// To be spliced.
    pub elements: Option<Rows>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Product {
    a: u64,
    b: u64,
    c: u64,
    c_elem: u64,
    bias: u64,
    mask: u64,
    row_sums: u64,
    scratch: u64,
    m: i32,
    n: i32,
    k: i32,
    ld_elem: i32,
    part: i32,
    parts: i32,
    relu: i32,
    add: i32,
}

/// The kernels' handles, and memory for the parts of products that are cut along K.
#[derive(Debug)]
pub struct Mapping {
    nt: Kernel,
    nn: Kernel,
    tn: Kernel,
    finish: Kernel,
    blocks: usize,
    scratch: Buffer<f32>,
}

impl Mapping {
    /// Resolves the kernels.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        let kernel = |name| cuda.kernel("mapping", name, THREADS, 0);
        let sms = cuda.description().sm_count;
        Ok(Mapping {
            nt: kernel("mapping_nt")?,
            nn: kernel("mapping_nn")?,
            tn: kernel("mapping_tn")?,
            finish: kernel("mapping_finish")?,
            blocks: BLOCKS_PER_SM * sms,
            scratch: Buffer::new(cuda, Self::scratch(sms), "sums of the mapping")?,
        })
    }

    /// Floats of the memory for parts, on a card of `sms` multiprocessors.
    pub fn scratch(sms: usize) -> usize {
        BLOCKS_PER_SM * sms * TILE * TILE
    }

    /// Maps `x: [n, dim]`; `activated: [n, mid]` is kept for [`Self::backward`].
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn forward(
        &self,
        cuda: &Cuda,
        widths: Widths,
        tensors: [&Buffer<f32>; 4],
        n: usize,
        x: &Buffer<f32>,
        activated: &Buffer<f32>,
        output: Mapped,
    ) -> Result<()> {
        let Widths { dim, mid, out } = widths;
        check(widths, tensors, &[("x", x, n * dim), ("activated", activated, n * mid)])?;
        if let Some(floats) = output.floats {
            check(widths, tensors, &[("output", floats, n * out)])?;
        }
        if let Some(e) = output.elements {
            let fits = e.rows >= n && e.columns == out && e.is_aligned() && e.precision == cuda.precision();
            require(fits, "mapping", || format!("{n} rows of {out} do not fit {e:?}"))?;
        }
        let [w1, b1, w2, b2] = tensors.map(Buffer::address);
        let hidden =
            Product { a: x.address(), b: w1, c: activated.address(), bias: b1, relu: 1, ..Product::of(n, mid, dim) };
        let mapped = Product {
            a: activated.address(),
            b: w2,
            c: output.floats.map_or(0, Buffer::address),
            c_elem: output.elements.map_or(0, |e| e.address),
            ld_elem: output.elements.map_or(0, |e| e.stride as i32),
            bias: b2,
            ..Product::of(n, out, mid)
        };
        self.run(cuda, self.nt, hidden, true)?;
        self.run(cuda, self.nt, mapped, true)
    }

    /// Adds the gradients for `d_output: [n, out]` to `gradient`, the four tensors' gradients. `d_activated: [n, mid]` is
    /// overwritten, and so is `d_x: [n, dim]`, where it is wanted.
    #[allow(clippy::too_many_arguments)] // one operation, its operands
    pub fn backward(
        &self,
        cuda: &Cuda,
        widths: Widths,
        tensors: [&Buffer<f32>; 4],
        n: usize,
        x: &Buffer<f32>,
        activated: &Buffer<f32>,
        d_output: &Buffer<f32>,
        gradient: [&Buffer<f32>; 4],
        d_activated: &Buffer<f32>,
        d_x: Option<&Buffer<f32>>,
    ) -> Result<()> {
        let Widths { dim, mid, out } = widths;
        let mid_rows = [("activated", activated, n * mid), ("d_activated", d_activated, n * mid)];
        check(widths, tensors, &mid_rows)?;
        check(widths, gradient, &[("x", x, n * dim), ("d_output", d_output, n * out)])?;
        let [w1, _, w2, _] = tensors.map(Buffer::address);
        let [g1, gb1, g2, gb2] = gradient.map(Buffer::address);
        let (x, activated, d_output) = (x.address(), activated.address(), d_output.address());
        let d_a = d_activated.address();
        // C[n_out, n_in] += d_yᵀ · x, and the bias: sums of d_y's columns.
        let parameters = |d_y, x, n_out, n_in, c, row_sums| Product {
            a: d_y,
            b: x,
            c,
            row_sums,
            add: 1,
            ..Product::of(n_out, n_in, n)
        };
        self.run(cuda, self.tn, parameters(d_output, activated, out, mid, g2, gb2), false)?;
        let hidden = Product { a: d_output, b: w2, c: d_a, mask: activated, ..Product::of(n, mid, out) };
        self.run(cuda, self.nn, hidden, true)?;
        self.run(cuda, self.tn, parameters(d_a, x, mid, dim, g1, gb1), false)?;
        if let Some(d_x) = d_x {
            check(widths, tensors, &[("d_x", d_x, n * dim)])?;
            self.run(cuda, self.nn, Product { a: d_a, b: w1, c: d_x.address(), ..Product::of(n, dim, mid) }, true)?;
        }
        Ok(())
    }

    /// One product; `cut`: along K, if that is what fills the card.
    fn run(&self, cuda: &Cuda, kernel: Kernel, mut p: Product, cut: bool) -> Result<()> {
        let (m, n, k) = (p.m as usize, p.n as usize, p.k as usize);
        let tiles = m.div_ceil(TILE) * n.div_ceil(TILE);
        let parts = if cut { (self.blocks / tiles.max(1)).clamp(1, k.div_ceil(MIN_PART).max(1)) } else { 1 };
        let part = k.div_ceil(parts).next_multiple_of(BK);
        let parts = k.div_ceil(part).max(1);
        (p.part, p.parts, p.scratch) = (part as i32, parts as i32, self.scratch.address());
        let fits = parts == 1 || parts * m * n <= self.scratch.len();
        require(fits, "mapping", || format!("{parts} parts of {m} x {n} in {} values", self.scratch.len()))?;
        // SAFETY: the struct is the kernels'; the buffers were checked to hold m, n and k.
        unsafe {
            cuda.launch(kernel, [n.div_ceil(TILE), m.div_ceil(TILE), parts], arguments![p])?;
            if parts > 1 {
                cuda.launch(self.finish, [(m * n / 4).div_ceil(THREADS as usize), 1, 1], arguments![p])?;
            }
        }
        Ok(())
    }
}

impl Product {
    fn of(m: usize, n: usize, k: usize) -> Self {
        Product { m: m as i32, n: n as i32, k: k as i32, ..Product::default() }
    }
}

/// The widths, the four tensors (or their gradients) and further operands with the lengths they need.
fn check(widths: Widths, tensors: [&Buffer<f32>; 4], operands: &[(&str, &Buffer<f32>, usize)]) -> Result<()> {
    let Widths { dim, mid, out } = widths;
    let whole = [dim, mid, out].iter().all(|w| w.is_multiple_of(4));
    require(whole, "mapping", || format!("{widths:?} must be multiples of 4"))?;
    let names = ["W1", "b1", "W2", "b2"];
    let tensors = names.into_iter().zip(tensors).zip(widths.lengths()).map(|((name, t), n)| (name, t, n));
    for (name, buffer, n) in tensors.chain(operands.iter().copied()) {
        require(buffer.len() >= n, "mapping", || format!("{name} has {} values, {widths:?} need {n}", buffer.len()))?;
    }
    Ok(())
}
