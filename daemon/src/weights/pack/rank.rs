//! One rank's file of a pack, as a source of tensors.
//!
//! Invariant: matrices share the mapping; nothing is copied but vectors and the factors of FP8.

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use dsd_kernels::{
    dtype::Format,
    matrix::{Matrix, TileScales},
};

use super::{
    super::{
        error::{Shape, WeightsError},
        mmap::{self, MappedFile},
        pread::{self, PieceError},
        source::{Cut, Role, TensorSource},
        tensor::{StoredTensor, StoredType},
    },
    PROVE_AT_START_BYTES_MAX, check_digest, check_length,
    error::PackError,
    format_named,
    manifest::{LayoutJson, MANIFEST_NAME, PIECE_ALIGN, Piece, PieceKind, RankFile, Span},
    scales_name, spans,
};
use crate::runtime;

/// An opened file of a pack: the tensors of one rank.
#[derive(Debug)]
pub struct PackedRank {
    path: PathBuf,
    folder: PathBuf,
    source: File,
    bytes: Bytes,
    pieces: HashMap<String, Entry>,
    /// Whether tensors are hashed when they are taken.
    proves: bool,
}

/// A tensor that is not what was packed.
pub(super) struct Damage {
    pub(super) expected: String,
    pub(super) found: String,
}

#[derive(Debug)]
struct Entry {
    piece: Piece,
    claimed: AtomicBool,
}

