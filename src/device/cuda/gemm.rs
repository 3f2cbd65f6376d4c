//! Matrix products with frozen weights (`kernels/gemm.cu`): `C = A Bᵀ` for the forward, `C = A B` for the backward.
//!
//! Tile shapes are chosen by `Gemm::tile`: the largest that still gives every multiprocessor a block. On compute capability
//! 9.0 the largest are those of `kernels/gemm_sm90.cu` (wgmma, tensor maps), which `gemm_sm90.rs` starts; dropout masks are
//! left to the portable kernels: in the forward for the adapters' columns, in the backward for the whole product. A product may
//! also go to cuBLASLt, if that is there and faster (`gemm_choice.rs`).

use super::context::{Cuda, Precision};
use super::error::{Result, require};
use super::gemm_choice::{Choices, GemmChoice, Product};
use super::gemm_sm90;
use super::launch::{Kernel, arguments};
use super::mask::MaskLayout;
use super::memory::Rows;

const BK: usize = 32;
const STAGES: usize = 3;
/// Most regions of a launch.
const MAX_REGIONS: usize = 4;
/// Columns of a tile of adapters with dropout (forward).
const MASKED_COLUMNS: usize = 32;

/// Columns (forward) or steps of K (backward) of one adapter whose input is dropped out.
#[derive(Clone, Copy, Debug)]
pub struct Masked {
    /// First column or step.
    pub first: usize,
    /// How many: the padded rank.
    pub count: usize,
    /// Address of the mask (`mask.rs`), which has the product's rows.
    pub mask: u64,
}

/// Dropout of the adapters of one product.
#[derive(Clone, Copy, Debug)]
pub struct Masks<'a> {
    /// Adapters in ascending order, up to the last column or step; what comes before is unmasked.
    pub adapters: &'a [Masked],
    /// Features of the masked input.
    pub width: usize,
    /// `1 / (1 − p)`.
    pub scale: f32,
}

impl Masks<'_> {
    /// The adapters, counted from the end of the `first` columns or steps that come before them.
    pub(super) fn without(&self, first: usize) -> Vec<Masked> {
        self.adapters.iter().map(|m| Masked { first: m.first - first, ..*m }).collect()
    }
}

/// What happens to a product before it is stored.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a> {
    /// `C = A B + bias + addend`. `bias`: address of one element a column, or 0. `addend` may be `C`. In the forward, the adapters'
    /// columns get neither.
    Plain {
        /// Address of `[rows of W]`, or 0.
        bias: u64,
        /// `[m, rows of W]`, or `[m, n]` in the backward.
        addend: Option<Rows>,
        /// Dropout.
        masks: Option<Masks<'a>>,
    },
    /// Columns are gate and up in turn: `act = silu(gate) · up`, `[m, n / 2]`; C, if kept, gets gate and up.
    Swiglu {
        /// Address of `[n]`, or 0.
        bias: u64,
        /// Written.
        act: Rows,
        /// Keep C.
        keep: bool,
    },
    /// The product is `d_act`, `[m, n]`; C, `[m, 2 n]`, becomes the gradient of `gate_up`, `[m, 2 n]`.
    SwigluBackward {
        /// Saved by the forward.
        gate_up: Rows,
        /// Dropout.
        masks: Option<Masks<'a>>,
    },
}

impl Epilogue<'_> {
    /// Nothing: `C = A B`.
    pub const NONE: Epilogue<'static> = Epilogue::Plain { bias: 0, addend: None, masks: None };
}

/// The second operand: frozen weights, and the adapters' A that ride along as further rows.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    /// `[out, in]`.
    pub weight: Rows,
    /// `[padded ranks, in]`.
    pub adapters: Option<Rows>,
}

impl Stack {
    fn rows(&self) -> usize {
        self.weight.rows + self.adapters.map_or(0, |a| a.rows)
    }
}

impl From<Rows> for Stack {
    fn from(weight: Rows) -> Self {
        Stack { weight, adapters: None }
    }
}

/// Which way B lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// `[n, k]`: `C = A Bᵀ`.
    Transposed,
    /// `[k, n]`: `C = A B`.
    Plain,
}

/// `Region` of `kernels/include/gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Region {
    first: i32,
    last: i32,
    tile: i32,
    mask: u64,
}

