//! A run directory: configuration, metrics, TensorBoard events, and the places of everything else.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::Error;
use super::config::Config;
use super::tensorboard::{self, EventFile};
use crate::files::write_atomic;

/// An open run.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    events: EventFile,
}

impl RunDir {
    /// Makes the directory of a new run, or opens an existing one with `resume`: its configuration must be the same.
    pub fn open(root: &Path, config: &Config, resume: bool) -> Result<Self, Error> {
        let path = root.join("config.toml");
        if path.exists() {
            let before = Config::resolve(None, Some(&path), &[])?;
            let differing = differences(&before, config)?;
            if !differing.is_empty() {
                let what = format!(
                    "this run was made with another configuration: {}; choose another --run",
                    differing.join(", ")
                );
                return Err(Error::state(root, what));
            }
            if !resume {
                return Err(Error::state(
                    root,
                    "this run exists; pass --resume to go on with it, or choose another --run",
                ));
            }
        }
        std::fs::create_dir_all(root).map_err(Error::io(root))?;
        let text = config.to_toml()?;
        write_atomic(&path, |w| w.write_all(text.as_bytes())).map_err(Error::io(&path))?;
        let events = EventFile::create(root).map_err(Error::io(root))?;
        Ok(RunDir { root: root.to_path_buf(), events })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Checkpoints of a stage.
    pub fn checkpoints(&self, stage: &str) -> PathBuf {
        self.root.join(stage).join("checkpoints")
    }

    /// Appends scalars to `metrics.jsonl` and to the event file. `phase` is `train` or `valid`.
    pub fn log(&mut self, stage: &str, phase: &str, step: u64, values: &[(&str, f64)]) -> Result<(), Error> {
        let mut record: Map<String, Value> =
            [("stage".into(), json!(stage)), ("phase".into(), json!(phase)), ("step".into(), json!(step))]
                .into_iter()
                .collect();
        record.extend(values.iter().map(|(k, v)| (k.to_string(), json!(v))));
        let path = self.root.join("metrics.jsonl");
        let line = Value::Object(record).to_string() + "\n";
        let file = OpenOptions::new().create(true).append(true).open(&path);
        file.and_then(|mut f| f.write_all(line.as_bytes())).map_err(Error::io(&path))?;
        let tags: Vec<(String, f64)> = values.iter().map(|(k, v)| (format!("{stage}/{phase}/{k}"), *v)).collect();
        let tags: Vec<(&str, f64)> = tags.iter().map(|(k, v)| (k.as_str(), *v)).collect();
        self.events.scalars(step, &tags).map_err(Error::io(&self.root))
    }

    /// Drops records of a stage beyond step `last` (all of them if it begins anew): a resumed run writes them again.
    pub fn rewind(&self, stage: &str, last: Option<u64>) -> Result<(), Error> {
        tensorboard::rewind(&self.root, &format!("{stage}/"), last).map_err(Error::io(&self.root))?;
        let path = self.root.join("metrics.jsonl");
        let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
        let keep = |line: &&str| match serde_json::from_str::<Value>(line) {
            Ok(r) => r["stage"] != stage || r["step"].as_u64().zip(last).is_some_and(|(step, last)| step <= last),
            // A line that a death cut short.
            Err(_) => false,
        };
        let kept: String = text.lines().filter(keep).flat_map(|l| [l, "\n"]).collect();
        if kept == text {
            return Ok(());
        }
        write_atomic(&path, |w| w.write_all(kept.as_bytes())).map_err(Error::io(&path))
    }
}

/// Keys whose values differ.
fn differences(a: &Config, b: &Config) -> Result<Vec<String>, Error> {
    fn walk(path: &str, a: &Value, b: &Value, out: &mut Vec<String>) {
        match (a, b) {
            (Value::Object(x), Value::Object(y)) => {
                for (key, x) in x {
                    let full = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                    walk(&full, x, y.get(key).unwrap_or(&Value::Null), out);
                }
            }
            _ if a != b => out.push(format!("{path} was {a}, is {b}")),
            _ => {}
        }
    }
    let value = |c: &Config| {
        serde_json::to_value(c).map_err(|e| Error::Config { origin: "configuration".into(), what: e.to_string() })
    };
    let mut out = Vec::new();
    walk("", &value(a)?, &value(b)?, &mut out);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_not_mixed_with_another() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("run");
        let config = Config::default();
        RunDir::open(&root, &config, false).unwrap();
        let e = RunDir::open(&root, &config, false).unwrap_err().to_string();
        assert!(e.contains("pass --resume"), "{e}");
        let other = Config { seed: 1, ..config.clone() };
        let e = RunDir::open(&root, &other, true).unwrap_err().to_string();
        assert!(e.contains("seed was 42, is 1"), "{e}");
        RunDir::open(&root, &config, true).unwrap();
    }

    #[test]
    fn rewinding_leaves_no_record_twice() {
        let dir = tempfile::tempdir().unwrap();
        let mut run = RunDir::open(dir.path(), &Config::default(), false).unwrap();
        for step in 1..=5 {
            run.log("stage1", "train", step, &[("loss", 0.5)]).unwrap();
        }
        run.log("stage2", "train", 9, &[("loss", 0.5)]).unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut text = std::fs::read_to_string(&path).unwrap();
        text += "{\"stage\":\"sta"; // cut short by a death
        std::fs::write(&path, text).unwrap();
        run.rewind("stage1", Some(3)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> =
            text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 9]);
        run.rewind("stage1", None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    }
}