impl PackedRank {
    /// Maps the file and holds length, header and places against the manifest's `file`.
    pub(super) fn open(path: &Path, folder: &Path, file: &RankFile) -> Result<Self, WeightsError> {
        let MappedFile {
            file: source,
            mapping: bytes,
        } = mmap::map_file(path)?;
        mmap::prefer_huge(&bytes);
        check_length(path, bytes.len() as u64, file.bytes)?;
        let misplaced = |what: String, expected: String, found: u64| {
            WeightsError::from(PackError::Manifest {
                file: folder.join(MANIFEST_NAME),
                what,
                expected,
                found: found.to_string(),
            })
        };
        let header_len = usize::try_from(file.header_bytes).unwrap_or(usize::MAX);
        if bytes.len() < header_len {
            let expected = format!("at most {}", file.bytes);
            let what = format!("the header length of `{}`", path.display());
            return Err(misplaced(what, expected, file.header_bytes));
        }
        let mut header = vec![0; header_len];
        let n_read = runtime::file::read_at(&source, &mut header, 0).map_err(|source| {
            WeightsError::Read {
                file: path.to_owned(),
                source,
            }
        })?;
        check_digest(
            path,
            || "the header".to_owned(),
            &header[..n_read],
            &file.header_blake3,
        )?;
        for (name, Span { offset, bytes, .. }) in spans(file) {
            let end = offset.checked_add(*bytes);
            let inside = file.header_bytes <= *offset && end.is_some_and(|end| end <= file.bytes);
            if !inside || !offset.is_multiple_of(PIECE_ALIGN) {
                return Err(misplaced(
                    format!("the place of `{name}` ({bytes} bytes)"),
                    format!(
                        "a multiple of {PIECE_ALIGN} from {} to {}",
                        file.header_bytes, file.bytes
                    ),
                    *offset,
                ));
            }
        }
        let mut pieces = HashMap::with_capacity(file.pieces.len());
        for piece in &file.pieces {
            let entry = Entry {
                piece: piece.clone(),
                claimed: AtomicBool::new(false),
            };
            if pieces.insert(piece.name.clone(), entry).is_some() {
                return Err(WeightsError::DuplicateTensor {
                    file: path.to_owned(),
                    tensor: piece.name.clone(),
                    first: path.to_owned(),
                });
            }
        }
        Ok(Self {
            path: path.to_owned(),
            folder: folder.to_owned(),
            source,
            bytes,
            pieces,
            proves: file.bytes <= PROVE_AT_START_BYTES_MAX,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of its matrices and vectors.
    pub fn tensor_bytes(&self) -> u64 {
        self.pieces.values().map(|e| e.piece.span.bytes).sum()
    }

    /// Names of the tensors that nothing took, sorted.
    pub fn unclaimed(&self) -> Vec<String> {
        let left = self.pieces.values();
        let mut names = left
            .filter(|entry| !entry.claimed.load(Ordering::Relaxed))
            .map(|entry| entry.piece.name.clone())
            .collect::<Vec<_>>();
        names.sort();
        names
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.pieces.contains_key(name)
    }

    /// The whole mapping.
    pub(super) fn mapping(&self) -> &Bytes {
        &self.bytes
    }

    /// Reads a span and returns its digest, and what is wrong with it. `each` is told the length of
    /// every piece read and may stop the reading.
    ///
    /// # Errors
    /// What `each` stopped with.
    pub(super) fn look_at<S>(
        &self,
        span: &Span,
        each: &mut dyn FnMut(usize) -> Result<(), S>,
    ) -> Result<(String, Option<Damage>), S> {
        let mut hasher = blake3::Hasher::new();
        let range = span.offset..span.offset.saturating_add(span.bytes);
        let read = pread::pieces(&self.source, range, &mut |piece| {
            hasher.update(piece);
            each(piece.len())
        });
        let digest = hasher.finalize().to_hex().to_string();
        let expected = format!("blake3 {}", span.blake3);
        let damage = match read {
            Err(PieceError::Stopped(stop)) => return Err(stop),
            Err(PieceError::Read(e)) => Some(Damage {
                expected,
                found: format!("cannot be read: {e}"),
            }),
            Ok(n_bytes) if n_bytes < span.bytes => Some(Damage {
                expected: format!("{} bytes", span.bytes),
                found: format!("{n_bytes} bytes, then the file ends"),
            }),
            Ok(_) if digest != span.blake3 => Some(Damage {
                expected,
                found: format!("blake3 {digest}"),
            }),
            Ok(_) => None,
        };
        Ok((digest, damage))
    }

    /// The bytes of a span, which [`Self::open`] found to lie inside.
    fn bytes_of(&self, span: &Span) -> Bytes {
        // Both are offsets in a mapping, so they fit.
        let start = span.offset as usize;
        self.bytes.slice(start..start + span.bytes as usize)
    }

    fn claim(&self, name: &str) -> Result<&Piece, WeightsError> {
        let Some(entry) = self.pieces.get(name) else {
            return Err(WeightsError::MissingTensor {
                file: self.path.clone(),
                tensor: name.to_owned(),
            });
        };
        entry.claimed.store(true, Ordering::Relaxed);
        Ok(&entry.piece)
    }

    fn proven(&self, name: &str, span: &Span) -> Result<Bytes, WeightsError> {
        let bytes = self.bytes_of(span);
        if self.proves {
            check_digest(
                &self.path,
                || format!("tensor `{name}`"),
                &bytes,
                &span.blake3,
            )?;
        }
        Ok(bytes)
    }

    fn floats(&self, name: &str, span: &Span) -> Result<Vec<f32>, WeightsError> {
        let data = self.proven(name, span)?;
        let tensor = StoredTensor {
            file: self.path.as_path().into(),
            name: name.to_owned(),
            stored_type: StoredType::Weights(Format::F32),
            shape: vec![data.len() / size_of::<f32>()],
            data,
        };
        tensor.to_f32()
    }

    fn wrong_shape(&self, name: &str, expected: &[usize], found: &[usize]) -> WeightsError {
        WeightsError::TensorShape {
            file: self.path.clone(),
            tensor: name.to_owned(),
            expected: format!("{expected:?}"),
            found: Shape(found.iter().map(|n| *n as u64).collect()),
        }
    }
}

impl TensorSource for PackedRank {
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
    ) -> Result<Matrix, WeightsError> {
        let piece = self.claim(name)?;
        let PieceKind::Matrix {
            shape: packed_shape,
            cut: packed_cut,
            role: packed_role,
            format,
            layout,
            tile_scales,
        } = &piece.what
        else {
            return Err(self.wrong_shape(name, &shape, &[piece.span.bytes as usize / 4]));
        };
        if *packed_shape != shape {
            return Err(self.wrong_shape(name, &shape, packed_shape));
        }
        let (packed_cut, packed_role) = (Cut::from(*packed_cut), Role::from(*packed_role));
        if (&packed_cut, packed_role) != (cut, role) {
            return Err(PackError::OtherPiece {
                file: self.path.clone(),
                tensor: name.to_owned(),
                packed_cut,
                asked_cut: cut.clone(),
                packed_role,
                asked_role: role,
            }
            .into());
        }
        let [n_rows, n_cols] = cut.shape_of(shape);
        let format = format_named(&self.folder, format)?;
        let tile_scales = match tile_scales {
            None => None,
            Some(scales) => Some(TileScales {
                tile_rows: scales.tile_rows,
                tile_cols: scales.tile_cols,
                values: self.floats(&scales_name(name), &scales.span)?,
            }),
        };
        let data = self.proven(name, &piece.span)?;
        match layout {
            LayoutJson::Panels => Matrix::from_panels(format, n_rows, n_cols, data),
            LayoutJson::Rows => Matrix::new(format, n_rows, n_cols, data, tile_scales),
        }
        .map_err(|source| WeightsError::Matrix {
            file: self.path.clone(),
            tensor: name.to_owned(),
            source,
        })
    }

    fn vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        let piece = self.claim(name)?;
        match &piece.what {
            PieceKind::Vector {
                len: packed_len,
                part: [start, end],
            } if *packed_len == len && (*start..*end) == part => {
                let values = self.floats(name, &piece.span)?;
                match values.len() == part.len() {
                    true => Ok(values),
                    false => Err(self.wrong_shape(name, &[part.len()], &[values.len()])),
                }
            }
            PieceKind::Vector {
                len: packed_len,
                part: [start, end],
            } if *packed_len == len => Err(PackError::OtherPiece {
                file: self.path.clone(),
                tensor: name.to_owned(),
                packed_cut: Cut::Rows(*start..*end),
                asked_cut: Cut::Rows(part),
                packed_role: Role::Linear,
                asked_role: Role::Linear,
            }
            .into()),
            PieceKind::Vector { len: found, .. } => Err(self.wrong_shape(name, &[len], &[*found])),
            PieceKind::Matrix { shape, .. } => Err(self.wrong_shape(name, &[len], shape)),
        }
    }

    fn skip(&self, _name: &str, _shape: [usize; 2]) -> Result<(), WeightsError> {
        // A pack holds pieces only; there is none of this.
        Ok(())
    }

    fn contains(&self, name: &str) -> bool {
        self.has(name)
    }

    fn format(&self, name: &str) -> Option<Format> {
        match &self.pieces.get(name)?.piece.what {
            PieceKind::Matrix { format, .. } => format_named(&self.folder, format).ok(),
            PieceKind::Vector { .. } => None,
        }
    }
}
