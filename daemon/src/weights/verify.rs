//! Reads every byte of a checkpoint: digests, damage, differences from saved digests.
//!
//! Does not stop at the first damaged tensor: the report lists all findings.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::{Path, PathBuf},
};

use dsd_kernels::dtype::Format;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::{
    checkpoint::Checkpoint,
    error::WeightsError,
    folder::{StoredFile, stored_files},
    mmap::MappedFile,
    pack,
    pread::{self, PIECE_BYTES, PieceError},
    side_file::read_json,
    tensor::{StoredTensor, StoredType},
};

/// What [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyReport {
    /// The checkpoint.
    pub path: PathBuf,
    /// Bytes of tensors read.
    pub bytes: u64,
    /// blake3 over names, types, shapes and bytes of all tensors, in the order of names.
    pub digest: String,
    /// Every tensor, in the order of names.
    pub tensors: Vec<TensorDigest>,
    /// Everything that is wrong; empty means the checkpoint is good.
    pub findings: Vec<Finding>,
}

/// One tensor as it lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDigest {
    /// The file.
    pub file: PathBuf,
    /// The name in that file.
    pub name: String,
    /// Name of the stored type.
    pub stored_type: String,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// Length.
    pub bytes: u64,
    /// blake3 of the bytes, hexadecimal.
    pub digest: String,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub file: PathBuf,
    /// The tensor.
    pub tensor: String,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub found: String,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Tensors read.
    pub n_tensors_done: usize,
    /// Tensors in all.
    pub n_tensors: usize,
    /// Bytes read.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes: u64,
}

/// Saved digests of a good checkpoint: tensor name to blake3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digests {
    /// Over all tensors.
    pub digest: String,
    /// Of each tensor's bytes.
    pub tensors: BTreeMap<String, String>,
}

/// Opens a checkpoint afresh, reads every tensor, looks for non-finite numbers and compares with
/// `saved` where given. `on_progress` is called after every tensor.
///
/// # Errors
/// [`WeightsError`] when the checkpoint cannot be opened at all; damage to tensors is in the report.
pub fn verify(
    path: &Path,
    saved: Option<&Digests>,
    mut on_progress: impl FnMut(VerifyProgress),
) -> Result<VerifyReport, WeightsError> {
    if pack::is_pack(path) {
        return verify_pack(path, saved, &mut on_progress);
    }
    // Checks the configuration too; its mappings are dropped before the tensors are read.
    Checkpoint::open(path)?;
    let files = stored_files(path)?;
    let all = |f: &'_ StoredFile| f.tensors.iter().map(|t| t.data.len() as u64).sum::<u64>();
    let bytes = files.iter().map(all).sum();
    let mut tensors = files
        .iter()
        .flat_map(|f| f.tensors.iter().map(|t| (&f.file, t)))
        .collect::<Vec<_>>();
    tensors.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
    let n_tensors = tensors.len();
    let mut overall = blake3::Hasher::new();
    let mut digests = Vec::with_capacity(n_tensors);
    let mut findings = Vec::new();
    let mut bytes_done = 0;
    for (i, (file, tensor)) in tensors.iter().enumerate() {
        let (digest, finding) = look_at(file, tensor);
        add_to_overall(&mut overall, &digest);
        findings.extend(finding);
        bytes_done += digest.bytes;
        digests.push(digest);
        on_progress(VerifyProgress {
            n_tensors_done: i + 1,
            n_tensors,
            bytes_done,
            bytes,
        });
    }
    let mut report = VerifyReport {
        path: path.to_owned(),
        bytes,
        digest: overall.finalize().to_hex().to_string(),
        tensors: digests,
        findings,
    };
    if let Some(saved) = saved {
        let differences = differences(&report, saved);
        report.findings.extend(differences);
    }
    Ok(report)
}

