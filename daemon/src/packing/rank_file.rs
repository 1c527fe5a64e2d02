//! Writes one rank's file: a safetensors file of byte tensors whose data begin at cache lines, in the
//! order in which they are asked for.
//!
//! Room for the header is left in front and filled last, so that every tensor is taken, laid out and
//! written once.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    num::NonZero,
    ops::Range,
    path::{Path, PathBuf},
    thread,
};

use dsd_kernels::{
    matrix::{Layout, Matrix},
    panel::{self, PANEL_ROWS},
};
use serde_json::{Map, json};

use super::{PackingError, place::refused};
use crate::{
    model::TensorRequest,
    weights::{
        Cut, Role,
        pack::{
            manifest::{
                LAYOUT_VERSION, LayoutJson, PIECE_ALIGN, Piece, PieceKind, RankFile, ScalesJson,
                Span, digest,
            },
            scales_name,
        },
    },
};

/// Bytes of a header entry besides its name: braces, keys, and three numbers of up to 20 digits.
const ENTRY_BYTES: usize = 160;
/// Bytes of the header's own metadata.
const METADATA_BYTES: usize = 512;
/// Bytes that are laid out, written and reported at a time.
const CHUNK_BYTES: usize = 32 << 20;
/// Bytes of a write, at a multiple of themselves: the system then caches the file in pages as large
/// as it has, and readers map those (all of 92 MB in pages of 2 MiB here; as the tensors come, 24 MB).
const WRITE_BYTES: usize = 8 << 20;
/// Bytes after which the disk is waited for, so that progress is what is on it.
const SYNC_BYTES: u64 = 256 << 20;

/// Who is told how many bytes more were written, and may end the writing.
pub(super) type OnBytes<'a> = &'a mut dyn FnMut(u64) -> Result<(), PackingError>;

pub(super) struct RankWriter {
    path: PathBuf,
    file: File,
    header_bytes: u64,
    /// Where the next byte goes.
    at: u64,
    /// Bytes in front of `at` that are not written yet.
    staged: Vec<u8>,
    synced_at: u64,
    /// Name, start and end of every tensor of the file.
    entries: Vec<(String, u64, u64)>,
    pieces: Vec<Piece>,
    buffer: Vec<u8>,
}

impl RankWriter {
    /// Makes the file, with room for a header that names the tensors of `requests`.
    pub(super) fn create(path: &Path, requests: &[TensorRequest]) -> Result<Self, PackingError> {
        let entry = |request: &TensorRequest| {
            let (TensorRequest::Matrix { name, .. } | TensorRequest::Vector { name, .. }) = request;
            // A matrix may have a tensor of scales.
            name.len() + scales_name(name).len() + 2 * ENTRY_BYTES
        };
        let header = METADATA_BYTES + requests.iter().map(entry).sum::<usize>();
        let header_bytes = (header as u64).next_multiple_of(PIECE_ALIGN);
        Ok(Self {
            path: path.to_owned(),
            file: File::create_new(path).map_err(|e| refused(path, e))?,
            header_bytes,
            at: header_bytes,
            staged: vec![0; header_bytes as usize],
            synced_at: 0,
            entries: Vec::new(),
            pieces: Vec::new(),
            buffer: Vec::new(),
        })
    }

    /// Appends a piece of a matrix, in panels where its role and format have them.
    pub(super) fn matrix(
        &mut self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
        matrix: &Matrix,
        on_bytes: OnBytes<'_>,
    ) -> Result<(), PackingError> {
        let (format, n_rows, n_cols) = (matrix.format(), matrix.n_rows(), matrix.n_cols());
        let panels = match (role, matrix.layout()) {
            (Role::Linear, Layout::Rows) => panel::bytes(format, n_rows, n_cols),
            (Role::Latent, Layout::Rows) | (_, Layout::Panels) => None,
        };
        let span = match panels {
            Some(len) => self.panels(name, matrix, len, on_bytes)?,
            None => self.bytes(name, matrix.data(), on_bytes)?,
        };
        let layout = match (panels, matrix.layout()) {
            (Some(_), _) | (None, Layout::Panels) => LayoutJson::Panels,
            (None, Layout::Rows) => LayoutJson::Rows,
        };
        let tile_scales = match matrix.tile_scales() {
            None => None,
            // Panels hold the factors of their rows.
            Some(_) if panels.is_some() => None,
            Some(scales) => Some(ScalesJson {
                tile_rows: scales.tile_rows,
                tile_cols: scales.tile_cols,
                span: self.floats(&scales_name(name), &scales.values, on_bytes)?,
            }),
        };
        self.pieces.push(Piece {
            name: name.to_owned(),
            what: PieceKind::Matrix {
                shape,
                cut: cut.into(),
                role: role.into(),
                format: format.name().to_owned(),
                layout,
                tile_scales,
            },
            span,
        });
        Ok(())
    }

    /// Appends a piece of a vector.
    pub(super) fn vector(
        &mut self,
        name: &str,
        len: usize,
        part: Range<usize>,
        values: &[f32],
        on_bytes: OnBytes<'_>,
    ) -> Result<(), PackingError> {
        let span = self.floats(name, values, on_bytes)?;
        self.pieces.push(Piece {
            name: name.to_owned(),
            what: PieceKind::Vector {
                len,
                part: [part.start, part.end],
            },
            span,
        });
        Ok(())
    }

