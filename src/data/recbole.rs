//! MovieLens-100K as RecBole ships it: `ml-100k.inter` and `ml-100k.item`, in a directory or still inside RecBole's wheel.

use std::path::{Path, PathBuf};

use super::Error;
use super::archive::Archive;
use super::split::SplitRule;
use super::store::Manifest;
use super::table::{Layout, prepare_table};

/// Prepares MovieLens-100K: liked from 4 stars on, split by rank in time 60/20/20.
pub fn prepare_ml100k(inter: &Path, item: &Path, out: &Path, skip_bad_rows: bool) -> Result<Manifest, Error> {
    let rule = SplitRule::Fractions(60.0, 20.0, 20.0);
    prepare_table("MovieLens-100K", inter, item, &Layout::recbole(4.0), &rule, out, skip_bad_rows)
}

/// The same from a directory that holds the two files, or from the wheel (`recbole-1.2.1-py3-none-any.whl`).
pub fn prepare_ml100k_from(from: &Path, out: &Path, skip_bad_rows: bool) -> Result<Manifest, Error> {
    let names = ["ml-100k.inter", "ml-100k.item"];
    if from.is_dir() {
        let [inter, item] = names.map(|n| from.join(n));
        return prepare_ml100k(&inter, &item, out, skip_bad_rows);
    }
    let mut archive = Archive::open(from)?;
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let mut unpacked = |name: &str| -> Result<PathBuf, Error> {
        let bytes = archive.read(name)?.ok_or_else(|| {
            Error::file(
                from,
                format!("holds no {name}; expected RecBole's wheel, or a directory with {}", names.join(" and ")),
            )
        })?;
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).map_err(Error::io(&path))?;
        Ok(path)
    };
    let (inter, item) = (unpacked(names[0])?, unpacked(names[1])?);
    prepare_ml100k(&inter, &item, out, skip_bad_rows)
}
