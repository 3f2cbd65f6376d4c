//! Layers of settings: defaults, then a preset, then a file, then `key=value`, each over the one before.
//!
//! Owns what every layer has in common: a key must exist in the defaults and its value must have the type it has there, and
//! what is wrong is told with the place it came from (file and line, or argument). What values mean is [`super::config`]'s.

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::Error;

/// A setting that is not usable: its full key, and the rest of the sentence.
pub type Fault = (String, String);

/// Settings laid over each other.
#[derive(Debug)]
pub struct Layers {
    table: Table,
    /// Where a key's value came from, if not from the defaults.
    origins: BTreeMap<String, String>,
}

impl Layers {
    /// The lowest layer.
    pub fn new(defaults: &impl Serialize) -> Result<Self, Error> {
        let table = Table::try_from(defaults).map_err(|e| error("defaults", &e.to_string()))?;
        Ok(Layers { table, origins: BTreeMap::new() })
    }

    /// Lays a TOML text over what is there. `name` is the file's or preset's, for messages.
    pub fn text(&mut self, text: &str, name: &str) -> Result<(), Error> {
        let given: Table = text.parse().map_err(|e: toml::de::Error| error(name, e.to_string().trim_end()))?;
        let mut lines = BTreeMap::new();
        // The same text parsed before: it has no errors.
        if let Ok(spans) = DeTable::parse(text) {
            find_lines(spans.get_ref(), "", text, &mut lines);
        }
        let place = |key: &str| lines.get(key).map_or_else(|| name.to_string(), |line| format!("{name}: line {line}"));
        merge(&mut self.table, given, "", &mut |key| _ = self.origins.insert(key.into(), place(key)))
            .map_err(|(key, what)| error(&place(&key), &what))
    }

    /// Lays one `key=value` over what is there. Text needs no quotes.
    pub fn setting(&mut self, setting: &str) -> Result<(), Error> {
        let origin = format!("--set {setting}");
        self.assign(setting)
            .map(|key| _ = self.origins.insert(key, origin.clone()))
            .map_err(|what| error(&origin, &what))
    }

    fn assign(&mut self, setting: &str) -> Result<String, String> {
        let (key, text) = setting.split_once('=').ok_or("expected key=value, like stage1.learning_rate=0.001")?;
        let (key, text) = (key.trim(), text.trim());
        if key.is_empty() {
            return Err("the key is empty; expected key=value, like stage1.learning_rate=0.001".into());
        }
        let known = keys(&self.table, "");
        let mut parts = key.split('.');
        let first = parts.next().and_then(|part| self.table.get_mut(part));
        let slot = parts.fold(first, |at, part| at.and_then(|v| v.as_table_mut()?.get_mut(part)));
        let slot = slot.ok_or_else(|| unknown(key, &known))?;
        if slot.is_table() {
            let inner = known.iter().filter(|k| k.starts_with(&format!("{key}."))).cloned().collect::<Vec<_>>();
            return Err(format!("{key} is a table; name one of its keys: {}", inner.join(", ")));
        }
        let parsed =
            format!("v = {text}").parse::<Table>().ok().filter(|t| t.len() == 1).and_then(|mut t| t.remove("v"));
        let value = match (&slot, parsed) {
            (Value::String(_), Some(Value::String(quoted))) => Value::String(quoted),
            (Value::String(_), _) => Value::String(text.into()),
            (_, Some(value)) => value,
            (slot, None) => return Err(format!("{text:?} is not a value of type {}", slot.type_str())),
        };
        *slot = like(slot, value).map_err(|what| format!("{key} {what}"))?;
        Ok(key.into())
    }

    /// The layers as a type whose meaning `check` then judges.
    pub fn resolve<T: DeserializeOwned>(self, check: impl FnOnce(&T) -> Result<(), Fault>) -> Result<T, Error> {
        let origin = |key: &str| self.origins.get(key).map_or("configuration", String::as_str).to_string();
        let value: T = self.table.clone().try_into().map_err(|e: toml::de::Error| {
            // "MESSAGE\nin `KEY`": the key is told in no other way.
            let text = e.to_string();
            let key = text.rsplit_once("in `").map_or("", |(_, key)| key.trim_end().trim_end_matches('`'));
            error(&origin(key), &format!("{key}: {}", e.message()))
        })?;
        check(&value).map_err(|(key, what)| error(&origin(&key), &format!("{key} {what}")))?;
        Ok(value)
    }
}

fn error(origin: &str, what: &str) -> Error {
    Error::Config { origin: origin.into(), what: what.into() }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.into() } else { format!("{path}.{key}") }
}

/// Line of every key, tables included. A key repeated by the parts of its children keeps its first line.
fn find_lines(table: &DeTable, path: &str, text: &str, lines: &mut BTreeMap<String, usize>) {
    for (key, value) in table {
        let full = join(path, key.get_ref());
        let line = text[..key.span().start].matches('\n').count() + 1;
        if let DeValue::Table(inner) = value.get_ref() {
            find_lines(inner, &full, text, lines);
        }
        lines.insert(full, line);
    }
}

/// Lays `given` over `table`; calls `set` with the key of every value. An error is a key and what is wrong.
fn merge(table: &mut Table, given: Table, path: &str, set: &mut dyn FnMut(&str)) -> Result<(), Fault> {
    for (key, value) in given {
        let full = join(path, &key);
        let Some(slot) = table.get_mut(&key) else {
            let what = unknown(&full, &keys(table, path));
            return Err((full, what));
        };
        match (slot, value) {
            (Value::Table(inner), Value::Table(value)) => merge(inner, value, &full, set)?,
            (Value::Table(_), other) => {
                let what = format!("{full} is {}; expected a table, [{full}]", other.type_str());
                return Err((full, what));
            }
            (slot, value) => {
                *slot = like(slot, value).map_err(|what| (full.clone(), format!("{full} {what}")))?;
                set(&full);
            }
        }
    }
    Ok(())
}

/// `value` in the type of `slot`: an integer may stand for a float. No setting is a negative integer.
fn like(slot: &Value, value: Value) -> Result<Value, String> {
    match (slot, value) {
        (Value::Float(_), Value::Integer(i)) => Ok(Value::Float(i as f64)),
        (_, Value::Integer(i)) if i < 0 => Err(format!("is {i}; expected an integer of at least 0")),
        (slot, value) if slot.same_type(&value) => Ok(value),
        (slot, value) => Err(format!("is {value}; expected a value of type {}", slot.type_str())),
    }
}

/// Full keys of everything in `table`, tables included.
fn keys(table: &Table, path: &str) -> Vec<String> {
    let inner = |(key, value): (&String, &Value)| {
        let full = join(path, key);
        let below = value.as_table().map(|t| keys(t, &full)).unwrap_or_default();
        std::iter::once(full).chain(below).collect::<Vec<_>>()
    };
    table.iter().flat_map(inner).collect()
}

/// Suggests the known key that is most like it, as a whole or (in another table) by its last part.
fn unknown(key: &str, known: &[String]) -> String {
    let last = |k: &str| k.rsplit('.').next().unwrap_or("").to_string();
    let likeness = |k: &String| {
        let whole = strsim::normalized_damerau_levenshtein(k, key);
        whole.max(0.9 * strsim::normalized_damerau_levenshtein(&last(k), &last(key)))
    };
    let best = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b))).filter(|k| likeness(k) > 0.6);
    let hint = best.map_or(String::new(), |k| format!("; did you mean {k}?"));
    format!("unknown key {key}{hint}")
}
