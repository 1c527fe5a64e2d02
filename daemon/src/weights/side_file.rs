//! Reads the small files beside the weights: configuration, index, tokenizer, templates.

use std::path::Path;

use serde::Deserialize;

use super::{
    error::{WeightsError, file_error},
    foreign,
};
use crate::runtime::file;

/// Longest side file that is read; the largest real ones are tokenizers of about 20 MB.
const SIDE_BYTES_MAX: u64 = 64 << 20;

/// Reads a JSON side file of bounded size.
pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(
    file: &Path,
    what: &'static str,
) -> Result<T, WeightsError> {
    serde_json::from_slice(&read_side_file(file)?).map_err(|source| WeightsError::Json {
        file: file.to_owned(),
        what,
        source,
    })
}

/// Reads a text side file of bounded size.
pub(crate) fn read_text(file: &Path, what: &'static str) -> Result<String, WeightsError> {
    String::from_utf8(read_side_file(file)?).map_err(|_| WeightsError::NotUtf8 {
        file: file.to_owned(),
        what: what.to_owned(),
    })
}

/// Reads a side file of bounded size. Copied, not mapped: side files are small, and people edit them
/// in place.
pub(crate) fn read_side_file(path: &Path) -> Result<Vec<u8>, WeightsError> {
    let bytes = file::read(path, SIDE_BYTES_MAX).map_err(|e| file_error(path, e))?;
    foreign::refuse_pointer_bytes(path, &bytes)?;
    Ok(bytes)
}
