//! The cursor over the tokens, module directives, variables and functions.

use std::collections::HashSet;

use super::Error;
use super::ast::Module;
use super::lexer::{self, Lexeme, Token};
use super::types::Space;

/// The parser's state.
#[derive(Debug)]
pub struct Parser<'t> {
    tokens: Vec<Lexeme<'t>>,
    at: usize,
    module_names: HashSet<&'t str>,
    module: Module,
}

impl<'t> Parser<'t> {
    /// A parser at the start of the text.
    pub fn new(text: &'t str) -> Result<Self, Error> {
        // cuModuleLoadData takes text that ends in NUL; some writers pad with more.
        let tokens = lexer::tokens(text.trim_end_matches('\0'))?;
        Ok(Self { tokens, at: 0, module_names: HashSet::new(), module: Module::default() })
    }

    /// The token ahead.
    pub fn peek(&self) -> &Token<'t> {
        &self.tokens[self.at].token
    }

    /// The token `n` further, and whether it stands directly after the one before it.
    pub fn peek_at(&self, n: usize) -> (&Token<'t>, bool) {
        let lexeme = &self.tokens[(self.at + n).min(self.tokens.len() - 1)];
        (&lexeme.token, lexeme.glued)
    }

    /// Takes the token ahead. (Not an iterator: the end repeats.)
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Token<'t> {
        let token = self.tokens[self.at].token.clone();
        self.at = (self.at + 1).min(self.tokens.len() - 1);
        token
    }

    /// Line of the token ahead.
    pub fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    /// An error at the cursor.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::new(self.line(), message)
    }

    /// Takes a punctuation character if it is ahead.
    pub fn eat(&mut self, c: char) -> bool {
        let found = *self.peek() == Token::Punct(c);
        if found {
            self.next();
        }
        found
    }

    /// Takes a punctuation character that must be ahead.
    pub fn expect(&mut self, c: char) -> Result<(), Error> {
        if self.eat(c) { Ok(()) } else { Err(self.error(format!("expected `{c}`, found {:?}", self.peek()))) }
    }

    /// Takes a name that must be ahead.
    pub fn name(&mut self) -> Result<&'t str, Error> {
        match self.next() {
            Token::Name(name) => Ok(name),
            other => Err(self.error(format!("expected a name, found {other:?}"))),
        }
    }

    /// Whether the module declares a variable or function of this name.
    pub fn is_module_name(&self, name: &str) -> bool {
        self.module_names.contains(name)
    }

    pub(super) fn skip_to_semicolon(&mut self) -> Result<(), Error> {
        while !self.eat(';') {
            if self.next() == Token::End {
                return Err(self.error("the text ends inside a directive"));
            }
        }
        Ok(())
    }

    pub(super) fn int(&mut self) -> Result<u32, Error> {
        let value = self.constant()?;
        u32::try_from(value).map_err(|_| self.error(format!("{value} is out of range here")))
    }

    /// Parses a module.
    pub fn module(mut self) -> Result<Module, Error> {
        // Declarations may come after uses (calls, initial values): know the names first.
        let mut depth = 0i64;
        for pair in self.tokens.windows(3) {
            match pair[0].token {
                Token::Punct('{') => depth += 1,
                Token::Punct('}') => depth -= 1,
                _ => {}
            }
            if depth > 0 {
                continue;
            }
            if let (Token::Name(name), Token::Punct('(' | ';' | '=' | '[')) = (&pair[1].token, &pair[2].token) {
                let after_directive = matches!(&pair[0].token, Token::Dot(_) | Token::Punct(')'));
                if after_directive {
                    self.module_names.insert(name);
                }
            }
        }
        let mut seen_version = false;
        while *self.peek() != Token::End {
            let directive = match self.next() {
                Token::Dot(d) => d,
                Token::Punct(';') => continue,
                other => return Err(self.error(format!("expected a directive, found {other:?}"))),
            };
            match directive {
                "version" => {
                    seen_version = true;
                    self.module.version = match self.next() {
                        Token::F64(bits) => {
                            let tenths = (f64::from_bits(bits) * 10.0).round() as u32;
                            (tenths / 10, tenths % 10)
                        }
                        Token::Int(major) => (major as u32, 0),
                        _ => return Err(self.error("`.version` needs a number such as 7.0")),
                    };
                }
                "target" => self.target()?,
                "address_size" => {
                    if self.constant()? != 64 {
                        return Err(self.error("only `.address_size 64` is supported"));
                    }
                }
                "file" => {
                    let index = self.int()?;
                    if let Token::Text(path) = self.next() {
                        self.module.files.push((index, path.to_string()));
                    }
                    while self.eat(',') {
                        self.constant()?;
                    }
                }
                "section" => {
                    self.next();
                    self.expect('{')?;
                    let mut depth = 1;
                    while depth > 0 {
                        match self.next() {
                            Token::Punct('{') => depth += 1,
                            Token::Punct('}') => depth -= 1,
                            Token::End => return Err(self.error("the text ends inside `.section`")),
                            _ => {}
                        }
                    }
                }
                "visible" | "extern" | "weak" | "common" => {
                    self.declaration(directive == "extern", None)?;
                }
                "pragma" => self.skip_to_semicolon()?,
                "alias" => return Err(self.error("`.alias` is not supported")),
                _ => self.declaration(false, Some(directive))?,
            }
        }
        if !seen_version {
            return Err(self.error("no `.version` directive: this is not PTX"));
        }
        Ok(self.module)
    }

    fn target(&mut self) -> Result<(), Error> {
        loop {
            let name = self.name()?;
            if let Some(rest) = name.strip_prefix("sm_") {
                let digits = rest.trim_end_matches(|c: char| c.is_ascii_alphabetic());
                self.module.target_sm = digits.parse().map_err(|_| self.error(format!("unknown target `{name}`")))?;
                self.module.target_suffix = rest[digits.len()..].chars().next();
            }
            if !self.eat(',') {
                return Ok(());
            }
        }
    }

    fn declaration(&mut self, mut is_extern: bool, directive: Option<&'t str>) -> Result<(), Error> {
        let mut directive = match directive {
            Some(d) => d,
            None => self.directive()?,
        };
        while matches!(directive, "visible" | "extern" | "weak" | "common") {
            is_extern |= directive == "extern";
            directive = self.directive()?;
        }
        match directive {
            "entry" | "func" => {
                let function = self.function(directive == "entry")?;
                let known = self.module.functions.iter().position(|f| f.name == function.name);
                match known {
                    Some(i) if self.module.functions[i].body.is_none() => self.module.functions[i] = function,
                    Some(_) if function.body.is_some() => {
                        return Err(Error::new(function.line, format!("`{}` is defined twice", function.name)));
                    }
                    Some(_) => {}
                    None => self.module.functions.push(function),
                }
                Ok(())
            }
            "global" | "const" | "shared" => {
                let space = Space::parse(directive).unwrap_or(Space::Global);
                for variable in self.variables(space, is_extern)? {
                    let known = self.module.variables.iter().position(|v| v.name == variable.name);
                    match known {
                        Some(i) if self.module.variables[i].is_extern => self.module.variables[i] = variable,
                        Some(_) if variable.is_extern => {}
                        Some(_) => return Err(self.error(format!("`{}` is declared twice", variable.name))),
                        None => self.module.variables.push(variable),
                    }
                }
                Ok(())
            }
            other => Err(self.error(format!("directive `.{other}` is not supported here"))),
        }
    }

    pub(super) fn directive(&mut self) -> Result<&'t str, Error> {
        match self.next() {
            Token::Dot(d) => Ok(d),
            other => Err(self.error(format!("expected a directive, found {other:?}"))),
        }
    }
}
