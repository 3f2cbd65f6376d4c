//! The cursor over the tokens, module directives, variables and functions.

use std::collections::HashSet;

use super::Error;
use super::ast::{Function, Module, Relocation, Variable};
use super::lexer::{self, Lexeme, Token};
use super::scope::Scopes;
use super::types::{Space, Type};

/// Largest variable that a module may declare; larger is a malformed text, not a program.
const MAX_VARIABLE_BYTES: u64 = 1 << 36;

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

    fn skip_to_semicolon(&mut self) -> Result<(), Error> {
        while !self.eat(';') {
            if self.next() == Token::End {
                return Err(self.error("the text ends inside a directive"));
            }
        }
        Ok(())
    }

    fn int(&mut self) -> Result<u32, Error> {
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

    fn directive(&mut self) -> Result<&'t str, Error> {
        match self.next() {
            Token::Dot(d) => Ok(d),
            other => Err(self.error(format!("expected a directive, found {other:?}"))),
        }
    }

    /// Variables after their space: `.align 4 .b8 name[16] = {...}, other;`
    fn variables(&mut self, space: Space, is_extern: bool) -> Result<Vec<Variable>, Error> {
        let mut all = Vec::new();
        let (align, ty, width) = self.variable_type()?;
        loop {
            all.push(self.variable(space, is_extern, align, ty, width)?);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(all)
    }

    /// `.align n`, `.v4`, `.ptr ...` and the type, in any order.
    fn variable_type(&mut self) -> Result<(u32, Type, u32), Error> {
        let (mut align, mut ty, mut width, mut is_pointer) = (0, None, 1, false);
        while let Token::Dot(d) = *self.peek() {
            self.next();
            match d {
                // After `.ptr` the alignment is that of the memory pointed to.
                "align" => {
                    let n = self.int()?;
                    align = if is_pointer { align } else { n };
                }
                "v2" => width = 2,
                "v4" => width = 4,
                "ptr" | "global" | "const" | "shared" | "local" | "attribute" => {
                    is_pointer |= d == "ptr";
                    if d == "attribute" && self.eat('(') {
                        while !self.eat(')') {
                            if self.next() == Token::End {
                                return Err(self.error("the text ends inside `.attribute`"));
                            }
                        }
                    }
                }
                // Handles of textures are 64-bit values; only their size matters to a parameter list.
                "texref" | "samplerref" | "surfref" => ty = Some(Type::B64),
                _ => match Type::parse(d) {
                    Some(t) => ty = Some(t),
                    None => return Err(self.error(format!("`.{d}` is no type"))),
                },
            }
        }
        let ty = ty.ok_or_else(|| self.error("a declaration without a type"))?;
        if !align.is_power_of_two() && align != 0 {
            return Err(self.error(format!("alignment {align} is not a power of two")));
        }
        Ok((align.max(ty.bytes() * width).min(if align > 0 { align } else { 1 << 20 }), ty, width))
    }

    fn variable(&mut self, space: Space, is_extern: bool, align: u32, ty: Type, width: u32) -> Result<Variable, Error> {
        let name = self.name()?.to_string();
        let mut bytes = u64::from(ty.bytes() * width);
        while self.eat('[') {
            if self.eat(']') {
                bytes = 0;
                continue;
            }
            let n = self.constant()?;
            let n = u64::try_from(n).map_err(|_| self.error("a negative array size"))?;
            bytes = bytes.checked_mul(n).ok_or_else(|| self.error("an array beyond the address space"))?;
            self.expect(']')?;
        }
        let mut variable = Variable { name, space, align, bytes, init: vec![], relocations: vec![], is_extern };
        if self.eat('=') {
            self.initializer(&mut variable, ty, 0)?;
            variable.bytes = variable.bytes.max(variable.init.len() as u64);
        }
        if variable.bytes > MAX_VARIABLE_BYTES {
            return Err(self.error(format!("variable `{}` is larger than 64 GiB", variable.name)));
        }
        Ok(variable)
    }

    fn initializer(&mut self, variable: &mut Variable, ty: Type, depth: u32) -> Result<(), Error> {
        if depth > 16 {
            return Err(self.error("an initial value nested too deep"));
        }
        if self.eat('{') {
            while !self.eat('}') {
                self.initializer(variable, ty, depth + 1)?;
                if !self.eat(',') {
                    self.expect('}')?;
                    break;
                }
            }
            return Ok(());
        }
        let size = ty.bytes() as usize;
        let negative =
            matches!(self.peek(), Token::Punct('-')) && matches!(self.peek_at(1).0, Token::F32(_) | Token::F64(_));
        if negative {
            self.next();
        }
        let value = match *self.peek() {
            Token::F32(bits) => {
                self.next();
                if ty == Type::F64 { f64::from(f32::from_bits(bits)).to_bits() } else { u64::from(bits) }
            }
            Token::F64(bits) => {
                self.next();
                if ty == Type::F64 { bits } else { u64::from((f64::from_bits(bits) as f32).to_bits()) }
            }
            Token::Name(name) if name != "WARP_SZ" => {
                self.next();
                let symbol = if name == "generic" && self.eat('(') {
                    let inner = self.name()?;
                    let addend = if matches!(self.peek(), Token::Punct('+' | '-')) { self.constant()? } else { 0 };
                    self.expect(')')?;
                    (inner, addend)
                } else {
                    (name, 0)
                };
                let addend = if matches!(self.peek(), Token::Punct('+' | '-')) { self.constant()? } else { 0 };
                variable.relocations.push(Relocation {
                    offset: variable.init.len() as u64,
                    bytes: size as u32,
                    symbol: symbol.0.to_string(),
                    addend: symbol.1.wrapping_add(addend),
                });
                0
            }
            _ => {
                let v = self.constant()?;
                match ty {
                    Type::F32 => u64::from((v as f32).to_bits()),
                    Type::F64 => (v as f64).to_bits(),
                    _ => v as u64,
                }
            }
        };
        let value = if negative { value ^ 1 << (size * 8 - 1).min(63) } else { value };
        variable.init.extend_from_slice(&value.to_le_bytes()[..size.min(8)]);
        Ok(())
    }

    /// A parameter list up to its `)`.
    fn params(&mut self, scopes: &mut Scopes) -> Result<(Vec<Variable>, Vec<Option<u32>>), Error> {
        let (mut params, mut registers) = (Vec::new(), Vec::new());
        while !self.eat(')') {
            if !params.is_empty() {
                self.expect(',')?;
            }
            let is_register = match self.directive()? {
                "param" => false,
                "reg" => true,
                other => return Err(self.error(format!("`.{other}` in a parameter list"))),
            };
            let (align, ty, width) = self.variable_type()?;
            let variable = self.variable(Space::Param, false, align, ty, width)?;
            registers.push(is_register.then(|| scopes.declare_register(&variable.name, ty)));
            if !is_register {
                scopes.declare_variable(variable.clone());
            }
            params.push(variable);
        }
        Ok((params, registers))
    }

    fn triple(&mut self) -> Result<[u32; 3], Error> {
        let mut dims = [1; 3];
        for dim in &mut dims {
            *dim = self.int()?;
            if !self.eat(',') {
                break;
            }
        }
        Ok(dims)
    }

    fn function(&mut self, is_entry: bool) -> Result<Function, Error> {
        let line = self.line();
        let mut scopes = Scopes::new();
        let (returns, return_registers) =
            if !is_entry && self.eat('(') { self.params(&mut scopes)? } else { Default::default() };
        let name = self.name()?.to_string();
        let (params, param_registers) = if self.eat('(') { self.params(&mut scopes)? } else { Default::default() };
        let mut function = Function {
            name,
            is_entry,
            line,
            params,
            returns,
            param_registers,
            return_registers,
            registers: vec![],
            variables: vec![],
            body: None,
            labels: vec![],
            branch_targets: vec![],
            max_threads: None,
            required_threads: None,
            required_cluster: None,
            max_registers: None,
        };
        while let Token::Dot(d) = *self.peek() {
            self.next();
            match d {
                "maxntid" => function.max_threads = Some(self.triple()?),
                "reqntid" => function.required_threads = Some(self.triple()?),
                "reqnctapercluster" => function.required_cluster = Some(self.triple()?),
                "maxnreg" => function.max_registers = Some(self.int()?),
                "minnctapersm" | "maxnctapersm" | "maxclusterrank" => {
                    self.int()?;
                }
                "noreturn" | "explicitcluster" | "unified" | "blocksareclusters" => {}
                "pragma" => self.skip_to_semicolon()?,
                other => return Err(self.error(format!("directive `.{other}` of a function is not supported"))),
            }
        }
        if self.eat(';') {
            return Ok(function);
        }
        self.expect('{')?;
        self.body(&mut function, &mut scopes)?;
        Ok(function)
    }

    fn body(&mut self, function: &mut Function, scopes: &mut Scopes) -> Result<(), Error> {
        let mut body = Vec::new();
        let mut source = (0, 0);
        loop {
            match *self.peek() {
                Token::Punct('}') => {
                    self.next();
                    if !scopes.close() {
                        break;
                    }
                }
                Token::Punct('{') => {
                    self.next();
                    scopes.open();
                }
                Token::Punct(';') => {
                    self.next();
                }
                Token::Dot(d) => {
                    self.next();
                    self.body_directive(d, scopes, &mut source)?;
                }
                Token::Name(name) if *self.peek_at(1).0 == Token::Punct(':') => {
                    self.next();
                    self.next();
                    if let Token::Dot(d @ ("branchtargets" | "calltargets" | "callprototype")) = *self.peek() {
                        self.next();
                        self.table(name, d, function, scopes)?;
                    } else if !scopes.define_label(name, body.len()) {
                        return Err(self.error(format!("label `{name}` is defined twice")));
                    }
                }
                Token::Name(_) | Token::Punct('@') => body.push(self.instruction(scopes, source)?),
                _ => return Err(self.error(format!("expected an instruction, found {:?}", self.peek()))),
            }
        }
        function.labels = scopes.resolve_labels()?;
        function.registers = std::mem::take(&mut scopes.registers);
        function.variables = std::mem::take(&mut scopes.variables);
        function.body = Some(body);
        Ok(())
    }

    /// `name: .branchtargets a, b;` keeps its labels; call targets and prototypes say nothing that running needs.
    fn table(&mut self, name: &str, kind: &str, function: &mut Function, scopes: &mut Scopes) -> Result<(), Error> {
        if kind != "branchtargets" {
            scopes.define_label(name, usize::MAX);
            return self.skip_to_semicolon();
        }
        let mut labels = Vec::new();
        loop {
            let line = self.line();
            let label = self.name()?;
            labels.push(scopes.refer_label(label, line));
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')?;
        // References to the table itself resolve to its index beyond all instructions.
        scopes.define_label(name, usize::MAX - 1 - function.branch_targets.len());
        function.branch_targets.push((name.to_string(), labels));
        Ok(())
    }

    fn body_directive(&mut self, d: &str, scopes: &mut Scopes, source: &mut (u32, u32)) -> Result<(), Error> {
        match d {
            "loc" => {
                *source = (self.int()?, self.int()?);
                self.int()?;
                // `, function_name label+n, inlined_at file line column` on the same line
                if self.eat(',') {
                    self.name()?;
                    self.name()?;
                    if self.eat('+') {
                        self.constant()?;
                    }
                    self.expect(',')?;
                    self.name()?;
                    for _ in 0..3 {
                        self.int()?;
                    }
                }
                Ok(())
            }
            "pragma" => self.skip_to_semicolon(),
            "reg" => self.register_declaration(scopes),
            "local" | "shared" | "param" | "global" | "const" => {
                let space = Space::parse(d).unwrap_or(Space::Local);
                for variable in self.variables(space, false)? {
                    scopes.declare_variable(variable);
                }
                Ok(())
            }
            "branchtargets" | "calltargets" | "callprototype" => Err(self.error(format!("`.{d}` needs a label"))),
            other => Err(self.error(format!("directive `.{other}` is not supported in a function"))),
        }
    }

    fn register_declaration(&mut self, scopes: &mut Scopes) -> Result<(), Error> {
        let (_, ty, width) = self.variable_type()?;
        loop {
            let name = self.name()?;
            if self.eat('<') {
                // Not a constant expression: `>` would continue it.
                let Token::Int(count) = self.next() else {
                    return Err(self.error("a register family needs a number, as in `%r<9>`"));
                };
                let count = u32::try_from(count).map_err(|_| self.error("too many registers"))?;
                self.expect('>')?;
                scopes.declare_family(name, count, ty);
            } else if width > 1 {
                scopes.declare_vector(name, ty, width as usize);
            } else {
                scopes.declare_register(name, ty);
            }
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }
}
