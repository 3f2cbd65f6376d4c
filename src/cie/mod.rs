//! The mapping from collaborative vectors to token embeddings (CIE).