    /// Writes the header and waits until all is on disk.
    pub(super) fn finish(mut self, rank: usize) -> Result<RankFile, PackingError> {
        let metadata = json!({
            "format": "dsd pack",
            "layout_version": LAYOUT_VERSION.to_string(),
            "rank": rank.to_string(),
        });
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), metadata);
        for (name, start, end) in &self.entries {
            let entry = json!({
                "dtype": "U8",
                "shape": [end - start],
                "data_offsets": [start - self.header_bytes, end - self.header_bytes],
            });
            header.insert(name.clone(), entry);
        }
        assert_eq!(
            header.len(),
            self.entries.len() + 1,
            "a model asks once for a tensor"
        );
        let text = serde_json::Value::Object(header).to_string();
        let room = self.header_bytes as usize - size_of::<u64>();
        assert!(
            text.len() <= room,
            "names of tensors are printed as they are: {} bytes of {room}",
            text.len()
        );
        let mut bytes = (room as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(self.header_bytes as usize, b' ');
        let mut write = || {
            self.file.write_all(&self.staged)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(&bytes)?;
            self.file.sync_all()
        };
        write().map_err(|e| refused(&self.path, e))?;
        Ok(RankFile {
            bytes: self.at,
            header_bytes: self.header_bytes,
            header_blake3: digest(&bytes),
            pieces: self.pieces,
        })
    }

    fn floats(
        &mut self,
        name: &str,
        values: &[f32],
        on_bytes: OnBytes<'_>,
    ) -> Result<Span, PackingError> {
        let bytes = values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>();
        self.bytes(name, &bytes, on_bytes)
    }

    fn bytes(
        &mut self,
        name: &str,
        bytes: &[u8],
        on_bytes: OnBytes<'_>,
    ) -> Result<Span, PackingError> {
        let mut tensor = self.begin();
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.append(&mut tensor, chunk, on_bytes)?;
        }
        self.end(name, &tensor)
    }

    /// Lays the matrix out in panels of `len` bytes together, a chunk at a time.
    fn panels(
        &mut self,
        name: &str,
        matrix: &Matrix,
        len: usize,
        on_bytes: OnBytes<'_>,
    ) -> Result<Span, PackingError> {
        let n_panels = matrix.n_rows().div_ceil(PANEL_ROWS);
        let panel_len = len / n_panels.max(1);
        let per_chunk = (CHUNK_BYTES / panel_len.max(1)).max(1);
        let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
        let mut tensor = self.begin();
        let mut buffer = std::mem::take(&mut self.buffer);
        for first in (0..n_panels).step_by(per_chunk) {
            let n = per_chunk.min(n_panels - first);
            buffer.resize(n * panel_len, 0);
            let per_thread = n.div_ceil(n_threads);
            thread::scope(|scope| {
                let parts = buffer.chunks_mut(per_thread * panel_len);
                for (part, out) in parts.enumerate() {
                    scope.spawn(move || {
                        let first = first + part * per_thread;
                        for (i, out) in out.chunks_mut(panel_len).enumerate() {
                            panel::pack(matrix, first + i, out);
                        }
                    });
                }
            });
            self.append(&mut tensor, &buffer, on_bytes)?;
        }
        self.buffer = buffer;
        self.end(name, &tensor)
    }

    fn begin(&self) -> Tensor {
        Tensor {
            start: self.at,
            hasher: blake3::Hasher::new(),
        }
    }

    fn append(
        &mut self,
        tensor: &mut Tensor,
        bytes: &[u8],
        on_bytes: OnBytes<'_>,
    ) -> Result<(), PackingError> {
        tensor.hasher.update(bytes);
        self.write(bytes)?;
        on_bytes(bytes.len() as u64)
    }

    fn end(&mut self, name: &str, tensor: &Tensor) -> Result<Span, PackingError> {
        let span = Span {
            offset: tensor.start,
            bytes: self.at - tensor.start,
            blake3: tensor.hasher.finalize().to_hex().to_string(),
        };
        let padding = self.at.next_multiple_of(PIECE_ALIGN) - self.at;
        self.write(&[0; PIECE_ALIGN as usize][..padding as usize])?;
        self.entries.push((name.to_owned(), tensor.start, self.at));
        Ok(span)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), PackingError> {
        let mut write = || {
            self.at += bytes.len() as u64;
            self.staged.extend_from_slice(bytes);
            let whole = self.staged.len() / WRITE_BYTES * WRITE_BYTES;
            for piece in self.staged[..whole].chunks(WRITE_BYTES) {
                self.file.write_all(piece)?;
            }
            self.staged.drain(..whole);
            if self.synced_at + SYNC_BYTES <= self.at {
                self.synced_at = self.at;
                self.file.sync_data()?;
            }
            Ok(())
        };
        write().map_err(|e| refused(&self.path, e))
    }
}

/// A tensor being written.
struct Tensor {
    start: u64,
    hasher: blake3::Hasher,
}
