//! Reads a GGUF header (versions 2 and 3) and cuts the file into tensors.
//!
//! Knows the container only; what the keys mean is `gguf_config`'s and `text`'s business.
//!
//! Invariant: memory taken while reading is bounded by [`ELEMENTS_MAX`] and the length of the file,
//! whatever its counts say.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    fs::File,
    io,
    ops::Range,
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
use dsd_kernels::dtype::Format;

use super::{
    error::WeightsError,
    foreign,
    mmap::{self, MappedFile},
    tensor::{NAME_BYTES_MAX, StoredTensor, StoredType, check_shape},
};
use crate::runtime::file;

const MAGIC: [u8; 4] = *b"GGUF";
/// Keys of one file; real ones have 20 to 60.
const KEYS_MAX: u64 = 4096;
/// Tensors of one file; the largest published models have about 2000 (experts are stacked).
const TENSORS_MAX: u64 = 100_000;
/// Array elements over all keys: four arrays (tokens, scores, types, merges) of a vocabulary of a
/// million and some room.
const ELEMENTS_MAX: u64 = 1 << 23;
/// Bytes of a string value; chat templates are the longest.
const STRING_BYTES_MAX: u64 = 1 << 24;
/// Dimensions of a tensor in ggml.
const DIMS_MAX: u32 = 4;
/// Where the file does not say.
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 16;
/// Bytes of the header read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// One value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer.
    Uint(u64),
    /// Any signed integer.
    Int(i64),
    /// Single precision, kept as written.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// Text.
    String(String),
    /// Values of one type; arrays of arrays are refused.
    Array(Vec<Self>),
}

/// The key-value part of a GGUF file.
#[derive(Debug, Clone)]
pub struct GgufMetadata {
    file: Arc<Path>,
    values: HashMap<String, GgufValue>,
}

/// A file's metadata and its tensors in file order, shapes slowest first.
pub(super) struct Gguf {
    pub(super) metadata: GgufMetadata,
    pub(super) tensors: Vec<StoredTensor>,
    /// Where the keys end in the file.
    keys_end: usize,
}

/// Maps and reads a file.
///
/// # Errors
/// [`WeightsError`] naming the first thing that does not fit.
pub(super) fn read(path: &Path) -> Result<Gguf, WeightsError> {
    open(path).map(|(_, gguf)| gguf)
}

/// As [`read`], with the file.
///
/// # Errors
/// [`WeightsError`] naming the first thing that does not fit.
pub(super) fn open(path: &Path) -> Result<(MappedFile, Gguf), WeightsError> {
    let mapped = mmap::map_file(path)?;
    foreign::refuse_pointer(path, &mapped.file)?;
    let reader = Reader {
        path,
        file: Some(&mapped.file),
        file_len: mapped.mapping.len(),
        window: Cow::Owned(Vec::new()),
        window_start: 0,
        at: 0,
        elements_left: ELEMENTS_MAX,
    };
    let gguf = parse_with(reader, &mapped.mapping)?;
    Ok((mapped, gguf))
}

/// Reads `bytes`, the whole of `path`.
#[cfg(test)]
pub(super) fn parse(path: &Path, bytes: &Bytes) -> Result<Gguf, WeightsError> {
    let reader = Reader {
        path,
        file: None,
        file_len: bytes.len(),
        window: Cow::Borrowed(bytes),
        window_start: 0,
        at: 0,
        elements_left: ELEMENTS_MAX,
    };
    parse_with(reader, bytes)
}

/// Reads the header and cuts `bytes`, the whole file, into tensors.
fn parse_with(mut reader: Reader<'_>, bytes: &Bytes) -> Result<Gguf, WeightsError> {
    let path = reader.path;
    let (n_tensors, n_keys) = read_counts(&mut reader)?;
    let file: Arc<Path> = path.into();
    let mut values = HashMap::new();
    for _ in 0..n_keys {
        let key = reader.string("a key", NAME_BYTES_MAX)?;
        let value_type = reader.u32(&key)?;
        let value = reader.value(&key, value_type)?;
        if values.contains_key(&key) {
            return Err(reader.field(&key, "once", "twice"));
        }
        values.insert(key, value);
    }
    let metadata = GgufMetadata {
        file: Arc::clone(&file),
        values,
    };
    let keys_end = reader.position();
    let mut infos = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..n_tensors {
        let info = read_info(&mut reader)?;
        if !names.insert(info.name.clone()) {
            return Err(WeightsError::DuplicateTensor {
                file: path.to_owned(),
                tensor: info.name,
                first: path.to_owned(),
            });
        }
        infos.push(info);
    }
    let alignment = alignment(&metadata)?;
    let header_end = reader.position();
    let tensors = cut_all(&file, bytes, infos, header_end, alignment)?;
    Ok(Gguf {
        metadata,
        tensors,
        keys_end,
    })
}

