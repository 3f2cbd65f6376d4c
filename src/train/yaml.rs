//! YAML as far as configurations use it: tables of single values and of lists of single values, each with its line.
//!
//! A single value stays text; whether it is a number or a boolean is asked of it, by the rules of OmegaConf (YAML 1.1 words, and
//! `1e-3` is a number). Anchors, several documents and lists of tables are refused: the official files have none.

use std::borrow::Cow;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};

/// What is wrong, and in which line (from 1).
pub type Fault = (usize, String);

/// A key without keys below it.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaf {
    /// Its full name: `run.init_lr`.
    pub key: String,
    /// Its line, from 1.
    pub line: usize,
    /// Its value.
    pub value: Value,
}

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A single one.
    One(Scalar),
    /// A list.
    List(Vec<Scalar>),
}

/// A single value.
#[derive(Clone, Debug, PartialEq)]
pub struct Scalar {
    /// Its text, without quotes.
    pub text: String,
    /// Was it quoted? Then it is nothing but text.
    pub quoted: bool,
}

impl Scalar {
    /// Is it nothing?
    pub fn is_null(&self) -> bool {
        !self.quoted && matches!(self.text.as_str(), "" | "~" | "null" | "Null" | "NULL")
    }

    /// As a boolean.
    pub fn boolean(&self) -> Option<bool> {
        match self.text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" if !self.quoted => Some(true),
            "false" | "no" | "off" if !self.quoted => Some(false),
            _ => None,
        }
    }

    /// As a finite number.
    pub fn number(&self) -> Option<f64> {
        let digits = self.text.replace('_', "");
        digits.parse().ok().filter(|n: &f64| !self.quoted && n.is_finite())
    }

    /// As a count.
    pub fn count(&self) -> Option<u64> {
        self.text.replace('_', "").parse().ok().filter(|_| !self.quoted)
    }
}

impl Value {
    /// For people, in one line.
    pub fn shown(&self) -> String {
        let one = |s: &Scalar| match s.quoted {
            true => format!("{:?}", s.text),
            false if s.is_null() => "null".into(),
            false => s.text.escape_debug().to_string(),
        };
        match self {
            Value::One(s) => one(s),
            Value::List(items) => format!("[{}]", items.iter().map(one).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Tables in tables: more is not a configuration.
const DEEPEST: usize = 16;

/// All leaves of a document in the order of the file. An empty document has none.
pub fn leaves(text: &str) -> Result<Vec<Leaf>, Fault> {
    let mut reader = Reader { parser: Parser::new_from_str(text), leaves: Vec::new() };
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => return Ok(reader.leaves),
            (Event::StreamStart | Event::DocumentEnd | Event::DocumentStart(_), _) => {}
            (_, line) if !reader.leaves.is_empty() => return Err((line, "a second document; expected one".into())),
            (Event::MappingStart(..), _) => reader.table("", 0)?,
            (Event::Scalar(text, style, ..), _) if scalar(text.clone(), style).is_null() => {}
            (_, line) => return Err((line, "expected a table of keys".into())),
        }
    }
}

struct Reader<'a> {
    parser: Parser<'a, StrInput<'a>>,
    leaves: Vec<Leaf>,
}

fn scalar(text: Cow<str>, style: ScalarStyle) -> Scalar {
    Scalar { text: text.into_owned(), quoted: style != ScalarStyle::Plain }
}

impl<'a> Reader<'a> {
    /// The next event and its line.
    fn next(&mut self) -> Result<(Event<'a>, usize), Fault> {
        let line = |span: Span| span.start.line();
        match self.parser.next_event() {
            Some(Ok((Event::Alias(_), span))) => {
                Err((line(span), "an alias (*name) is not supported; write the value out".into()))
            }
            Some(Ok((event, span))) => Ok((event, line(span))),
            Some(Err(e)) => Err((e.marker().line(), format!("not YAML: {}", e.info()))),
            None => Ok((Event::StreamEnd, 0)),
        }
    }

