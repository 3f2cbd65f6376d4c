//! Loading images into modules.

use super::{Driver, error, lock};
use crate::fatbin::{self, Image};
use crate::module::{Error, Module};

impl Driver {
    /// Loads an image and gives its module a handle.
    ///
    /// # Safety
    /// `image` is what `cuModuleLoadData` takes.
    pub unsafe fn load_image(&self, image: *const u8) -> Result<usize, u32> {
        match self.unsafe_in_capture("loading a module") {
            0 => {}
            code => return Err(code),
        }
        // SAFETY: the caller's promise.
        let texts = match unsafe { fatbin::read(image) } {
            Image::Ptx(texts) => texts,
            Image::CubinOnly => {
                eprintln!("[cuda-emulator] the image holds machine code only: there is no PTX to run");
                return Err(error::NO_BINARY_FOR_GPU);
            }
            Image::Invalid => return Err(error::INVALID_IMAGE),
        };
        let texts = fatbin::runnable(texts, self.device.card.sm);
        let Some(text) = texts.first() else {
            eprintln!("[cuda-emulator] no PTX of the image is for sm_{} or older", self.device.card.sm);
            return Err(error::NO_BINARY_FOR_GPU);
        };
        let module = Module::parse(text, &self.device.memory).map_err(|problem| {
            eprintln!("[cuda-emulator] {problem}");
            match problem {
                Error::Ptx(_) => error::INVALID_PTX,
                Error::Memory(_) => error::OUT_OF_MEMORY,
            }
        })?;
        if let Some(newest) = self.environment.ptx_version
            && module.version > newest
        {
            eprintln!(
                "[cuda-emulator] PTX {}.{} is newer than {}.{}",
                module.version.0, module.version.1, newest.0, newest.1
            );
            module.unload(&self.device.memory);
            return Err(error::UNSUPPORTED_PTX_VERSION);
        }
        let handle = self.handle();
        lock(&self.modules).insert(handle, module);
        Ok(handle)
    }
}
