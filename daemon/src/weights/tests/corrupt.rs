//! Single files, damaged.

use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    super::{gguf, safetensors},
    describe,
    writer::{
        GgufWriter, f32s, gguf_string, safetensors as write, safetensors_raw, tiny_llama_gguf,
    },
};

fn check_safetensors(bytes: Vec<u8>, expected: &str) {
    let path = Path::new("/m/a.safetensors");
    let error = safetensors::parse(path, &Bytes::from(bytes)).expect_err(expected);
    assert_eq!(describe(&error, Path::new("/m")), expected);
}

fn check_header(header: &str, n_data: usize, expected: &str) {
    check_safetensors(safetensors_raw(header, &vec![0; n_data]), expected);
}

fn check_gguf(writer: &GgufWriter, expected: &str) {
    check_gguf_bytes(writer.bytes(), expected);
}

fn check_gguf_bytes(bytes: Vec<u8>, expected: &str) {
    let path = Path::new("/m/a.gguf");
    let error = gguf::parse(path, &Bytes::from(bytes))
        .err()
        .expect(expected);
    assert_eq!(describe(&error, Path::new("/m")), expected);
}

#[test]
fn damaged_safetensors_are_refused_by_name() {
    let good = write(&[
        ("a", "F32", &[2, 3], f32s(&[1.0; 6])),
        ("b", "BF16", &[4], vec![0; 8]),
    ]);
    let path = Path::new("/m/a.safetensors");
    assert_eq!(
        safetensors::parse(path, &Bytes::from(good.clone()))
            .unwrap()
            .len(),
        2
    );

    check_safetensors(
        good[..4].to_vec(),
        "Truncated: `@a.safetensors` ends inside the header length: 8 bytes needed, 4 there",
    );
    check_safetensors(
        good[..50].to_vec(),
        "Truncated: `@a.safetensors` ends inside the header: 121 bytes needed, 50 there",
    );
    check_safetensors(
        good[..good.len() - 1].to_vec(),
        "Truncated: `@a.safetensors` ends inside tensor `b`: 8 bytes needed, 7 there",
    );
    let longer = [good.as_slice(), &[0; 3]].concat();
    check_safetensors(
        longer,
        "FileLength: `@a.safetensors` is 156 bytes long, its header describes 153",
    );
    let mut huge = good;
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    check_safetensors(
        huge,
        "TooLarge: `@a.safetensors`: the header length is 18446744073709551615, at most 100000000 is accepted",
    );
    check_header(
        "{",
        0,
        "Json: `@a.safetensors` is not valid safetensors header",
    );
    check_header(
        r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}"#,
        4,
        "Json: `@a.safetensors` is not valid safetensors header",
    );
    check_header(
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
        4,
        "Json: `@a.safetensors` is not valid safetensors header",
    );
    check_header(
        &format!(
            r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#,
            "n".repeat(1025)
        ),
        4,
        "TooLarge: `@a.safetensors`: the length of a tensor name is 1025, at most 1024 is accepted",
    );
    check_safetensors(
        [&2u64.to_le_bytes()[..], &[0xFF, 0xFE]].concat(),
        "NotUtf8: `@a.safetensors`: safetensors header is not UTF-8",
    );
}

#[test]
fn impossible_safetensors_entries_are_refused_by_name() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    check_header(
        &one("F4", "[8]", "[0,4]"),
        4,
        "TensorType: `@a.safetensors`: tensor `a` has type F4, expected a safetensors type this version knows",
    );
    check_header(
        &one("F32", "[0,4]", "[0,0]"),
        0,
        "TensorShape: `@a.safetensors`: tensor `a` has shape [0, 4], expected dimensions of at least 1",
    );
    check_header(
        &one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"),
        4,
        "TensorShape: `@a.safetensors`: tensor `a` has shape [1, 1, 1, 1, 1, 1, 1, 1, 1], expected at most 8 dimensions",
    );
    check_header(
        &one("F32", "[4294967296,4294967296]", "[0,4]"),
        4,
        "TensorShape: `@a.safetensors`: tensor `a` has shape [4294967296, 4294967296], expected whole f32 blocks and a size within 18446744073709551615 bytes",
    );
    check_header(
        &one("F32", "[2]", "[0,4]"),
        4,
        "TensorBytes: `@a.safetensors`: tensor `a` has 4 bytes, expected 8",
    );
    check_header(
        &one("F32", "[1]", "[4,0]"),
        4,
        "TensorOffset: `@a.safetensors`: tensor `a` starts at byte 4, expected 0",
    );
    check_header(
        &one("F32", "[1]", "[0,18446744073709551615]"),
        4,
        "TensorBytes: `@a.safetensors`: tensor `a` has 18446744073709551615 bytes, expected 4",
    );
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},
                "b":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    check_header(
        &two("[0,8]", "[4,12]"),
        12,
        "TensorOffset: `@a.safetensors`: tensor `b` starts at byte 4, expected 8",
    );
    check_header(
        &two("[0,8]", "[12,20]"),
        20,
        "TensorOffset: `@a.safetensors`: tensor `b` starts at byte 12, expected 8",
    );
    let twice = two("[0,8]", "[8,16]").replace("\"b\"", "\"a\"");
    check_header(
        &twice,
        16,
        "DuplicateTensor: `@a.safetensors`: tensor `a` is there twice, first in `@a.safetensors`",
    );
}

