//! `manifest.json`: what a pack holds, with digests of everything and of itself.
//!
//! Invariant: a manifest is believed only when its digest fits, and then its version and layout.

use std::{
    fs, io,
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use dsd_kernels::panel;
use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::{
    super::{
        error::{WeightsError, file_error},
        pread::{self, PieceError},
        source::{Cut, Role},
    },
    error::PackError,
};
use crate::runtime::file;

/// Version of manifest and files; another one is refused.
pub(crate) const LAYOUT_VERSION: u32 = 2;
/// The manifest's name in the folder of a pack.
pub(crate) const MANIFEST_NAME: &str = "manifest.json";
/// The metadata of a GGUF source, which hold its tokenizer.
pub(crate) const GGUF_NAME: &str = "metadata.gguf";
/// Bytes at which the data of every piece begins: a cache line, as panels want it.
pub(crate) const PIECE_ALIGN: u64 = panel::PANEL_ALIGN as u64;
/// Longest manifest that is read: 47,000 tensors on 8 ranks take about 100 MB.
const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Ranks of a pack at most.
const RANKS_MAX: usize = 64;

/// The facts of a pack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) layout_version: u32,
    pub(crate) cpu_layout: String,
    pub(crate) written_by: String,
    pub(crate) architecture: String,
    pub(crate) config: Value,
    pub(crate) generation_config: Option<Value>,
    pub(crate) eos_token_ids: Vec<u32>,
    /// The files that were packed.
    pub(crate) sources: Vec<SourceFile>,
    /// Files of the pack besides manifest and ranks.
    pub(crate) side_files: Vec<SideFile>,
    pub(crate) ranks: Vec<RankFile>,
}

/// A file of the checkpoint, as it was when packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// Nanoseconds since 1970; 0 where the system does not tell.
    pub(crate) modified_ns: u64,
    pub(crate) blake3: String,
}

/// A small file of the pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SideFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

/// One rank's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RankFile {
    pub(crate) bytes: u64,
    /// Length of the safetensors header, with its length field and padding.
    pub(crate) header_bytes: u64,
    pub(crate) header_blake3: String,
    pub(crate) pieces: Vec<Piece>,
}

/// A tensor's piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Piece {
    pub(crate) name: String,
    pub(crate) what: PieceKind,
    pub(crate) span: Span,
}

/// Where bytes lie in a rank's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Span {
    /// From the start of the file.
    pub(crate) offset: u64,
    /// Without padding.
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

