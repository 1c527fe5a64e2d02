//! What a rank has loaded, in two digests that all ranks of a group, and all groups of a replica, must
//! agree on: a stream that goes on with other weights would go on with other bytes, without a word.
//!
//! Weight files are told apart by what the file system knows of them (size, inode, times in
//! nanoseconds): a replaced or written file differs, and nothing of hundreds of gigabytes is read.
//! Configuration and tokenizer are small and count by their content. Whatever else lies beside them
//! counts for nothing.
//!
//! Called by rank.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    runtime::file::{self, FileError},
    weights::{Checkpoint, WeightsError, gguf_metadata_only},
};

/// What a tokenizer is read from, in folders and packs; the last is there in packs of GGUF files.
const TEXT_NAMES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "encoding/encoding_dsv4.py",
    "encoding_dsv4.py",
    "metadata.gguf",
];
/// Longest of them; the largest real ones have about 20 MB.
const TEXT_LEN_MAX: u64 = 1 << 30;
/// Files of a checkpoint's folder that are looked at, at most; more are no checkpoint.
const FILES_MAX: usize = 65_536;

/// Why it cannot be said what was loaded.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The file system does not tell.
    #[error("cannot look at `{}`", path.display())]
    Look {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the tokenizer cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: FileError,
    },
    /// The metadata of a GGUF file cannot be read.
    #[error(transparent)]
    Gguf(#[from] WeightsError),
    /// Somebody wrote or replaced it.
    #[error("`{}` changed while it was loaded", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
}

/// What the file system knows of a file.
type Facts = [i64; 7];

/// The files of a checkpoint before it was opened.
#[derive(Debug)]
pub(super) struct Seen(BTreeMap<PathBuf, Facts>);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Of the build and the weight files.
    pub(super) weights: String,
    /// Of configuration and tokenizer.
    pub(super) text: String,
}

impl Seen {
    /// Looks at the checkpoint folder, GGUF file or pack at `path`.
    pub(super) fn look(path: &Path) -> Result<Self, IdentityError> {
        let metadata = metadata_of(path)?;
        if !metadata.is_dir() {
            return Ok(Self(BTreeMap::from([(path.to_owned(), facts(&metadata))])));
        }
        let failed = |source| IdentityError::Look {
            path: path.to_owned(),
            source,
        };
        let mut seen = BTreeMap::new();
        for entry in fs::read_dir(path).map_err(failed)?.take(FILES_MAX) {
            let file = entry.map_err(failed)?.path();
            // A link that leads nowhere is none of the checkpoint's files.
            if let Ok(metadata) = fs::metadata(&file)
                && metadata.is_file()
            {
                seen.insert(file, facts(&metadata));
            }
        }
        Ok(Self(seen))
    }

    /// What `checkpoint`, which was opened since and is loaded now, is.
    pub(super) fn identity(&self, checkpoint: &Checkpoint) -> Result<Identity, IdentityError> {
        Ok(Identity {
            weights: self.weights(checkpoint)?,
            text: text(checkpoint)?,
        })
    }

