//! Integration tests: one program, so that it is linked once.

mod cli;
mod common;
mod cublaslt;
mod cuda;
mod cuda_collab;
mod cuda_graphs;
mod cuda_model;
mod gguf;
mod goldens;
mod imports;
mod kernels;
mod kill;
mod methods;
mod model;
mod operations;
mod overhead;
mod pickles;
mod prepare;
mod prepare_amazon;
mod prepare_parquet;
mod prompts;
mod selftest;
mod training;
