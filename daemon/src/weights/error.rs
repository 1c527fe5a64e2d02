//! Why a checkpoint was refused: always the file, where there is one the tensor, and what was
//! expected against what was found.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use dsd_kernels::{dtype::Format, matrix::MatrixError, quant::RoundError};

use super::{pack::PackError, source::Cut, tensor::StoredType};
use crate::runtime::file::FileError;

/// What a file that is not read means for its checkpoint.
pub(super) fn file_error(path: &Path, error: FileError) -> WeightsError {
    let file = path.to_owned();
    match error {
        FileError::Io(source) => WeightsError::Read { file, source },
        FileError::NotRegular => WeightsError::NotAFile { file },
        FileError::TooLong { found, max } => WeightsError::TooLarge {
            file,
            what: "the length".to_owned(),
            found,
            max,
        },
    }
}

/// Why a checkpoint, or one tensor of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be opened, measured, read or mapped.
    #[error("cannot read `{}`", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The path is a device, a pipe or a folder where a file belongs.
    #[error("`{}` is not a regular file", file.display())]
    NotAFile {
        /// The path.
        file: PathBuf,
    },
    /// The folder does not hold exactly one checkpoint.
    #[error("`{}` holds {found}, expected {expected}", path.display())]
    NotACheckpoint {
        /// The folder or file given.
        path: PathBuf,
        /// What makes a checkpoint.
        expected: &'static str,
        /// What is there instead.
        found: String,
    },
    /// Something else is in the place of weights that this version reads.
    #[error("`{}` is {found}; {remedy}", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
        /// What it is.
        found: String,
        /// What would help.
        remedy: &'static str,
    },
    /// A JSON file or header does not parse.
    #[error("`{}` is not valid {what}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Which part of it.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A count or length of a file is beyond what any real checkpoint has.
    #[error("`{}`: {what} is {found}, at most {max} is accepted", file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// What was counted.
        what: String,
        /// The file's number.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A header needs bytes beyond the end of the file.
    #[error("`{}` ends inside {what}: {expected} bytes needed, {found} there", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// What was being read.
        what: String,
        /// Bytes needed.
        expected: u64,
        /// Bytes left.
        found: u64,
    },
    /// The tensors end before or after the file does.
    #[error("`{}` is {found} bytes long, its header describes {expected}", file.display())]
    FileLength {
        /// The file.
        file: PathBuf,
        /// Length that the header implies.
        expected: u64,
        /// Length on disk.
        found: u64,
    },
    /// A header field or configuration key has an impossible or unsupported value.
    #[error("`{}`: {field} is {found}, expected {expected}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// Name of the field or key.
        field: String,
        /// What would be accepted.
        expected: String,
        /// The file's value.
        found: String,
    },
    /// A name is not UTF-8.
    #[error("`{}`: {what} is not UTF-8", file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// Which name.
        what: String,
    },
    /// One name stands for two tensors.
    #[error("`{}`: tensor `{tensor}` is there twice, first in `{}`", file.display(), first.display())]
    DuplicateTensor {
        /// File of the second one.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// File of the first one.
        first: PathBuf,
    },
    /// The tensor's stored type is not supported.
    #[error("`{}`: tensor `{tensor}` has type {found}, expected {expected}", file.display())]
    TensorType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Types that would do.
        expected: String,
        /// The file's type.
        found: String,
    },
    /// The tensor has a zero or overflowing dimension, too many of them, or a partial block.
    #[error("`{}`: tensor `{tensor}` has shape {found}, expected {expected}", file.display())]
    TensorShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What would be accepted.
        expected: String,
        /// The file's shape.
        found: Shape,
    },
    /// The tensor's bytes do not start where the previous tensor's end.
    #[error("`{}`: tensor `{tensor}` starts at byte {found}, expected {expected}", file.display())]
    TensorOffset {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where it must start, relative to the data.
        expected: u64,
        /// Where its header says it starts.
        found: u64,
    },
    /// Type and shape need another number of bytes than the header sets aside.
    #[error("`{}`: tensor `{tensor}` has {found} bytes, expected {expected}", file.display())]
    TensorBytes {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Bytes that type and shape need.
        expected: u64,
        /// Bytes set aside.
        found: u64,
    },
    /// A tensor the model needs is not in the checkpoint.
    #[error("`{}`: tensor `{tensor}` is missing", file.display())]
    MissingTensor {
        /// The checkpoint.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// An FP8 tensor has no scales.
    #[error("`{}`: FP8 tensor `{tensor}` needs `{expected}`, which is missing", file.display())]
    MissingScale {
        /// File of the weight.
        file: PathBuf,
        /// The weight.
        tensor: String,
        /// Name of the absent scale tensor.
        expected: String,
    },
    /// Scales belong to a tensor that is not FP8.
    #[error("`{}`: `{scale}` scales `{tensor}`, which is {found}, expected fp8_e4m3", file.display())]
    UnexpectedScale {
        /// File of the weight.
        file: PathBuf,
        /// The weight.
        tensor: String,
        /// The scale tensor.
        scale: String,
        /// Type of the weight.
        found: StoredType,
    },
    /// A scale or a norm weight is NaN or infinite.
    #[error("`{}`: element {index} of tensor `{tensor}` is {found}, expected a finite number", file.display())]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// First offending element.
        index: usize,
        /// Its value.
        found: f32,
    },
    /// An index names a shard by something else than a plain file name.
    #[error("`{}`: tensor `{tensor}` is said to be in `{found}`, expected a plain file name", file.display())]
    ShardName {
        /// The index.
        file: PathBuf,
        /// A tensor assigned to it.
        tensor: String,
        /// The name.
        found: String,
    },
    /// An index names a shard that is not there.
    #[error("`{}`: shard `{expected}` (of tensor `{tensor}`) is missing", file.display())]
    MissingShard {
        /// The index.
        file: PathBuf,
        /// A tensor assigned to it.
        tensor: String,
        /// The shard's name.
        expected: String,
    },
    /// A GGUF model in several files lacks one.
    #[error(
        "`{}` is one of {count} parts, and `{expected}` is not beside it: put all parts into one folder \
         under the names they were published with", file.display()
    )]
    MissingPart {
        /// The part that was opened.
        file: PathBuf,
        /// Name of the absent one.
        expected: String,
        /// How many there are.
        count: u64,
    },
    /// An index says that a shard holds a tensor, and it does not.
    #[error("`{}`: tensor `{tensor}` is missing, `{}` says it is here", file.display(), index.display())]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The index.
        index: PathBuf,
    },
    /// A shard holds a tensor that the index does not place there.
    #[error("`{}`: tensor `{tensor}` is here, `{}` expects it in {expected}", file.display(), index.display())]
    NotInIndex {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The index.
        index: PathBuf,
        /// Where the index places it: a shard's name or "no shard".
        expected: String,
    },
    /// A rank's piece would begin or end inside a block.
    #[error(
        "`{}`: tensor `{tensor}` of {format} cannot be cut at {cut:?}: its blocks have {block_len} \
         columns", file.display()
    )]
    Cut {
        /// The file or folder.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The piece asked for.
        cut: Cut,
        /// How it is stored.
        format: Format,
        /// Columns of a block.
        block_len: usize,
    },
    /// The operator asked for rounded weights, and these cannot be rounded.
    #[error("`{}`: tensor `{tensor}` cannot be rounded to {format}", file.display())]
    Round {
        /// The file or folder.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What it should become.
        format: Format,
        /// Why not.
        #[source]
        source: RoundError,
    },
    /// A pack does not fit its manifest, or not what is asked of it.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Shape, type and bytes were checked and still make no matrix.
    #[error("`{}`: tensor `{tensor}` does not make a matrix", file.display())]
    Matrix {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Which check failed.
        #[source]
        source: MatrixError,
    },
}

/// Dimensions of a tensor, slowest first, printed as `[2, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape(pub Vec<u64>);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
