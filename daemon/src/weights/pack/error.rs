//! Why a pack is not used: always what it was made for against what is here.

use std::path::PathBuf;

use super::super::source::{Cut, Role};

/// Why a pack, or one piece of it, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The manifest is not the one that was written.
    #[error(
        "`{}` was edited or damaged: its blake3 is {found}, expected {expected}; pack the checkpoint \
         again", file.display()
    )]
    ManifestDigest {
        /// The manifest.
        file: PathBuf,
        /// As the manifest says.
        expected: String,
        /// Of what it holds.
        found: String,
    },
    /// Written by another version of the format.
    #[error(
        "`{}` has layout version {found}, this build reads {expected}; pack the checkpoint again",
        file.display()
    )]
    LayoutVersion {
        /// The manifest.
        file: PathBuf,
        /// Of this build.
        expected: u32,
        /// Of the pack.
        found: u64,
    },
    /// The bytes are ordered for other kernels.
    #[error(
        "`{}` is laid out for `{found}`, the kernels of this build read `{expected}`; pack the \
         checkpoint again", file.display()
    )]
    CpuLayout {
        /// The manifest.
        file: PathBuf,
        /// Of this build.
        expected: &'static str,
        /// Of the pack.
        found: String,
    },
    /// Packed for another number of ranks.
    #[error(
        "`{}` is packed for {packed} ranks, {asked} are asked for; use --tp {packed}, or pack the \
         checkpoint for {asked}", folder.display()
    )]
    RankCount {
        /// The pack.
        folder: PathBuf,
        /// Ranks it was made for.
        packed: usize,
        /// Ranks of the group.
        asked: usize,
    },
    /// A file of the checkpoint changed after it was packed.
    #[error(
        "`{}` is stale: `{}` has {what} {found}, it had {recorded} when it was packed; pack the \
         checkpoint again, or move it away to serve the pack as it is",
        folder.display(), source_file.display()
    )]
    Stale {
        /// The pack.
        folder: PathBuf,
        /// The file of the checkpoint.
        source_file: PathBuf,
        /// `length` or `blake3`.
        what: &'static str,
        /// When packed.
        recorded: String,
        /// Now.
        found: String,
    },
    /// A file is shorter or longer than the manifest says.
    #[error(
        "`{}` is {found} bytes long, the manifest of its pack says {expected}; was it truncated?",
        file.display()
    )]
    FileLength {
        /// The file.
        file: PathBuf,
        /// In the manifest.
        expected: u64,
        /// On disk.
        found: u64,
    },
    /// Bytes are not those that were written.
    #[error(
        "`{}`: {part} is damaged: its blake3 is {found}, expected {expected}; pack the checkpoint \
         again", file.display()
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// ``tensor `NAME` ``, or the part that is not a tensor.
        part: String,
        /// In the manifest.
        expected: String,
        /// Of the bytes.
        found: String,
    },
    /// The manifest contradicts itself.
    #[error("`{}`: {what} is {found}, expected {expected}", file.display())]
    Manifest {
        /// The manifest.
        file: PathBuf,
        /// Which of its facts.
        what: String,
        /// What would fit.
        expected: String,
        /// What it says.
        found: String,
    },
    /// Another piece is asked for than was packed.
    #[error(
        "`{}` holds {packed_cut:?} of tensor `{tensor}` as {packed_role:?}, this build asks for \
         {asked_cut:?} as {asked_role:?}; pack the checkpoint again", file.display()
    )]
    OtherPiece {
        /// The rank's file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The piece there is.
        packed_cut: Cut,
        /// The piece that is asked for.
        asked_cut: Cut,
        /// What it was laid out for.
        packed_role: Role,
        /// What it is asked for.
        asked_role: Role,
    },
    /// A pack is asked for what only a checkpoint has.
    #[error("`{}` is a pack already; pack the checkpoint it was made from", folder.display())]
    NotACheckpoint {
        /// The pack.
        folder: PathBuf,
    },
}