    fn weights(&self, checkpoint: &Checkpoint) -> Result<String, IdentityError> {
        let mut hasher = blake3::Hasher::new_derive_key("dsd rank weights");
        hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
        let program = metadata_of(Path::new("/proc/self/exe"))?;
        // Without the time of its inode, which changes when an upgrade takes its name away: ranks go on
        // running the program that their agent runs.
        let [dev, ino, size, mtime, mtime_nsec, ..] = facts(&program);
        add(&mut hasher, &[dev, ino, size, mtime, mtime_nsec]);
        for mapped in checkpoint.files() {
            let path = &mapped.path;
            let now = facts(&metadata_of(path)?);
            if self.0.get(path) != Some(&now) {
                return Err(IdentityError::Changed { path: path.clone() });
            }
            let name = path.file_name().unwrap_or_default();
            add_bytes(&mut hasher, name.as_encoded_bytes());
            add(&mut hasher, &now);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }
}

fn text(checkpoint: &Checkpoint) -> Result<String, IdentityError> {
    let mut hasher = blake3::Hasher::new_derive_key("dsd rank text");
    let generation_config = checkpoint.generation_config();
    for config in [Some(checkpoint.config()), generation_config] {
        let words = config.map(ToString::to_string).unwrap_or_default();
        add_bytes(&mut hasher, words.as_bytes());
    }
    let config_file = checkpoint.config_file();
    if config_file.extension().is_some_and(|ext| ext == "gguf") {
        add_bytes(&mut hasher, &gguf_metadata_only(config_file)?);
        return Ok(hasher.finalize().to_hex().to_string());
    }
    for name in TEXT_NAMES {
        let path = checkpoint.path().join(name);
        if !path.exists() {
            continue;
        }
        let read = file::read(&path, TEXT_LEN_MAX);
        let bytes = read.map_err(|source| IdentityError::Read { path, source })?;
        add_bytes(&mut hasher, name.as_bytes());
        add_bytes(&mut hasher, &bytes);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// With the length in front, so that two pieces are told from one.
fn add_bytes(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

fn add(hasher: &mut blake3::Hasher, words: &[i64]) {
    for word in words {
        hasher.update(&word.to_le_bytes());
    }
}

fn metadata_of(path: &Path) -> Result<Metadata, IdentityError> {
    fs::metadata(path).map_err(|source| IdentityError::Look {
        path: path.to_owned(),
        source,
    })
}

fn facts(metadata: &Metadata) -> Facts {
    [
        metadata.dev().cast_signed(),
        metadata.ino().cast_signed(),
        metadata.size().cast_signed(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: &str = "model.safetensors";

    /// A safetensors file with one tensor of these values.
    fn shard(values: [u8; 4]) -> Vec<u8> {
        let head = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let mut bytes = (head.len() as u64).to_le_bytes().to_vec();
        bytes.extend(head.as_bytes());
        bytes.extend(values);
        bytes
    }

    fn of(folder: &Path) -> Result<Identity, IdentityError> {
        let seen = Seen::look(folder)?;
        seen.identity(&Checkpoint::reopen(folder)?)
    }

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(SHARD), shard([0; 4])).unwrap();
        fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        let config = r#"{"model_type":"llama","eos_token_id":2}"#;
        fs::write(folder.path().join("config.json"), config).unwrap();
        folder
    }

    #[test]
    fn replaced_weights_and_another_tokenizer_are_told_apart() {
        let folder = folder();
        let at = |name: &str| folder.path().join(name);
        let first = of(folder.path()).unwrap();
        assert_eq!(of(folder.path()).unwrap(), first);
        // The same length, put in its place by a rename.
        fs::write(at("new"), shard([1; 4])).unwrap();
        fs::rename(at("new"), at(SHARD)).unwrap();
        let second = of(folder.path()).unwrap();
        assert_ne!(second.weights, first.weights);
        assert_eq!(second.text, first.text);
        // The same text again is the same.
        fs::write(at("tokenizer.json"), "{}").unwrap();
        assert_eq!(of(folder.path()).unwrap(), second);
        for (name, text) in [
            ("tokenizer.json", "[]"),
            ("config.json", r#"{"model_type":"llama","eos_token_id":3}"#),
            ("generation_config.json", "{}"),
            ("chat_template.jinja", "{{ messages }}"),
        ] {
            let before = of(folder.path()).unwrap();
            fs::write(at(name), text).unwrap();
            let after = of(folder.path()).unwrap();
            assert_eq!(after.weights, before.weights, "{name}");
            assert_ne!(after.text, before.text, "{name}");
        }
        assert!(of(&at("absent")).is_err());
    }

    /// A README, or a download into the folder, used to keep a lost group from coming back.
    #[test]
    fn other_files_in_the_folder_change_nothing() {
        let folder = folder();
        let first = of(folder.path()).unwrap();
        for name in [
            "README.md",
            "golden.safetensors",
            "other.gguf",
            "notes.json",
        ] {
            fs::write(folder.path().join(name), "text").unwrap();
        }
        fs::create_dir(folder.path().join("onnx")).unwrap();
        assert_eq!(of(folder.path()).unwrap(), first);
    }

    #[test]
    fn a_file_that_changes_while_it_is_loaded_is_named() {
        let folder = folder();
        let seen = Seen::look(folder.path()).unwrap();
        let checkpoint = Checkpoint::reopen(folder.path()).unwrap();
        let new = folder.path().join("new");
        fs::write(&new, shard([1; 4])).unwrap();
        fs::rename(&new, folder.path().join(SHARD)).unwrap();
        let error = seen.identity(&checkpoint).unwrap_err();
        assert!(
            matches!(&error, IdentityError::Changed { path } if path.ends_with(SHARD)),
            "{error}"
        );
    }

    #[test]
    fn every_file_of_a_tokenizer_counts() {
        let of_text = crate::text::FILE_NAMES;
        assert!(of_text.iter().all(|name| TEXT_NAMES.contains(name)));
        let of_pack = crate::weights::pack::manifest::GGUF_NAME;
        assert!(TEXT_NAMES.contains(&of_pack));
    }
}
