//! Who computes a product: our kernels or cuBLASLt (`cublaslt.rs`), whichever is faster at its shape on this card.
//!
//! Shapes are chosen for when they are first seen, rows rounded up to a power of two: both run on the operands at hand, timed by
//! the card's clock, and a line tells the outcome. After that a product costs a look into a table. cuBLASLt knows neither two
//! matrices as one operand nor SwiGLU nor dropout: it multiplies with W alone, and our kernels do the rest (adapters' columns or
//! steps, SwiGLU's forward), which is in its time. SwiGLU's backward has no kernel of its own, so those products stay ours.
//!
//! What is seen first while a stream is being captured cannot be timed: it is ours for that graph. The last bits of ours and of
//! cuBLASLt differ, so runs are repeatable bit by bit only with the same choices: [`GemmChoice::Ours`].

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::{result, sys};

use super::context::Cuda;
use super::cublaslt::{CublasLt, Planned, Shape, VARIABLE};
use super::error::{Attempt, Result};
use super::gemm::{Epilogue, Gemm, Masks, Stack, Weight};
use super::lora::{Adapter, Lora};
use super::memory::Rows;
use crate::progress::note;

/// Who computes matrix products on a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GemmChoice {
    /// Our kernels: the same bits on every run.
    #[default]
    Ours,
    /// cuBLASLt wherever it can.
    CublasLt,
    /// The faster one at each shape, as timed on this card.
    Auto,
}

impl GemmChoice {
    const NAMES: [(&str, GemmChoice); 3] =
        [("ours", GemmChoice::Ours), ("cublaslt", GemmChoice::CublasLt), ("auto", GemmChoice::Auto)];
}

impl std::str::FromStr for GemmChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = GemmChoice::NAMES.iter().find(|(name, _)| *name == text);
        found.map(|(_, choice)| *choice).ok_or_else(|| format!("{text:?} is none of ours, cublaslt, auto"))
    }
}

impl std::fmt::Display for GemmChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = GemmChoice::NAMES.iter().find(|(_, choice)| choice == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

/// A product as it was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product<'a> {
    pub a: Rows,
    pub stack: Stack,
    pub way: Weight,
    pub c: Rows,
    pub epilogue: Epilogue<'a>,
}

/// What a choice holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// Of cuBLASLt's part.
    shape: Shape,
    /// Rows of the adapters' A.
    adapters: usize,
    masked: bool,
    swiglu: bool,
}

impl std::fmt::Display for Key {
    /// `y = x Wᵀ, W 4096 x 11008, up to 4096 rows, + residual`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shape { m, n, k, transposed, ld_addend, bias, .. } = self.shape;
        let (what, out, width) = if transposed { ("x Wᵀ", n, k) } else { ("d_y W", k, n) };
        write!(f, "{what}, W {out} x {width}, up to {m} rows")?;
        // In the backward the adapters' part is an addend too.
        let addend = ld_addend.is_some() && (transposed || self.adapters == 0);
        let said = [(bias, ", bias"), (addend, ", residual"), (self.swiglu, ", SwiGLU"), (self.masked, ", dropout")];
        said.iter().filter(|(is, _)| *is).try_for_each(|(_, name)| f.write_str(name))?;
        if self.adapters > 0 { write!(f, ", LoRA's {} (ours)", self.adapters) } else { Ok(()) }
    }
}