#[test]
fn damaged_gguf_headers_are_refused_by_name() {
    let good = tiny_llama_gguf();
    assert!(gguf::parse(Path::new("/m/a.gguf"), &Bytes::from(good.bytes())).is_ok());
    let with = |edit: &dyn Fn(&mut GgufWriter)| {
        let mut writer = good.clone();
        edit(&mut writer);
        writer
    };
    let mut bytes = good.bytes();
    bytes[..4].copy_from_slice(b"GGML");
    check_gguf_bytes(
        bytes,
        "Field: `@a.gguf`: magic number is `GGML`, expected GGUF",
    );
    check_gguf_bytes(
        Vec::new(),
        "Truncated: `@a.gguf` ends inside the magic number: 4 bytes needed, 0 there",
    );
    check_gguf(
        &with(&|w| w.version = 1),
        "Field: `@a.gguf`: GGUF version is 1, expected 2 or 3, little endian",
    );
    check_gguf(
        &with(&|w| w.version = 3u32.swap_bytes()),
        "Field: `@a.gguf`: GGUF version is a big-endian file, expected 2 or 3, little endian",
    );
    check_gguf(
        &with(&|w| w.n_tensors = Some(u64::MAX)),
        "TooLarge: `@a.gguf`: the number of tensors is 18446744073709551615, at most 100000 is accepted",
    );
    check_gguf(
        &with(&|w| w.n_keys = Some(1 << 40)),
        "TooLarge: `@a.gguf`: the number of keys is 1099511627776, at most 4096 is accepted",
    );
    check_gguf(
        &good.clone().raw("x", 8, &u64::MAX.to_le_bytes()),
        "TooLarge: `@a.gguf`: x is 18446744073709551615, at most 16777216 is accepted",
    );
    let array = [&4u32.to_le_bytes()[..], &(1u64 << 60).to_le_bytes()].concat();
    check_gguf(
        &good.clone().raw("x", 9, &array),
        "TooLarge: `@a.gguf`: x is 1152921504606846976, at most 8388608 is accepted",
    );
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
    check_gguf(
        &good.clone().raw("x", 9, &nested),
        "Field: `@a.gguf`: x is an array of arrays, expected an array of plain values",
    );
    check_gguf(
        &good.clone().raw("x", 13, &[]),
        "Field: `@a.gguf`: value type of `x` is 13, expected 0 to 12",
    );
    check_gguf(
        &good.clone().raw("x", 7, &[2]),
        "Field: `@a.gguf`: x is 2, expected 0 or 1",
    );
    check_gguf(
        &good.clone().raw("x", 8, &gguf_string(&[0xFF])),
        "NotUtf8: `@a.gguf`: x is not UTF-8",
    );
    check_gguf(
        &with(&|w| w.keys.push(w.keys[0].clone())),
        "Field: `@a.gguf`: general.architecture is twice, expected once",
    );
    check_gguf(
        &good.clone().u32("general.alignment", 24),
        "Field: `@a.gguf`: general.alignment is 24, expected a power of two from 8 to 65536",
    );
    check_gguf(
        &good.clone().u32("general.alignment", 1 << 30),
        "Field: `@a.gguf`: general.alignment is 1073741824, expected a power of two from 8 to 65536",
    );
}

