//! float32 buffers with a sentinel behind them.

use crate::device::cuda::{Buffer, Cuda, Result};

/// A bit pattern that no kernel writes: a NaN.
const SENTINEL: u32 = 0x7fc0_dead;
/// Values of sentinel.
const MARGIN: usize = 64;

/// `len` numbers on the device, then sentinels. Operations take such arrays by their beginning, so nothing lies before: that is for
/// the bounds checks of the emulator.
pub(super) struct Floats {
    /// The operand.
    pub buffer: Buffer<f32>,
    len: usize,
}

impl Floats {
    /// Numbers that all are sentinels: what is not written shows.
    pub fn new(cuda: &Cuda, len: usize) -> Result<Self> {
        let buffer = Buffer::from_host(cuda, &vec![f32::from_bits(SENTINEL); len + MARGIN], "a test")?;
        Ok(Floats { buffer, len })
    }

    /// Holding `values`.
    pub fn filled(cuda: &Cuda, values: &[f32]) -> Result<Self> {
        let mut floats = Floats::new(cuda, values.len())?;
        floats.buffer.upload(cuda, values)?;
        Ok(floats)
    }

    /// The numbers, and whether what follows them is untouched.
    pub fn read(&self, cuda: &Cuda) -> Result<(Vec<f32>, bool)> {
        let mut values = self.buffer.download(cuda, self.buffer.len())?;
        let contained = values[self.len..].iter().all(|x| x.to_bits() == SENTINEL);
        values.truncate(self.len);
        Ok((values, contained))
    }
}
