//! Integer constant expressions, with C's operators and precedence, evaluated in 64-bit two's complement.

use super::Error;
use super::lexer::Token;
use super::parser::Parser;

/// Deepest nesting of parentheses and unary operators: the text comes from outside, the stack is ours.
const MAX_DEPTH: u32 = 64;

impl Parser<'_> {
    /// Parses an integer constant expression.
    pub fn constant(&mut self) -> Result<i64, Error> {
        self.ternary(0)
    }

    fn ternary(&mut self, depth: u32) -> Result<i64, Error> {
        let condition = self.binary(0, depth)?;
        if !self.eat('?') {
            return Ok(condition);
        }
        let yes = self.ternary(depth + 1)?;
        self.expect(':')?;
        let no = self.ternary(depth + 1)?;
        Ok(if condition != 0 { yes } else { no })
    }

    fn binary(&mut self, min: u8, depth: u32) -> Result<i64, Error> {
        let mut left = self.unary(depth)?;
        while let Some((op, level, n)) = self.operator() {
            if level < min {
                break;
            }
            for _ in 0..n {
                self.next();
            }
            let right = self.binary(level + 1, depth + 1)?;
            left = match op {
                "*" => left.wrapping_mul(right),
                "/" | "%" if right == 0 => return Err(self.error("division by zero in a constant")),
                "/" => left.wrapping_div(right),
                "%" => left.wrapping_rem(right),
                "+" => left.wrapping_add(right),
                "-" => left.wrapping_sub(right),
                "<<" => left.checked_shl(right as u32).unwrap_or(0),
                ">>" => left.checked_shr(right as u32).unwrap_or(if left < 0 { -1 } else { 0 }),
                "<" => (left < right) as i64,
                ">" => (left > right) as i64,
                "<=" => (left <= right) as i64,
                ">=" => (left >= right) as i64,
                "==" => (left == right) as i64,
                "!=" => (left != right) as i64,
                "&" => left & right,
                "^" => left ^ right,
                "|" => left | right,
                "&&" => (left != 0 && right != 0) as i64,
                _ => (left != 0 || right != 0) as i64,
            };
        }
        Ok(left)
    }

    /// The binary operator ahead, its precedence, and its tokens.
    fn operator(&self) -> Option<(&'static str, u8, usize)> {
        let Token::Punct(first) = self.peek() else { return None };
        let second = match self.peek_at(1) {
            (Token::Punct(c), true) => Some(*c),
            _ => None,
        };
        Some(match (*first, second) {
            ('<', Some('<')) => ("<<", 7, 2),
            ('>', Some('>')) => (">>", 7, 2),
            ('<', Some('=')) => ("<=", 6, 2),
            ('>', Some('=')) => (">=", 6, 2),
            ('=', Some('=')) => ("==", 5, 2),
            ('!', Some('=')) => ("!=", 5, 2),
            ('&', Some('&')) => ("&&", 1, 2),
            ('|', Some('|')) => ("||", 0, 2),
            ('*', _) => ("*", 9, 1),
            ('/', _) => ("/", 9, 1),
            ('%', _) => ("%", 9, 1),
            ('+', _) => ("+", 8, 1),
            ('-', _) => ("-", 8, 1),
            ('<', _) => ("<", 6, 1),
            ('>', _) => (">", 6, 1),
            ('&', _) => ("&", 4, 1),
            ('^', _) => ("^", 3, 1),
            ('|', _) => ("|", 2, 1),
            _ => return None,
        })
    }

    fn unary(&mut self, depth: u32) -> Result<i64, Error> {
        if depth > MAX_DEPTH {
            return Err(self.error("a constant expression nested too deep"));
        }
        match self.next() {
            Token::Int(value) => Ok(value),
            Token::Name("WARP_SZ") => Ok(32),
            Token::Punct('-') => Ok(self.unary(depth + 1)?.wrapping_neg()),
            Token::Punct('+') => self.unary(depth + 1),
            Token::Punct('~') => Ok(!self.unary(depth + 1)?),
            Token::Punct('!') => Ok((self.unary(depth + 1)? == 0) as i64),
            Token::Punct('(') => {
                // A cast such as (.s64) or (.u64) changes nothing in 64-bit two's complement.
                if let Token::Dot(_) = self.peek() {
                    self.next();
                    self.expect(')')?;
                    return self.unary(depth + 1);
                }
                let value = self.ternary(depth + 1)?;
                self.expect(')')?;
                Ok(value)
            }
            _ => Err(self.error("a constant is missing")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_is_that_of_c() {
        for (text, value) in [
            ("1+2*3", 7),
            ("(1+2)*3", 9),
            ("-8>>1", -4),
            ("1<<4|3", 19),
            ("7&3==3", 1),
            ("5 ? 2 : 3", 2),
            ("~0", -1),
            ("WARP_SZ-1", 31),
            ("1||0&&0", 1),
            ("10-3-2", 5),
        ] {
            assert_eq!(Parser::new(text).unwrap().constant().unwrap(), value, "{text}");
        }
        assert!(Parser::new("1/0").unwrap().constant().is_err());
        assert!(Parser::new(&"(".repeat(5000)).unwrap().constant().is_err());
        assert!(Parser::new(&"1+".repeat(5000)).unwrap().constant().is_err());
    }
}
