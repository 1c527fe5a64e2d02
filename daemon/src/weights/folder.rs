//! Which files of a folder make the checkpoint, and whether shards and index agree.
//!
//! Invariant: a shard's name is a plain file name, so an index reaches nothing outside its folder.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

use super::{
    error::WeightsError,
    foreign,
    gguf_split::{self, PartName},
    mmap::MappedFile,
    safetensors,
    side_file::read_json,
    tensor::StoredTensor,
};

const SINGLE_NAME: &str = "model.safetensors";
const INDEX_NAME: &str = "model.safetensors.index.json";

/// The files of a checkpoint with their tensors as they lie there, without configuration or
/// translation.
pub(super) fn stored_files(path: &Path) -> Result<Vec<StoredFile>, WeightsError> {
    let metadata = path.metadata().map_err(|source| WeightsError::Read {
        file: path.to_owned(),
        source,
    })?;
    let gguf_file = match metadata.is_dir() {
        true => only_gguf_in(path)?,
        false => Some(path.to_owned()),
    };
    if let Some(file) = gguf_file {
        let parts = gguf_split::open(&file)?.into_iter();
        let files = parts.map(|part| StoredFile {
            file: part.file,
            tensors: part.gguf.tensors,
        });
        return Ok(files.collect());
    }
    let mut files = Vec::new();
    let (shards, index) = find_shards(path)?;
    for shard in shards {
        let (file, tensors) = safetensors::open(&shard)?;
        if let Some(index) = &index {
            index.check_shard(&shard, &tensors)?;
        }
        files.push(StoredFile { file, tensors });
    }
    Ok(files)
}

/// A file and what lies in it.
pub(super) struct StoredFile {
    pub(super) file: MappedFile,
    pub(super) tensors: Vec<StoredTensor>,
}

/// The one GGUF file of a folder without safetensors, or the first of its parts; `None` for a folder that has those.
pub(super) fn only_gguf_in(folder: &Path) -> Result<Option<PathBuf>, WeightsError> {
    if folder.join(SINGLE_NAME).exists() || folder.join(INDEX_NAME).exists() {
        return Ok(None);
    }
    let read_error = |source| WeightsError::Read {
        file: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(read_error)? {
        let path = entry.map_err(read_error)?.path();
        if path.extension().is_some_and(|e| e == "gguf") {
            found.push(path);
        }
    }
    found.sort();
    let model_of = |path| PartName::of(path).map(|name| (name.model, name.count));
    let is_one = match found.first().map(|first| model_of(first)) {
        Some(Some(model)) => found.iter().all(|part| model_of(part) == Some(model)),
        _ => found.len() == 1,
    };
    if is_one {
        return Ok(found.into_iter().next());
    }
    if found.is_empty() {
        foreign::refuse_pickles(folder)?;
    }
    Err(WeightsError::NotACheckpoint {
        path: folder.to_owned(),
        expected: "model.safetensors, model.safetensors.index.json or one .gguf file (or all parts of one)",
        found: format!("none of the first two and {} .gguf files", found.len()),
    })
}

/// The shards of a folder and its index where it has one.
pub(super) fn find_shards(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>), WeightsError> {
    let single = folder.join(SINGLE_NAME);
    let index_file = folder.join(INDEX_NAME);
    if !index_file.exists() {
        return Ok((vec![single], None));
    }
    let index = Index::read(index_file)?;
    let shards = index.shards(folder)?;
    // Two sets of weights: which one is meant is not ours to guess.
    if single.exists() && !shards.contains(&single) {
        return Err(WeightsError::NotACheckpoint {
            path: folder.to_owned(),
            expected: "one of model.safetensors and model.safetensors.index.json",
            found: "both, and the index does not name model.safetensors".to_owned(),
        });
    }
    Ok((shards, Some(index)))
}

/// `model.safetensors.index.json`: which shard holds which tensor.
pub(super) struct Index {
    file: PathBuf,
    shard_of: HashMap<String, String>,
}

#[derive(Deserialize)]
struct IndexJson {
    weight_map: HashMap<String, String>,
}

impl Index {
    fn read(file: PathBuf) -> Result<Self, WeightsError> {
        let IndexJson { weight_map } = read_json(&file, INDEX_NAME)?;
        Ok(Self {
            file,
            shard_of: weight_map,
        })
    }

    /// The shards, sorted by name, each a plain name in `folder` that exists.
    fn shards(&self, folder: &Path) -> Result<Vec<PathBuf>, WeightsError> {
        let mut names = BTreeSet::new();
        for (tensor, shard) in &self.shard_of {
            let mut components = Path::new(shard).components();
            let plain = matches!(components.next(), Some(Component::Normal(name)) if name == shard.as_str())
                && components.next().is_none();
            if !plain {
                return Err(WeightsError::ShardName {
                    file: self.file.clone(),
                    tensor: tensor.clone(),
                    found: shard.chars().take(200).collect(),
                });
            }
            if names.insert(shard) && !folder.join(shard).exists() {
                return Err(WeightsError::MissingShard {
                    file: self.file.clone(),
                    tensor: tensor.clone(),
                    expected: shard.clone(),
                });
            }
        }
        Ok(names.into_iter().map(|name| folder.join(name)).collect())
    }

    /// Refuses a shard that lacks a tensor of the index or holds another one.
    pub(super) fn check_shard(
        &self,
        shard: &Path,
        tensors: &[StoredTensor],
    ) -> Result<(), WeightsError> {
        let shard_name = shard.file_name().unwrap_or_default().to_string_lossy();
        let mut missing: BTreeSet<&str> = self
            .shard_of
            .iter()
            .filter(|(_, of)| **of == shard_name)
            .map(|(tensor, _)| tensor.as_str())
            .collect();
        for tensor in tensors {
            if !missing.remove(tensor.name.as_str()) {
                let expected = self.shard_of.get(&tensor.name);
                return Err(WeightsError::NotInIndex {
                    file: shard.to_owned(),
                    tensor: tensor.name.clone(),
                    index: self.file.clone(),
                    expected: expected.map_or_else(|| "no shard".to_owned(), |s| format!("`{s}`")),
                });
            }
        }
        match missing.first() {
            None => Ok(()),
            Some(tensor) => Err(WeightsError::NotInShard {
                file: shard.to_owned(),
                tensor: (*tensor).to_owned(),
                index: self.file.clone(),
            }),
        }
    }
}
