//! Checkpoints: named float32 tensors and a JSON state, consistent at every moment.
//!
//! A checkpoint is a directory (`last`, `best`) with `model.safetensors`, `optimizer.safetensors` and `state.json`. A new one is
//! written beside the old, every file synced, `state.json` last; then the old is renamed away, the new into place, the old
//! removed. Whatever the moment the process dies, [`Checkpoint::load`] finds a whole one: under its name, or under one of the
//! two names of the exchange.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::files::write_atomic;

/// A named tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values.
    pub values: Vec<f32>,
}

impl Tensor {
    /// Puts the parts together.
    pub fn new(name: impl Into<String>, shape: Vec<usize>, values: Vec<f32>) -> Self {
        Tensor { name: name.into(), shape, values }
    }
}

/// Parameters, optimizer state, and everything else a run needs to go on.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint<S> {
    /// Trained tensors.
    pub model: Vec<Tensor>,
    /// Moments; empty where only the model matters.
    pub optimizer: Vec<Tensor>,
    /// The rest.
    pub state: S,
}

fn invalid(path: &Path, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()))
}

/// Writes tensors as a safetensors file, whole or not at all.
pub fn write_tensors(path: &Path, tensors: &[Tensor], metadata: &[(&str, String)]) -> io::Result<()> {
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|t| TensorView::new(Dtype::F32, t.shape.clone(), bytemuck::cast_slice(&t.values)).map(|v| (&t.name, v)))
        .collect();
    let mut entries = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
    entries.extend(metadata.iter().map(|(k, v)| (k.to_string(), v.clone())));
    let bytes =
        safetensors::serialize(views.map_err(|e| invalid(path, e))?, Some(entries)).map_err(|e| invalid(path, e))?;
    write_atomic(path, |w| w.write_all(&bytes))
}

