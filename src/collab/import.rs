//! Trained collaborative models from elsewhere: official state dicts (`.pth`, [`crate::pth`]), or the file of another run.
//!
//! Owns which tensors, of which shapes, each official model has, and the messages when a file does not fit the data. What a run
//! then keeps is the file that training would have written.

use std::path::Path;

use super::Error;
use super::lightgcn::{self, Propagation};
use super::mf::{Mf, save_tensors};
use super::model::CollabConfig;
use crate::checkpoint::{Tensor, read_tensors};
use crate::data::Dataset;
use crate::pth::{TorchFile, Values};

/// What a file must fit.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// `mf`, `lightgcn` or `sasrec`.
    pub model: &'a str,
    /// Rows of a table of users: the largest id and one, for row 0 is padding.
    pub n_users: usize,
    /// Rows of a table of items, row 0 included.
    pub n_items: usize,
    /// Width of a vector, and the setting that says so.
    pub width: (usize, &'a str),
}

/// The tensors of the model in a file, under their official names and in official order.
///
/// They may lie in dictionaries or behind a prefix (`model.rec_encoder.`). Every official tensor must be there with its shape,
/// finite, and nothing else beside them.
pub fn read(path: &Path, wanted: &Wanted) -> Result<Vec<Tensor>, Error> {
    let bad = |what: String| Error::Model { path: path.into(), what };
    let mut source = Source::open(path)?;
    let names = source.names();
    let first = first_name(wanted.model);
    let mut ends = names.iter().filter(|n| n.as_str() == first || n.ends_with(&format!(".{first}")));
    let (prefix, more) = (ends.next().map(|n| n[..n.len() - first.len()].to_string()), ends.next());
    let prefix = prefix.ok_or_else(|| bad(absent(&names, wanted.model)))?;
    if let Some(other) = more {
        return Err(bad(format!("{prefix}{first} and {other} both could be the model; save one state dict alone")));
    }
    let inside: Vec<&str> = names.iter().filter_map(|n| n.strip_prefix(&prefix)).collect();
    let length = |name: &str| match source.shape(&format!("{prefix}{name}")) {
        Some(Ok(shape)) => shape.first().copied().unwrap_or(0),
        _ => 0,
    };
    let layout = match wanted.model {
        "sasrec" => {
            let blocks =
                (0..).take_while(|b| inside.contains(&&*format!("attention_layers.{b}.in_proj_weight"))).count();
            sasrec(wanted.n_items, wanted.width.0, length("pos_emb.weight"), blocks)
        }
        _ => {
            let [users, items] = tables(wanted.model);
            vec![
                (users.to_string(), vec![wanted.n_users, wanted.width.0]),
                (items.to_string(), vec![wanted.n_items, wanted.width.0]),
            ]
        }
    };
    let foreign = inside.iter().find(|n| !layout.iter().any(|l| l.0 == **n) && !derived(n));
    if let Some(name) = foreign {
        return Err(bad(format!("{prefix}{name} is not a tensor of an official {} model", wanted.model)));
    }
    let mut tensors = Vec::new();
    for (name, shape) in layout {
        let full = format!("{prefix}{name}");
        let found = source.shape(&full).ok_or_else(|| bad(format!("has no tensor {full} of shape {shape:?}")))?;
        let found = found.map_err(|e| bad(format!("{full}: {e}")))?;
        if found != shape {
            return Err(bad(misfit(&full, &found, &shape, wanted)));
        }
        let values = source.values(&full)?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(bad(format!("{full} holds {} (value {at}); expected finite numbers", values[at])));
        }
        tensors.push(Tensor::new(name, shape, values));
    }
    if wanted.model != "sasrec" {
        // Row 0 stands for ids that no table knows. PARITY: LightGCN's official row 0 is a random vector that no edge leads to and no
        // id selects; zero here, as after training.
        tensors.iter_mut().for_each(|t| t.values[..wanted.width.0].fill(0.0));
    }
    Ok(tensors)
}

impl CollabConfig {
    /// Reads [`Self::pretrained`] and writes, with facts as metadata, the file that [`Self::fit`] would have left at `path`.
    pub fn import(&self, data: &Dataset, (path, facts): (&Path, &[(&str, String)])) -> Result<(), Error> {
        let width = match self.model.as_str() {
            "lightgcn" => (self.lightgcn.dim, "collab.lightgcn.dim"),
            "mf" => (self.mf.dim, "collab.mf.dim"),
            "sasrec" => (self.sasrec.dim, "collab.sasrec.dim"),
            other => {
                let what =
                    format!("collab.pretrained takes models of kind mf, lightgcn and sasrec; collab.model is {other}");
                return Err(Error::Model { path: self.pretrained.clone().into(), what });
            }
        };
        let wanted = Wanted { model: &self.model, n_users: data.n_users, n_items: data.n_items, width };
        let mut tensors = read(Path::new(&self.pretrained), &wanted)?;
        if let ("lightgcn", [users, items]) = (&*self.model, &tensors[..]) {
            let tables = Mf { dim: width.0, users: users.values.clone(), items: items.values.clone() };
            let vectors = Propagation::new(data, self.lightgcn.layers).apply(&tables);
            tensors.extend(vectors.named(lightgcn::VECTORS));
        }
        save_tensors(&tensors, path, facts)
    }
}

