//! Reads a safetensors header and cuts the file into tensors.
//!
//! Stricter than the format's own library where that matters: duplicate names, zero dimensions
//! and unknown types are refused by name, and every refusal says what was expected.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{
    error::WeightsError,
    foreign,
    mmap::{self, MappedFile},
    tensor::{NAME_BYTES_MAX, StoredTensor, StoredType, check_shape},
};
use crate::runtime::file;

/// The format's own limit on the JSON header.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// The length field in front of the header.
const LENGTH_BYTES: usize = 8;

/// Maps `path` and returns its tensors in file order.
///
/// # Errors
/// [`WeightsError`] naming the first thing that does not fit.
pub(super) fn read(path: &Path) -> Result<Vec<StoredTensor>, WeightsError> {
    open(path).map(|(_, tensors)| tensors)
}

/// As [`read`], with the file.
///
/// # Errors
/// [`WeightsError`] naming the first thing that does not fit.
pub(super) fn open(path: &Path) -> Result<(MappedFile, Vec<StoredTensor>), WeightsError> {
    let mapped = mmap::map_file(path)?;
    foreign::refuse_pointer(path, &mapped.file)?;
    let read_at = |buffer: &mut [u8], offset| {
        file::read_at(&mapped.file, buffer, offset).map_err(|source| WeightsError::Read {
            file: path.to_owned(),
            source,
        })
    };
    let mut length = [0; LENGTH_BYTES];
    let n_read = read_at(&mut length, 0)?;
    let header_len = header_len(path, &length[..n_read], mapped.mapping.len())?;
    let mut header = vec![0; header_len];
    let n_read = read_at(&mut header, LENGTH_BYTES as u64)?;
    if n_read < header_len {
        return Err(WeightsError::Truncated {
            file: path.to_owned(),
            what: "the header".to_owned(),
            expected: header_len as u64,
            found: n_read as u64,
        });
    }
    let tensors = cut_all(path, &header, &mapped.mapping)?;
    Ok((mapped, tensors))
}

/// Cuts `bytes`, the whole of `path`, into tensors.
#[cfg(test)]
pub(super) fn parse(path: &Path, bytes: &Bytes) -> Result<Vec<StoredTensor>, WeightsError> {
    let first = &bytes[..bytes.len().min(LENGTH_BYTES)];
    let header_len = header_len(path, first, bytes.len())?;
    let header = bytes.slice(LENGTH_BYTES..LENGTH_BYTES + header_len);
    cut_all(path, &header, bytes)
}

/// Cuts `bytes`, the whole of `path`, into the tensors of its header.
fn cut_all(path: &Path, header: &[u8], bytes: &Bytes) -> Result<Vec<StoredTensor>, WeightsError> {
    let data_start = LENGTH_BYTES + header.len();
    let header = std::str::from_utf8(header).map_err(|_| WeightsError::NotUtf8 {
        file: path.to_owned(),
        what: "safetensors header".to_owned(),
    })?;
    let Header(mut entries) =
        serde_json::from_str(header).map_err(|source| WeightsError::Json {
            file: path.to_owned(),
            what: "safetensors header",
            source,
        })?;
    if let Some(longest) = entries.iter().map(|(name, _)| name.len() as u64).max()
        && NAME_BYTES_MAX < longest
    {
        return Err(WeightsError::TooLarge {
            file: path.to_owned(),
            what: "the length of a tensor name".to_owned(),
            found: longest,
            max: NAME_BYTES_MAX,
        });
    }
    let mut names = HashSet::with_capacity(entries.len());
    if let Some((name, _)) = entries
        .iter()
        .find(|(name, _)| !names.insert(name.as_str()))
    {
        return Err(WeightsError::DuplicateTensor {
            file: path.to_owned(),
            tensor: name.clone(),
            first: path.to_owned(),
        });
    }
    entries.sort_by_key(|(_, entry)| entry.data_offsets);

    let file: Arc<Path> = path.into();
    let data = bytes.slice(data_start..);
    let mut end = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let tensor = cut(&file, name, &entry, &data, end)?;
        end += tensor.data.len();
        tensors.push(tensor);
    }
    if end != data.len() {
        return Err(WeightsError::FileLength {
            file: path.to_owned(),
            expected: (data_start + end) as u64,
            found: bytes.len() as u64,
        });
    }
    Ok(tensors)
}

/// The length of the header, which the first bytes of a file of `file_len` bytes tell.
fn header_len(path: &Path, first: &[u8], file_len: usize) -> Result<usize, WeightsError> {
    let truncated = |what: &str, expected: u64| WeightsError::Truncated {
        file: path.to_owned(),
        what: what.to_owned(),
        expected,
        found: file_len as u64,
    };
    let Some((length, _)) = first.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated("the header length", LENGTH_BYTES as u64));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if HEADER_BYTES_MAX < header_bytes {
        return Err(WeightsError::TooLarge {
            file: path.to_owned(),
            what: "the header length".to_owned(),
            found: header_bytes,
            max: HEADER_BYTES_MAX,
        });
    }
    // Below the limit, so neither the conversion nor the sum can overflow.
    let header_len = header_bytes as usize;
    match LENGTH_BYTES + header_len <= file_len {
        true => Ok(header_len),
        false => Err(truncated("the header", LENGTH_BYTES as u64 + header_bytes)),
    }
}

/// One tensor, which must start at `expected_start` of `data`.
fn cut(
    file: &Arc<Path>,
    name: String,
    entry: &Entry,
    data: &Bytes,
    expected_start: usize,
) -> Result<StoredTensor, WeightsError> {
    let Some(stored_type) = StoredType::from_safetensors(&entry.dtype) else {
        return Err(WeightsError::TensorType {
            file: file.to_path_buf(),
            tensor: name,
            expected: "a safetensors type this version knows".to_owned(),
            found: entry.dtype.chars().take(64).collect(),
        });
    };
    let (shape, n_bytes) = check_shape(file, &name, stored_type, &entry.shape)?;
    let [start, end] = entry.data_offsets;
    if start != expected_start as u64 {
        return Err(WeightsError::TensorOffset {
            file: file.to_path_buf(),
            tensor: name,
            expected: expected_start as u64,
            found: start,
        });
    }
    let found = end.saturating_sub(start);
    if found != n_bytes as u64 {
        return Err(WeightsError::TensorBytes {
            file: file.to_path_buf(),
            tensor: name,
            expected: n_bytes as u64,
            found,
        });
    }
    if data.len() - expected_start < n_bytes {
        return Err(WeightsError::Truncated {
            file: file.to_path_buf(),
            what: format!("tensor `{name}`"),
            expected: n_bytes as u64,
            found: (data.len() - expected_start) as u64,
        });
    }
    Ok(StoredTensor {
        file: Arc::clone(file),
        name,
        stored_type,
        shape,
        data: data.slice(expected_start..expected_start + n_bytes),
    })
}

/// The tensors of a header in the order written, duplicates included.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensor names")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Header, M::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<HashMap<String, String>>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(Header(entries))
    }
}
