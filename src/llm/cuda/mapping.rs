//! The mapping from collaborative vectors to the LLM's, on the card: parameters, their gradients, and what a pass keeps.

use crate::cie::Mapping;
use crate::device::cuda::mapping::{Mapped, Mapping as Kernels, Widths};
use crate::device::cuda::{Buffer, Cuda};
use crate::llm::Error;

use super::workspace::{grow, put};

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
    /// Gradient of `x`, where it is wanted.
    d_x: Buffer<f32>,
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

    /// Maps `x: [n, dim]` into `output: [n, out]`.
    pub fn forward(&mut self, cuda: &Cuda, x: &[f32], output: &Buffer<f32>) -> Result<(), Error> {
        self.n = self.count(x);
        put(cuda, &mut self.x, x, "collaborative vectors")?;
        grow(cuda, &mut self.activated, self.n * self.widths.mid, "CIE activations")?;
        let output = Mapped { floats: Some(output), elements: None };
        let parameters = self.parameters.each_ref();
        Ok(self.kernels.forward(cuda, self.widths, parameters, self.n, &self.x, &self.activated, output)?)
    }

    /// Adds the gradients of the last [`Self::forward`], whose output's are `d_output: [n, out]`. Those of its input are brought to
    /// the host, into `d_x: [n, dim]`, where they are wanted.
    pub fn backward(&mut self, cuda: &Cuda, d_output: &Buffer<f32>, d_x: Option<&mut [f32]>) -> Result<(), Error> {
        if d_x.is_some() {
            grow(cuda, &mut self.d_x, self.n * self.widths.dim, "gradients of collaborative vectors")?;
        }
        grow(cuda, &mut self.d_activated, self.n * self.widths.mid, "CIE activations")?;
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
            d_x.is_some().then_some(&self.d_x),
        )?;
        if let Some(d_x) = d_x {
            self.d_x.download_to(cuda, d_x)?;
        }
        Ok(())
    }
}
