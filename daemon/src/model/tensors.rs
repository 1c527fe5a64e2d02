//! The tensors that one rank's part of a decoder is built from, without building it: what a memory
//! plan counts and a pack holds.

use std::{cell::RefCell, ops::Range};

use dsd_kernels::{backend::WeightStore, dtype::Format, matrix::Matrix};

use super::{ModelError, build, split::Split};
use crate::weights::{Cut, Role, TensorSource, WeightsError};

/// One tensor, or a piece of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorRequest {
    /// A matrix.
    Matrix {
        /// The tensor's name.
        name: String,
        /// Rows and columns of the whole.
        shape: [usize; 2],
        /// The piece.
        cut: Cut,
        /// What it is for.
        role: Role,
    },
    /// A vector of norms, biases or the like, in f32.
    Vector {
        /// The tensor's name.
        name: String,
        /// Elements of the whole.
        len: usize,
        /// The piece.
        part: Range<usize>,
    },
}

/// Everything [`build`] will ask `source` for, in its order.
///
/// # Errors
/// [`ModelError`].
pub fn tensors(source: &dyn TensorSource, split: &Split) -> Result<Vec<TensorRequest>, ModelError> {
    let recorder = Recorder {
        source,
        requests: RefCell::default(),
    };
    build(&recorder, split, &Nowhere)?;
    Ok(recorder.requests.into_inner())
}

/// Notes what it is asked for and hands out nothing of it.
struct Recorder<'a> {
    source: &'a dyn TensorSource,
    requests: RefCell<Vec<TensorRequest>>,
}

impl TensorSource for Recorder<'_> {
    fn matrix(
        &self,
        name: &str,
        shape: [usize; 2],
        cut: &Cut,
        role: Role,
    ) -> Result<Matrix, WeightsError> {
        self.requests.borrow_mut().push(TensorRequest::Matrix {
            name: name.to_owned(),
            shape,
            cut: cut.clone(),
            role,
        });
        Ok(Matrix::from_f32(0, 0, &[]))
    }

    fn vector(&self, name: &str, len: usize, part: Range<usize>) -> Result<Vec<f32>, WeightsError> {
        let ones = vec![1.0; part.len()];
        self.requests.borrow_mut().push(TensorRequest::Vector {
            name: name.to_owned(),
            len,
            part,
        });
        Ok(ones)
    }

    fn skip(&self, name: &str, shape: [usize; 2]) -> Result<(), WeightsError> {
        self.source.skip(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn format(&self, name: &str) -> Option<Format> {
        self.source.format(name)
    }
}

/// Keeps nothing.
struct Nowhere;

impl WeightStore for Nowhere {
    type Buffer = ();
    type Weight = ();

    fn upload(&self, _values: &[f32]) {}

    fn weight(&self, _parts: Vec<Matrix>) {}

    fn latent_weight(&self, _matrix: Matrix) {}
}
