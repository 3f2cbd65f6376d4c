//! The LLaMA-family model.
