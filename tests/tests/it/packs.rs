//! Packs from the outside: written, served, spoiled, and never half-written.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
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

/// Cuts a file off and makes it whole again, in place.
struct Cut {
    path: PathBuf,
    whole: Vec<u8>,
}

impl Cut {
    fn of(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            whole: fs::read(path).unwrap(),
        }
    }

    fn off(&self, share: f64) {
        let file = fs::OpenOptions::new().write(true).open(&self.path);
        let len = self.whole.len() as f64 * share;
        file.unwrap().set_len(len as u64).unwrap();
    }

    fn mend(&self) {
        fs::write(&self.path, &self.whole).unwrap();
    }
}

/// The same numbers below 1 in every run.
fn seeded(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// The check read the file through its mapping; one run in eight ended the agent with SIGBUS.
#[test]
fn a_pack_that_is_cut_off_while_it_is_verified_costs_nobody_s_life() {
    let (_folder, out) = packed(&data::smollm2());
    let node = Node::start(&data::reference("llama"));
    let store = node.state().join("models");
    fs::create_dir(&store).unwrap();
    let pack = data::copy_of(&out, &store);
    let cut = Cut::of(&rank_file(&pack));
    let verify = || {
        let started = Instant::now();
        let outcome = tool::dsctl(&node, &["--json", "model", "verify", "packed"]);
        (outcome, started.elapsed())
    };
    let (good, took) = verify();
    assert_eq!(good.code, Some(0), "{good:?}");
    let mut random = seeded(14);
    let mut n_found = 0;
    for round in 0..24 {
        let (delay, share) = (took.mul_f64(random()), random());
        let outcome = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(delay);
                cut.off(share);
            });
            verify().0
        });
        cut.mend();
        assert!(
            matches!(outcome.code, Some(0 | 2)),
            "round {round}: {outcome:?}"
        );
        let report = outcome.json_lines().pop().unwrap();
        for finding in report["verified"]["findings"].as_array().unwrap() {
            let file = finding["file"].as_str().unwrap();
            let is_named = file == "rank-00-of-01.safetensors" || file == pack.to_str().unwrap();
            assert!(is_named, "{finding}");
            let found = finding["found"].as_str().unwrap();
            let is_of_tensor = found.ends_with("then the file ends");
            assert_eq!(is_of_tensor, finding["tensor"] != "", "{finding}");
            n_found += usize::from(is_of_tensor);
        }
    }
    assert!(0 < n_found, "no cut came in the middle of a check");
    node.must_serve();
}

/// A scrub met the end of the file every time. Ranks compute with the mapping and may be lost.
#[test]
fn a_pack_that_is_cut_off_while_it_is_scrubbed_does_not_end_the_agent() {
    let (_folder, out) = packed(&data::smollm2());
    let cut = Cut::of(&rank_file(&out));
    let mut random = seeded(15);
    for round in 0..3 {
        let node = Node::builder(&out)
            // The first scrub takes some four seconds.
            .env("DSD_ENGINE__SCRUB_BYTES_PER_S", cut.whole.len() / 4)
            // Whatever ranks have to say about their end.
            .allow("")
            .start();
        let pid = node.pid();
        thread::sleep(Duration::from_secs_f64(2.0 * random()));
        cut.off(random() * 0.4);
        let damage = wait::until("damage is found", || {
            node.logged("a tensor of the pack is damaged; pack the checkpoint again and load the model anew")
        });
        assert_eq!(damage["file"], rank_file(&out).to_str().unwrap());
        assert_ne!(damage["tensor"], "", "round {round}");
        let found = damage["found"].as_str().unwrap();
        assert!(found.ends_with("then the file ends"), "{damage}");
        assert_eq!(http::get(node.http, "/health").status, 200);
        assert_eq!(node.pid(), pid);
        drop(node);
        cut.mend();
    }
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

/// It used to leave what it had written to the next pack of that name.
#[test]
fn a_writer_that_is_interrupted_leaves_nothing() {
    let model = data::smollm2();
    for (signal, code) in [("INT", 130), ("TERM", 143), ("HUP", 129)] {
        let folder = TempDir::new().unwrap();
        let half = folder.path().join(".packed.packing");
        let mut child = tool::command("dsd")
            .args(["pack", "--tp", "1", "--model"])
            .arg(&model)
            .arg("--out")
            .arg(folder.path().join("packed"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        wait::until_true("a beginning", || {
            half.exists() || child.try_wait().unwrap().is_some()
        });
        process::signal(child.id(), signal);
        let status = process::exit_of(&mut child, "an interrupted pack");
        assert_eq!(status.code(), Some(code), "{signal}");
        assert_eq!(names(folder.path()), [""; 0], "{signal}");
    }
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

/// The canary used to run only when nothing else did: wrong answers under load went on and on, and
/// `/ready` said 200.
#[test]
fn weights_that_are_overwritten_under_load_turn_readiness() {
    let (_folder, out) = packed(&data::smollm2());
    let node = Node::builder(&out)
        // Not by looking at the file.
        .env("DSD_ENGINE__SCRUB_INTERVAL_S", 86_400)
        .allow("canary")
        .allow("is damaged")
        .allow("cannot be locked into memory")
        .start();
    let body = json!({"prompt": [1, 2, 3], "max_tokens": 16, "ignore_eos": true});
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let took = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Acquire) {
                    node.post("/v1/completions", &body);
                }
            });
        }
        wait::until_true("traffic", || node.model_status()["n_running"] != 0);
        nudge(&rank_file(&out));
        let at = Instant::now();
        let words = wait::until_or(wait::DEADLINE, || {
            let reply = node.get("/ready");
            (reply.status == 503).then_some(reply.body)
        });
        is_over.store(true, std::sync::atomic::Ordering::Release);
        let words = words.unwrap_or_else(|| panic!("still ready"));
        assert!(words.contains("answers a fixed prompt"), "{words}");
        at.elapsed()
    });
    // A second of the canary's interval, steps that other tests slow down, and the writing.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// Flips the lowest bit of every 64th byte in the middle half of a file, in place: answers stay text.
fn nudge(path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.unwrap();
    let len = file.metadata().unwrap().len();
    let mut part = vec![0; (len / 2) as usize];
    file.read_exact_at(&mut part, len / 4).unwrap();
    part.iter_mut().step_by(64).for_each(|byte| *byte ^= 1);
    file.write_all_at(&part, len / 4).unwrap();
}
