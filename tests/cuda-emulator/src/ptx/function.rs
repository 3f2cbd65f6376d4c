//! Kernels and device functions: parameters, directives, bodies.

use super::Error;
use super::ast::{Function, Variable};
use super::lexer::Token;
use super::parser::Parser;
use super::scope::Scopes;
use super::types::Space;

impl<'t> Parser<'t> {
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

    pub(super) fn function(&mut self, is_entry: bool) -> Result<Function, Error> {
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
