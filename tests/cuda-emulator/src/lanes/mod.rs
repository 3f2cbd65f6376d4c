//! Arithmetic on the 32 lanes of a warp: one function per operation and type, resolved when a module is decoded.
//!
//! A scalar closure becomes a loop over 32 lanes that the compiler vectorises, in a version for any processor and one for
//! AVX2 with FMA; the decoder keeps a pointer to the right one, so executing an instruction is one indirect call. All 32
//! lanes are computed whatever the mask; the machine blends.

pub mod compare;
pub mod convert;
pub mod float;
pub mod half_float;
pub mod integer;
pub mod logic;
pub mod video;

/// A register of 32-bit lanes.
pub type Lanes32 = [u32; 32];
/// A register of 64-bit lanes.
pub type Lanes64 = [u64; 32];

/// `d = f(a, b, c)` on 32 lanes; unused operands may point anywhere readable.
///
/// # Safety
/// Pointers address whole registers of the widths that the operation was picked for; `d` equals a source or is disjoint.
pub type LaneFn = unsafe fn(d: *mut u32, a: *const u32, b: *const u32, c: *const u32);

/// `mask = f(a, b)` on 32 lanes: bit i is lane i.
///
/// # Safety
/// As [`LaneFn`].
pub type CompareFn = unsafe fn(a: *const u32, b: *const u32) -> u32;

/// A value that a lane of a register can hold.
pub trait Lane: Copy + 'static {
    /// The register's lane: u32 for everything up to 32 bits, else u64.
    type Slot: Copy + Default;
    /// Reads the value from the lane's low bits.
    fn from_slot(slot: Self::Slot) -> Self;
    /// The value in the lane's low bits, zeros above.
    fn to_slot(self) -> Self::Slot;
}

macro_rules! lane_integers {
    ($($t:ty, $u:ty, $slot:ty;)*) => {$(
        impl Lane for $t {
            type Slot = $slot;
            #[inline(always)]
            fn from_slot(slot: $slot) -> Self { slot as $t }
            #[inline(always)]
            fn to_slot(self) -> $slot { self as $u as $slot }
        }
    )*};
}
lane_integers! { u8, u8, u32; i8, u8, u32; u16, u16, u32; i16, u16, u32; u32, u32, u32; i32, u32, u32; u64, u64, u64; i64, u64, u64; }

impl Lane for f32 {
    type Slot = u32;
    #[inline(always)]
    fn from_slot(slot: u32) -> Self {
        f32::from_bits(slot)
    }
    #[inline(always)]
    fn to_slot(self) -> u32 {
        self.to_bits()
    }
}

impl Lane for f64 {
    type Slot = u64;
    #[inline(always)]
    fn from_slot(slot: u64) -> Self {
        f64::from_bits(slot)
    }
    #[inline(always)]
    fn to_slot(self) -> u64 {
        self.to_bits()
    }
}

/// Two 16-bit halves, low first.
#[derive(Debug, Clone, Copy)]
pub struct Pair(pub u16, pub u16);

impl Lane for Pair {
    type Slot = u32;
    #[inline(always)]
    fn from_slot(slot: u32) -> Self {
        Pair(slot as u16, (slot >> 16) as u16)
    }
    #[inline(always)]
    fn to_slot(self) -> u32 {
        u32::from(self.0) | u32::from(self.1) << 16
    }
}

/// Conjures a closure that captures nothing, so that a plain function pointer can run it.
#[inline(always)]
fn closure<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "a lane closure must capture nothing") };
    // SAFETY: a read of no bytes is valid from any aligned, non-null pointer. That a value of `F` may exist at all follows
    // from the `pick` functions: they name a caller's instance only when handed a value of `F`, and `F` is `Copy`.
    unsafe { std::ptr::NonNull::<F>::dangling().read() }
}

/// # Safety
/// See [`LaneFn`].
#[inline(always)]
unsafe fn loop3<A: Lane, B: Lane, C: Lane, D: Lane, F: Fn(A, B, C) -> D + Copy>(
    d: *mut u32,
    a: *const u32,
    b: *const u32,
    c: *const u32,
) {
    let f = closure::<F>();
    let (d, a, b, c) =
        (d.cast::<[D::Slot; 32]>(), a.cast::<[A::Slot; 32]>(), b.cast::<[B::Slot; 32]>(), c.cast::<[C::Slot; 32]>());
    // SAFETY: the caller's registers; copies first, because `d` may be one of the sources.
    unsafe {
        let (a, b, c) = (*a, *b, *c);
        let mut out = [D::Slot::default(); 32];
        for i in 0..32 {
            out[i] = f(A::from_slot(a[i]), B::from_slot(b[i]), C::from_slot(c[i])).to_slot();
        }
        *d = out;
    }
}

