//! Packs: a checkpoint cut for the ranks of a group and laid out for the kernels, one file per rank,
//! mapped and used as it is.
//!
//! Knows the files of a pack; which tensors a rank needs is the writer's business (`packing`).
//!
//! Invariant: nothing of a pack is used before it was held against the manifest: the manifest's own
//! digest, every file's length, every header and side file when the pack is opened; the tensors when
//! they are taken, or where that would make the start slow, by the [`PackKeeper`] right after it.

mod error;
pub(crate) mod manifest;
mod keeper;
mod rank;

pub use error::PackError;
pub use keeper::{DamagedTensor, KeeperConfig, PackHealth, PackKeeper};
use rank::Damage;
pub use rank::PackedRank;

use std::{
    collections::HashMap,
    convert::Infallible,
    path::{Path, PathBuf},
};

use dsd_kernels::dtype::Format;

use self::manifest::{
    MANIFEST_NAME, Manifest, PieceKind, RankFile, SideFile, Span, digest, rank_name,
};
use super::{
    error::{WeightsError, file_error},
    verify::{Finding, TensorDigest, VerifyProgress},
};
use crate::runtime::file::{self, FileError};

/// Bytes of a rank's file, and of a source file, that are hashed at start: about 0.1 s of one core.
/// Beyond it tensors are hashed in the background.
const PROVE_AT_START_BYTES_MAX: u64 = 256 << 20;

/// Longest side file; the largest real ones are tokenizers of about 20 MB.
const SIDE_BYTES_MAX: u64 = 1 << 30;

/// An opened pack.
#[derive(Debug)]
pub struct Pack {
    folder: PathBuf,
    manifest: Manifest,
    /// How matrices are stored, by name.
    formats: HashMap<String, Format>,
    ranks: Vec<PackedRank>,
}

/// True for a folder with a manifest.
pub(crate) fn is_pack(folder: &Path) -> bool {
    folder.join(MANIFEST_NAME).is_file()
}

impl Pack {
    /// Opens the pack in `folder`, maps its files and holds everything but the tensors' bytes
    /// against the manifest.
    ///
    /// # Errors
    /// [`WeightsError`].
    pub(super) fn open(folder: &Path) -> Result<Self, WeightsError> {
        let manifest = Manifest::read(folder)?;
        for file in &manifest.side_files {
            check_side_file(folder, file)?;
        }
        let n_ranks = manifest.ranks.len();
        let ranks = manifest.ranks.iter().enumerate();
        let ranks = ranks
            .map(|(rank, file)| {
                let path = folder.join(rank_name(rank, n_ranks));
                PackedRank::open(&path, folder, file)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut formats = HashMap::new();
        for piece in manifest.ranks.iter().flat_map(|rank| &rank.pieces) {
            if let PieceKind::Matrix { format, .. } = &piece.what {
                formats.insert(piece.name.clone(), format_named(folder, format)?);
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            formats,
            ranks,
        })
    }

    /// Refuses a pack whose checkpoint is there and has changed.
    pub(super) fn refuse_stale(&self) -> Result<(), WeightsError> {
        let mut sources = self.manifest.sources.iter();
        sources.try_for_each(|source| source.check(&self.folder, PROVE_AT_START_BYTES_MAX))
    }

    /// Rank `rank`'s part.
    ///
    /// # Errors
    /// [`PackError::RankCount`] for a group of another size.
    pub fn rank(&self, rank: usize, n_ranks: usize) -> Result<&PackedRank, WeightsError> {
        match self.ranks.get(rank) {
            Some(part) if n_ranks == self.ranks.len() => Ok(part),
            _ => Err(PackError::RankCount {
                folder: self.folder.clone(),
                packed: self.ranks.len(),
                asked: n_ranks,
            }
            .into()),
        }
    }

    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.ranks.first().is_some_and(|rank| rank.has(name))
    }

    pub(super) fn format(&self, name: &str) -> Option<Format> {
        self.formats.get(name).copied()
    }

    /// Rank files and their lengths.
    pub(super) fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        let lengths = self.manifest.ranks.iter().map(|rank| rank.bytes);
        self.ranks.iter().map(PackedRank::path).zip(lengths)
    }
}