/// The file `path` without its tensors.
///
/// # Errors
/// [`WeightsError`] naming the first thing that does not fit.
pub(crate) fn metadata_only(path: &Path) -> Result<Vec<u8>, WeightsError> {
    /// Behind magic number and version.
    const N_TENSORS: Range<usize> = 8..16;
    let (mapped, gguf) = open(path)?;
    let Gguf {
        metadata, keys_end, ..
    } = gguf;
    let mut only = vec![0; keys_end];
    let n_read = file::read_at(&mapped.file, &mut only, 0).map_err(|e| read_error(path, e))?;
    if n_read < keys_end {
        return Err(WeightsError::Truncated {
            file: path.to_owned(),
            what: "the keys".to_owned(),
            expected: keys_end as u64,
            found: n_read as u64,
        });
    }
    only[N_TENSORS].fill(0);
    only.resize(keys_end.next_multiple_of(alignment(&metadata)?), 0);
    Ok(only)
}

/// Checks magic and version, returns the numbers of tensors and keys.
fn read_counts(reader: &mut Reader<'_>) -> Result<(u64, u64), WeightsError> {
    let magic: [u8; 4] = reader.array("the magic number")?;
    if magic != MAGIC {
        let found = String::from_utf8_lossy(&magic).escape_debug().to_string();
        return Err(reader.field("magic number", "GGUF", &format!("`{found}`")));
    }
    let version = reader.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let found = match version.swap_bytes() {
            2 | 3 => "a big-endian file".to_owned(),
            _ => version.to_string(),
        };
        return Err(reader.field("GGUF version", "2 or 3, little endian", &found));
    }
    let n_tensors = reader.count("the number of tensors", TENSORS_MAX)?;
    let n_keys = reader.count("the number of keys", KEYS_MAX)?;
    Ok((n_tensors, n_keys))
}

struct TensorInfo {
    name: String,
    stored_type: StoredType,
    shape: Vec<usize>,
    n_bytes: usize,
    offset: u64,
}

fn read_info(reader: &mut Reader<'_>) -> Result<TensorInfo, WeightsError> {
    let name = reader.string("a tensor name", NAME_BYTES_MAX)?;
    let n_dims = reader.u32(&name)?;
    if n_dims == 0 || DIMS_MAX < n_dims {
        let field = format!("number of dimensions of tensor `{name}`");
        return Err(reader.field(&field, "1 to 4", &n_dims.to_string()));
    }
    let mut dims = Vec::with_capacity(DIMS_MAX as usize);
    for _ in 0..n_dims {
        dims.push(reader.u64(&name)?);
    }
    // The file has the fastest dimension first.
    dims.reverse();
    let type_id = reader.u32(&name)?;
    let Some(format) = format_of(type_id) else {
        return Err(WeightsError::TensorType {
            file: reader.path.to_owned(),
            tensor: name,
            expected: "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K".to_owned(),
            found: type_name(type_id),
        });
    };
    let stored_type = StoredType::Weights(format);
    let offset = reader.u64(&name)?;
    let (shape, n_bytes) = check_shape(reader.path, &name, stored_type, &dims)?;
    Ok(TensorInfo {
        name,
        stored_type,
        shape,
        n_bytes,
        offset,
    })
}