    /// The keys of a table whose start has been read.
    fn table(&mut self, path: &str, depth: usize) -> Result<(), Fault> {
        let mut seen: Vec<String> = Vec::new();
        loop {
            let (name, line) = match self.next()? {
                (Event::MappingEnd, _) => return Ok(()),
                (Event::Scalar(name, ..), line) => (name.into_owned(), line),
                (_, line) => return Err((line, "a key that is not a word".into())),
            };
            if seen.contains(&name) {
                return Err((line, format!("{name} is given twice in the same table; remove one")));
            }
            let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            seen.push(name);
            let value = match self.next()? {
                (Event::MappingStart(..), line) if depth == DEEPEST => {
                    return Err((line, format!("tables nested deeper than {DEEPEST}")));
                }
                (Event::MappingStart(..), _) => {
                    self.table(&key, depth + 1)?;
                    continue;
                }
                (Event::Scalar(text, style, ..), _) => Value::One(scalar(text, style)),
                (Event::SequenceStart(..), _) => Value::List(self.list(&key)?),
                (_, line) => return Err((line, format!("{key} has no value"))),
            };
            self.leaves.push(Leaf { key, line, value });
        }
    }

    /// The items of a list whose start has been read.
    fn list(&mut self, key: &str) -> Result<Vec<Scalar>, Fault> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (Event::Scalar(text, style, ..), _) => items.push(scalar(text, style)),
                (_, line) => return Err((line, format!("{key} holds a table or a list; expected single values"))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "\
# a comment
model: # another
  path: \"a # b\"
  on: True
  list: ['x', 2] # after
  block:
    - x
    - \"\"
  empty:

run:
    lr: 1e-3
    word: none such
    n: 1_000
";

    #[test]
    fn every_leaf_has_its_line() {
        let leaves = leaves(FILE).unwrap();
        let shown: Vec<_> = leaves.iter().map(|l| format!("{} {} {}", l.line, l.key, l.value.shown())).collect();
        let want = [
            "3 model.path \"a # b\"",
            "4 model.on True",
            "5 model.list [\"x\", 2]",
            "6 model.block [x, \"\"]",
            "9 model.empty null",
            "12 run.lr 1e-3",
            "13 run.word none such",
            "14 run.n 1_000",
        ];
        assert_eq!(shown, want);
    }

    #[test]
    fn values_are_read_as_omegaconf_reads_them() {
        let one = |text: &str, quoted| Scalar { text: text.into(), quoted };
        assert_eq!(one("1e-3", false).number(), Some(0.001));
        assert_eq!(one("1e-3", true).number(), None, "quoted, it is text");
        assert_eq!((one("8.0e-5c", false).number(), one("inf", false).number()), (None, None));
        assert_eq!((one("1_0", false).count(), one("-1", false).count()), (Some(10), None));
        assert_eq!((one("Yes", false).boolean(), one("False", false).boolean()), (Some(true), Some(false)));
        assert_eq!((one("True", true).boolean(), one("1", false).boolean()), (None, None));
        assert!(one("", false).is_null() && one("~", false).is_null() && !one("", true).is_null());
    }

    #[test]
    fn what_no_configuration_has_is_refused_with_its_line() {
        for (text, want) in [
            ("a: 1\na: 2\n", (2, "a is given twice")),
            ("a: &x 1\nb: *x\n", (2, "an alias")),
            ("a: 1\n---\nb: 2\n", (3, "a second document")),
            ("- 1\n", (1, "expected a table of keys")),
            ("a:\n  - b: 1\n", (2, "a holds a table")),
            ("? [1]\n: 2\n", (1, "a key that is not a word")),
            ("a: [1\n", (2, "not YAML")),
            ("a:\n\tb: 1\n", (2, "not YAML")),
        ] {
            let (line, what) = leaves(text).unwrap_err();
            assert!(line == want.0 && what.contains(want.1), "{text:?}: {line}: {what}");
        }
        let deep: String = (0..40).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
        assert!(leaves(&deep).unwrap_err().1.contains("deeper"));
        assert_eq!((leaves("").unwrap(), leaves("# nothing\n").unwrap()), (vec![], vec![]));
    }

    proptest! {
        #[test]
        fn mutations_are_read_or_refused(at in 0..FILE.len(), with in "[ -~\n\t]{0,3}") {
            let text = format!("{}{with}{}", &FILE[..at], &FILE[at + 1..]);
            let _ = leaves(&text);
        }

        #[test]
        fn anything_is_read_or_refused(text in "\\PC{0,60}") {
            let _ = leaves(&text);
        }
    }
}
