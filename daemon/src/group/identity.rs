//! What a rank has loaded, in two digests that all ranks of a group, and all groups of a replica, must
//! agree on: a stream that goes on with other weights would go on with other bytes, without a word.
//!
//! Weight files are told apart by what the file system knows of them (size, inode, times in
//! nanoseconds): a replaced or written file differs, and nothing of hundreds of gigabytes is read.
//! Configuration and tokenizer are small and are read.
//!
//! Called by rank.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::weights::gguf_metadata_only;

/// Files up to this size are read where they are no weights.
const SMALL_FILE_LEN_MAX: u64 = 64 << 20;
/// Files of a checkpoint at most; more are no checkpoint.
const FILES_MAX: usize = 65_536;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Of the build and the weight files.
    pub(super) weights: String,
    /// Of the others.
    pub(super) text: String,
}

impl Identity {
    /// Of the checkpoint folder, GGUF file or pack at `path`.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let mut weights = blake3::Hasher::new_derive_key("dsd rank weights");
        let mut text = blake3::Hasher::new_derive_key("dsd rank text");
        weights.update(env!("CARGO_PKG_VERSION").as_bytes());
        add_metadata(&mut weights, Path::new("/proc/self/exe"))?;
        for file in files_of(path)? {
            let name = file.file_name().unwrap_or_default();
            let is_weights = ["safetensors", "gguf"]
                .iter()
                .any(|ext| file.extension().is_some_and(|e| e == *ext));
            if is_weights {
                if file.extension().is_some_and(|e| e == "gguf") {
                    // Configuration and tokenizer are in front of its tensors.
                    let metadata = gguf_metadata_only(&file).map_err(io::Error::other)?;
                    text.update(&metadata);
                }
                weights.update(name.as_encoded_bytes());
                add_metadata(&mut weights, &file)?;
                continue;
            }
            text.update(name.as_encoded_bytes());
            let metadata = fs::metadata(&file)?;
            if metadata.len() <= SMALL_FILE_LEN_MAX {
                text.update(&fs::read(&file)?);
            } else {
                add_metadata(&mut text, &file)?;
            }
        }
        Ok(Self {
            weights: weights.finalize().to_hex().to_string(),
            text: text.finalize().to_hex().to_string(),
        })
    }
}

/// The regular files of a checkpoint, by name.
fn files_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !fs::metadata(path)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path)?.take(FILES_MAX) {
        let file = entry?.path();
        if fs::metadata(&file).is_ok_and(|metadata| metadata.is_file()) {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn add_metadata(hasher: &mut blake3::Hasher, file: &Path) -> io::Result<()> {
    let metadata = fs::metadata(file)?;
    let words = [
        metadata.dev().cast_signed(),
        metadata.ino().cast_signed(),
        metadata.size().cast_signed(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ];
    for word in words {
        hasher.update(&word.to_le_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_weights_and_another_tokenizer_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("model.safetensors"), [0; 100]).unwrap();
        fs::write(at("tokenizer.json"), "{}").unwrap();
        fs::create_dir(at("more")).unwrap();
        let first = Identity::of(folder.path()).unwrap();
        assert_eq!(Identity::of(folder.path()).unwrap(), first);
        // The same length, put in its place by a rename.
        fs::write(at("new"), [1; 100]).unwrap();
        fs::rename(at("new"), at("model.safetensors")).unwrap();
        let second = Identity::of(folder.path()).unwrap();
        assert_eq!(
            (second.weights == first.weights, &second.text),
            (false, &first.text)
        );
        // The same text again is the same.
        fs::write(at("tokenizer.json"), "{}").unwrap();
        assert_eq!(Identity::of(folder.path()).unwrap(), second);
        fs::write(at("tokenizer.json"), "[]").unwrap();
        let third = Identity::of(folder.path()).unwrap();
        assert_eq!(
            (&third.weights, third.text == second.text),
            (&second.weights, false)
        );
        assert!(Identity::of(&at("absent")).is_err());
    }
}