fn verify_pack(
    path: &Path,
    saved: Option<&Digests>,
    on_progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport, WeightsError> {
    let (tensors, findings) = pack::verify(path, on_progress)?;
    let mut overall = blake3::Hasher::new();
    for tensor in &tensors {
        add_to_overall(&mut overall, tensor);
    }
    let mut report = VerifyReport {
        path: path.to_owned(),
        bytes: tensors.iter().map(|t| t.bytes).sum(),
        digest: overall.finalize().to_hex().to_string(),
        tensors,
        findings,
    };
    if let Some(saved) = saved {
        let differences = differences(&report, saved);
        report.findings.extend(differences);
    }
    Ok(report)
}

impl VerifyReport {
    /// True when nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty()
    }

    /// The digests, to be saved and compared with later.
    pub fn digests(&self) -> Digests {
        Digests {
            digest: self.digest.clone(),
            tensors: self
                .tensors
                .iter()
                .map(|t| (t.name.clone(), t.digest.clone()))
                .collect(),
        }
    }
}

impl Digests {
    /// Reads a saved file (JSON).
    ///
    /// # Errors
    /// [`WeightsError::Read`] or [`WeightsError::Json`].
    pub fn load(file: &Path) -> Result<Self, WeightsError> {
        read_json(file, "digest file")
    }

    /// Writes a file that [`Digests::load`] reads.
    ///
    /// # Errors
    /// [`WeightsError::Read`] with the system's answer.
    pub fn save(&self, file: &Path) -> Result<(), WeightsError> {
        let write_error = |source| WeightsError::Read {
            file: file.to_owned(),
            source,
        };
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| write_error(std::io::Error::other(e)))?;
        std::fs::write(file, text).map_err(write_error)
    }
}

/// Reads a tensor, through the file and not the mapping: its digest, and the first thing that is
/// wrong with its bytes.
fn look_at(file: &MappedFile, tensor: &StoredTensor) -> (TensorDigest, Option<Finding>) {
    let bytes = tensor.data.len() as u64;
    let start = file.offset_of(&tensor.data);
    // Whole units, so that none lies in two pieces.
    let unit_bytes = unit_bytes(tensor.stored_type);
    let piece_bytes = (PIECE_BYTES / unit_bytes).max(1) * unit_bytes;
    let mut hasher = blake3::Hasher::new();
    let mut n_units = 0;
    let mut non_finite = None;
    let read = pread::pieces_of(
        &file.file,
        start..start + bytes,
        piece_bytes,
        &mut |piece| {
            hasher.update(piece);
            if non_finite.is_none() {
                non_finite = first_non_finite(tensor.stored_type, piece)
                    .map(|(unit, index)| (unit, n_units + index));
            }
            n_units += piece.len() / unit_bytes;
            Ok::<(), Infallible>(())
        },
    );
    let (expected, found) = match read {
        Err(PieceError::Stopped(never)) => match never {},
        Err(PieceError::Read(e)) => (format!("{bytes} bytes"), format!("cannot be read: {e}")),
        Ok(n_bytes) if n_bytes < bytes => (
            format!("{bytes} bytes"),
            format!("{n_bytes} bytes, then the file ends"),
        ),
        Ok(_) => match non_finite {
            Some((unit, index)) => (
                "finite numbers".to_owned(),
                format!("NaN or infinity at {unit} {index}"),
            ),
            None => (String::new(), String::new()),
        },
    };
    let finding = (!found.is_empty()).then(|| Finding {
        file: tensor.file.to_path_buf(),
        tensor: tensor.name.clone(),
        expected,
        found,
    });
    let digest = TensorDigest {
        file: tensor.file.to_path_buf(),
        name: tensor.name.clone(),
        stored_type: tensor.stored_type.to_string(),
        shape: tensor.shape.clone(),
        bytes,
        digest: hasher.finalize().to_hex().to_string(),
    };
    (digest, finding)
}

/// Lengths in front of the parts keep two different checkpoints from feeding the same bytes.
fn add_to_overall(overall: &mut blake3::Hasher, tensor: &TensorDigest) {
    for part in [&tensor.name, &tensor.stored_type, &tensor.digest] {
        overall.update(&(part.len() as u64).to_le_bytes());
        overall.update(part.as_bytes());
    }
    overall.update(&(tensor.shape.len() as u64).to_le_bytes());
    for dim in &tensor.shape {
        overall.update(&(*dim as u64).to_le_bytes());
    }
}

