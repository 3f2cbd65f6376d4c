//! Integration tests: one program, so that it is linked once.

mod cli;
mod common;
mod goldens;
mod operations;
mod prepare;
mod prompts;
mod training;
