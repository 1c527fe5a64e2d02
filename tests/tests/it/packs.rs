//! Packs from the outside: written, served, spoiled, and never half-written.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use dsd_tests::{
    data, http,
    node::Node,
    process::{self, Outcome},
    tool, wait,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Packs a checkpoint for one rank.
fn packed(model: &Path) -> (TempDir, PathBuf) {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("packed");
    let outcome = pack(model, &out);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let report = &outcome.json_lines()[0];
    assert_eq!(report["ranks"], 1);
    assert_eq!(
        report["bytes"],
        fs::metadata(rank_file(&out)).unwrap().len(),
        "{report}"
    );
    (folder, out)
}

fn pack(model: &Path, out: &Path) -> Outcome {
    let args = ["pack", "--json", "--tp", "1", "--model"];
    let mut command = tool::command("dsd");
    command.args(args).arg(model).arg("--out").arg(out);
    process::run(&mut command, "")
}

fn rank_file(pack: &Path) -> PathBuf {
    pack.join("rank-00-of-01.safetensors")
}

/// Names in a folder, hidden ones too.
fn names(folder: &Path) -> Vec<String> {
    let mut names = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect::<Vec<_>>();
    names.sort();
    names
}

fn answer(node: &Node) -> Value {
    let request = json!({"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0});
    let reply = node.post("/v1/completions", &request);
    assert_eq!(reply.status, 200, "{reply:?}");
    reply.json()["choices"].clone()
}

#[test]
fn a_pack_is_served_like_its_checkpoint_and_a_flipped_bit_takes_it_out() {
    let model = data::smollm2();
    let (_folder, out) = packed(&model);
    let expected = answer(&Node::builder(&model).start());
    let node = Node::builder(&out)
        .env("DSD_ENGINE__SCRUB_INTERVAL_S", 60)
        .allow("is damaged")
        .allow("cannot be locked into memory")
        .start();
    assert_eq!(answer(&node), expected);
    wait::until_true("the first scrub", || {
        let metrics = http::get(node.http, "/metrics").body;
        metrics.contains("dsd_pack_scrubs_total{model=\"packed\"} 1")
    });
    let report = tool::dsctl_json(&node, &["model", "verify", "packed"]);
    assert_eq!(report["verified"]["findings"], json!([]), "{report}");

    flip_last_bit(&rank_file(&out));
    let outcome = tool::dsctl(&node, &["--json", "model", "verify", "packed"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    drop(node);

    // A fresh start does not get so far.
    let state = TempDir::new().unwrap();
    let mut command = tool::command("dsd");
    command
        .args(["dev", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0"])
        .arg("--model")
        .arg(&out)
        .arg("--state")
        .arg(state.path());
    let outcome = process::run(&mut command, "");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(
        outcome.stderr.contains("is damaged: its blake3 is"),
        "{outcome:?}"
    );
}

/// The end of the last tensor, in front of its padding or not.
fn flip_last_bit(file: &Path) {
    let manifest: Value =
        serde_json::from_slice(&fs::read(file.with_file_name("manifest.json")).unwrap()).unwrap();
    let pieces = manifest["manifest"]["ranks"][0]["pieces"]
        .as_array()
        .unwrap();
    let at = pieces.last().unwrap()["span"]["offset"].as_u64().unwrap();
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn a_writer_that_is_killed_leaves_nothing_that_is_used() {
    let model = data::smollm2();
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("packed");
    let half = folder.path().join(".packed.packing");
    let mut child = tool::command("dsd")
        .args(["pack", "--tp", "1", "--model"])
        .arg(&model)
        .arg("--out")
        .arg(&out)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait::until_true("some of the pack", || {
        let written = fs::metadata(rank_file(&half)).map_or(0, |meta| meta.len());
        1 << 20 <= written || child.try_wait().unwrap().is_some()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(names(folder.path()), [".packed.packing"]);

    let outcome = pack(&model, &out);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(names(folder.path()), ["packed"]);
}

/// A limit on the length of files stands for a full disk: the same write fails, and for anybody.
#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let model = data::smollm2();
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("packed");
    let script = "trap '' XFSZ; ulimit -f 20000; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command
        .args(["-c", script])
        .arg(data::program("dsd"))
        .args(["pack", "--tp", "1", "--model"])
        .arg(&model)
        .arg("--out")
        .arg(&out);
    let outcome = process::run(&mut command, "");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    for text in ["cannot pack", "cannot write", "rank-00-of-01.safetensors"] {
        assert!(outcome.stderr.contains(text), "{outcome:?}");
    }
    assert_eq!(names(folder.path()), [""; 0]);
}
