//! GGUF models in several files: which files make one, and whether they belong together.
//!
//! Parts lie in one folder under the names that llama.cpp's gguf-split gives them,
//! `NAME-00002-of-00003.gguf`. Each says in `split.no` (from 0), `split.count` and
//! `split.tensors.count` (of all parts) where it belongs; only the first has the model's keys.
//!
//! Knows no key but those.

use std::path::{Path, PathBuf};

use super::{
    error::WeightsError,
    gguf::{self, Gguf, GgufMetadata},
    mmap::MappedFile,
};

/// Parts of one model; the largest published ones have about 100.
const PARTS_MAX: u64 = 1000;
/// What follows a model's name: `-00002-of-00003`.
const SUFFIX_LEN: usize = "-00000-of-00000".len();

/// The name of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PartName<'a> {
    /// What all parts' names begin with.
    pub(crate) model: &'a str,
    /// Which part, from 1.
    pub(crate) number: u64,
    /// How many there are.
    pub(crate) count: u64,
}

impl<'a> PartName<'a> {
    /// The name of the file at `path`; `None` where it is not that of a part.
    pub(crate) fn of(path: &'a Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
        let (model, suffix) = name.split_at_checked(name.len().checked_sub(SUFFIX_LEN)?)?;
        let (number, count) = suffix.strip_prefix('-')?.split_once("-of-")?;
        let digits = |text: &str| {
            let plain = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| text.parse().ok())?
        };
        let (number, count) = (digits(number)?, digits(count)?);
        (1 <= number && number <= count).then_some(Self {
            model,
            number,
            count,
        })
    }

    /// The file name of another part of the same model.
    pub(crate) fn sibling(&self, number: u64) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.model, self.count)
    }
}

/// A part, or a whole model in one file.
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: MappedFile,
    pub(super) gguf: Gguf,
}

/// Opens the file at `path` and, where it is one part of a model, the other parts beside it, in their
/// order: the first has the metadata.
///
/// # Errors
/// [`WeightsError`]: a file that is damaged, a part that is missing or does not belong to the others.
pub(super) fn open(path: &Path) -> Result<Vec<Part>, WeightsError> {
    let given = open_one(path)?;
    let metadata = &given.gguf.metadata;
    let count = metadata.uint("split.count")?.unwrap_or(1);
    if count <= 1 {
        return Ok(vec![given]);
    }
    let name = PartName::of(path).filter(|name| name.count == count);
    let Some(name) = name.filter(|_| count <= PARTS_MAX) else {
        let expected = format!(
            "the `N` of a file name `MODEL-00001-of-0000N.gguf`, at most {PARTS_MAX}: parts are found \
             by the names that gguf-split gives them"
        );
        return Err(metadata.field("split.count", &expected, &count.to_string()));
    };
    let mut given = Some(given);
    let mut parts: Vec<Part> = Vec::new();
    let mut n_tensors = 0;
    for number in 1..=count {
        let here = path.with_file_name(name.sibling(number));
        let part = match given.take_if(|_| number == name.number) {
            Some(part) => part,
            None if here.exists() => open_one(&here)?,
            None => {
                return Err(WeightsError::MissingPart {
                    file: path.to_owned(),
                    expected: name.sibling(number),
                    count,
                });
            }
        };
        let first = parts.first().unwrap_or(&part);
        check(&part.gguf.metadata, number - 1, count, &first.gguf.metadata)?;
        n_tensors += part.gguf.tensors.len() as u64;
        parts.push(part);
    }
    let metadata = &parts[0].gguf.metadata;
    match tensor_count(metadata)? {
        Some(found) if found == n_tensors => Ok(parts),
        found => {
            let expected = format!("{n_tensors}, as many as all parts hold");
            Err(metadata.field(TENSOR_COUNT, &expected, &shown(found)))
        }
    }
}

fn open_one(path: &Path) -> Result<Part, WeightsError> {
    let (file, gguf) = gguf::open(path)?;
    Ok(Part {
        path: path.to_owned(),
        file,
        gguf,
    })
}

const TENSOR_COUNT: &str = "split.tensors.count";

fn tensor_count(metadata: &GgufMetadata) -> Result<Option<u64>, WeightsError> {
    metadata.uint(TENSOR_COUNT)
}

fn shown(found: Option<u64>) -> String {
    found.map_or_else(|| "missing".to_owned(), |found| found.to_string())
}

/// Refuses a file that is not part `no` (from 0) of `count` of the model of `first`.
fn check(
    metadata: &GgufMetadata,
    no: u64,
    count: u64,
    first: &GgufMetadata,
) -> Result<(), WeightsError> {
    let refuse = |key: &str, expected: String, found: Option<u64>| {
        Err(metadata.field(key, &expected, &shown(found)))
    };
    let found = metadata.uint("split.count")?;
    if found != Some(count) {
        let expected = format!("{count}, as in `{}`", first.file().display());
        return refuse("split.count", expected, found);
    }
    let found = metadata.uint("split.no")?;
    if found != Some(no) {
        let expected =
            format!("{no}, as its name says: it is another part, or one of another model");
        return refuse("split.no", expected, found);
    }
    let (found, expected) = (tensor_count(metadata)?, tensor_count(first)?);
    if found != expected {
        let file = first.file().display();
        let expected = format!(
            "{}, as in `{file}`: the parts are of different models",
            shown(expected)
        );
        return refuse(TENSOR_COUNT, expected, found);
    }
    Ok(())
}
