//! Writes small safetensors and GGUF files for tests.

use std::{fs, path::Path};

use serde_json::{Map, Value, json};

/// A safetensors file from a header and data.
pub(crate) fn safetensors_raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A safetensors file of `(name, type, shape, bytes)`.
pub(crate) fn safetensors(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    safetensors_raw(&Value::Object(header).to_string(), &data)
}

/// Little-endian f32 bytes.
pub(crate) fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Writes `config.json` and the given files.
pub(crate) fn write_folder(folder: &Path, config: &Value, files: &[(&str, Vec<u8>)]) {
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for (name, bytes) in files {
        fs::write(folder.join(name), bytes).unwrap();
    }
}

/// A GGUF file in the making. Fields are public so that tests can write wrong numbers.
#[derive(Clone)]
pub(crate) struct GgufWriter {
    pub(crate) version: u32,
    pub(crate) n_tensors: Option<u64>,
    pub(crate) n_keys: Option<u64>,
    pub(crate) keys: Vec<(String, Vec<u8>)>,
    pub(crate) tensors: Vec<GgufTensor>,
    /// Added behind the data.
    pub(crate) tail: Vec<u8>,
}

/// Dimensions fastest first, as in the file.
#[derive(Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: Vec<u8>,
    pub(crate) dims: Vec<u64>,
    pub(crate) type_id: u32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) offset: Option<u64>,
}

/// A length and bytes.
pub(crate) fn gguf_string(text: &[u8]) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text);
    bytes
}

impl GgufWriter {
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            n_tensors: None,
            n_keys: None,
            keys: Vec::new(),
            tensors: Vec::new(),
            tail: Vec::new(),
        }
    }

    pub(crate) fn raw(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        let mut bytes = value_type.to_le_bytes().to_vec();
        bytes.extend_from_slice(value);
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.to_owned(), bytes));
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, &[u8::from(value)])
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &gguf_string(value.as_bytes()))
    }

    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            bytes.extend(gguf_string(value.as_bytes()));
        }
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = 5u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            bytes.extend(value.to_le_bytes());
        }
        self.raw(key, 9, &bytes)
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push(GgufTensor {
            name: name.as_bytes().to_vec(),
            dims: dims.to_vec(),
            type_id,
            bytes,
            offset: None,
        });
        self
    }

    pub(crate) fn tensor_f32(self, name: &str, dims: &[u64], value: f32) -> Self {
        let n = dims.iter().product::<u64>() as usize;
        self.tensor(name, dims, 0, f32s(&vec![value; n]))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        const ALIGNMENT: usize = 32;
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(
            self.n_tensors
                .unwrap_or(self.tensors.len() as u64)
                .to_le_bytes(),
        );
        bytes.extend(self.n_keys.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            bytes.extend(gguf_string(key.as_bytes()));
            bytes.extend(value);
        }
        let mut data: Vec<u8> = Vec::new();
        for tensor in &self.tensors {
            data.resize(data.len().next_multiple_of(ALIGNMENT), 0);
            bytes.extend(gguf_string(&tensor.name));
            bytes.extend((tensor.dims.len() as u32).to_le_bytes());
            for dim in &tensor.dims {
                bytes.extend(dim.to_le_bytes());
            }
            bytes.extend(tensor.type_id.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend_from_slice(&tensor.bytes);
        }
        if !self.tensors.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        }
        bytes.extend(data);
        bytes.extend(&self.tail);
        bytes
    }
}

/// A one-layer llama of hidden size 32 with two heads, everything f32.
pub(crate) fn tiny_llama_gguf() -> GgufWriter {
    tiny_gguf("llama")
        .tensor_f32("blk.0.ffn_gate.weight", &[32, 64], 0.5)
        .tensor_f32("blk.0.ffn_up.weight", &[32, 64], 0.5)
        .tensor_f32("blk.0.ffn_down.weight", &[64, 32], 0.5)
}

/// The same for any architecture, without the feed-forward part.
pub(crate) fn tiny_gguf(architecture: &str) -> GgufWriter {
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    GgufWriter::new()
        .string("general.architecture", architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("embedding_length"), 32)
        .u32(&key("feed_forward_length"), 64)
        .u32(&key("attention.head_count"), 2)
        .u32(&key("attention.head_count_kv"), 1)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .u32(&key("context_length"), 128)
        .tensor_f32("token_embd.weight", &[32, 48], 0.25)
        .tensor_f32("output_norm.weight", &[32], 1.0)
        .tensor_f32("blk.0.attn_norm.weight", &[32], 1.0)
        .tensor_f32("blk.0.ffn_norm.weight", &[32], 1.0)
        .tensor_f32("blk.0.attn_q.weight", &[32, 32], 0.5)
        .tensor_f32("blk.0.attn_k.weight", &[32, 16], 0.5)
        .tensor_f32("blk.0.attn_v.weight", &[32, 16], 0.5)
        .tensor_f32("blk.0.attn_output.weight", &[32, 32], 0.5)
}
