//! From syntax tree to program: registers get slots, variables get addresses, instructions get their functions.
//!
//! [`builder`] holds what is known while decoding, [`blocks`] orders the code so that parted lanes meet again, [`layout`]
//! places variables, [`operands`] reads operands; the other modules each decode one family of instructions. An instruction
//! that none of them knows is an error with its line.

pub mod arithmetic;
pub mod async_ops;
pub mod blocks;
pub mod builder;
pub mod control;
pub mod convert;
pub mod float;
pub mod layout;
pub mod memory;
pub mod moves;
pub mod operands;
pub mod placement;
pub mod warp;
pub mod wgmma;

use std::collections::HashMap;

use crate::program::Program;
use crate::ptx::{Error, Module};

/// Decodes a kernel of a module. `addresses` gives the device address of every global and constant variable.
pub fn kernel(module: &Module, name: &str, addresses: &HashMap<String, u64>) -> Result<Program, Error> {
    builder::Builder::new(module, addresses).kernel(name)
}