/// `Gemm` of `kernels/include/gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Arguments {
    a: u64,
    b: u64,
    b_tail: u64,
    c: u64,
    bias: u64,
    addend: u64,
    gate_up: u64,
    act: u64,
    m: i32,
    n: i32,
    k: i32,
    b_rows: i32,
    lda: i32,
    ldb: i32,
    ldb_tail: i32,
    ldc: i32,
    ld_addend: i32,
    ld_gate_up: i32,
    ld_act: i32,
    mask: MaskLayout,
    mask_scale: f32,
    n_regions: i32,
    pub(super) n_tiles: i32,
    plain_n: i32,
    k_last: i32,
    regions: [Region; MAX_REGIONS],
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub m: usize,
    pub n: usize,
    pub kernel: Kernel,
    /// One of `gemm_sm90.cu`.
    pub sm90: bool,
}

/// Handles of the kernels, largest tiles first.
#[derive(Debug)]
pub struct Gemm {
    nt: Vec<Tile>,
    nn: Vec<Tile>,
    nt_swiglu: Vec<Tile>,
    nn_swiglu_bwd: Vec<Tile>,
    /// Takes this tile shape of each list (its last, if there are fewer) instead of choosing.
    pub force: Option<usize>,
    /// Blocks of the kernels whose blocks stay and walk the tiles (`gemm_sm90.cu`): one a multiprocessor. With fewer, each block
    /// walks several tiles even of a small product.
    pub resident: usize,
    /// Who computes products, where cuBLASLt is there.
    pub choice: GemmChoice,
    choices: Option<Choices>,
}

