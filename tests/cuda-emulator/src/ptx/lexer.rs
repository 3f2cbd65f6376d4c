//! Tokens of PTX text.

use super::Error;

/// A token.
#[derive(Debug, Clone, PartialEq)]
pub enum Token<'t> {
    /// An identifier, `%` and `$` included.
    Name(&'t str),
    /// `.name`, without the dot; `::` belongs to the name.
    Dot(&'t str),
    /// An integer constant.
    Int(i64),
    /// `0f` and eight digits.
    F32(u32),
    /// `0d` and sixteen digits, or a decimal fraction.
    F64(u64),
    /// A string, without its quotes.
    Text(&'t str),
    /// A punctuation character; `<<`, `>>`, `==`, `!=`, `<=`, `>=`, `&&`, `||` come as their parts.
    Punct(char),
    /// End of the text.
    End,
}

/// A token, its line, and whether white space stands before it.
#[derive(Debug, Clone)]
pub struct Lexeme<'t> {
    /// The token.
    pub token: Token<'t>,
    /// Line, from 1.
    pub line: u32,
    /// Directly after the token before it.
    pub glued: bool,
}

fn is_name_start(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%')
}

fn is_name(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$')
}

/// Splits text into tokens; the last is [`Token::End`].
pub fn tokens(text: &str) -> Result<Vec<Lexeme<'_>>, Error> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len() / 4);
    let (mut at, mut line, mut last_end) = (0usize, 1u32, usize::MAX);
    while at < bytes.len() {
        let c = bytes[at];
        if c == b'\n' {
            line += 1;
            at += 1;
            continue;
        }
        if c.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if bytes[at..].starts_with(b"//") {
            at = text[at..].find('\n').map_or(bytes.len(), |n| at + n);
            continue;
        }
        if bytes[at..].starts_with(b"/*") {
            let Some(n) = find(&bytes[at + 2..], b"*/") else {
                return Err(Error::new(line, "comment without end"));
            };
            line += bytes[at..at + 2 + n].iter().filter(|c| **c == b'\n').count() as u32;
            at += n + 4;
            continue;
        }
        let start = at;
        let token = if is_name_start(c) {
            at += 1;
            while at < bytes.len() && is_name(bytes[at]) {
                at += 1;
            }
            Token::Name(&text[start..at])
        } else if c == b'.' && bytes.get(at + 1).is_some_and(|c| is_name(*c)) {
            at += 1;
            while at < bytes.len() && (is_name(bytes[at]) || (bytes[at] == b':' && bytes.get(at + 1) == Some(&b':'))) {
                at += if bytes[at] == b':' { 2 } else { 1 };
            }
            Token::Dot(&text[start + 1..at.min(bytes.len())])
        } else if c.is_ascii_digit() {
            number(text, &mut at, line)?
        } else if c == b'"' {
            let Some(n) = find(&bytes[at + 1..], b"\"") else {
                return Err(Error::new(line, "string without end"));
            };
            at += n + 2;
            line += bytes[start..at].iter().filter(|c| **c == b'\n').count() as u32;
            Token::Text(&text[start + 1..at - 1])
        } else if c.is_ascii() {
            at += 1;
            Token::Punct(c as char)
        } else {
            return Err(Error::new(line, "a character that is not ASCII outside comments and strings"));
        };
        out.push(Lexeme { token, line, glued: start == last_end });
        last_end = at;
    }
    out.push(Lexeme { token: Token::End, line, glued: false });
    Ok(out)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

fn number<'t>(text: &'t str, at: &mut usize, line: u32) -> Result<Token<'t>, Error> {
    let bytes = text.as_bytes();
    let start = *at;
    let bad = |what: &str| Error::new(line, format!("{what} in a number"));
    if bytes[start] == b'0' && matches!(bytes.get(start + 1), Some(b'f' | b'F' | b'd' | b'D')) {
        let digits = if matches!(bytes[start + 1], b'f' | b'F') { 8 } else { 16 };
        let body = text.get(start + 2..start + 2 + digits).ok_or_else(|| bad("too few digits"))?;
        let bits = u64::from_str_radix(body, 16).map_err(|_| bad("a character that is no hex digit"))?;
        *at = start + 2 + digits;
        return Ok(if digits == 8 { Token::F32(bits as u32) } else { Token::F64(bits) });
    }
    while *at < bytes.len() && bytes[*at].is_ascii_alphanumeric() {
        *at += 1;
    }
    let is_decimal = bytes[start..*at].iter().all(|c| c.is_ascii_digit());
    let fraction =
        is_decimal && bytes.get(*at) == Some(&b'.') && bytes.get(*at + 1).is_some_and(|c| c.is_ascii_digit());
    let exponent = !bytes[start..*at].starts_with(b"0x")
        && !bytes[start..*at].starts_with(b"0X")
        && bytes[start..*at].iter().filter(|c| !c.is_ascii_digit()).all(|c| matches!(c, b'e' | b'E'))
        && !is_decimal;
    if fraction || exponent {
        if fraction {
            *at += 1;
            while *at < bytes.len() && bytes[*at].is_ascii_alphanumeric() {
                *at += 1;
            }
        }
        if matches!(bytes[*at - 1], b'e' | b'E') && matches!(bytes.get(*at), Some(b'+' | b'-')) {
            *at += 1;
            while *at < bytes.len() && bytes[*at].is_ascii_digit() {
                *at += 1;
            }
        }
        let value: f64 = text[start..*at].parse().map_err(|_| bad("not a decimal fraction"))?;
        return Ok(Token::F64(value.to_bits()));
    }
    let body = text[start..*at].trim_end_matches(['U', 'u']);
    let (digits, radix) = match body.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&body[2..], 16),
        [b'0', b'b' | b'B', ..] => (&body[2..], 2),
        [b'0', _, ..] => (&body[1..], 8),
        _ => (body, 10),
    };
    let value = u64::from_str_radix(digits, radix).map_err(|_| bad("not an integer of 64 bits"))?;
    Ok(Token::Int(value as i64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<Token<'_>> {
        tokens(text).unwrap().into_iter().map(|l| l.token).collect()
    }

    #[test]
    fn numbers_in_every_spelling() {
        assert_eq!(
            kinds("0x1F 017 0b101 42U 0f3F800000 0d3FF0000000000000 1.5 2e3 1.0e-2"),
            [
                Token::Int(31),
                Token::Int(15),
                Token::Int(5),
                Token::Int(42),
                Token::F32(1f32.to_bits()),
                Token::F64(1f64.to_bits()),
                Token::F64(1.5f64.to_bits()),
                Token::F64(2000f64.to_bits()),
                Token::F64(0.01f64.to_bits()),
                Token::End
            ]
        );
    }

    #[test]
    fn opcodes_names_and_lines() {
        let all = tokens("ld.shared::cta.v4 %r1 /* two\nlines */ $L_0:\n").unwrap();
        assert_eq!(all[1].token, Token::Dot("shared::cta"));
        assert!(all[1].glued && !all[3].glued);
        assert_eq!((all[4].token.clone(), all[4].line), (Token::Name("$L_0"), 2));
    }
}