#[test]
fn impossible_gguf_tensors_are_refused_by_name() {
    let good = tiny_llama_gguf();
    let last = good.tensors.len() - 1;
    let with = |edit: &dyn Fn(&mut GgufWriter)| {
        let mut writer = good.clone();
        edit(&mut writer);
        writer
    };
    check_gguf(
        &with(&|w| w.tensors[0].type_id = 10),
        "TensorType: `@a.gguf`: tensor `token_embd.weight` has type Q2_K, expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K",
    );
    check_gguf(
        &with(&|w| w.tensors[0].type_id = 77),
        "TensorType: `@a.gguf`: tensor `token_embd.weight` has type unknown ggml type 77, expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K",
    );
    check_gguf(
        &with(&|w| w.tensors[0].dims = vec![0, 48]),
        "TensorShape: `@a.gguf`: tensor `token_embd.weight` has shape [48, 0], expected dimensions of at least 1",
    );
    check_gguf(
        &with(&|w| w.tensors[0].dims = vec![u64::MAX, u64::MAX]),
        "TensorShape: `@a.gguf`: tensor `token_embd.weight` has shape [18446744073709551615, 18446744073709551615], expected whole f32 blocks and a size within 18446744073709551615 bytes",
    );
    check_gguf(
        &with(&|w| (w.tensors[0].type_id, w.tensors[0].dims) = (14, vec![32, 48])),
        "TensorShape: `@a.gguf`: tensor `token_embd.weight` has shape [48, 32], expected whole q6_k blocks and a size within 18446744073709551615 bytes",
    );
    check_gguf(
        &with(&|w| w.tensors[0].dims = vec![1; 5]),
        "Field: `@a.gguf`: number of dimensions of tensor `token_embd.weight` is 5, expected 1 to 4",
    );
    check_gguf(
        &with(&|w| w.tensors[1].offset = Some(0)),
        "TensorOffset: `@a.gguf`: tensor `output_norm.weight` starts at byte 0, expected 6144",
    );
    check_gguf(
        &with(&|w| w.tensors[1].name = b"token_embd.weight".to_vec()),
        "DuplicateTensor: `@a.gguf`: tensor `token_embd.weight` is there twice, first in `@a.gguf`",
    );
    check_gguf(
        &with(&|w| w.tensors[1].name = vec![0xC0, 0x80]),
        "NotUtf8: `@a.gguf`: a tensor name is not UTF-8",
    );
    check_gguf(
        &with(&|w| w.tensors[last].bytes.truncate(100)),
        "Truncated: `@a.gguf` ends inside tensor `blk.0.ffn_down.weight`: 8192 bytes needed, 100 there",
    );
    check_gguf(
        &with(&|w| w.tail = vec![0; 33]),
        &format!(
            "FileLength: `@a.gguf` is {} bytes long, its header describes {}",
            good.bytes().len() + 33,
            good.bytes().len()
        ),
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_safetensors_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let good = write(&[
            ("model.a", "F32", &[2, 3], f32s(&[1.0; 6])),
            ("model.b", "F8_E4M3", &[2, 2], vec![1; 4]),
        ]);
        let bytes = mutate(good, &edits, truncate.then_some(cut));
        if let Ok(tensors) = safetensors::parse(Path::new("x"), &bytes.into()) {
            for tensor in tensors {
                let _ = tensor.to_f32();
            }
        }
    }

    #[test]
    fn mutated_gguf_never_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let writer = tiny_llama_gguf().strings("tokenizer.ggml.tokens", &["a", "b"]);
        let header_len = writer.bytes().len() - writer.tensors.iter().map(|t| t.bytes.len()).sum::<usize>();
        let good = writer.bytes();
        // Most edits belong into the header: that is what is parsed.
        let (head, data) = good.split_at(header_len);
        let mut bytes = mutate(head.to_vec(), &edits, None);
        bytes.extend_from_slice(data);
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(gguf) = gguf::parse(Path::new("x"), &bytes.into()) {
            let _ = super::super::gguf_config::translate(&gguf.metadata, &gguf.tensors);
            let _ = super::super::gguf_config::eos_token_ids(&gguf.metadata);
        }
    }
}

fn mutate(
    mut bytes: Vec<u8>,
    edits: &[(prop::sample::Index, u8)],
    cut: Option<prop::sample::Index>,
) -> Vec<u8> {
    for (at, value) in edits {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
    bytes
}
