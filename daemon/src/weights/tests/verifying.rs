//! `verify` finds what changed.

use std::fs;

use serde_json::json;

use super::{
    super::{Digests, mmap, verify},
    writer::{f32s, safetensors, tiny_llama_gguf, write_folder},
};

#[test]
fn a_flipped_bit_and_a_nan_are_found_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let write = |b: f32| {
        let weights = safetensors(&[
            ("a", "F32", &[2], f32s(&[1.0, 2.0])),
            ("b", "F32", &[1], f32s(&[b])),
        ]);
        let files = [("model.safetensors", weights)];
        write_folder(dir.path(), &json!({"model_type": "llama"}), &files);
    };
    write(1.0);
    let mut steps = Vec::new();
    let good = verify(dir.path(), None, |p| {
        steps.push((p.n_tensors_done, p.bytes_done))
    })
    .unwrap();
    assert!(good.is_good());
    assert_eq!(steps, [(1, 8), (2, 12)]);
    let digest_file = dir.path().join("digests.json");
    good.digests().save(&digest_file).unwrap();
    let saved = Digests::load(&digest_file).unwrap();
    assert_eq!(verify(dir.path(), Some(&saved), |_| ()).unwrap(), good);

    write(f32::NAN);
    let bad = verify(dir.path(), Some(&saved), |_| ()).unwrap();
    let found: Vec<_> = bad
        .findings
        .iter()
        .map(|f| (f.tensor.as_str(), f.found.as_str()))
        .collect();
    let digest = format!("blake3 {}", bad.tensors[1].digest);
    assert_eq!(
        found,
        [
            ("b", "NaN or infinity at element 0"),
            ("b", digest.as_str())
        ]
    );
    assert_ne!(bad.digest, good.digest);
}

#[test]
fn missing_and_extra_tensors_differ_from_saved_digests() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    fs::write(&file, tiny_llama_gguf().bytes()).unwrap();
    let mut saved = verify(&file, None, |_| ()).unwrap().digests();
    let digest = saved.tensors.remove("output_norm.weight").unwrap();
    saved
        .tensors
        .insert("gone.weight".to_owned(), digest.clone());
    let report = verify(&file, Some(&saved), |_| ()).unwrap();
    let found: Vec<_> = report
        .findings
        .iter()
        .map(|f| (f.tensor.as_str(), f.expected.as_str()))
        .collect();
    let expected = format!("blake3 {digest}");
    assert_eq!(
        found,
        [
            ("output_norm.weight", "no such tensor"),
            ("gone.weight", expected.as_str())
        ]
    );
}

#[test]
fn a_damaged_block_scale_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    let mut blocks = vec![0u8; 2 * 20];
    blocks[20 + 3] = 0x7C;
    let writer = tiny_llama_gguf().tensor("extra.weight", &[32, 2], 3, blocks);
    fs::write(&file, writer.bytes()).unwrap();
    let report = verify(&file, None, |_| ()).unwrap();
    assert_eq!(report.findings.len(), 1);
    assert_eq!(report.findings[0].tensor, "extra.weight");
    assert_eq!(report.findings[0].found, "NaN or infinity at block 1");
}

/// Reading it through its mapping ended the process.
#[test]
fn a_file_that_is_cut_off_meanwhile_is_a_finding() {
    let dir = tempfile::tempdir().unwrap();
    let weights = safetensors(&[
        ("a", "F32", &[4096], vec![0; 16384]),
        ("b", "F32", &[4096], vec![0; 16384]),
        ("c", "F32", &[4096], vec![0; 16384]),
    ]);
    let len = weights.len() as u64;
    let files = [("model.safetensors", weights)];
    write_folder(dir.path(), &json!({"model_type": "llama"}), &files);
    let file = dir.path().join("model.safetensors");
    let report = verify(dir.path(), None, |p| {
        if p.n_tensors_done == 1 {
            let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
            file.set_len(len - 16384 - 384).unwrap();
        }
    })
    .unwrap();
    let found: Vec<_> = report
        .findings
        .iter()
        .map(|f| (f.file.clone(), f.tensor.as_str(), f.found.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            (file.clone(), "b", "16000 bytes, then the file ends"),
            (file, "c", "0 bytes, then the file ends")
        ]
    );
}

/// Locking pages is all that the agent does with a mapping.
#[test]
fn locking_a_file_that_was_cut_off_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, vec![1; 1 << 16]).unwrap();
    let mapped = mmap::map_file(&path).unwrap();
    fs::write(&path, b"").unwrap();
    mmap::prefer_huge(&mapped.mapping);
    mmap::will_need(&mapped.mapping);
    assert!(mmap::lock(&mapped.mapping).is_err());
}

/// Infinities where one piece of the file ends and the next begins.
#[test]
fn numbers_are_counted_across_pieces() {
    let dir = tempfile::tempdir().unwrap();
    for index in [0, (1 << 18) - 1, 1 << 18, (1 << 19) + 5] {
        let mut values = vec![1.0; (1 << 19) + 6];
        values[index] = f32::INFINITY;
        let weights = safetensors(&[("a", "F32", &[values.len()], f32s(&values))]);
        let files = [("model.safetensors", weights)];
        write_folder(dir.path(), &json!({"model_type": "llama"}), &files);
        let report = verify(dir.path(), None, |_| ()).unwrap();
        assert_eq!(
            report.findings[0].found,
            format!("NaN or infinity at element {index}")
        );
    }
}
