//! Integration tests: one program, so that it is linked once.

mod cli;
mod common;
mod cuda;
mod cuda_collab;
mod cuda_model;
mod gguf;
mod goldens;
mod kernels;
mod kill;
mod model;
mod operations;
mod overhead;
mod pickles;
mod prepare;
mod prompts;
mod selftest;
mod training;
