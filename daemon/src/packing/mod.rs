//! Writes packs: asks a checkpoint for exactly what every rank of a group will ask for, lays it out
//! for the kernels, and describes it in a manifest.
//!
//! Knows no layout of a file (`weights::pack` reads what this writes).
//!
//! Invariant: a pack appears under its name when all of it is on disk, and never before.
//!
//! Called by `dsd pack`.

mod place;
mod rank_file;
#[cfg(test)]
mod tests;

use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use self::{
    place::Place,
    rank_file::{OnBytes, RankWriter},
};
use crate::{
    model::{self, ModelError, RankOf, Split, TensorRequest},
    runner::WeightBytes,
    text,
    weights::{
        Checkpoint, PackError, TensorSource, WeightsError, gguf_metadata_only,
        pack::manifest::{
            GGUF_NAME, LAYOUT_VERSION, MANIFEST_NAME, Manifest, RankFile, SideFile, SourceFile,
            digest, rank_name,
        },
        side_file::read_side_file,
    },
};

/// Why a pack was not written. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum PackingError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// It is no model of ours, or cannot be dealt to so many ranks.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// There is something under the pack's name.
    #[error("`{}` exists already; remove it or choose another with --out", path.display())]
    Exists {
        /// The pack's folder.
        path: PathBuf,
    },
    /// The path ends in no name.
    #[error("`{}` cannot name a folder; choose another with --out", path.display())]
    Name {
        /// As given.
        path: PathBuf,
    },
    /// Somebody else writes a pack of that name.
    #[error("another dsd writes into `{}`", folder.display())]
    Busy {
        /// Its temporary folder.
        folder: PathBuf,
    },
    /// The disk is too full to begin.
    #[error("the pack needs {needed} bytes, `{}` has {free} free", folder.display())]
    Space {
        /// Folder of the pack.
        folder: PathBuf,
        /// Bytes of the pack.
        needed: u64,
        /// Bytes that can be written.
        free: u64,
    },
    /// Whoever is told of progress wanted no more.
    #[error("interrupted; nothing is left of the pack")]
    Interrupted,
    /// The system refused a write: most often, the disk is full.
    #[error("cannot write `{}`", file.display())]
    Write {
        /// The file or folder.
        file: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// How far the writing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackingProgress {
    /// What is being done.
    pub stage: &'static str,
    /// Bytes done in this stage.
    pub bytes_done: u64,
    /// Bytes of this stage.
    pub bytes: u64,
}

/// Who is told of progress, a few times a second, and says whether to go on.
pub type OnProgress<'a> = &'a mut dyn FnMut(PackingProgress) -> ControlFlow<()>;

