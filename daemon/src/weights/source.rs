//! What a model's weights are asked of: a checkpoint, or one rank's pieces of it in a pack.
//!
//! A rank asks for the piece it computes with, by the tensor's name, its whole shape and a cut; who
//! answers has checked that the tensor has that shape.

use std::ops::Range;

use dsd_kernels::{dtype::Format, matrix::Matrix};

use super::{checkpoint::Checkpoint, error::WeightsError, pack::PackedRank};

/// Which piece of a matrix a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// These rows: some outputs of a linear layer.
    Rows(Range<usize>),
    /// These columns: some inputs of a linear layer, in whole blocks of its format.
    Cols(Range<usize>),
}

impl Cut {
    /// Rows `range` of `n`.
    pub fn rows(range: &Range<usize>, n: usize) -> Self {
        match *range == (0..n) {
            true => Self::Whole,
            false => Self::Rows(range.clone()),
        }
    }

    /// Columns `range` of `n`.
    pub fn cols(range: &Range<usize>, n: usize) -> Self {
        match *range == (0..n) {
            true => Self::Whole,
            false => Self::Cols(range.clone()),
        }
    }

    /// Rows and columns of this piece of a matrix.
    pub fn shape_of(&self, [n_rows, n_cols]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Whole => [n_rows, n_cols],
            Self::Rows(range) => [range.len(), n_cols],
            Self::Cols(range) => [n_rows, range.len()],
        }
    }
}

/// What a matrix is for, which decides how its bytes are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A linear layer or an embedding: panels, where its format has them.
    Linear,
    /// A `kv_b_proj` of keys and values, which is walked across its rows: rows.
    Latent,
}

/// Tensors by name, cut for one rank.
pub trait TensorSource {
    /// The piece `cut` of a matrix of exactly this whole shape, FP8 with its scales.
    ///
    /// # Errors
    /// [`WeightsError`] when it is missing, has another shape or a type kernels do not know, when
    /// FP8 and scales do not belong together, or when the cut falls inside a block.
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
    ) -> Result<Matrix, WeightsError>;

    /// Elements `part` of a vector of exactly this whole length, as f32.
    ///
    /// # Errors
    /// [`WeightsError`] when it is missing, has another shape, is not F32, F16 or BF16, or holds
    /// NaN or infinity.
    fn vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Vec<f32>, WeightsError>;

    /// Notes that a matrix of exactly this whole shape is known, though this rank has no piece of it.
    ///
    /// # Errors
    /// [`WeightsError`] when it is missing or has another shape, where whole tensors are at hand.
    fn skip(&self, name: &str, shape: [usize; 2]) -> Result<(), WeightsError>;

    /// True when there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// How a matrix is stored; `None` when there is none of this name, or of a type kernels do not
    /// know.
    fn format(&self, name: &str) -> Option<Format>;
}

impl TensorSource for Checkpoint {
    fn matrix(
        &self,
        name: &str,
        [n_rows, n_cols]: [usize; 2],
        cut: &Cut,
        _role: Role,
    ) -> Result<Matrix, WeightsError> {
        let matrix = Self::matrix(self, name, n_rows, n_cols)?;
        let piece = match cut {
            Cut::Whole => return Ok(matrix),
            Cut::Rows(range) => matrix.rows(range.start, range.len()),
            Cut::Cols(range) => matrix.cols(range.start, range.len()),
        };
        piece.ok_or_else(|| WeightsError::Cut {
            file: self.path().to_owned(),
            tensor: name.to_owned(),
            cut: cut.clone(),
            format: matrix.format(),
            block_len: matrix.format().block_len(),
        })
    }

    fn vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        let mut values = Self::vector(self, name, len)?;
        values.truncate(part.end);
        values.drain(..part.start.min(part.end));
        Ok(values)
    }

    fn skip(&self, name: &str, [n_rows, n_cols]: [usize; 2]) -> Result<(), WeightsError> {
        Self::matrix(self, name, n_rows, n_cols).map(drop)
    }

    fn contains(&self, name: &str) -> bool {
        Self::contains(self, name)
    }

    fn format(&self, name: &str) -> Option<Format> {
        Self::format(self, name)
    }
}

/// What one rank of a group takes its tensors from.
#[derive(Debug, Clone, Copy)]
pub enum RankTensors<'a> {
    /// Whole tensors, cut as they are taken.
    Checkpoint(&'a Checkpoint),
    /// Pieces made for this rank.
    Pack(&'a PackedRank),
}

impl RankTensors<'_> {
    /// Names of the tensors that nothing took, sorted.
    pub fn unclaimed(&self) -> Vec<String> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.unclaimed(),
            Self::Pack(rank) => rank.unclaimed(),
        }
    }

    fn source(&self) -> &dyn TensorSource {
        match self {
            Self::Checkpoint(checkpoint) => *checkpoint,
            Self::Pack(rank) => *rank,
        }
    }
}

impl TensorSource for RankTensors<'_> {
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
    ) -> Result<Matrix, WeightsError> {
        self.source().matrix(name, shape, cut, role)
    }

    fn vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        self.source().vector(name, len, part)
    }

    fn skip(&self, name: &str, shape: [usize; 2]) -> Result<(), WeightsError> {
        self.source().skip(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.source().contains(name)
    }

    fn format(&self, name: &str) -> Option<Format> {
        self.source().format(name)
    }
}