impl Product<'_> {
    /// Its key, or why cuBLASLt cannot take part in it.
    fn key(&self) -> std::result::Result<Key, &'static str> {
        let (weight, adapters) = (self.stack.weight, self.stack.adapters.map_or(0, |a| a.rows));
        let transposed = self.way == Weight::Transposed;
        let (bias, addend, masks, swiglu) = match self.epilogue {
            Epilogue::Plain { bias, addend, masks } => (bias, addend, masks, false),
            Epilogue::Swiglu { .. } if adapters > 0 => return Err("SwiGLU runs over W and adapters"),
            Epilogue::Swiglu { bias, .. } => (bias, None, None, true),
            Epilogue::SwigluBackward { .. } => return Err("SwiGLU's backward is fused with the product"),
        };
        let masked = masks.is_some_and(|m| !m.adapters.is_empty());
        if masked && masks.is_some_and(|m| m.adapters[0].first != weight.rows) {
            return Err("dropout begins inside of W");
        }
        if !bias.is_multiple_of(16) {
            return Err("the bias lies at no 16-byte boundary");
        }
        if !transposed && adapters > 0 && !self.is_repeatable() {
            return Err("the adapters' steps would be added in place");
        }
        let (n, k) = if transposed { (weight.rows, weight.columns) } else { (weight.columns, weight.rows) };
        let addend = if !transposed && adapters > 0 { Some(self.c) } else { addend };
        let shape = Shape {
            transposed,
            m: self.a.rows.next_power_of_two(),
            n,
            k,
            lda: self.a.stride,
            ldb: weight.stride,
            ldc: self.c.stride,
            ld_addend: addend.map(|a| a.stride),
            // In the backward with adapters, ours adds it.
            bias: bias != 0 && (transposed || adapters == 0),
        };
        Ok(Key { shape, adapters, masked, swiglu })
    }

    /// It may run twice and leave the same.
    fn is_repeatable(&self) -> bool {
        !matches!(self.epilogue, Epilogue::Plain { addend: Some(addend), .. } if addend.address == self.c.address)
    }
}

/// What was chosen for a key.
#[derive(Debug)]
enum Choice {
    Ours,
    CublasLt(Box<Planned>),
}

/// cuBLASLt, and what was chosen so far.
#[derive(Debug)]
pub(super) struct Choices {
    table: Mutex<BTreeMap<Key, Choice>>,
    /// Why products of a kind stay ours, as it was told.
    told: Mutex<BTreeSet<&'static str>>,
    /// SwiGLU.
    lora: Lora,
    library: CublasLt,
}

impl Choices {
    /// The library, if the card's choice wants it and it is there. Only [`GemmChoice::CublasLt`] insists.
    pub fn open(cuda: &Cuda) -> Result<Option<Self>> {
        let choice = cuda.gemm();
        // The emulator runs no machine code, of which a real cuBLASLt is made: there it must be named.
        if choice == GemmChoice::Ours
            || choice == GemmChoice::Auto && cuda.is_emulated() && std::env::var_os(VARIABLE).is_none()
        {
            return Ok(None);
        }
        match CublasLt::open(cuda) {
            Ok(library) => {
                let how = if choice == GemmChoice::Auto { "ours or its, as timed" } else { "its wherever it can" };
                note(&format!("products: {library} found; {how}"));
                Ok(Some(Choices { table: Mutex::default(), told: Mutex::default(), lora: Lora::new(cuda)?, library }))
            }
            Err(e) if choice == GemmChoice::CublasLt => Err(e),
            Err(e) => {
                note(&format!("products: ours; {e}"));
                Ok(None)
            }
        }
    }

    /// Bytes of the library's workspace.
    pub fn workspace(&self) -> usize {
        self.library.workspace()
    }

    /// Runs a product, whose operands were checked, if it was chosen for cuBLASLt; false if it is ours to run.
    pub fn run(&self, cuda: &Cuda, gemm: &Gemm, product: &Product) -> Result<bool> {
        if [product.a.rows, product.stack.weight.rows, product.stack.weight.columns].contains(&0) {
            return Ok(false);
        }
        let key = match product.key() {
            Ok(key) => key,
            Err(why) => {
                if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(why) {
                    note(&format!("products: ours where {why}"));
                }
                return Ok(false);
            }
        };
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let choice = match table.entry(key) {
            Entry::Occupied(chosen) => chosen.into_mut(),
            Entry::Vacant(place) => {
                let Some(choice) = self.choose(cuda, gemm, product, key)? else { return Ok(false) };
                place.insert(choice)
            }
        };
        match choice {
            Choice::CublasLt(planned) => self.with(planned, cuda, gemm, product),
            Choice::Ours => Ok(false),
        }
    }