/// Cuts the data part; each tensor must start at the first aligned byte behind the one before.
fn cut_all(
    file: &Arc<Path>,
    bytes: &Bytes,
    infos: Vec<TensorInfo>,
    header_end: usize,
    alignment: usize,
) -> Result<Vec<StoredTensor>, WeightsError> {
    let too_long = |name: &str| WeightsError::Truncated {
        file: file.to_path_buf(),
        what: format!("tensor `{name}`"),
        expected: u64::MAX,
        found: bytes.len() as u64,
    };
    // `alignment` is at most ALIGNMENT_MAX and `header_end` an offset in memory: no overflow.
    let data_start = header_end.next_multiple_of(alignment);
    let mut end = data_start;
    let mut tensors = Vec::with_capacity(infos.len());
    for info in infos {
        let start = end
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| too_long(&info.name))?;
        if info.offset != (start - data_start) as u64 {
            return Err(WeightsError::TensorOffset {
                file: file.to_path_buf(),
                tensor: info.name,
                expected: (start - data_start) as u64,
                found: info.offset,
            });
        }
        end = start
            .checked_add(info.n_bytes)
            .ok_or_else(|| too_long(&info.name))?;
        if bytes.len() < end {
            return Err(WeightsError::Truncated {
                file: file.to_path_buf(),
                what: format!("tensor `{}`", info.name),
                expected: info.n_bytes as u64,
                found: bytes.len().saturating_sub(start) as u64,
            });
        }
        tensors.push(StoredTensor {
            file: Arc::clone(file),
            name: info.name,
            stored_type: info.stored_type,
            shape: info.shape,
            data: bytes.slice(start..end),
        });
    }
    // Writers may or may not pad the last tensor.
    if bytes.len() != end && bytes.len() != end.next_multiple_of(alignment) {
        return Err(WeightsError::FileLength {
            file: file.to_path_buf(),
            expected: end as u64,
            found: bytes.len() as u64,
        });
    }
    Ok(tensors)
}

fn alignment(metadata: &GgufMetadata) -> Result<usize, WeightsError> {
    let key = "general.alignment";
    let alignment = metadata.uint(key)?.unwrap_or(ALIGNMENT_DEFAULT);
    if !alignment.is_power_of_two() || !(8..=ALIGNMENT_MAX).contains(&alignment) {
        let expected = format!("a power of two from 8 to {ALIGNMENT_MAX}");
        return Err(metadata.field(key, &expected, &alignment.to_string()));
    }
    Ok(alignment as usize)
}

/// The ggml type ids that kernels know.
fn format_of(type_id: u32) -> Option<Format> {
    Some(match type_id {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        30 => Format::Bf16,
        _ => return None,
    })
}

/// The name of a type we do not have, for the message.
fn type_name(type_id: u32) -> String {
    let name = match type_id {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return format!("unknown ggml type {type_id}"),
    };
    name.to_owned()
}

impl GgufMetadata {
    /// The file, for messages.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.values.get(key)
    }

    /// A non-negative integer of any width; `None` when the key is absent.
    ///
    /// # Errors
    /// [`WeightsError::Field`] when the key holds something else.
    pub fn uint(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::Uint(v)) => Ok(Some(*v)),
            Some(GgufValue::Int(v)) if 0 <= *v => Ok(Some(v.unsigned_abs())),
            Some(other) => Err(self.field(key, "a non-negative integer", &other.to_string())),
        }
    }

    /// A number, single precision widened by its shortest decimal form (1e-5 stays 1e-5).
    ///
    /// # Errors
    /// [`WeightsError::Field`] when the key holds something else or no finite number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        let value = match self.value(key) {
            None => return Ok(None),
            Some(GgufValue::F32(v)) => v.to_string().parse().unwrap_or_else(|_| f64::from(*v)),
            Some(GgufValue::F64(v)) => *v,
            Some(GgufValue::Uint(v)) => *v as f64,
            Some(GgufValue::Int(v)) => *v as f64,
            Some(other) => return Err(self.field(key, "a number", &other.to_string())),
        };
        if !value.is_finite() {
            return Err(self.field(key, "a finite number", &value.to_string()));
        }
        Ok(Some(value))
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`WeightsError::Field`] when the key holds something else.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.field(key, "true or false", &other.to_string())),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// [`WeightsError::Field`] when the key holds something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.field(key, "a string", &other.to_string())),
        }
    }

    /// An array.
    ///
    /// # Errors
    /// [`WeightsError::Field`] when the key holds something else.
    pub fn array(&self, key: &str) -> Result<Option<&[GgufValue]>, WeightsError> {
        match self.value(key) {
            None => Ok(None),
            Some(GgufValue::Array(v)) => Ok(Some(v)),
            Some(other) => Err(self.field(key, "an array", &other.to_string())),
        }
    }

    /// The refusal of a key's value.
    pub fn field(&self, key: &str, expected: &str, found: &str) -> WeightsError {
        field_error(&self.file, key, expected, found)
    }
}

impl std::fmt::Display for GgufValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Uint(v) => v.fmt(f),
            Self::Int(v) => v.fmt(f),
            Self::F32(v) => v.fmt(f),
            Self::F64(v) => v.fmt(f),
            Self::Bool(v) => v.fmt(f),
            Self::String(v) => write!(f, "`{}`", v.chars().take(64).collect::<String>()),
            Self::Array(v) => write!(f, "an array of {}", v.len()),
        }
    }
}

