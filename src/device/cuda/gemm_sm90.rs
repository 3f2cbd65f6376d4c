//! Matrix products on compute capability 9.0 (`kernels/gemm_sm90.cu`): tensor maps of the operands, and blocks that stay.
//!
//! `gemm.rs` checks the operands and chooses the tile; this file starts what it chose.

use cudarc::driver::sys;

use super::context::{Cuda, Precision};
use super::error::{Attempt, Result};
use super::gemm::{Arguments, Stack, Tile, Weight};
use super::launch::arguments;
use super::memory::Rows;
use super::tensor_map::{BOX_COLUMNS, TensorMap};

const BM: usize = 128;
const BK: usize = 64;
const THREADS: u32 = 384;
/// Columns of a tile and stages of its ring.
const SHAPES: [(usize, usize); 2] = [(256, 4), (128, 6)];
/// The first driver that knows tensor maps and this PTX.
const DRIVER: i32 = 12_000;

/// Dynamic shared memory: the stages, the epilogues' 16 rows of 64 floats a warp, two barriers a stage.
const fn shared_bytes(n: usize, stages: usize) -> usize {
    stages * (BM + n) * BK * 2 + 8 * 16 * 64 * 4 + 2 * 8 * stages
}

/// Whether card, driver and element type are right for these kernels.
pub(super) fn is_available(cuda: &Cuda) -> Result<bool> {
    if cuda.description().capability != (9, 0) || cuda.precision() != Precision::Bf16 {
        return Ok(false);
    }
    let mut driver = 0;
    // SAFETY: writes one number.
    unsafe { sys::cuDriverGetVersion(&mut driver) }
        .result()
        .attempt(|| "asking for the driver's version".to_owned())?;
    Ok(driver >= DRIVER)
}

/// The kernels of these names, widest first.
pub(super) fn tiles(cuda: &Cuda, names: [&'static str; 2]) -> Result<Vec<Tile>> {
    let tile = |(name, (n, stages))| {
        let kernel = cuda.kernel("gemm_sm90", name, THREADS, shared_bytes(n, stages))?;
        Ok(Tile { m: BM, n, kernel, sm90: true })
    };
    names.into_iter().zip(SHAPES).map(tile).collect()
}

/// Starts a tile's kernel on at most `resident` blocks. `g` and the operands were checked; none is empty.
pub(super) fn run(
    cuda: &Cuda,
    tile: Tile,
    resident: usize,
    a: Rows,
    b: Stack,
    way: Weight,
    mut g: Arguments,
) -> Result<()> {
    let box_rows = if way == Weight::Transposed { tile.n } else { BOX_COLUMNS };
    let adapters = b.adapters.filter(|rows| rows.rows > 0);
    let map_a = TensorMap::new(a, BM)?;
    let map_b = TensorMap::new(b.weight, box_rows)?;
    let map_tail = adapters.map_or(Ok(map_b), |rows| TensorMap::new(rows, box_rows))?;
    let n_tiles = match way {
        // The adapters' columns begin a tile of their own.
        Weight::Transposed => b.weight.rows.div_ceil(tile.n) + adapters.map_or(0, |rows| rows.rows.div_ceil(tile.n)),
        Weight::Plain => b.weight.columns.div_ceil(tile.n),
    };
    g.n_tiles = n_tiles as i32;
    let blocks = (a.rows.div_ceil(tile.m) * n_tiles).min(resident);
    // SAFETY: three maps and the struct are the kernel's arguments; shapes, strides and alignment were checked, and `Rows` lie in
    // live buffers.
    unsafe { cuda.launch(tile.kernel, [blocks, 1, 1], arguments![map_a, map_b, map_tail, g]) }
}