    /// Chooses; `None` if it cannot be told yet.
    fn choose(&self, cuda: &Cuda, gemm: &Gemm, product: &Product, key: Key) -> Result<Option<Choice>> {
        if gemm.choice == GemmChoice::Auto && (!product.is_repeatable() || is_capturing(cuda)?) {
            return Ok(None);
        }
        let Some(mut planned) = self.library.plan(cuda.precision(), key.shape)? else {
            note(&format!("products: {key}: ours, cuBLASLt has no algorithm for it"));
            return Ok(Some(Choice::Ours));
        };
        if gemm.choice == GemmChoice::CublasLt {
            return Ok(Some(Choice::CublasLt(Box::new(planned))));
        }
        // Both once: modules are loaded, and a number of rows that the library's algorithm does not take shows.
        gemm.ours(cuda, product)?;
        if !self.with(&mut planned, cuda, gemm, product)? {
            return Ok(None);
        }
        let (rounds, runs) = if cuda.is_emulated() { (1, 1) } else { (5, 4) };
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(cuda.seconds(runs, || gemm.ours(cuda, product))? / runs as f64);
            theirs.push(cuda.seconds(runs, || self.with(&mut planned, cuda, gemm, product).map(drop))? / runs as f64);
        }
        let [ours, theirs] = [ours, theirs].map(median);
        let taken = if theirs < ours { "cuBLASLt" } else { "ours" };
        note(&format!("products: {key}: ours {:.1} us, cuBLASLt {:.1} us: {taken}", ours * 1e6, theirs * 1e6));
        Ok(Some(if theirs < ours { Choice::CublasLt(Box::new(planned)) } else { Choice::Ours }))
    }

    /// Runs a product with cuBLASLt and, for what that does not know, our kernels. False, with C not yet right, if the library
    /// does not take it.
    fn with(&self, planned: &mut Planned, cuda: &Cuda, gemm: &Gemm, product: &Product) -> Result<bool> {
        let &Product { a, stack: Stack { weight, adapters }, way, c, epilogue } = product;
        match (epilogue, adapters) {
            (Epilogue::Plain { bias, addend, masks }, Some(tail)) => {
                let apart = masks.map(|m| m.without(weight.rows));
                let masks = masks.zip(apart.as_ref()).map(|(m, apart)| Masks { adapters: apart, ..m });
                if way == Weight::Transposed {
                    let of_weight = c.columns(0, weight.rows);
                    if !self.library.run(cuda, planned, a, weight, of_weight, bias, addend)? {
                        return Ok(false);
                    }
                    let epilogue = Epilogue::Plain { bias: 0, addend: None, masks };
                    let c = c.columns(weight.rows, tail.rows);
                    gemm.ours(cuda, &Product { a, stack: tail.into(), way, c, epilogue })?;
                    return Ok(true);
                }
                // The adapters' steps of K first: the library adds what it finds.
                let steps = a.columns(weight.rows, tail.rows);
                let epilogue = Epilogue::Plain { bias, addend, masks };
                gemm.ours(cuda, &Product { a: steps, stack: tail.into(), way, c, epilogue })?;
                self.library.run(cuda, planned, a.columns(0, weight.rows), weight, c, 0, Some(c))
            }
            (Epilogue::Plain { bias, addend, .. }, None) => self.library.run(cuda, planned, a, weight, c, bias, addend),
            (Epilogue::Swiglu { bias, act, .. }, _) => {
                let done = self.library.run(cuda, planned, a, weight, c, bias, None)?;
                if done {
                    self.lora.swiglu(cuda, c.rows(0, a.rows), act.rows(0, a.rows), Adapter::NONE)?;
                }
                Ok(done)
            }
            (Epilogue::SwigluBackward { .. }, _) => Ok(false),
        }
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn is_capturing(cuda: &Cuda) -> Result<bool> {
    cuda.bind()?;
    // SAFETY: the stream lives.
    let status =
        unsafe { result::stream::is_capturing(cuda.stream()) }.attempt(|| "asking for a capture".to_owned())?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
