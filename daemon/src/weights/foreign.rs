//! What people have in the place of weights that are read here, refused by its name.
//!
//! Each of these would be refused anyway, further on and in words that lead astray.

use std::{fs::File, path::Path};

use serde_json::Value;

use super::{error::WeightsError, side_file::read_json};
use crate::runtime::file;

/// First bytes of what Git leaves where a large file was not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";
/// A pointer is a few short lines.
const LFS_POINTER_BYTES_MAX: usize = 1024;
const PICKLES: [&str; 3] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
];

/// Refuses a file of weights that is only a Git LFS pointer.
///
/// # Errors
/// [`WeightsError::Foreign`], [`WeightsError::Read`].
pub(super) fn refuse_pointer(path: &Path, file: &File) -> Result<(), WeightsError> {
    let mut first = [0; LFS_POINTER_BYTES_MAX];
    let n_read = file::read_at(file, &mut first, 0).map_err(|source| WeightsError::Read {
        file: path.to_owned(),
        source,
    })?;
    refuse_pointer_bytes(path, &first[..n_read])
}

/// As [`refuse_pointer`], of a file's first bytes.
///
/// # Errors
/// [`WeightsError::Foreign`].
pub(super) fn refuse_pointer_bytes(path: &Path, first: &[u8]) -> Result<(), WeightsError> {
    if !first.starts_with(LFS_POINTER) {
        return Ok(());
    }
    let lines = String::from_utf8_lossy(&first[..first.len().min(LFS_POINTER_BYTES_MAX)]);
    let n_bytes = lines
        .lines()
        .find_map(|line| line.strip_prefix("size ")?.parse::<u64>().ok());
    Err(WeightsError::Foreign {
        file: path.to_owned(),
        found: match n_bytes {
            Some(n) => format!("a Git LFS pointer to a file of {n} bytes, not the file itself"),
            None => "a Git LFS pointer, not the file itself".to_owned(),
        },
        remedy: "fetch it with `git lfs pull`",
    })
}

/// Refuses a folder, without anything that is read, whose weights are pickles.
///
/// # Errors
/// [`WeightsError::Foreign`].
pub(super) fn refuse_pickles(folder: &Path) -> Result<(), WeightsError> {
    match PICKLES
        .iter()
        .map(|name| folder.join(name))
        .find(|file| file.exists())
    {
        None => Ok(()),
        Some(file) => Err(WeightsError::Foreign {
            file,
            found: "a checkpoint of PyTorch pickles, which are programs and never read".to_owned(),
            remedy: "convert it to safetensors (load it with transformers and call save_pretrained)",
        }),
    }
}

/// Refuses the configurations of MLX's quantization and of ModelOpt's, NVFP4 among them.
///
/// # Errors
/// [`WeightsError::Foreign`].
pub(super) fn refuse_config(file: &Path, config: &Value) -> Result<(), WeightsError> {
    let refuse = |found: String, remedy| {
        Err(WeightsError::Foreign {
            file: file.to_owned(),
            found,
            remedy,
        })
    };
    let word = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(short);
    let quantization = config.get("quantization_config");
    if let Some(modelopt) = quantization
        && word(modelopt, "quant_method").as_deref() == Some("modelopt")
    {
        return refuse(of_modelopt(word(modelopt, "quant_algo")), OTHER_FORM);
    }
    let mlx = config
        .get("quantization")
        .filter(|mlx| mlx.get("bits").is_some());
    match mlx {
        Some(mlx) if quantization.is_none_or(|q| q.get("quant_method").is_none()) => refuse(
            format!(
                "of a model quantized by MLX to {} bits",
                short(mlx["bits"].to_string())
            ),
            OTHER_FORM,
        ),
        _ => Ok(()),
    }
}

/// Refuses weights that are packed while the configuration says nothing of it; what packed them may
/// have left its own file beside.
///
/// # Errors
/// [`WeightsError::Foreign`].
pub(super) fn refuse_packed<'a>(
    folder: &Path,
    mut names: impl Iterator<Item = &'a str>,
) -> Result<(), WeightsError> {
    let side_file = |name| Some(folder.join(name)).filter(|file| file.exists());
    if let Some(file) = side_file("hf_quant_config.json") {
        let described: Value = read_json(&file, "hf_quant_config.json")?;
        if let Some(algorithm) = described["quantization"]["quant_algo"].as_str() {
            let found = of_modelopt(Some(short(algorithm)));
            let remedy = OTHER_FORM;
            return Err(WeightsError::Foreign {
                file,
                found,
                remedy,
            });
        }
    }
    if !names.any(|name| name.ends_with(".qweight")) {
        return Ok(());
    }
    let found = "without a quantization_config, and the weights are packed".to_owned();
    Err(
        match (
            side_file("quantize_config.json"),
            side_file("quant_config.json"),
        ) {
            (Some(file), _) => WeightsError::Foreign {
                file,
                found: "the description of GPTQ weights, which is read from config.json alone"
                    .to_owned(),
                remedy: "copy its keys there as `quantization_config`, with \"quant_method\": \"gptq\"",
            },
            (None, Some(file)) => WeightsError::Foreign {
                file,
                found: "the description of AWQ weights, which is read from config.json alone"
                    .to_owned(),
                remedy: "write there, as `quantization_config`: {\"quant_method\": \"awq\", \"bits\": w_bit, \
                     \"group_size\": q_group_size, \"zero_point\": zero_point, \"version\": version}",
            },
            (None, None) => WeightsError::Foreign {
                file: folder.join("config.json"),
                found,
                remedy: "write there how they are packed (quant_method, bits, group_size)",
            },
        },
    )
}

const OTHER_FORM: &str =
    "use the model it was made from, or a form of it in FP8, AWQ, GPTQ or GGUF";

fn of_modelopt(algorithm: Option<String>) -> String {
    let algorithm = algorithm.unwrap_or_else(|| "form not named".to_owned());
    format!("of a model quantized by ModelOpt ({algorithm})")
}

fn short(text: impl AsRef<str>) -> String {
    text.as_ref().chars().take(64).collect()
}
