//! Some fields of a line that is a JSON object; the rest is skipped without being kept.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A field as it stands in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Field<'a> {
    /// The object has no such field.
    #[default]
    Missing,
    /// `null`.
    Null,
    /// A number.
    Number(f64),
    /// Text, without its escapes.
    Text(Cow<'a, str>),
    /// Something else, in words.
    Other(&'static str),
}

impl<'a> Field<'a> {
    /// Missing or null?
    pub fn is_absent(&self) -> bool {
        matches!(self, Field::Missing | Field::Null)
    }

    /// The text of the field `name`. `Err`: what it is instead.
    pub fn text(self, name: &str) -> Result<Cow<'a, str>, String> {
        match self {
            Field::Text(text) => Ok(text),
            other => Err(other.but(name, "text")),
        }
    }

    /// The number of the field `name`. `Err`: what it is instead.
    pub fn number(&self, name: &str) -> Result<f64, String> {
        match self {
            Field::Number(number) => Ok(*number),
            other => Err(other.but(name, "a number")),
        }
    }

    fn but(&self, name: &str, expected: &str) -> String {
        match self {
            Field::Missing => format!("has no {name}; expected {expected}"),
            Field::Null => format!("{name} is null; expected {expected}"),
            Field::Number(n) => format!("{name} is the number {n}; expected {expected}"),
            Field::Text(t) => format!("{name} is the text {t:?}; expected {expected}"),
            Field::Other(what) => format!("{name} is {what}; expected {expected}"),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Field<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Field<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Field<'de>, E> {
                Ok(Field::Null)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Field<'de>, E> {
                Ok(Field::Other(if value { "true" } else { "false" }))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Field<'de>, E> {
                Ok(Field::Number(value as f64))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Field<'de>, E> {
                Ok(Field::Number(value as f64))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Field<'de>, E> {
                Ok(Field::Number(value))
            }
            fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Field<'de>, E> {
                Ok(Field::Text(Cow::Borrowed(value)))
            }
            fn visit_str<E>(self, value: &str) -> Result<Field<'de>, E> {
                Ok(Field::Text(Cow::Owned(value.to_string())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Field<'de>, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Field::Other("a list"))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Field<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Field::Other("an object"))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

struct Names<'n, const N: usize>(&'n [&'n str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Names<'_, N> {
    type Value = [Field<'de>; N];

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Names<'_, N> {
    type Value = [Field<'de>; N];

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = [const { Field::Missing }; N];
        while let Some(key) = map.next_key::<Field>()? {
            let Field::Text(key) = key else { continue };
            match self.0.iter().position(|name| *name == key) {
                Some(at) => fields[at] = map.next_value()?,
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(fields)
    }
}

/// The named fields of one JSON object; of two fields with one name the last counts, as in Python. `Err`: why it is none.
pub fn fields<'a, const N: usize>(line: &'a str, names: &[&str; N]) -> Result<[Field<'a>; N], String> {
    let mut json = serde_json::Deserializer::from_str(line);
    Names(names).deserialize(&mut json).and_then(|fields| json.end().map(|()| fields)).map_err(|e| {
        let what = e.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        format!("not a whole JSON object: {what} at column {}", e.column())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for() {
        let line = r#"{"x": {"asin": "no", "y": [1, {"a": "\ud800"}]}, "asin": "B1", "overall": 5.0, "t": "\u00e9\n", "z": null}"#;
        let [asin, overall, t, z, none, x] = fields(line, &["asin", "overall", "t", "z", "none", "x"]).unwrap();
        assert_eq!((asin, overall.number("overall")), (Field::Text("B1".into()), Ok(5.0)));
        assert_eq!((t.text("t").unwrap(), z.is_absent(), none.is_absent()), ("é\n".into(), true, true));
        assert_eq!(x.text("x"), Err("x is an object; expected text".into()));
        let [a] = fields(r#"{"a": 1, "a": "2"}"#, &["a"]).unwrap();
        assert_eq!(a.number("a"), Err("a is the text \"2\"; expected a number".into()));
        assert_eq!(fields(r#"{"a": [1, [2]]}"#, &["a"]).unwrap(), [Field::Other("a list")]);
    }

    #[test]
    fn what_is_no_object() {
        for (line, what) in [
            ("[1]", "expected a JSON object at column"),
            ("{\"a\": 1", "EOF while parsing an object at column 7"),
            ("{\"a\": 1} x", "trailing characters at column 10"),
            ("{'a': 1}", "key must be a string at column 2"),
            ("{\"a\": NaN}", "expected value at column 7"),
            ("{\"a\": 1e999}", "number out of range"),
        ] {
            let e = fields(line, &["a"]).unwrap_err();
            assert!(e.starts_with("not a whole JSON object: ") && e.contains(what), "{line}: {e}");
        }
    }
}
