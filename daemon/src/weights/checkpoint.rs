//! One checkpoint: its configuration and its tensors under Hugging Face names.
//!
//! Does not know which tensors a model needs; it only remembers which were taken.
//!
//! Invariant: every tensor of the files is reachable under exactly one name.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use dsd_kernels::{
    dtype::Format,
    matrix::{Matrix, TileScales},
    quant,
};
use serde_json::Value;

use super::{
    error::WeightsError,
    folder, foreign,
    gguf::{self, GgufMetadata},
    gguf_config,
    gguf_names::{self, HfName},
    gguf_split,
    int4::{self, Packed},
    mmap,
    pack::{
        self, Pack,
        manifest::{GGUF_NAME, MANIFEST_NAME},
    },
    packed::{self, PackedRows},
    quantization::{self, Int4Scheme, PackedScheme, Scheme},
    safetensors,
    side_file::read_json,
    source::RankTensors,
    tensor::{StoredTensor, StoredType},
};

/// An opened checkpoint, or a pack of one. Matrices taken from it share its mappings and may outlive
/// it. The tensors of a pack are had through [`Checkpoint::of_rank`] only.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// The file that holds the configuration, for messages.
    config_file: PathBuf,
    architecture: String,
    config: Value,
    generation_config: Option<Value>,
    eos_token_ids: Vec<u32>,
    gguf: Option<GgufMetadata>,
    scheme: Scheme,
    /// Linear layers are rounded to this format when they are taken.
    rounding: Option<Format>,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
    /// Then `tensors` is empty.
    pack: Option<Arc<Pack>>,
}

/// A file of the checkpoint and how many of its bytes are mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MappedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
}

#[derive(Debug)]
struct Entry {
    tensor: StoredTensor,
    claimed: AtomicBool,
}

const CONFIG_NAME: &str = "config.json";
const GENERATION_CONFIG_NAME: &str = "generation_config.json";

