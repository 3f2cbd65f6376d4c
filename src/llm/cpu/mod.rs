//! The model on the CPU: its weights arranged for the operations, its blocks forward and backward.

mod block;
mod model;

pub use model::{Model, Workspace};