/// # Safety
/// See [`CompareFn`].
#[inline(always)]
unsafe fn loop_mask<A: Lane, B: Lane, F: Fn(A, B) -> bool + Copy>(a: *const u32, b: *const u32) -> u32 {
    let f = closure::<F>();
    let (a, b) = (a.cast::<[A::Slot; 32]>(), b.cast::<[B::Slot; 32]>());
    let mut bits = [0u32; 32];
    // SAFETY: the caller's registers.
    unsafe {
        for (i, bit) in bits.iter_mut().enumerate() {
            *bit = u32::from(f(A::from_slot((*a)[i]), B::from_slot((*b)[i]))) << i;
        }
    }
    bits.iter().fold(0, |mask, bit| mask | bit)
}

macro_rules! versions {
    ($plain:ident, $avx2:ident, $inner:ident, [$($g:ident: $b:path),*], $f:ident: $ft:path, ($($p:ident: $pt:ty),*) $(-> $r:ty)?) => {
        /// # Safety
        /// As the function type it is picked for.
        unsafe fn $plain<$($g: $b,)* $f: $ft + Copy>($($p: $pt),*) $(-> $r)? {
            // SAFETY: the caller's promise.
            unsafe { $inner::<$($g,)* $f>($($p),*) }
        }
        /// # Safety
        /// As the function type it is picked for, on a processor with AVX2, FMA, F16C, BMI and POPCNT.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        unsafe fn $avx2<$($g: $b,)* $f: $ft + Copy>($($p: $pt),*) $(-> $r)? {
            // SAFETY: the caller's promise.
            unsafe { $inner::<$($g,)* $f>($($p),*) }
        }
    };
}

trait Fn3<A, B, C, D>: Fn(A, B, C) -> D {}
impl<A, B, C, D, F: Fn(A, B, C) -> D> Fn3<A, B, C, D> for F {}
trait FnMask<A, B>: Fn(A, B) -> bool {}
impl<A, B, F: Fn(A, B) -> bool> FnMask<A, B> for F {}

versions!(plain3, avx3, loop3, [A: Lane, B: Lane, C: Lane, D: Lane], F: Fn3<A, B, C, D>, (d: *mut u32, a: *const u32, b: *const u32, c: *const u32));
versions!(plain_mask, avx_mask, loop_mask, [A: Lane, B: Lane], F: FnMask<A, B>, (a: *const u32, b: *const u32) -> u32);

/// Whether this processor runs the AVX2 versions.
pub fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// The lane function of `f(a, b, c)`.
pub fn pick3<A: Lane, B: Lane, C: Lane, D: Lane, F: Fn(A, B, C) -> D + Copy>(_f: F) -> LaneFn {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return avx3::<A, B, C, D, F>;
    }
    plain3::<A, B, C, D, F>
}

/// The lane function of `f(a, b)`.
pub fn pick2<A: Lane, B: Lane, D: Lane, F: Fn(A, B) -> D + Copy>(f: F) -> LaneFn {
    adapt2(f)
}

/// The lane function of `f(a)`.
pub fn pick1<A: Lane, D: Lane, F: Fn(A) -> D + Copy>(f: F) -> LaneFn {
    adapt1(f)
}

fn adapt2<A: Lane, B: Lane, D: Lane, F: Fn(A, B) -> D + Copy>(_f: F) -> LaneFn {
    // A closure over nothing stays without bytes: it calls the conjured `F`.
    pick3::<A, B, u32, D, _>(|a, b, _| closure::<F>()(a, b))
}

fn adapt1<A: Lane, D: Lane, F: Fn(A) -> D + Copy>(_f: F) -> LaneFn {
    pick3::<A, u32, u32, D, _>(|a, _, _| closure::<F>()(a))
}

/// The lane function of a comparison.
pub fn pick_mask<A: Lane, B: Lane, F: Fn(A, B) -> bool + Copy>(_f: F) -> CompareFn {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return avx_mask::<A, B, F>;
    }
    plain_mask::<A, B, F>
}