/// Official names of the tables of users and items.
fn tables(model: &str) -> [&'static str; 2] {
    if model == "lightgcn" {
        ["embedding_user.weight", "embedding_item.weight"]
    } else {
        ["user_embedding.weight", "item_embedding.weight"]
    }
}

/// What a run's own file holds besides the official tensors: LightGCN's propagated vectors.
fn derived(name: &str) -> bool {
    ["user_vectors", "item_vectors"].contains(&name)
}

/// The tensor by which a model is recognised.
fn first_name(model: &str) -> &'static str {
    if model == "sasrec" { "item_emb.weight" } else { tables(model)[0] }
}

/// Official SASRec: names and shapes.
fn sasrec(n_items: usize, d: usize, positions: usize, blocks: usize) -> Vec<(String, Vec<usize>)> {
    let mut all =
        vec![("item_emb.weight".to_string(), vec![n_items, d]), ("pos_emb.weight".into(), vec![positions, d])];
    let mut weights = |name: String, shape: Vec<usize>, bias: usize| {
        all.push((format!("{name}weight"), shape));
        all.push((format!("{name}bias"), vec![bias]));
    };
    for b in 0..blocks {
        weights(format!("attention_layernorms.{b}."), vec![d], d);
        weights(format!("attention_layers.{b}.in_proj_"), vec![3 * d, d], 3 * d);
        weights(format!("attention_layers.{b}.out_proj."), vec![d, d], d);
        weights(format!("forward_layernorms.{b}."), vec![d], d);
        weights(format!("forward_layers.{b}.conv1."), vec![d, d, 1], d);
        weights(format!("forward_layers.{b}.conv2."), vec![d, d, 1], d);
    }
    weights("last_layernorm.".into(), vec![d], d);
    all
}

/// Why a file has no tensor of the model: it is another model's, or none.
fn absent(names: &[String], model: &str) -> String {
    let has = |name: &str| names.iter().any(|n| n == name || n.ends_with(&format!(".{name}")));
    let other = ["mf", "lightgcn", "sasrec"].into_iter().find(|m| *m != model && has(first_name(m)));
    let hint = match other {
        Some(other) => format!("; it has {}: a model of kind {other}, collab.model is {model}", first_name(other)),
        None if names.is_empty() => "; it holds no tensors".into(),
        None => {
            let some: Vec<&str> = names.iter().take(3).map(String::as_str).collect();
            format!("; it has {}{}", some.join(", "), if names.len() > 3 { ", …" } else { "" })
        }
    };
    format!("has no tensor {}{hint}", first_name(model))
}

fn misfit(name: &str, found: &[usize], want: &[usize], wanted: &Wanted) -> String {
    let (width, setting) = wanted.width;
    let plain = format!("{name} has shape {found:?}; expected {want:?}");
    match (found, want) {
        (&[rows, d], &[want_rows, want_d]) if d != want_d && rows == want_rows && d > 0 => {
            format!("{plain}: {setting} is {width}; set it to {d} if the file is right")
        }
        (&[rows, _], &[want_rows, _]) if rows != want_rows => {
            let ids = want_rows.saturating_sub(1);
            format!("{plain}: the data has ids 1 to {ids}, and row 0 is padding; was the model trained on other data?")
        }
        _ => plain,
    }
}

/// A file of named tensors.
enum Source {
    Torch(Box<TorchFile<std::fs::File>>),
    Safetensors(Vec<Tensor>),
}

impl Source {
    fn open(path: &Path) -> Result<Self, Error> {
        if path.extension().is_some_and(|e| e == "safetensors") {
            let (tensors, _) = read_tensors(path).map_err(|source| Error::Io { path: path.into(), source })?;
            return Ok(Source::Safetensors(tensors));
        }
        Ok(Source::Torch(Box::new(TorchFile::open(path)?)))
    }

    fn names(&self) -> Vec<String> {
        match self {
            Source::Torch(file) => file.entries.iter().map(|e| e.name.clone()).collect(),
            Source::Safetensors(tensors) => tensors.iter().map(|t| t.name.clone()).collect(),
        }
    }

    /// A tensor's shape, or why it cannot be read; `None` if it is not there.
    fn shape(&self, name: &str) -> Option<Result<Vec<usize>, String>> {
        match self {
            Source::Torch(file) => {
                let entry = file.entries.iter().find(|e| e.name == name)?;
                Some(entry.layout.as_ref().map(|l| l.shape.clone()).map_err(String::clone))
            }
            Source::Safetensors(tensors) => tensors.iter().find(|t| t.name == name).map(|t| Ok(t.shape.clone())),
        }
    }

