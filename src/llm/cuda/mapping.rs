//! The mapping from collaborative vectors to the LLM's, on the card: parameters, their gradients, and what a pass keeps.

use crate::cie::Mapping;
use crate::device::cuda::mapping::{Mapped, Mapping as Kernels, Widths};
use crate::device::cuda::{Buffer, Cuda};
use crate::llm::Error;

use super::workspace::grow;

/// Float32 parameters and gradients of a [`Mapping`], in its order.
#[derive(Debug)]
pub(super) struct DeviceMapping {
    kernels: Kernels,
    widths: Widths,
    pub parameters: [Buffer<f32>; 4],
    pub gradients: [Buffer<f32>; 4],
    /// Collaborative vectors, `[n, dim]`.
    x: Buffer<f32>,
    /// Hidden layer and its gradient, `[n, mid]`.
    activated: Buffer<f32>,
    d_activated: Buffer<f32>,
    /// Gradient of `x`, computed where it is wanted: in all passes of a training or in none.
    pub d_x: Buffer<f32>,
    pub wants_d_x: bool,
    n: usize,
}

/// Makes an array of buffers; the first error ends it.
fn buffers(make: impl FnMut(usize) -> Result<Buffer<f32>, Error>) -> Result<[Buffer<f32>; 4], Error> {
    let made = (0..4).map(make).collect::<Result<Vec<_>, _>>()?;
    Ok(made.try_into().expect("four were made"))
}

impl DeviceMapping {
    /// Copies the parameters; gradients are zero.
    pub fn new(cuda: &Cuda, mapping: &Mapping) -> Result<Self, Error> {
        let empty = || Buffer::new(cuda, 0, "CIE activations");
        Ok(DeviceMapping {
            kernels: Kernels::new(cuda)?,
            widths: Widths { dim: mapping.dim, mid: mapping.mid, out: mapping.out },
            parameters: buffers(|i| Ok(Buffer::from_host(cuda, &mapping.tensors[i], "CIE parameters")?))?,
            gradients: buffers(|i| Ok(Buffer::zeros(cuda, mapping.tensors[i].len(), "CIE gradients")?))?,
            x: empty()?,
            activated: empty()?,
            d_activated: empty()?,
            d_x: empty()?,
            wants_d_x: false,
            n: 0,
        })
    }

    /// Numbers of the output a vector has.
    pub fn out(&self) -> usize {
        self.widths.out
    }

    /// Vectors in `x`.
    pub fn count(&self, x: &[f32]) -> usize {
        x.len() / self.widths.dim
    }

    /// Makes room for `n` vectors.
    pub fn reserve(&mut self, cuda: &Cuda, n: usize) -> Result<(), Error> {
        grow(cuda, &mut self.x, n * self.widths.dim, "collaborative vectors")?;
        grow(cuda, &mut self.d_x, n * self.widths.dim, "collaborative vectors")?;
        grow(cuda, &mut self.activated, n * self.widths.mid, "CIE activations")?;
        grow(cuda, &mut self.d_activated, n * self.widths.mid, "CIE activations")
    }

    /// Bytes on a card of `sms` multiprocessors, for `n` vectors: parameters, gradients, activations.
    pub fn bytes(mapping: &Mapping, n: usize, sms: usize) -> usize {
        let parameters: usize = mapping.tensors.iter().map(Vec::len).sum();
        (2 * parameters + n * 2 * (mapping.dim + mapping.mid) + Kernels::scratch(sms)) * size_of::<f32>()
    }

    /// Takes `x: [m, dim]`, and zeros up to `n` vectors.
    pub fn load(&mut self, cuda: &Cuda, x: &[f32], n: usize) -> Result<(), Error> {
        self.n = n;
        self.reserve(cuda, n)?;
        let mut x = x.to_vec();
        x.resize(n * self.widths.dim, 0.0);
        Ok(self.x.upload(cuda, &x)?)
    }

    /// Maps what was loaded into `output: [n, out]`.
    pub fn forward(&self, cuda: &Cuda, output: &Buffer<f32>) -> Result<(), Error> {
        let output = Mapped { floats: Some(output), elements: None };
        let parameters = self.parameters.each_ref();
        Ok(self.kernels.forward(cuda, self.widths, parameters, self.n, &self.x, &self.activated, output)?)
    }

    /// Adds the gradients of the last [`Self::forward`], whose output's are `d_output: [n, out]`; those of its input stay here.
    pub fn backward(&self, cuda: &Cuda, d_output: &Buffer<f32>) -> Result<(), Error> {
        self.kernels.backward(
            cuda,
            self.widths,
            self.parameters.each_ref(),
            self.n,
            &self.x,
            &self.activated,
            d_output,
            self.gradients.each_ref(),
            &self.d_activated,
            self.wants_d_x.then_some(&self.d_x),
        )?;
        Ok(())
    }
}
