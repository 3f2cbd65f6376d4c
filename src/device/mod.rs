//! The list of operations and their implementations.
