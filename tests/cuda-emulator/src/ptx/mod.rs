//! PTX text to a syntax tree: what was written, with names resolved and nothing yet decided about how it runs.
//!
//! [`lexer`] makes tokens, [`parser`] makes modules, [`variable`] and [`function`] what they hold, [`instruction`]
//! statements and operands, [`constant`] the constant expressions. Meaning is given in [`crate::decode`]. Grammar: PTX ISA, chapters "Syntax" and
//! "State Spaces, Types, and Variables". Text from outside never panics here: every refusal is an [`Error`] with a line.

pub mod ast;
pub mod constant;
pub mod function;
pub mod instruction;
pub mod lexer;
pub mod parser;
pub mod scope;
pub mod types;
pub mod variable;

pub use ast::{Function, Instruction, Module, Operand, Variable};
pub use types::{Space, Type};

/// Why PTX text was refused: one line, with the line of the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("PTX line {line}: {message}")]
pub struct Error {
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// What is wrong and, where it helps, what is expected.
    pub message: String,
}

impl Error {
    /// An error at a line.
    pub fn new(line: u32, message: impl Into<String>) -> Self {
        Self { line, message: message.into() }
    }
}

/// Parses PTX text.
pub fn parse(text: &str) -> Result<Module, Error> {
    parser::Parser::new(text)?.module()
}