fn field_error(file: &Path, field: &str, expected: &str, found: &str) -> WeightsError {
    WeightsError::Field {
        file: file.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found: found.chars().take(200).collect(),
    }
}

fn read_error(file: &Path, source: io::Error) -> WeightsError {
    WeightsError::Read {
        file: file.to_owned(),
        source,
    }
}

/// Walks the header; every read is checked against the end of the file.
struct Reader<'a> {
    path: &'a Path,
    /// Where more is read from than the window shows; without it the window is everything.
    file: Option<&'a File>,
    file_len: usize,
    window: Cow<'a, [u8]>,
    /// Where in the file the window begins.
    window_start: usize,
    /// In the window.
    at: usize,
    elements_left: u64,
}

impl Reader<'_> {
    fn position(&self) -> usize {
        self.window_start + self.at
    }

    /// Moves the window on so that it shows `n` bytes from here, or what the file has of them.
    fn fetch(&mut self, n: usize) -> Result<(), WeightsError> {
        let Some(file) = self.file else {
            return Ok(());
        };
        let at = self.position();
        let len = n.max(WINDOW_BYTES).min(self.file_len.saturating_sub(at));
        let mut window = vec![0; len];
        let n_read =
            file::read_at(file, &mut window, at as u64).map_err(|e| read_error(self.path, e))?;
        window.truncate(n_read);
        self.window = Cow::Owned(window);
        self.window_start = at;
        self.at = 0;
        Ok(())
    }

    fn take(&mut self, what: &str, n: usize) -> Result<&[u8], WeightsError> {
        if self.window.len() - self.at < n {
            self.fetch(n)?;
        }
        let left = &self.window[self.at..];
        let Some(taken) = left.get(..n) else {
            return Err(WeightsError::Truncated {
                file: self.path.to_owned(),
                what: what.to_owned(),
                expected: n as u64,
                found: left.len() as u64,
            });
        };
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], WeightsError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(what, N)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, WeightsError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, WeightsError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str, max: u64) -> Result<u64, WeightsError> {
        let found = self.u64(what)?;
        if max < found {
            return Err(WeightsError::TooLarge {
                file: self.path.to_owned(),
                what: what.to_owned(),
                found,
                max,
            });
        }
        Ok(found)
    }

    fn string(&mut self, what: &str, max: u64) -> Result<String, WeightsError> {
        let n = self.count(what, max)?;
        // At most STRING_BYTES_MAX.
        let bytes = self.take(what, n as usize)?.to_vec();
        String::from_utf8(bytes).map_err(|_| WeightsError::NotUtf8 {
            file: self.path.to_owned(),
            what: what.to_owned(),
        })
    }

    fn value(&mut self, key: &str, value_type: u32) -> Result<GgufValue, WeightsError> {
        const ARRAY: u32 = 9;
        if value_type != ARRAY {
            return self.scalar(key, value_type);
        }
        let element_type = self.u32(key)?;
        if element_type == ARRAY {
            return Err(self.field(key, "an array of plain values", "an array of arrays"));
        }
        let n = self.count(key, self.elements_left)?;
        self.elements_left -= n;
        let mut elements = Vec::new();
        for _ in 0..n {
            elements.push(self.scalar(key, element_type)?);
        }
        Ok(GgufValue::Array(elements))
    }

    fn scalar(&mut self, key: &str, value_type: u32) -> Result<GgufValue, WeightsError> {
        Ok(match value_type {
            0 => GgufValue::Uint(u8::from_le_bytes(self.array(key)?).into()),
            1 => GgufValue::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => GgufValue::Uint(u16::from_le_bytes(self.array(key)?).into()),
            3 => GgufValue::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => GgufValue::Uint(self.u32(key)?.into()),
            5 => GgufValue::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => GgufValue::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array::<1>(key)? {
                [0] => GgufValue::Bool(false),
                [1] => GgufValue::Bool(true),
                [other] => return Err(self.field(key, "0 or 1", &other.to_string())),
            },
            8 => GgufValue::String(self.string(key, STRING_BYTES_MAX)?),
            10 => GgufValue::Uint(self.u64(key)?),
            11 => GgufValue::Int(i64::from_le_bytes(self.array(key)?)),
            12 => GgufValue::F64(f64::from_le_bytes(self.array(key)?)),
            other => {
                let field = format!("value type of `{key}`");
                return Err(self.field(&field, "0 to 12", &other.to_string()));
            }
        })
    }

    fn field(&self, field: &str, expected: &str, found: &str) -> WeightsError {
        field_error(self.path, field, expected, found)
    }
}