fn differences(report: &VerifyReport, saved: &Digests) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut left: BTreeMap<&str, &str> = saved
        .tensors
        .iter()
        .map(|(k, v)| (k.as_str(), v.as_str()))
        .collect();
    for tensor in &report.tensors {
        let expected = match left.remove(tensor.name.as_str()) {
            Some(digest) if digest == tensor.digest => continue,
            Some(digest) => format!("blake3 {digest}"),
            None => "no such tensor".to_owned(),
        };
        findings.push(Finding {
            file: tensor.file.clone(),
            tensor: tensor.name.clone(),
            expected,
            found: format!("blake3 {}", tensor.digest),
        });
    }
    for (name, digest) in left {
        findings.push(Finding {
            file: report.path.clone(),
            tensor: name.to_owned(),
            expected: format!("blake3 {digest}"),
            found: "missing".to_owned(),
        });
    }
    if findings.is_empty() && saved.digest != report.digest {
        findings.push(Finding {
            file: report.path.clone(),
            tensor: "(all)".to_owned(),
            expected: format!("blake3 {}", saved.digest),
            found: format!("blake3 {}", report.digest),
        });
    }
    findings
}

/// Bytes of what [`first_non_finite`] counts.
fn unit_bytes(stored_type: StoredType) -> usize {
    match stored_type {
        StoredType::Weights(format) => format.block_bytes(),
        StoredType::F64 => 8,
        StoredType::Int { bytes, .. } => usize::from(bytes),
        StoredType::F8E5m2 | StoredType::F8E8m0 | StoredType::Bool => 1,
    }
}

/// The first NaN or infinity among numbers or block scales.
fn first_non_finite(stored_type: StoredType, data: &[u8]) -> Option<(&'static str, usize)> {
    let f16_at = |block: &[u8], at: usize| match block.get(at..at + 2) {
        Some(&[a, b]) => f16::from_le_bytes([a, b]).is_finite(),
        _ => false,
    };
    let element = |i| ("element", i);
    // Offsets of the f16 factors in a block (ggml-common.h).
    let factor_offsets: &[usize] = match stored_type {
        StoredType::Weights(format) => match format {
            Format::F32 => {
                let (v, _) = data.as_chunks::<4>();
                return v
                    .iter()
                    .position(|b| !f32::from_le_bytes(*b).is_finite())
                    .map(element);
            }
            Format::F16 => {
                let (v, _) = data.as_chunks::<2>();
                return v
                    .iter()
                    .position(|b| !f16::from_le_bytes(*b).is_finite())
                    .map(element);
            }
            Format::Bf16 => {
                let (v, _) = data.as_chunks::<2>();
                return v
                    .iter()
                    .position(|b| !bf16::from_le_bytes(*b).is_finite())
                    .map(element);
            }
            Format::F8E4m3 => return data.iter().position(|b| b & 0x7F == 0x7F).map(element),
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
            Format::Q4_1 | Format::Q5_1 | Format::Q4K | Format::Q5K => &[0, 2],
            Format::Q6K => &[208],
            Format::Int4 => &[0],
            Format::Int8 => return None,
        },
        StoredType::F64 => {
            let (v, _) = data.as_chunks::<8>();
            return v
                .iter()
                .position(|b| !f64::from_le_bytes(*b).is_finite())
                .map(element);
        }
        StoredType::F8E5m2 => return data.iter().position(|b| 0x7C <= b & 0x7F).map(element),
        StoredType::F8E8m0 => return data.iter().position(|b| *b == 0xFF).map(element),
        StoredType::Int { .. } | StoredType::Bool => return None,
    };
    let StoredType::Weights(format) = stored_type else {
        return None;
    };
    data.chunks(format.block_bytes())
        .position(|block| factor_offsets.iter().any(|at| !f16_at(block, *at)))
        .map(|i| ("block", i))
}
