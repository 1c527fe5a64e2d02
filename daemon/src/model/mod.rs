//! Model lines, written once over [`dsd_kernels::backend::Backend`].
//!
//! A line (Llama, Qwen, DeepSeek ..) is a reading of `config.json` into a [`DecoderSpec`]; one
//! decoder runs every spec. Knows no requests, no sampling and no scheduling.
//!
//! Invariant: what a configuration asks for and this code does not do is refused by name when the
//! model is built, never guessed.

mod fields;
mod bounds;
mod rope;
pub mod spec;
/// One file per model line: configuration to [`DecoderSpec`].
mod lines;
pub mod split;
mod build;
mod tensors;
mod layers;
mod decoder;
mod workspace;
#[cfg(test)]
mod tests;

pub use build::{build, refuse_extra_tensors};
pub use decoder::{Decoder, Step};
pub use fields::ConfigError;
pub use rope::RopeSpec;
pub use spec::{DecoderSpec, spec_of};
pub use split::{RankOf, Split, SplitError};
pub use tensors::{TensorRequest, tensors};
pub use workspace::Workspace;

use crate::weights::WeightsError;

/// Why a checkpoint cannot become a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The configuration is incomplete, contradictory or asks for something unknown.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor is missing or wrong.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// It cannot be dealt to so many ranks.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The checkpoint holds tensors the architecture does not have.
    #[error(
        "{n} tensors do not belong to {architecture}, the first is `{first}`; \
         is the configuration of another model?"
    )]
    ExtraTensors {
        /// Model line.
        architecture: String,
        /// How many.
        n: usize,
        /// The alphabetically first.
        first: String,
    },
}