impl Checkpoint {
    /// Opens a Hugging Face folder, a GGUF file (any part, where it has several), a folder that holds
    /// exactly one GGUF model, or a pack, maps its files and checks every header against its file's length.
    ///
    /// # Errors
    /// [`WeightsError`] naming file, tensor, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let opened = Self::reopen(path)?;
        if let Some(pack) = &opened.pack {
            pack.refuse_stale()?;
        }
        Ok(opened)
    }

    /// As [`Checkpoint::open`], for a rank whose agent has opened it: a checkpoint that changed after
    /// it was packed does not keep a lost rank from coming back.
    ///
    /// # Errors
    /// [`WeightsError`].
    pub fn reopen(path: &Path) -> Result<Self, WeightsError> {
        let metadata = path.metadata().map_err(|source| WeightsError::Read {
            file: path.to_owned(),
            source,
        })?;
        if !metadata.is_dir() {
            return Self::open_gguf(path, path);
        }
        if pack::is_pack(path) {
            return Self::open_pack(path);
        }
        match folder::only_gguf_in(path)? {
            Some(file) => Self::open_gguf(path, &file),
            None => Self::open_folder(path),
        }
    }

    fn open_gguf(path: &Path, file: &Path) -> Result<Self, WeightsError> {
        let (mut files, mut tensors, mut metadata) = (Vec::new(), Vec::new(), None);
        for part in gguf_split::open(file)? {
            files.push(mapped_file(&part.path)?);
            tensors.extend(part.gguf.tensors);
            metadata.get_or_insert(part.gguf.metadata);
        }
        let metadata = metadata.expect("a model has a first part");
        let config = gguf_config::translate(&metadata, &tensors)?;
        let eos_token_ids = gguf_config::eos_token_ids(&metadata)?;
        let mut entries = BTreeMap::new();
        for tensor in tensors {
            match gguf_names::translate(&tensor.name) {
                HfName::Whole(name) => insert(&mut entries, name, tensor)?,
                HfName::HeadStack(name) => insert(&mut entries, name, join_stack(tensor)?)?,
                HfName::ExpertStack { prefix, suffix } => {
                    for (expert, matrix) in cut_stack(&tensor)?.into_iter().enumerate() {
                        insert(&mut entries, format!("{prefix}.{expert}.{suffix}"), matrix)?;
                    }
                }
            }
        }
        Ok(Self {
            path: path.to_owned(),
            config_file: metadata.file().to_owned(),
            architecture: config["model_type"].as_str().unwrap_or_default().to_owned(),
            config,
            generation_config: None,
            eos_token_ids,
            gguf: Some(metadata),
            scheme: Scheme::Plain,
            rounding: None,
            files,
            tensors: entries,
            pack: None,
        })
    }

    fn open_folder(path: &Path) -> Result<Self, WeightsError> {
        let config_file = path.join(CONFIG_NAME);
        let config = read_object(&config_file, CONFIG_NAME)?;
        let generation_file = path.join(GENERATION_CONFIG_NAME);
        let generation_config = match generation_file.exists() {
            true => Some(read_object(&generation_file, GENERATION_CONFIG_NAME)?),
            false => None,
        };
        let architecture = architecture_of(&config_file, &config)?;
        foreign::refuse_config(&config_file, &config)?;
        let scheme = quantization::scheme(&config_file, &config)?;
        // Where the generation configuration names any, it is alone that counts: authors mend there
        // what the configuration has wrong.
        let configured = token_ids(&config_file, &config, "eos_token_id")?;
        let eos_token_ids = match &generation_config {
            Some(generation) => token_ids(&generation_file, generation, "eos_token_id")?,
            None => Vec::new(),
        };
        let eos_token_ids = match eos_token_ids.is_empty() {
            true => configured,
            false => eos_token_ids,
        };
        let (shard_paths, index) = folder::find_shards(path)?;
        let mut tensors = BTreeMap::new();
        let mut files = Vec::with_capacity(shard_paths.len());
        for shard in shard_paths {
            let stored = safetensors::read(&shard)?;
            if let Some(index) = &index {
                index.check_shard(&shard, &stored)?;
            }
            for tensor in stored {
                insert(&mut tensors, tensor.name.clone(), tensor)?;
            }
            files.push(mapped_file(&shard)?);
        }
        if scheme == Scheme::Plain {
            foreign::refuse_packed(path, tensors.keys().map(String::as_str))?;
        }
        Ok(Self {
            path: path.to_owned(),
            config_file,
            architecture,
            config,
            generation_config,
            eos_token_ids,
            gguf: None,
            scheme,
            rounding: None,
            files,
            tensors,
            pack: None,
        })
    }

    fn open_pack(path: &Path) -> Result<Self, WeightsError> {
        let pack = Pack::open(path)?;
        let manifest = pack.manifest();
        let gguf_file = path.join(GGUF_NAME);
        let gguf = match manifest.side_files.iter().any(|f| f.name == GGUF_NAME) {
            true => Some(gguf::read(&gguf_file)?.metadata),
            false => None,
        };
        let files = pack.files().map(|(path, bytes)| MappedFile {
            path: path.to_owned(),
            bytes,
        });
        Ok(Self {
            path: path.to_owned(),
            config_file: path.join(MANIFEST_NAME),
            architecture: manifest.architecture.clone(),
            config: manifest.config.clone(),
            generation_config: manifest.generation_config.clone(),
            eos_token_ids: manifest.eos_token_ids.clone(),
            gguf,
            scheme: Scheme::Plain,
            rounding: None,
            files: files.collect(),
            tensors: BTreeMap::new(),
            pack: Some(Arc::new(pack)),
        })
    }

    /// What rank `rank` of `n_ranks` takes its tensors from.
    ///
    /// # Errors
    /// [`pack::PackError::RankCount`] for a pack of another number of ranks.
    pub fn of_rank(&self, rank: usize, n_ranks: usize) -> Result<RankTensors<'_>, WeightsError> {
        Ok(match &self.pack {
            None => RankTensors::Checkpoint(self),
            Some(pack) => RankTensors::Pack(pack.rank(rank, n_ranks)?),
        })
    }

    /// The pack that was opened; `None` for a checkpoint.
    pub fn pack(&self) -> Option<&Arc<Pack>> {
        self.pack.as_ref()
    }

    /// The `model_type` of the configuration, or the first of its `architectures` where it has no
    /// `model_type`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The configuration under the keys of a Hugging Face `config.json`; made from the metadata for
    /// a GGUF file.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json`, where there is one.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// Where a folder's generation configuration lies.
    pub(crate) fn generation_config_file(&self) -> PathBuf {
        self.path.join(GENERATION_CONFIG_NAME)
    }

    /// True when rows of the query and key projections are stored so that rotary pairs are
    /// neighbours (llama.cpp permutes them when it converts the `llama` architecture).
    pub fn rope_interleaved_qk(&self) -> bool {
        self.gguf.is_some() && self.architecture == "llama"
    }

    /// Tokens that end a generation: those of the generation configuration, or where it names none,
    /// of the configuration; of a GGUF file, those of its keys and the control tokens known to be such.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// Sum of the lengths of the mapped files.
    pub fn bytes_mapped(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// From now on hands linear layers out rounded to the nearest values of `format`
    /// ([`quant::round_to`]), however they are stored. Embeddings, output layers, routers and
    /// `kv_b_proj`, which is computed in f32, stay as they are.
    pub fn round_weights(&mut self, format: Format) {
        self.rounding = Some(format);
    }

    /// Gives the memory of the pages back whose tensors are copied when they are taken, into panels
    /// or rounded; whoever reads them again reads the file.
    pub fn release_blocks(&self) {
        for (name, entry) in &self.tensors {
            let copied = match entry.tensor.stored_type {
                StoredType::Weights(format) => {
                    format.block_len() > 1 || self.rounding_of(name).is_some()
                }
                StoredType::Int { .. } => true,
                _ => false,
            };
            if copied {
                mmap::release(&entry.tensor.data);
            }
        }
    }

    /// The mapped files.
    pub fn files(&self) -> &[MappedFile] {
        &self.files
    }

    /// What was opened: a folder or a GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file the configuration comes from.
    pub fn config_file(&self) -> &Path {
        &self.config_file
    }

    /// The metadata of a GGUF file; `None` for safetensors.
    pub fn gguf_metadata(&self) -> Option<&GgufMetadata> {
        self.gguf.as_ref()
    }

    /// True when there is a tensor of this name, be it in several packed ones.
    pub fn contains(&self, name: &str) -> bool {
        let packed = || self.packed(name).is_some();
        match &self.pack {
            Some(pack) => pack.contains(name),
            None => self.tensors.contains_key(name) || packed(),
        }
    }

    /// Dimensions of a tensor, slowest first. Does not claim it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|e| e.tensor.shape.as_slice())
    }

    /// How a matrix is handed out; `None` when there is none of this name, or of a type kernels do
    /// not know. Does not claim it.
    pub fn format(&self, name: &str) -> Option<Format> {
        if let Some(pack) = &self.pack {
            return pack.format(name);
        }
        let stored = match self.packed(name) {
            Some(_) => Format::Int4,
            None => match self.tensors.get(name)?.tensor.stored_type {
                StoredType::Weights(format) => format,
                StoredType::Int {
                    bytes: 1,
                    signed: true,
                } if self.scheme == Scheme::Int8 => Format::Int8,
                _ => return None,
            },
        };
        Some(self.rounding_of(name).unwrap_or(stored))
    }

    /// The format that the matrix is rounded to when it is taken.
    fn rounding_of(&self, name: &str) -> Option<Format> {
        let linear = name.ends_with("_proj.weight") || name.ends_with("_proj_with_mqa.weight");
        let latent = ["kv_b_proj.weight", "k_b_proj.weight", "v_b_proj.weight"]
            .iter()
            .any(|end| name.ends_with(end));
        self.rounding.filter(|_| linear && !latent)
    }

    /// The layer whose weight is called `name`, where its four-bit codes are packed.
    fn packed<'n>(&self, name: &'n str) -> Option<&'n str> {
        let codes = match self.scheme {
            Scheme::Int4(_) => "qweight",
            Scheme::Packed(_) => "weight_packed",
            Scheme::Plain | Scheme::Fp8(_) | Scheme::Fp8Rows | Scheme::Int8 => return None,
        };
        let stem = name.strip_suffix(".weight")?;
        let packed = self.tensors.contains_key(&format!("{stem}.{codes}"));
        (packed && !self.tensors.contains_key(name)).then_some(stem)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Takes a matrix of exactly this shape, FP8 and Int8 with their scales, four-bit codes
    /// repacked.
    ///
    /// # Errors
    /// [`WeightsError`] when it is missing, has another shape or a type kernels do not know, or
    /// when weights and scales do not belong together.
    pub fn matrix(&self, name: &str, n_rows: usize, n_cols: usize) -> Result<Matrix, WeightsError> {
        let matrix = match (self.packed(name), self.scheme) {
            (Some(stem), Scheme::Int4(scheme)) => self.int4(scheme, name, stem, n_rows, n_cols)?,
            (Some(stem), Scheme::Packed(scheme)) => {
                self.packed_rows(scheme, name, stem, [n_rows, n_cols])?
            }
            _ => self.stored_matrix(name, n_rows, n_cols)?,
        };
        match self.rounding_of(name) {
            None => Ok(matrix),
            Some(format) => {
                quant::round_to(&matrix, format).map_err(|source| WeightsError::Round {
                    file: self.path.clone(),
                    tensor: name.to_owned(),
                    format,
                    source,
                })
            }
        }
    }

    fn stored_matrix(
        &self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Matrix, WeightsError> {
        let tensor = self.claim(name)?;
        tensor.expect_shape(&[n_rows, n_cols])?;
        let matrix = |format, tile_scales| {
            Matrix::new(format, n_rows, n_cols, tensor.data.clone(), tile_scales).map_err(
                |source| WeightsError::Matrix {
                    file: tensor.file.to_path_buf(),
                    tensor: name.to_owned(),
                    source,
                },
            )
        };
        let format = match tensor.stored_type {
            StoredType::Weights(format) => format,
            StoredType::Int {
                bytes: 1,
                signed: true,
            } if self.scheme == Scheme::Int8 => {
                let scales = self.row_scales(&format!("{name}_scale"), n_rows, n_cols)?;
                return matrix(Format::Int8, Some(scales));
            }
            other => {
                return Err(tensor.wrong_type("a type this version computes with", other));
            }
        };
        if format == Format::F8E4m3 && self.scheme == Scheme::Fp8Rows {
            let scales = self.row_scales(&format!("{name}_scale"), n_rows, n_cols)?;
            return matrix(format, Some(scales));
        }
        let scale_name = format!("{name}_scale_inv");
        let tile_scales = match (format == Format::F8E4m3, self.contains(&scale_name)) {
            (true, true) => Some(self.tile_scales(&scale_name, n_rows, n_cols)?),
            (false, false) => None,
            (true, false) => {
                return Err(WeightsError::MissingScale {
                    file: tensor.file.to_path_buf(),
                    tensor: name.to_owned(),
                    expected: scale_name,
                });
            }
            (false, true) => {
                return Err(WeightsError::UnexpectedScale {
                    file: tensor.file.to_path_buf(),
                    tensor: name.to_owned(),
                    scale: scale_name,
                    found: tensor.stored_type,
                });
            }
        };
        matrix(format, tile_scales)
    }

    fn int4(
        &self,
        scheme: Int4Scheme,
        name: &str,
        stem: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Matrix, WeightsError> {
        let groups = format!("{stem}.g_idx");
        let packed = Packed {
            name,
            codes: self.claim(&format!("{stem}.qweight"))?,
            zeros: self.claim(&format!("{stem}.qzeros"))?,
            scales: self.claim(&format!("{stem}.scales"))?,
            groups: match self.tensors.contains_key(&groups) {
                true => Some(self.claim(&groups)?),
                false => None,
            },
        };
        int4::repack(scheme, &packed, n_rows, n_cols)
    }

    fn packed_rows(
        &self,
        scheme: PackedScheme,
        name: &str,
        stem: &str,
        [n_rows, n_cols]: [usize; 2],
    ) -> Result<Matrix, WeightsError> {
        let packed = PackedRows {
            name,
            codes: self.claim(&format!("{stem}.weight_packed"))?,
            scales: self.claim(&format!("{stem}.weight_scale"))?,
            shape: self.claim(&format!("{stem}.weight_shape"))?,
            zeros: match scheme.symmetric {
                true => None,
                false => Some(self.claim(&format!("{stem}.weight_zero_point"))?),
            },
        };
        packed::repack(scheme, &packed, n_rows, n_cols)
    }

    /// Takes a vector of exactly this length, as f32.
    ///
    /// # Errors
    /// [`WeightsError`] when it is missing, has another shape, is not F32, F16 or BF16, or holds
    /// NaN or infinity.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, WeightsError> {
        let tensor = self.claim(name)?;
        tensor.expect_shape(&[len])?;
        tensor.to_f32()
    }

    /// Names of the tensors that nothing took, sorted.
    pub fn unclaimed(&self) -> Vec<String> {
        self.tensors
            .iter()
            .filter(|(_, entry)| !entry.claimed.load(Ordering::Relaxed))
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn claim(&self, name: &str) -> Result<&StoredTensor, WeightsError> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(WeightsError::MissingTensor {
                file: self.path.clone(),
                tensor: name.to_owned(),
            });
        };
        entry.claimed.store(true, Ordering::Relaxed);
        Ok(&entry.tensor)
    }

    /// Scales of a matrix with one for every row, `[n_rows]` or `[n_rows, 1]`.
    fn row_scales(
        &self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<TileScales, WeightsError> {
        let tensor = self.claim(name)?;
        if tensor.shape != [n_rows] {
            tensor.expect_shape(&[n_rows, 1])?;
        }
        Ok(TileScales {
            tile_rows: 1,
            tile_cols: n_cols,
            values: tensor.to_f32()?,
        })
    }

    fn tile_scales(
        &self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<TileScales, WeightsError> {
        let tensor = self.claim(name)?;
        let Scheme::Fp8(tile) = self.scheme else {
            return Err(WeightsError::Field {
                file: self.config_file.clone(),
                field: "quantization_config".to_owned(),
                expected: "the tile shape of the FP8 tensors".to_owned(),
                found: "missing".to_owned(),
            });
        };
        tensor.expect_shape(&[n_rows.div_ceil(tile.rows), n_cols.div_ceil(tile.cols)])?;
        Ok(TileScales {
            tile_rows: tile.rows,
            tile_cols: tile.cols,
            values: tensor.to_f32()?,
        })
    }
}

fn insert(
    tensors: &mut BTreeMap<String, Entry>,
    name: String,
    tensor: StoredTensor,
) -> Result<(), WeightsError> {
    if let Some(first) = tensors.get(&name) {
        return Err(WeightsError::DuplicateTensor {
            file: tensor.file.to_path_buf(),
            tensor: name,
            first: first.tensor.file.to_path_buf(),
        });
    }
    let entry = Entry {
        tensor,
        claimed: AtomicBool::new(false),
    };
    tensors.insert(name, entry);
    Ok(())
}

/// The three dimensions of a stack of matrices.
fn stack_shape(stack: &StoredTensor) -> Result<[usize; 3], WeightsError> {
    <[usize; 3]>::try_from(stack.shape.as_slice()).map_err(|_| WeightsError::TensorShape {
        file: stack.file.to_path_buf(),
        tensor: stack.name.clone(),
        expected: "three dimensions".to_owned(),
        found: super::tensor::shape_of(&stack.shape),
    })
}

/// `[heads, rows, cols]` as `[heads * rows, cols]`; the bytes lie alike.
fn join_stack(mut stack: StoredTensor) -> Result<StoredTensor, WeightsError> {
    let [n_heads, n_rows, n_cols] = stack_shape(&stack)?;
    // No overflow: the shape was found to fit the bytes of the file.
    stack.shape = vec![n_heads * n_rows, n_cols];
    Ok(stack)
}

/// Cuts `[experts, rows, cols]` into matrices that share the bytes.
fn cut_stack(stack: &StoredTensor) -> Result<Vec<StoredTensor>, WeightsError> {
    let [n_experts, n_rows, n_cols] = stack_shape(stack)?;
    // Exact: the bytes are n_experts times whole rows, checked when the file was read.
    let matrix_bytes = stack.data.len() / n_experts;
    Ok((0..n_experts)
        .map(|expert| StoredTensor {
            file: Arc::clone(&stack.file),
            name: stack.name.clone(),
            stored_type: stack.stored_type,
            shape: vec![n_rows, n_cols],
            data: stack
                .data
                .slice(expert * matrix_bytes..(expert + 1) * matrix_bytes),
        })
        .collect())
}

fn mapped_file(path: &Path) -> Result<MappedFile, WeightsError> {
    let metadata = path.metadata().map_err(|source| WeightsError::Read {
        file: path.to_owned(),
        source,
    })?;
    Ok(MappedFile {
        path: path.to_owned(),
        bytes: metadata.len(),
    })
}

fn read_object(file: &Path, what: &'static str) -> Result<Value, WeightsError> {
    let map: serde_json::Map<String, Value> = read_json(file, what)?;
    Ok(Value::Object(map))
}

fn architecture_of(file: &Path, config: &Value) -> Result<String, WeightsError> {
    let named = config.get("model_type").and_then(Value::as_str);
    let listed = config
        .get("architectures")
        .and_then(|list| list.get(0)?.as_str());
    match named.or(listed) {
        Some(architecture) => Ok(architecture.to_owned()),
        None => Err(WeightsError::Field {
            file: file.to_owned(),
            field: "model_type".to_owned(),
            expected: "the name of an architecture".to_owned(),
            found: "missing".to_owned(),
        }),
    }
}

/// One id or a list of them; none when the key is absent or null.
fn token_ids(file: &Path, config: &Value, key: &str) -> Result<Vec<u32>, WeightsError> {
    let refuse = |found: &Value| WeightsError::Field {
        file: file.to_owned(),
        field: key.to_owned(),
        expected: "a token id or a list of them".to_owned(),
        found: found.to_string().chars().take(200).collect(),
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|value| id(value).ok_or_else(|| refuse(value)))
            .collect(),
        Some(value) => Ok(vec![id(value).ok_or_else(|| refuse(value))?]),
    }
}
