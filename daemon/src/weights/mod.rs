//! Checkpoints by mmap: safetensors, GGUF and packs, checked before use.
//!
//! Knows files, tensor names, shapes and stored formats; knows no model and no arithmetic beyond
//! decoding small vectors.
//!
//! Invariant: a tensor is handed out only after every length, offset and shape in its file was
//! found to agree with the file's size; no byte count from a file is used unchecked.
//! Invariant: weight bytes are never copied; a matrix shares the mapping of its file.
//!
//! `model` reads tensors, `text` reads the tokenizer's side of a checkpoint, `admin` verifies.

pub mod checkpoint;
pub mod source;
pub mod pack;
pub mod verify;
mod error;
mod folder;
mod foreign;
pub(crate) mod side_file;
mod pread;
mod gguf;
mod int4;
mod packed;
mod gguf_config;
mod gguf_names;
mod gguf_split;
mod quantization;
mod safetensors;
mod tensor;
#[expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; nothing else here is"
)]
mod mmap;
#[cfg(test)]
pub(crate) mod tests;

pub use checkpoint::Checkpoint;
pub use error::WeightsError;
pub(crate) use gguf::metadata_only as gguf_metadata_only;
pub use gguf::{GgufMetadata, GgufValue};
pub(crate) use gguf_split::PartName;
pub(crate) use pack::is_pack;
pub use pack::{DamagedTensor, KeeperConfig, Pack, PackError, PackHealth, PackKeeper};
pub use source::{Cut, RankTensors, Role, TensorSource};
pub use tensor::StoredType;
pub use verify::{Digests, Finding, TensorDigest, VerifyProgress, VerifyReport, verify};
