//! The model store: checkpoints that lie in a folder, loaded or not, and the check of their bytes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{LoadError, Progress};
use crate::{
    runtime::file,
    weights::{self, PartName, VerifyReport, is_pack},
};

/// Entries of the folder looked at.
const ENTRIES_MAX: usize = 10_000;
/// Longest `config.json` read for a model's architecture.
const CONFIG_LEN_MAX: u64 = 1 << 20;

/// A checkpoint or pack in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModel {
    /// Name of its folder, or of its file without the extension and the part's number.
    pub name: String,
    /// Where it lies: the first part, where it has several.
    pub path: PathBuf,
    /// `safetensors`, `gguf` or `pack`.
    pub format: &'static str,
    /// `model_type` of its configuration; empty when that is not to be had without opening it, and
    /// for packs.
    pub architecture: String,
    /// Bytes of its weight files.
    pub bytes: u64,
}

/// Checkpoints in a folder, by name. A missing folder is an empty store.
///
/// # Errors
/// When the folder cannot be read.
pub fn scan(dir: &Path) -> io::Result<Vec<StoredModel>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut models = Vec::new();
    for entry in entries.take(ENTRIES_MAX) {
        models.extend(stored(&entry?.path()));
    }
    models.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(models)
}

/// The path of a model of that name in the store; names with separators lead nowhere.
pub fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    let is_plain =
        !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0']);
    let whole = [dir.join(name), dir.join(format!("{name}.gguf"))];
    let found = whole.into_iter().find(|path| is_plain && path.exists());
    found.or_else(|| {
        let entries = fs::read_dir(dir).ok()?.take(ENTRIES_MAX).flatten();
        let mut paths = entries.map(|entry| entry.path());
        let is_first = |part: PartName<'_>| part.model == name && part.number == 1;
        paths.find(|path| is_plain && PartName::of(path).is_some_and(is_first))
    })
}

/// What a model of this path is called unless told otherwise.
pub fn name_of(path: &Path) -> Option<String> {
    if let Some(part) = PartName::of(path).filter(|part| !part.model.is_empty()) {
        return Some(part.model.to_owned());
    }
    let is_gguf = path.extension().is_some_and(|ext| ext == "gguf");
    let name = if is_gguf {
        path.file_stem()
    } else {
        path.file_name()
    };
    Some(name?.to_str()?.to_owned())
}

/// Reads every byte of a checkpoint and reports what is wrong with it. Blocks.
///
/// # Errors
/// When the checkpoint cannot be opened at all.
pub fn verify(
    path: &Path,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<VerifyReport, LoadError> {
    weights::verify(path, None, |progress| {
        on_progress(Progress {
            stage: "verifying",
            n_done: progress.bytes_done,
            n_total: progress.bytes,
        });
    })
    .map_err(|e| LoadError::Checkpoint {
        path: path.to_owned(),
        source: Box::new(e),
    })
}

fn stored(path: &Path) -> Option<StoredModel> {
    let name = name_of(path)?;
    let (format, bytes) = if path.is_dir() {
        let mut bytes = [("safetensors", 0), ("gguf", 0)];
        for entry in fs::read_dir(path).ok()?.take(ENTRIES_MAX).flatten() {
            let file = entry.path();
            for (format, bytes) in &mut bytes {
                if file.extension().is_some_and(|ext| ext == *format) {
                    *bytes += file_len(&file).unwrap_or(0);
                }
            }
        }
        let (format, bytes) = bytes.into_iter().find(|(_, bytes)| 0 < *bytes)?;
        match is_pack(path) {
            true => ("pack", bytes),
            false => (format, bytes),
        }
    } else if path.extension().is_some_and(|ext| ext == "gguf") {
        match PartName::of(path) {
            None => ("gguf", file_len(path)?),
            // Others are listed with the first.
            Some(part) if part.number == 1 => ("gguf", parts_len(path, part)),
            Some(_) => return None,
        }
    } else {
        return None;
    };
    Some(StoredModel {
        name,
        path: path.to_owned(),
        format,
        architecture: architecture(path),
        bytes,
    })
}

/// The length of all parts that are there.
fn parts_len(first: &Path, name: PartName<'_>) -> u64 {
    let parts = (1..=name.count.min(ENTRIES_MAX as u64)).map(|number| name.sibling(number));
    parts
        .filter_map(|part| file_len(&first.with_file_name(part)))
        .sum()
}

/// The length of a regular file.
fn file_len(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    metadata.is_file().then_some(metadata.len())
}

fn architecture(path: &Path) -> String {
    let text = file::read_text(&path.join("config.json"), CONFIG_LEN_MAX).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    config
        .get("model_type")
        .and_then(|value| value.as_str())
        .unwrap_or("")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::file::tests::for_each_stranger;

    /// A pipe called config.json stopped the listing for good; a link to /dev/zero was read until
    /// the agent was killed.
    #[test]
    fn a_stranger_in_a_file_s_place_does_not_stop_the_listing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir(root.join("a")).unwrap();
        fs::write(root.join("a/model.safetensors"), b"123").unwrap();
        for_each_stranger(&root.join("a/config.json"), |what| {
            let models = scan(root).unwrap();
            assert_eq!(models.len(), 1, "{what}");
            assert_eq!(models[0].architecture, "", "{what}");
        });
        for_each_stranger(&root.join("a/other.safetensors"), |what| {
            assert_eq!(scan(root).unwrap()[0].bytes, 3, "{what}");
        });
        for_each_stranger(&root.join("b.gguf"), |what| {
            assert_eq!(scan(root).unwrap().len(), 1, "{what}");
        });
    }

    #[test]
    fn checkpoints_are_found_by_name_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(scan(&root.join("absent")).unwrap(), []);
        fs::write(root.join("b.gguf"), b"12345").unwrap();
        fs::create_dir(root.join("a")).unwrap();
        fs::write(root.join("a/config.json"), r#"{"model_type": "llama"}"#).unwrap();
        fs::write(root.join("a/model.safetensors"), b"123").unwrap();
        for number in 1..=2 {
            fs::write(root.join(format!("c-0000{number}-of-00002.gguf")), b"1234").unwrap();
        }
        fs::create_dir(root.join("empty")).unwrap();
        fs::write(root.join("notes.txt"), b"x").unwrap();
        let models = scan(root).unwrap();
        let seen: Vec<_> = models
            .iter()
            .map(|m| (m.name.as_str(), m.format, m.architecture.as_str(), m.bytes))
            .collect();
        assert_eq!(
            seen,
            [
                ("a", "safetensors", "llama", 3),
                ("b", "gguf", "", 5),
                ("c", "gguf", "", 8)
            ]
        );
        assert_eq!(find(root, "a"), Some(root.join("a")));
        assert_eq!(find(root, "b"), Some(root.join("b.gguf")));
        let first = root.join("c-00001-of-00002.gguf");
        assert_eq!(find(root, "c"), Some(first.clone()));
        assert_eq!(name_of(&first).as_deref(), Some("c"));
        for name in ["", ".", "..", "a/config.json", "../a", "d"] {
            assert_eq!(find(root, name), None, "{name}");
        }
    }
}