/// What a piece is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum PieceKind {
    Matrix {
        /// Of the whole tensor.
        shape: [usize; 2],
        cut: CutJson,
        role: RoleJson,
        /// Name of the stored format.
        format: String,
        layout: LayoutJson,
        /// FP8's factors.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tile_scales: Option<ScalesJson>,
    },
    /// f32.
    Vector {
        /// Of the whole tensor.
        len: usize,
        part: [usize; 2],
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ScalesJson {
    pub(crate) tile_rows: usize,
    pub(crate) tile_cols: usize,
    pub(crate) span: Span,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CutJson {
    Whole,
    Rows([usize; 2]),
    Cols([usize; 2]),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RoleJson {
    Linear,
    Latent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LayoutJson {
    Rows,
    Panels,
}

impl From<&Cut> for CutJson {
    fn from(cut: &Cut) -> Self {
        match cut {
            Cut::Whole => Self::Whole,
            Cut::Rows(range) => Self::Rows([range.start, range.end]),
            Cut::Cols(range) => Self::Cols([range.start, range.end]),
        }
    }
}

impl From<CutJson> for Cut {
    fn from(cut: CutJson) -> Self {
        match cut {
            CutJson::Whole => Self::Whole,
            CutJson::Rows([start, end]) => Self::Rows(start..end),
            CutJson::Cols([start, end]) => Self::Cols(start..end),
        }
    }
}

impl From<Role> for RoleJson {
    fn from(role: Role) -> Self {
        match role {
            Role::Linear => Self::Linear,
            Role::Latent => Self::Latent,
        }
    }
}

impl From<RoleJson> for Role {
    fn from(role: RoleJson) -> Self {
        match role {
            RoleJson::Linear => Self::Linear,
            RoleJson::Latent => Self::Latent,
        }
    }
}

/// The file: the facts as text, and the digest of that text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    blake3: String,
    manifest: Box<RawValue>,
}

/// What is read before the rest is understood.
#[derive(Deserialize)]
struct Versions {
    layout_version: u64,
    cpu_layout: String,
}

impl Manifest {
    /// Reads and believes the manifest of the pack in `folder`.
    ///
    /// # Errors
    /// [`WeightsError`].
    pub(crate) fn read(folder: &Path) -> Result<Self, WeightsError> {
        let file = folder.join(MANIFEST_NAME);
        let bytes = file::read(&file, MANIFEST_BYTES_MAX).map_err(|e| file_error(&file, e))?;
        let bad_json = |source| WeightsError::Json {
            file: file.clone(),
            what: "manifest of a pack",
            source,
        };
        let Sealed { blake3, manifest } = serde_json::from_slice(&bytes).map_err(bad_json)?;
        let text = manifest.get();
        let found = digest(text.as_bytes());
        if found != blake3 {
            return Err(PackError::ManifestDigest {
                file,
                expected: blake3.chars().take(found.len()).collect(),
                found,
            }
            .into());
        }
        let versions: Versions = serde_json::from_str(text).map_err(bad_json)?;
        if versions.layout_version != u64::from(LAYOUT_VERSION) {
            return Err(PackError::LayoutVersion {
                file,
                expected: LAYOUT_VERSION,
                found: versions.layout_version,
            }
            .into());
        }
        if versions.cpu_layout != panel::LAYOUT_NAME {
            return Err(PackError::CpuLayout {
                file,
                expected: panel::LAYOUT_NAME,
                found: versions.cpu_layout,
            }
            .into());
        }
        let manifest: Self = serde_json::from_str(text).map_err(bad_json)?;
        match manifest.ranks.len() {
            1..=RANKS_MAX => Ok(manifest),
            n => Err(PackError::Manifest {
                file,
                what: "the number of ranks".to_owned(),
                expected: format!("1 to {RANKS_MAX}"),
                found: n.to_string(),
            }
            .into()),
        }
    }

    /// The text of the file.
    ///
    /// # Errors
    /// Never for a manifest of this program; `serde_json` cannot promise it.
    pub(crate) fn seal(&self) -> Result<Vec<u8>, serde_json::Error> {
        let manifest = serde_json::value::to_raw_value(self)?;
        let mut text = serde_json::to_vec(&Sealed {
            blake3: digest(manifest.get().as_bytes()),
            manifest,
        })?;
        text.push(b'\n');
        Ok(text)
    }
}

impl SourceFile {
    /// The file as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn of(
        path: &Path,
        on_bytes: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Option<Self>, WeightsError> {
        let Some((bytes, blake3)) = digest_of_file(path, on_bytes)? else {
            return Ok(None);
        };
        let metadata = fs::metadata(path).map_err(|source| WeightsError::Read {
            file: path.to_owned(),
            source,
        })?;
        Ok(Some(Self {
            path: path.to_owned(),
            bytes,
            modified_ns: modified_ns(&metadata),
            blake3,
        }))
    }

    /// Refuses when the file is there and another one than was packed. A moved modification time
    /// alone says nothing; then the contents are compared, up to `hash_bytes_max` of them.
    pub(super) fn check(&self, folder: &Path, hash_bytes_max: u64) -> Result<(), WeightsError> {
        let stale = |what, recorded: &dyn ToString, found: &dyn ToString| {
            Err(PackError::Stale {
                folder: folder.to_owned(),
                source_file: self.path.clone(),
                what,
                recorded: recorded.to_string(),
                found: found.to_string(),
            }
            .into())
        };
        let metadata = match fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            // The checkpoint was moved away, or this is another machine.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::NotADirectory
                        | io::ErrorKind::PermissionDenied
                ) =>
            {
                return Ok(());
            }
            Err(source) => {
                return Err(WeightsError::Read {
                    file: self.path.clone(),
                    source,
                });
            }
        };
        if metadata.len() != self.bytes {
            return stale("length", &self.bytes, &metadata.len());
        }
        if modified_ns(&metadata) == self.modified_ns || hash_bytes_max < self.bytes {
            return Ok(());
        }
        let whole = digest_of_file(&self.path, &mut |_| ControlFlow::Continue(()))?;
        let found = whole.map_or_else(String::new, |(_, digest)| digest);
        match found == self.blake3 {
            true => Ok(()),
            false => stale("blake3", &self.blake3, &found),
        }
    }
}

fn modified_ns(metadata: &fs::Metadata) -> u64 {
    metadata
        .modified()
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
        .and_then(|since| u64::try_from(since.as_nanos()).ok())
        .unwrap_or(0)
}

/// The name of a rank's file.
pub(crate) fn rank_name(rank: usize, n_ranks: usize) -> String {
    format!("rank-{rank:02}-of-{n_ranks:02}.safetensors")
}

/// Length and blake3 of a whole file, which is read and not mapped: it may be cut off meanwhile. `None`
/// when `on_bytes`, which is told of every piece, wants no more.
fn digest_of_file(
    path: &Path,
    on_bytes: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<(u64, String)>, WeightsError> {
    let source = file::open(path).map_err(|e| file_error(path, e))?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0;
    let read = pread::pieces(&source, 0..u64::MAX, &mut |piece| {
        hasher.update(piece);
        bytes += piece.len() as u64;
        match on_bytes(piece.len() as u64) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(()),
        }
    });
    match read {
        Ok(_) => Ok(Some((bytes, hasher.finalize().to_hex().to_string()))),
        Err(PieceError::Read(source)) => Err(WeightsError::Read {
            file: path.to_owned(),
            source,
        }),
        Err(PieceError::Stopped(())) => Ok(None),
    }
}

/// blake3, hexadecimal.
pub(crate) fn digest(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}