/// Tells of progress.
fn tell(on_progress: OnProgress<'_>, progress: PackingProgress) -> Result<(), PackingError> {
    match on_progress(progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(PackingError::Interrupted),
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackingReport {
    /// The pack.
    pub path: PathBuf,
    /// Files of ranks.
    pub n_ranks: usize,
    /// Pieces of tensors in all of them.
    pub n_pieces: usize,
    /// Bytes of the ranks' files.
    pub bytes: u64,
    /// Bytes of the files that were packed.
    pub source_bytes: u64,
}

/// Packs the checkpoint at `model` for a group of `n_ranks` into the new folder `out`.
///
/// # Errors
/// [`PackingError`]; nothing is left behind.
pub fn pack(
    model: &Path,
    n_ranks: usize,
    out: &Path,
    on_progress: OnProgress<'_>,
) -> Result<PackingReport, PackingError> {
    let model = model.canonicalize().map_err(|source| WeightsError::Read {
        file: model.to_owned(),
        source,
    })?;
    let checkpoint = Checkpoint::open(&model)?;
    if checkpoint.pack().is_some() {
        return Err(WeightsError::from(PackError::NotACheckpoint { folder: model }).into());
    }
    let wanted = requests(&checkpoint, n_ranks)?;
    let place = Place::take(out)?;
    let side_files = side_files(&checkpoint)?;
    let packed_bytes = wanted.iter().map(|r| bytes_of(r, &checkpoint)).sum();
    let beside = side_files.iter().map(|f| f.bytes.len() as u64).sum::<u64>();
    place.refuse_if_full(packed_bytes + beside)?;

    let sources = source_files(&checkpoint, &side_files, on_progress)?;
    for file in &side_files {
        place.write(file.name, &file.bytes)?;
    }
    let mut ranks = Vec::new();
    let mut progress = PackingProgress {
        stage: "writing the pack",
        bytes_done: 0,
        bytes: packed_bytes,
    };
    for (rank, requests) in wanted.iter().enumerate() {
        let mut on_bytes = |n_bytes| {
            progress.bytes_done += n_bytes;
            tell(on_progress, progress)
        };
        let path = place.path().join(rank_name(rank, n_ranks));
        ranks.push(write_rank(
            &checkpoint,
            rank,
            requests,
            &path,
            &mut on_bytes,
        )?);
    }
    let manifest = Manifest {
        layout_version: LAYOUT_VERSION,
        cpu_layout: dsd_kernels::panel::LAYOUT_NAME.to_owned(),
        written_by: concat!("dsd ", env!("CARGO_PKG_VERSION")).to_owned(),
        architecture: checkpoint.architecture().to_owned(),
        config: checkpoint.config().clone(),
        generation_config: checkpoint.generation_config().cloned(),
        eos_token_ids: checkpoint.eos_token_ids().to_vec(),
        sources,
        side_files: side_files.iter().map(PlannedFile::described).collect(),
        ranks,
    };
    let text = manifest.seal().map_err(|e| PackingError::Write {
        file: place.path().join(MANIFEST_NAME),
        source: e.into(),
    })?;
    place.write(MANIFEST_NAME, &text)?;
    prove(place.path(), &wanted)?;
    let source_bytes = manifest.sources.iter().map(|f| f.bytes).sum();
    Ok(PackingReport {
        path: place.publish()?,
        n_ranks,
        n_pieces: manifest.ranks.iter().map(|r| r.pieces.len()).sum(),
        bytes: manifest.ranks.iter().map(|r| r.bytes).sum(),
        source_bytes,
    })
}

/// What every rank will ask for.
fn requests(
    checkpoint: &Checkpoint,
    n_ranks: usize,
) -> Result<Vec<Vec<TensorRequest>>, PackingError> {
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let format_of = |name: &str| checkpoint.format(name);
    (0..n_ranks.max(1))
        .map(|rank| {
            let of = RankOf { rank, n_ranks };
            let split = Split::new(&spec, of, &format_of).map_err(ModelError::from)?;
            let source = checkpoint.of_rank(rank, n_ranks)?;
            Ok(model::tensors(&source, &split)?)
        })
        .collect()
}

fn bytes_of(requests: &[TensorRequest], checkpoint: &Checkpoint) -> u64 {
    let matrices = WeightBytes::of_checkpoint(requests, &|name| checkpoint.format(name));
    let vectors = requests.iter().map(|request| match request {
        TensorRequest::Vector { part, .. } => (part.len() * size_of::<f32>()) as u64,
        TensorRequest::Matrix { .. } => 0,
    });
    matrices.mapped + matrices.panels + vectors.sum::<u64>()
}

fn write_rank(
    checkpoint: &Checkpoint,
    rank: usize,
    requests: &[TensorRequest],
    path: &Path,
    on_bytes: OnBytes<'_>,
) -> Result<RankFile, PackingError> {
    let mut writer = RankWriter::create(path, requests)?;
    for request in requests {
        match request {
            TensorRequest::Matrix {
                name,
                shape,
                cut,
                role,
            } => {
                let matrix = TensorSource::matrix(checkpoint, name, *shape, cut, *role)?;
                writer.matrix(name, *shape, cut, *role, &matrix, on_bytes)?;
            }
            TensorRequest::Vector { name, len, part } => {
                let values = TensorSource::vector(checkpoint, name, *len, part.clone())?;
                writer.vector(name, *len, part.clone(), &values, on_bytes)?;
            }
        }
    }
    writer.finish(rank)
}

/// Opens what was written as a node will, which also notices a checkpoint that changed meanwhile.
fn prove(folder: &Path, wanted: &[Vec<TensorRequest>]) -> Result<(), PackingError> {
    let pack = Checkpoint::open(folder)?;
    let found = requests(&pack, wanted.len())?;
    assert!(
        found == wanted,
        "a pack is asked for what its checkpoint was asked for"
    );
    Ok(())
}

/// A small file of the pack that is still to be written.
struct PlannedFile {
    name: &'static str,
    bytes: Vec<u8>,
    /// What it was copied from.
    source: Option<PathBuf>,
}

impl PlannedFile {
    fn described(&self) -> SideFile {
        SideFile {
            name: self.name.to_owned(),
            bytes: self.bytes.len() as u64,
            blake3: digest(&self.bytes),
        }
    }
}

/// What the tokenizer is read from.
fn side_files(checkpoint: &Checkpoint) -> Result<Vec<PlannedFile>, PackingError> {
    if let Some(metadata) = checkpoint.gguf_metadata() {
        return Ok(vec![PlannedFile {
            name: GGUF_NAME,
            bytes: gguf_metadata_only(metadata.file())?,
            source: None,
        }]);
    }
    let mut files = Vec::new();
    for name in text::FILE_NAMES {
        let path = checkpoint.path().join(name);
        // A pack has no folders.
        let name = name.rsplit('/').next().unwrap_or(name);
        if files.iter().any(|file: &PlannedFile| file.name == name) {
            continue;
        }
        match read_side_file(&path) {
            Ok(bytes) => files.push(PlannedFile {
                name,
                bytes,
                source: Some(path),
            }),
            Err(WeightsError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(files)
}

/// Everything that was packed, with digests.
fn source_files(
    checkpoint: &Checkpoint,
    side_files: &[PlannedFile],
    on_progress: OnProgress<'_>,
) -> Result<Vec<SourceFile>, PackingError> {
    let weights = checkpoint.files().iter().map(|file| file.path.clone());
    let mut paths = weights.collect::<Vec<_>>();
    let config = checkpoint.config_file().to_owned();
    if !paths.contains(&config) {
        paths.push(config);
    }
    if checkpoint.generation_config().is_some() {
        paths.push(checkpoint.generation_config_file());
    }
    paths.extend(side_files.iter().filter_map(|file| file.source.clone()));
    let mut progress = PackingProgress {
        stage: "reading the checkpoint",
        bytes_done: 0,
        bytes: checkpoint.bytes_mapped(),
    };
    let mut files = Vec::new();
    for path in paths {
        let file = SourceFile::of(&path, &mut |n_bytes| {
            progress.bytes_done = (progress.bytes_done + n_bytes).min(progress.bytes);
            on_progress(progress)
        })?;
        files.push(file.ok_or(PackingError::Interrupted)?);
    }
    Ok(files)
}