    fn values(&mut self, name: &str) -> Result<Vec<f32>, Error> {
        match self {
            Source::Torch(file) => {
                let at = file.entries.iter().position(|e| e.name == name).unwrap_or(0);
                match file.read(at)? {
                    Values::Floats(values) => Ok(values),
                    Values::Integers(_) => Err(Error::Model {
                        path: file.path().into(),
                        what: format!("{name} holds integers; expected floating point numbers"),
                    }),
                }
            }
            Source::Safetensors(tensors) => {
                let tensor = tensors.iter_mut().find(|t| t.name == name);
                Ok(tensor.map(|t| std::mem::take(&mut t.values)).unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::write_tensors;

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/torch").join(name)
    }

    fn wanted(model: &str, width: usize) -> Wanted<'_> {
        Wanted { model, n_users: 25, n_items: 31, width: (width, "collab.x.dim") }
    }

    fn refused(file: &Path, wanted: &Wanted) -> String {
        read(file, wanted).unwrap_err().to_string()
    }

    #[test]
    fn official_tables() {
        let mf = read(&fixture("mf.pth"), &wanted("mf", 8)).unwrap();
        assert_eq!(mf.iter().map(|t| &*t.name).collect::<Vec<_>>(), tables("mf"));
        assert_eq!((mf[0].shape.as_slice(), mf[1].shape.as_slice()), (&[25, 8][..], &[31, 8][..]));
        // make.py: value i of the nth table is (n + i / 8) / 64, and row 0 is zero.
        assert_eq!(mf[1].values[7..9], [0.0, 2.0 / 64.0]);
        assert_eq!(mf[0].values[199], (199.0 / 8.0) / 64.0);
        assert_eq!(read(&fixture("nested.pth"), &wanted("mf", 8)).unwrap(), mf, "behind a prefix, beside other things");
        let gcn = read(&fixture("lightgcn.pth"), &wanted("lightgcn", 8)).unwrap();
        assert_eq!(gcn[1].values[..9], [&[0.0; 8][..], &[2.0 / 64.0]].concat(), "row 0 is padding");
    }

    #[test]
    fn official_sasrec() {
        let tensors = read(&fixture("sasrec.pth"), &wanted("sasrec", 4)).unwrap();
        assert_eq!(tensors.len(), 2 + 2 * 12 + 2);
        // make.py: value i of the nth tensor written is n + i / 8.
        let value = |name: &str| tensors.iter().find(|t| t.name == name).unwrap().values[1];
        assert_eq!((value("item_emb.weight"), value("pos_emb.weight")), (0.125, 1.125));
        assert_eq!(value("forward_layers.1.conv2.bias"), 25.125);
        assert!(refused(&fixture("sasrec.pth"), &wanted("sasrec", 8)).contains("collab.x.dim is 8; set it to 4"));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let file = fixture("mf.pth");
        let e = refused(&file, &wanted("mf", 16));
        assert!(
            e.ends_with("mf.pth: user_embedding.weight has shape [25, 8]; expected [25, 16]: collab.x.dim is 16; set it to 8 if the file is right"),
            "{e}"
        );
        let e = refused(&file, &Wanted { n_items: 41, ..wanted("mf", 8) });
        assert!(
            e.contains("item_embedding.weight has shape [31, 8]; expected [41, 8]: the data has ids 1 to 40, and row 0 is padding"),
            "{e}"
        );
        let e = refused(&file, &wanted("lightgcn", 8));
        assert!(e.contains("has no tensor embedding_user.weight; it has user_embedding.weight: a model of kind mf, collab.model is lightgcn"), "{e}");
        assert!(refused(&fixture("kinds.pth"), &wanted("mf", 8)).contains("it has float32, float64, float16, …"));
        assert!(refused(&fixture("legacy.pth"), &wanted("mf", 8)).contains("before version 1.6"));
        assert!(refused(Path::new("/none.pth"), &wanted("mf", 8)).contains("/none.pth: No such file"));
    }

    #[test]
    fn files_of_other_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mf.safetensors");
        let write = |tensors: &[Tensor]| write_tensors(&path, tensors, &[]).unwrap();
        let mut mf = read(&fixture("mf.pth"), &wanted("mf", 8)).unwrap();
        write(&mf);
        assert_eq!(read(&path, &wanted("mf", 8)).unwrap(), mf);
        write(&[&mf[..], &[Tensor::new("user_bias.weight", vec![25], vec![0.0; 25])]].concat());
        let e = refused(&path, &wanted("mf", 8));
        assert!(e.contains("user_bias.weight is not a tensor of an official mf model"), "{e}");
        write(&mf[..1]);
        let e = refused(&path, &wanted("mf", 8));
        assert!(e.contains("has no tensor item_embedding.weight of shape [31, 8]"), "{e}");
        mf[1].values[9] = f32::NAN;
        write(&mf);
        assert!(refused(&path, &wanted("mf", 8)).contains("item_embedding.weight holds NaN (value 9)"));
        let twice =
            [&mf[..], &mf.iter().map(|t| Tensor { name: format!("old.{}", t.name), ..t.clone() }).collect::<Vec<_>>()];
        write(&twice.concat());
        assert!(refused(&path, &wanted("mf", 8)).contains("both could be the model"));
    }
}