impl Gemm {
    /// Resolves the kernels.
    pub fn new(cuda: &Cuda) -> Result<Self> {
        let sm90 = gemm_sm90::is_available(cuda)?;
        let tiles = |list: &[(usize, usize, &'static str)], sm90_list: [&'static str; 2]| -> Result<Vec<Tile>> {
            let mut all = Vec::new();
            if sm90 {
                all.extend(gemm_sm90::tiles(cuda, sm90_list)?);
            }
            for &(m, n, name) in list.iter().filter(|(m, ..)| cuda.precision() == Precision::Bf16 || *m == 32) {
                let shared = STAGES * (m + n) * BK * cuda.precision().bytes();
                all.push(Tile { m, n, kernel: cuda.kernel("gemm", name, 128, shared)?, sm90: false });
            }
            Ok(all)
        };
        Ok(Gemm {
            nt: tiles(
                &[(128, 128, "gemm_nt_128x128"), (128, 64, "gemm_nt_128x64"), (32, 64, "gemm_nt_32x64")],
                ["gemm_sm90_nt_128x256", "gemm_sm90_nt_128x128"],
            )?,
            nn: tiles(
                &[(128, 128, "gemm_nn_128x128"), (128, 64, "gemm_nn_128x64"), (32, 64, "gemm_nn_32x64")],
                ["gemm_sm90_nn_128x256", "gemm_sm90_nn_128x128"],
            )?,
            nt_swiglu: tiles(
                &[(128, 128, "gemm_nt_swiglu_128x128"), (32, 64, "gemm_nt_swiglu_32x64")],
                ["gemm_sm90_nt_swiglu_128x256", "gemm_sm90_nt_swiglu_128x128"],
            )?,
            nn_swiglu_bwd: tiles(
                &[(128, 128, "gemm_nn_swiglu_bwd_128x128"), (32, 64, "gemm_nn_swiglu_bwd_32x64")],
                ["gemm_sm90_nn_swiglu_bwd_128x256", "gemm_sm90_nn_swiglu_bwd_128x128"],
            )?,
            force: None,
            resident: cuda.description().sm_count,
            choice: cuda.gemm(),
            choices: Choices::open(cuda)?,
        })
    }

    /// cuBLASLt is there to be chosen.
    pub fn has_cublaslt(&self) -> bool {
        self.choices.is_some()
    }

    /// Bytes of cuBLASLt's workspace.
    pub fn workspace(&self) -> usize {
        self.choices.as_ref().map_or(0, Choices::workspace)
    }

    /// Tile shapes of the longest list.
    pub fn shapes(&self) -> usize {
        self.nt.len()
    }

    /// `C = epilogue(A · B)`. `a: [m, k]`; `b: [n, k]` or `[k, n]`; m any, n and k multiples of 8, rows at 16-byte boundaries.
    /// C may be written even where SwiGLU need not keep it.
    pub fn run(
        &self,
        cuda: &Cuda,
        a: Rows,
        b: impl Into<Stack>,
        way: Weight,
        c: Rows,
        epilogue: Epilogue,
    ) -> Result<()> {
        let choices = self.choices.as_ref().filter(|_| self.choice != GemmChoice::Ours && self.force.is_none());
        self.dispatch(cuda, &Product { a, stack: b.into(), way, c, epilogue }, choices)
    }

    /// With these kernels, whatever was chosen.
    pub(super) fn ours(&self, cuda: &Cuda, product: &Product) -> Result<()> {
        self.dispatch(cuda, product, None)
    }

    fn dispatch(&self, cuda: &Cuda, product: &Product, choices: Option<&Choices>) -> Result<()> {
        let &Product { a, stack, way, c, epilogue } = product;
        let (b, tail) = (stack.weight, stack.adapters.unwrap_or(stack.weight));
        let (m, k) = (a.rows, a.columns);
        let (n, b_k) = if way == Weight::Transposed { (stack.rows(), b.columns) } else { (b.columns, stack.rows()) };
        let refuse = |ok: bool, what: &str| require(ok, "gemm", || format!("{what}: A {a:?}, B {b:?}, C {c:?}"));
        refuse(b_k == k && tail.columns == b.columns, "A and B differ in K, or W and the adapters in width")?;
        refuse(n % 8 == 0 && k % 8 == 0, "N and K must be multiples of 8")?;
        refuse(
            a.is_aligned() && b.is_aligned() && tail.is_aligned() && c.is_aligned(),
            "rows must start at 16-byte boundaries",
        )?;
        let mut g = Arguments {
            a: a.address,
            b: b.address,
            b_tail: tail.address,
            c: c.address,
            bias: 0,
            addend: 0,
            gate_up: 0,
            act: 0,
            m: m as i32,
            n: n as i32,
            k: k as i32,
            b_rows: b.rows as i32,
            lda: a.stride as i32,
            ldb: b.stride as i32,
            ldb_tail: tail.stride as i32,
            ldc: c.stride as i32,
            ld_addend: 0,
            ld_gate_up: 0,
            ld_act: 0,
            mask: MaskLayout::new(0, m),
            mask_scale: 1.0,
            n_regions: 0,
            n_tiles: 0,
            plain_n: n as i32,
            k_last: k as i32,
            regions: [Region { first: 0, last: 0, tile: 0, mask: 0 }; MAX_REGIONS],
        };
        let (tiles, masks, c_columns) = match epilogue {
            Epilogue::Plain { bias, addend, masks } => {
                g.bias = bias;
                if let Some(addend) = addend {
                    let columns = if way == Weight::Transposed { b.rows } else { n };
                    refuse(
                        addend.rows >= m && addend.columns >= columns && addend.is_aligned(),
                        "the addend does not fit C",
                    )?;
                    (g.addend, g.ld_addend) = (addend.address, addend.stride as i32);
                }
                (if way == Weight::Transposed { &self.nt } else { &self.nn }, masks, n)
            }
            Epilogue::Swiglu { bias, act, keep } => {
                refuse(way == Weight::Transposed, "SwiGLU belongs to the forward product")?;
                refuse(act.rows >= m && act.columns == n / 2 && act.is_aligned(), "act does not fit C")?;
                (g.bias, g.act, g.ld_act) = (bias, act.address, act.stride as i32);
                if !keep {
                    g.c = 0;
                }
                (&self.nt_swiglu, None, n)
            }
            Epilogue::SwigluBackward { gate_up, masks } => {
                refuse(way == Weight::Plain, "SwiGLU's backward belongs to the backward product")?;
                refuse(
                    gate_up.rows >= m && gate_up.columns >= 2 * n && gate_up.is_aligned(),
                    "gate_up does not fit C",
                )?;
                (g.gate_up, g.ld_gate_up) = (gate_up.address, gate_up.stride as i32);
                (&self.nn_swiglu_bwd, masks, 2 * n)
            }
        };
        refuse(c.rows >= m && c.columns >= c_columns, "C is too small")?;
        if let Some(choices) = choices
            && choices.run(cuda, self, product)?
        {
            return Ok(());
        }
        // The kernels of sm_90a know no masks, and W and the adapters must part at a boundary of 8.
        let masked = masks.is_some_and(|masks| !masks.adapters.is_empty());
        let parts =
            [m, n, k, b.rows].iter().all(|&size| size > 0) && (stack.adapters.is_none() || b.rows.is_multiple_of(8));
        let sm90 = parts && !masked;
        if let Epilogue::Plain { bias, addend, masks: Some(masks) } = epilogue
            && parts
            && masked
            && way == Weight::Transposed
            && masks.adapters[0].first >= b.rows
            && self.tile(cuda, tiles, true, m, b.rows).sm90
        {
            // W's columns and the adapters' apart: only these, few, are left to the portable kernels.
            let unmasked = Epilogue::Plain { bias, addend, masks: None };
            self.ours(cuda, &Product { a, stack: b.into(), way, c: c.columns(0, b.rows), epilogue: unmasked })?;
            let adapters = masks.without(b.rows);
            let epilogue =
                Epilogue::Plain { bias: 0, addend: None, masks: Some(Masks { adapters: &adapters, ..masks }) };
            let c = c.columns(b.rows, tail.rows);
            return self.ours(cuda, &Product { a, stack: tail.into(), way, c, epilogue });
        }
        let tile = self.tile(cuda, tiles, sm90, m, n);
        if tile.sm90 {
            return gemm_sm90::run(cuda, tile, self.resident, a, stack, way, g);
        }
        g.n_tiles = n.div_ceil(tile.n) as i32;
        if let Some(masks) = masks {
            (g.mask, g.mask_scale) = (MaskLayout::new(masks.width, m), masks.scale);
            self.regions(&mut g, masks.adapters, way, tile.n)?;
        }
        let blocks = m.div_ceil(tile.m) * g.n_tiles as usize;
        // SAFETY: the struct is the kernel's; shapes, strides and alignment were checked, and `Rows` lie in live buffers.
        unsafe { cuda.launch(tile.kernel, [blocks, 1, 1], arguments![g]) }
    }

    /// What is masked comes last. Forward: the columns of each adapter are regions with tiles of their own, after the plain ones.
    /// Backward: the steps of K of each adapter are regions.
    fn regions(&self, g: &mut Arguments, adapters: &[Masked], way: Weight, tile: usize) -> Result<()> {
        let end = if way == Weight::Transposed { g.n } else { g.k } as usize;
        let plain = adapters.first().map_or(end, |a| a.first);
        let ends = adapters.iter().map(|a| a.first + a.count);
        let fits = adapters.len() <= MAX_REGIONS && ends.eq(adapters.iter().skip(1).map(|a| a.first).chain([end]));
        require(fits || adapters.is_empty(), "gemm", || {
            format!("adapters {adapters:?} are not the last of {end} columns")
        })?;
        let mut first_tile = plain.div_ceil(tile);
        for (region, a) in g.regions.iter_mut().zip(adapters) {
            let (first, last) = (a.first as i32, (a.first + a.count) as i32);
            *region = Region { first, last, tile: first_tile as i32, mask: a.mask };
            first_tile += a.count.div_ceil(MASKED_COLUMNS);
        }
        g.n_regions = adapters.len() as i32;
        match way {
            Weight::Transposed => (g.n_tiles, g.plain_n) = (first_tile as i32, plain as i32),
            Weight::Plain => g.k_last = plain as i32,
        }
        Ok(())
    }

    /// The largest tile that gives each multiprocessor a block; the smallest if none does. `sm90`: the kernels of sm_90a may take it.
    fn tile(&self, cuda: &Cuda, tiles: &[Tile], sm90: bool, m: usize, n: usize) -> Tile {
        let first = tiles.iter().position(|t| sm90 || !t.sm90).unwrap_or(0);
        if let Some(i) = self.force {
            return tiles[i.max(first).min(tiles.len() - 1)];
        }
        let enough = |t: &&Tile| m.div_ceil(t.m) * n.div_ceil(t.n) >= cuda.description().sm_count;
        *tiles[first..].iter().find(enough).unwrap_or(&tiles[tiles.len() - 1])
    }
}