fn check_side_file(folder: &Path, side_file: &SideFile) -> Result<(), WeightsError> {
    let path = folder.join(&side_file.name);
    // One byte more than expected, so that a longer one is told by its length.
    let len_max = side_file.bytes.min(SIDE_BYTES_MAX).saturating_add(1);
    let bytes = match file::read(&path, len_max) {
        Ok(bytes) => bytes,
        Err(FileError::TooLong { found, .. }) => {
            return check_length(&path, found, side_file.bytes);
        }
        Err(e) => return Err(file_error(&path, e)),
    };
    check_length(&path, bytes.len() as u64, side_file.bytes)?;
    check_digest(&path, || "the file".to_owned(), &bytes, &side_file.blake3)
}

fn check_length(file: &Path, found: u64, expected: u64) -> Result<(), WeightsError> {
    match found == expected {
        true => Ok(()),
        false => Err(PackError::FileLength {
            file: file.to_owned(),
            expected,
            found,
        }
        .into()),
    }
}

fn check_digest(
    file: &Path,
    part: impl FnOnce() -> String,
    bytes: &[u8],
    expected: &str,
) -> Result<(), WeightsError> {
    let found = digest(bytes);
    match found == expected {
        true => Ok(()),
        false => Err(PackError::Damaged {
            file: file.to_owned(),
            part: part(),
            expected: expected.chars().take(found.len()).collect(),
            found,
        }
        .into()),
    }
}

fn format_named(folder: &Path, name: &str) -> Result<Format, WeightsError> {
    let mut formats = Format::ALL.into_iter();
    formats.find(|format| format.name() == name).ok_or_else(|| {
        let names = Format::ALL.map(Format::name);
        PackError::Manifest {
            file: folder.join(MANIFEST_NAME),
            what: "a format".to_owned(),
            expected: format!("one of {}", names.join(", ")),
            found: format!("`{}`", name.chars().take(64).collect::<String>()),
        }
        .into()
    })
}

/// Every span of a rank's file with the name it goes by.
fn spans(rank: &RankFile) -> impl Iterator<Item = (String, &Span)> {
    rank.pieces.iter().flat_map(|piece| {
        let scales = match &piece.what {
            PieceKind::Matrix {
                tile_scales: Some(scales),
                ..
            } => Some((scales_name(&piece.name), &scales.span)),
            PieceKind::Matrix { .. } | PieceKind::Vector { .. } => None,
        };
        std::iter::once((piece.name.clone(), &piece.span)).chain(scales)
    })
}

/// What the factors of an FP8 matrix are called in a rank's file.
pub(crate) fn scales_name(matrix: &str) -> String {
    format!("{matrix}#tile_scales")
}

/// Reads every byte of the pack in `folder`: the tensors' digests, and what is wrong.
///
/// # Errors
/// [`WeightsError`] when it cannot be opened at all.
pub(super) fn verify(
    folder: &Path,
    on_progress: &mut dyn FnMut(VerifyProgress),
) -> Result<(Vec<TensorDigest>, Vec<Finding>), WeightsError> {
    let pack = Pack::open(folder)?;
    let mut findings = Vec::new();
    for source in &pack.manifest.sources {
        if let Err(e) = source.check(folder, u64::MAX) {
            findings.push(Finding {
                file: source.path.clone(),
                tensor: "(the file that was packed)".to_owned(),
                expected: format!("blake3 {}", source.blake3),
                found: e.to_string(),
            });
        }
    }
    let all = pack.manifest.ranks.iter().flat_map(spans);
    let (n_tensors, bytes) = all.fold((0, 0), |(n, bytes), (_, s)| (n + 1, bytes + s.bytes));
    let mut bytes_done = 0;
    let mut tensors = Vec::new();
    for (rank, file) in pack.ranks.iter().zip(&pack.manifest.ranks) {
        for (name, span) in spans(file) {
            let (digest, damage) = match rank.look_at(span, &mut |_| Ok::<(), Infallible>(())) {
                Ok(seen) => seen,
                Err(never) => match never {},
            };
            if let Some(Damage { expected, found }) = damage {
                findings.push(Finding {
                    file: rank.path().to_owned(),
                    tensor: name.clone(),
                    expected,
                    found,
                });
            }
            tensors.push(TensorDigest {
                file: rank.path().to_owned(),
                name,
                stored_type: "packed".to_owned(),
                shape: vec![span.bytes as usize],
                bytes: span.bytes,
                digest,
            });
            bytes_done += span.bytes;
            on_progress(VerifyProgress {
                n_tensors_done: tensors.len(),
                n_tensors,
                bytes_done,
                bytes,
            });
        }
    }
    Ok((tensors, findings))
}
