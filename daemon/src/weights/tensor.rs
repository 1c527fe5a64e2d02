//! A tensor as it lies in a file: type, shape and shared bytes, already checked to fit each other.

use std::{fmt, path::Path, sync::Arc};

use bytes::Bytes;
use dsd_kernels::dtype::Format;
use half::{bf16, f16};

use super::error::{Shape, WeightsError};

/// How the elements of a tensor in a file are encoded: the formats that kernels compute with, and
/// those that may lie in a file without being weights of a supported layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// A format that kernels know.
    Weights(Format),
    /// IEEE double precision.
    F64,
    /// FP8 e5m2.
    F8E5m2,
    /// Powers of two as exponents.
    F8E8m0,
    /// Integers (or packed nibbles) of this many bytes.
    Int {
        /// Bytes of one element: 1, 2, 4 or 8.
        bytes: u8,
        /// Two's complement.
        signed: bool,
    },
    /// One byte per truth value.
    Bool,
}

/// One tensor of a file. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub(super) struct StoredTensor {
    /// The file it lies in.
    pub(super) file: Arc<Path>,
    /// Its name in that file.
    pub(super) name: String,
    /// Encoding of the elements.
    pub(super) stored_type: StoredType,
    /// Dimensions, slowest first; empty for a scalar, never zero.
    pub(super) shape: Vec<usize>,
    /// The elements, exactly as many bytes as type and shape need.
    pub(super) data: Bytes,
}

/// Bytes of a key or a tensor's name in any file.
pub(super) const NAME_BYTES_MAX: u64 = 1024;
/// Dimensions a tensor of a safetensors file may have.
pub(super) const N_DIMS_MAX: usize = 8;

impl StoredType {
    /// The type called `name` in a safetensors header.
    pub(super) fn from_safetensors(name: &str) -> Option<Self> {
        let int = |bytes, signed| Self::Int { bytes, signed };
        Some(match name {
            "F32" => Self::Weights(Format::F32),
            "F16" => Self::Weights(Format::F16),
            "BF16" => Self::Weights(Format::Bf16),
            "F8_E4M3" => Self::Weights(Format::F8E4m3),
            "F64" => Self::F64,
            "F8_E5M2" => Self::F8E5m2,
            "F8_E8M0" => Self::F8E8m0,
            "I8" => int(1, true),
            "I16" => int(2, true),
            "I32" => int(4, true),
            "I64" => int(8, true),
            "U8" => int(1, false),
            "U16" => int(2, false),
            "U32" => int(4, false),
            "U64" => int(8, false),
            "BOOL" => Self::Bool,
            _ => return None,
        })
    }

    /// Bytes of a tensor whose rows (the last dimension) are whole blocks; `None` if they are not
    /// or the product overflows.
    pub(super) fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (n_cols, outer) = shape
            .split_last()
            .map_or((1, shape), |(last, o)| (*last, o));
        let row_bytes = match self {
            Self::Weights(format) => format.row_bytes(n_cols)?,
            Self::F64 => n_cols.checked_mul(8)?,
            Self::F8E5m2 | Self::F8E8m0 | Self::Bool => n_cols,
            Self::Int { bytes, .. } => n_cols.checked_mul(usize::from(bytes))?,
        };
        outer.iter().try_fold(row_bytes, |n, d| n.checked_mul(*d))
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weights(format) => format.fmt(f),
            Self::F64 => f.write_str("f64"),
            Self::F8E5m2 => f.write_str("fp8_e5m2"),
            Self::F8E8m0 => f.write_str("fp8_e8m0"),
            Self::Int { bytes, signed } => {
                write!(f, "{}{}", if *signed { 'i' } else { 'u' }, bytes * 8)
            }
            Self::Bool => f.write_str("bool"),
        }
    }
}

impl StoredTensor {
    /// The elements as f32.
    ///
    /// # Errors
    /// [`WeightsError::TensorType`] for anything but F32, F16 and BF16,
    /// [`WeightsError::NotFinite`] for NaN and infinity: a norm, bias or scale with one poisons
    /// every token.
    pub(super) fn to_f32(&self) -> Result<Vec<f32>, WeightsError> {
        let values: Vec<f32> = match self.stored_type {
            StoredType::Weights(Format::F32) => {
                let (elements, _) = self.data.as_chunks::<4>();
                elements.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            StoredType::Weights(Format::F16) => {
                let (elements, _) = self.data.as_chunks::<2>();
                elements
                    .iter()
                    .map(|b| f16::from_le_bytes(*b).to_f32())
                    .collect()
            }
            StoredType::Weights(Format::Bf16) => {
                let (elements, _) = self.data.as_chunks::<2>();
                elements
                    .iter()
                    .map(|b| bf16::from_le_bytes(*b).to_f32())
                    .collect()
            }
            other => return Err(self.wrong_type("f32, f16 or bf16", other)),
        };
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(WeightsError::NotFinite {
                file: self.file.to_path_buf(),
                tensor: self.name.clone(),
                index,
                found: values[index],
            }),
        }
    }

    /// Refuses another shape than `expected`.
    pub(super) fn expect_shape(&self, expected: &[usize]) -> Result<(), WeightsError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(WeightsError::TensorShape {
            file: self.file.to_path_buf(),
            tensor: self.name.clone(),
            expected: format!("{expected:?}"),
            found: shape_of(&self.shape),
        })
    }

    pub(super) fn wrong_type(&self, expected: &str, found: StoredType) -> WeightsError {
        WeightsError::TensorType {
            file: self.file.to_path_buf(),
            tensor: self.name.clone(),
            expected: expected.to_owned(),
            found: found.to_string(),
        }
    }
}

/// A checked shape as errors print it.
pub(super) fn shape_of(dims: &[usize]) -> Shape {
    Shape(dims.iter().map(|d| *d as u64).collect())
}

/// A header's dimensions as lengths, each at least 1, and their bytes.
///
/// # Errors
/// [`WeightsError::TensorShape`].
pub(super) fn check_shape(
    file: &Path,
    tensor: &str,
    stored_type: StoredType,
    dims: &[u64],
) -> Result<(Vec<usize>, usize), WeightsError> {
    let refuse = |expected: String| WeightsError::TensorShape {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        expected,
        found: Shape(dims.iter().copied().take(N_DIMS_MAX + 1).collect()),
    };
    if N_DIMS_MAX < dims.len() {
        return Err(refuse(format!("at most {N_DIMS_MAX} dimensions")));
    }
    let shape = dims
        .iter()
        .map(|d| usize::try_from(*d).ok().filter(|d| *d != 0))
        .collect::<Option<Vec<usize>>>()
        .ok_or_else(|| refuse("dimensions of at least 1".to_owned()))?;
    let n_bytes = stored_type.tensor_bytes(&shape).ok_or_else(|| {
        refuse(format!(
            "whole {stored_type} blocks and a size within {} bytes",
            usize::MAX
        ))
    })?;
    Ok((shape, n_bytes))
}