/// Reads a safetensors file of float32 tensors, with its metadata.
pub fn read_tensors(path: &Path) -> io::Result<(Vec<Tensor>, BTreeMap<String, String>)> {
    let bytes = std::fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    let whole = |e| invalid(path, format!("not a whole safetensors file: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(whole)?;
    let file = SafeTensors::deserialize(&bytes).map_err(whole)?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        if view.dtype() != Dtype::F32 {
            return Err(invalid(path, format!("{name} has type {:?}; expected F32", view.dtype())));
        }
        tensors.push(Tensor::new(name, view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data())));
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok((tensors, metadata))
}

/// A tensor by name and shape, taken out of a list.
pub fn take_tensor(tensors: &mut Vec<Tensor>, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
    let at = tensors
        .iter()
        .position(|t| t.name == name)
        .ok_or_else(|| format!("has no tensor {name} of shape {shape:?}"))?;
    let tensor = tensors.swap_remove(at);
    if tensor.shape != shape {
        return Err(format!("{name} has shape {:?}; expected {shape:?}", tensor.shape));
    }
    Ok(tensor.values)
}

impl<S: Serialize + DeserializeOwned> Checkpoint<S> {
    /// Writes the checkpoint `name` in `dir`.
    pub fn save(&self, dir: &Path, name: &str) -> io::Result<()> {
        let places = Places::new(dir, name);
        std::fs::create_dir_all(dir)?;
        // Leftovers of a death: whole ones are kept by moving them into place first.
        places.settle()?;
        remove(&places.new)?;
        std::fs::create_dir(&places.new)?;
        write_tensors(&places.new.join("model.safetensors"), &self.model, &[])?;
        if !self.optimizer.is_empty() {
            write_tensors(&places.new.join("optimizer.safetensors"), &self.optimizer, &[])?;
        }
        write_atomic(&places.new.join("state.json"), |w| {
            serde_json::to_writer(w, &self.state).map_err(io::Error::from)
        })?;
        places.exchange()
    }

    /// Reads the checkpoint `name` of `dir`; `None` if there never was a whole one.
    pub fn load(dir: &Path, name: &str) -> io::Result<Option<Self>> {
        let Some(place) = checkpoint_dir(dir, name) else { return Ok(None) };
        let path = place.join("state.json");
        let state = serde_json::from_slice(&std::fs::read(&path)?).map_err(|e| invalid(&path, e))?;
        let (model, _) = read_tensors(&place.join("model.safetensors"))?;
        let path = place.join("optimizer.safetensors");
        let optimizer = if path.exists() { read_tensors(&path)?.0 } else { Vec::new() };
        Ok(Some(Checkpoint { model, optimizer, state }))
    }
}

/// The directory of a checkpoint, for readers of single files.
pub fn checkpoint_dir(dir: &Path, name: &str) -> Option<PathBuf> {
    Places::new(dir, name).whole().cloned()
}

struct Places {
    current: PathBuf,
    new: PathBuf,
    old: PathBuf,
    whole: [PathBuf; 3],
}

impl Places {
    fn new(dir: &Path, name: &str) -> Self {
        let [current, new, old] =
            [name.to_string(), format!(".{name}.new"), format!(".{name}.old")].map(|n| dir.join(n));
        Places { whole: [current.clone(), new.clone(), old.clone()], current, new, old }
    }

    /// `state.json` is written last, and removed first: a directory that has it is whole.
    fn whole(&self) -> Option<&PathBuf> {
        self.whole.iter().find(|p| p.join("state.json").is_file())
    }

    fn settle(&self) -> io::Result<()> {
        match self.whole() {
            Some(place) if *place != self.current => {
                remove(&self.current)?;
                std::fs::rename(place, &self.current)
            }
            _ => Ok(()),
        }
    }

    fn exchange(&self) -> io::Result<()> {
        remove(&self.old)?;
        if self.current.exists() {
            std::fs::rename(&self.current, &self.old)?;
        }
        std::fs::rename(&self.new, &self.current)?;
        if let Some(dir) = self.current.parent() {
            std::fs::File::open(dir)?.sync_all()?;
        }
        remove(&self.old)
    }
}

fn remove(dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(dir.join("state.json")).and_then(|()| std::fs::remove_dir_all(dir)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ if dir.exists() => std::fs::remove_dir_all(dir),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(step: u64) -> Checkpoint<u64> {
        let tensor = |name: &str| Tensor::new(name, vec![2, 3], vec![step as f32; 6]);
        Checkpoint { model: vec![tensor("w")], optimizer: vec![tensor("m"), tensor("v")], state: step }
    }

    /// Every state of the directory that a death can leave loads as the old or as the new checkpoint, and the next save works.
    #[test]
    fn a_death_at_any_moment_leaves_a_whole_checkpoint() {
        for death in 0..7 {
            let dir = tempfile::tempdir().unwrap();
            let places = Places::new(dir.path(), "last");
            checkpoint(1).save(dir.path(), "last").unwrap();
            // The steps of save(), up to the death.
            let new = |upto: usize| {
                std::fs::create_dir(&places.new).unwrap();
                for name in ["model.safetensors", "optimizer.safetensors", "state.json"].iter().take(upto) {
                    let from = tempfile::tempdir().unwrap();
                    checkpoint(2).save(from.path(), "x").unwrap();
                    std::fs::copy(from.path().join("x").join(name), places.new.join(name)).unwrap();
                }
            };
            let want = match death {
                0..=3 => {
                    new(death);
                    1
                }
                4 => {
                    new(3);
                    std::fs::rename(&places.current, &places.old).unwrap();
                    2
                }
                5 => {
                    new(3);
                    std::fs::rename(&places.current, &places.old).unwrap();
                    std::fs::rename(&places.new, &places.current).unwrap();
                    2
                }
                _ => {
                    new(3);
                    std::fs::rename(&places.current, &places.old).unwrap();
                    std::fs::rename(&places.new, &places.current).unwrap();
                    std::fs::remove_file(places.old.join("state.json")).unwrap();
                    2
                }
            };
            let load = || Checkpoint::<u64>::load(dir.path(), "last").unwrap().unwrap();
            assert_eq!(load(), checkpoint(want), "death {death}");
            checkpoint(3).save(dir.path(), "last").unwrap();
            assert_eq!(load(), checkpoint(3), "after death {death}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "death {death} leaves nothing behind");
        }
    }

    #[test]
    fn nothing_is_not_a_checkpoint_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Checkpoint::<u64>::load(dir.path(), "last").unwrap(), None);
        checkpoint(1).save(dir.path(), "last").unwrap();
        let path = dir.path().join("last/model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let e = Checkpoint::<u64>::load(dir.path(), "last").unwrap_err().to_string();
        assert!(e.contains("model.safetensors: not a whole safetensors file"), "{e}");
    }
}
