//! cuda-emulator: PTX executed on the CPU, checked, and counted.
//!
//! Text becomes a tree ([`ptx`]), the tree a program of resolved instructions ([`decode`], [`program`]), and the program
//! runs on a grid of warps in lockstep ([`machine`]) over arithmetic on 32 lanes ([`lanes`], [`numerics`]) and device
//! memory with an address space of its own ([`memory`]). Accesses are checked ([`checks`]) and counted ([`counts`]).
//! [`Device`] and [`Module`] are the Rust API.
#![deny(missing_docs)]

pub mod checks;
pub mod counts;
pub mod decode;
pub mod device;
pub mod driver;
pub mod fatbin;
pub mod lanes;
pub mod machine;
pub mod memory;
pub mod module;
pub mod numerics;
pub mod program;
pub mod ptx;

pub use checks::{Finding, Kind};
pub use counts::Card;
pub use device::{Device, Shape};
pub use machine::{Config, Outcome};
pub use module::Module;
