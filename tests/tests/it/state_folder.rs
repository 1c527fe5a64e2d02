//! The state folder: one daemon at a time, whatever happens while it starts; certificates that have
//! expired; strangers in the places of files.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use dsd_proto::quic::{Role, pki};
use dsd_tests::{data, http, node::Node, process, silent::SilentHandshakes, tool, wait};
use tempfile::TempDir;

/// The shortest answer that a person or a probe still calls one.
const AT_ONCE: Duration = Duration::from_secs(1);

fn dev(state: &Path) -> Command {
    let mut command = tool::command("dsd");
    command
        .args(["dev", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0"])
        .arg("--model")
        .arg(data::reference("llama"))
        .arg("--state")
        .arg(state)
        .env("DSD_ENGINE__THREADS", "1")
        .env("DSD_ENGINE__KV_TOKENS", "4096")
        .env("DSD_LOG__FORMAT", "json")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// `dsd dev` whose standard error goes to a file.
struct Started {
    child: Child,
    log: std::path::PathBuf,
}

impl Started {
    fn new(state: &Path, log: std::path::PathBuf) -> Self {
        let file = fs::File::create(&log).unwrap();
        let child = dev(state).stderr(file).spawn().unwrap();
        Self { child, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The address for dsctl, once it listens.
    fn quic(&self) -> Option<String> {
        let log = self.log();
        let listening = log
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find(|record| record["message"] == "listening")?;
        Some(listening["quic"].as_str()?.to_owned())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

fn status(quic: &str, state: &Path) -> process::Outcome {
    let mut command = tool::command("dsctl");
    command.args(["--node", quic, "--state"]).arg(state);
    process::run(command.args(["--json", "status"]), "")
}

/// Answers, ready or not.
#[track_caller]
fn must_answer(outcome: &process::Outcome) {
    assert!(matches!(outcome.code, Some(0 | 2)), "{outcome:?}");
    assert!(outcome.stdout.contains("quic_address"), "{outcome:?}");
}

/// In four of six trials both used to write certificates, which then did not fit, for good.
#[test]
fn two_first_starts_at_once_leave_a_usable_folder() {
    for round in 0..20 {
        let folder = TempDir::new().unwrap();
        let state = folder.path().join("state");
        let start = |name: &str| Started::new(&state, folder.path().join(name));
        let mut both = [start("a.log"), start("b.log")];
        let loser = wait::until("one of them ends", || {
            both.iter_mut()
                .position(|one| one.child.try_wait().unwrap().is_some())
        });
        let log = both[loser].log();
        assert_eq!(
            both[loser].child.wait().unwrap().code(),
            Some(1),
            "round {round}: {log}"
        );
        let winner = &both[1 - loser];
        let expected = format!("in use by another dsd (pid {})", winner.child.id());
        assert!(log.contains(&expected), "round {round}: {log}");
        assert!(log.contains("--state"), "round {round}: {log}");
        let quic = wait::until("the other listens", || winner.quic());
        must_answer(&status(&quic, &state));
    }
}

/// Every state that a start leaves behind is one that the next start takes up.
#[test]
fn a_first_start_that_is_killed_anywhere_leaves_a_usable_folder() {
    let mut seed = 14u64;
    for round in 0..20 {
        let folder = TempDir::new().unwrap();
        let state = folder.path().join("state");
        for n in 0..3 {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // A first start has its certificates after 20 to 60 ms on this kind of machine.
            let micros = (seed >> 33) % 60_000;
            let mut killed = Started::new(&state, folder.path().join(format!("{n}.log")));
            thread::sleep(Duration::from_micros(micros));
            killed.child.kill().unwrap();
            killed.child.wait().unwrap();
        }
        let last = Started::new(&state, folder.path().join("last.log"));
        let quic = wait::until("the last start listens", || {
            assert!(!last.log().contains("dsd: "), "{round}: {}", last.log());
            last.quic()
        });
        must_answer(&status(&quic, &state));
    }
}

/// An expired certificate used to stop dsctl and the next start until somebody removed it.
#[test]
fn expired_certificates_are_renewed_at_the_start() {
    let state = TempDir::new().unwrap();
    let folder = state.path().join("pki");
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let past = now - 2 * 365 * 24 * 3600;
    let name = dsd::config::Config::default().node.name.parse().unwrap();
    pki::ensure(&folder, &"dsd".parse().unwrap(), &name, past).unwrap();
    let read = |name: &str| fs::read(folder.join(name)).unwrap();
    let before = ["ca.pem", "node.key", "admin.key"].map(read);
    let expired = status("127.0.0.1:1", state.path());
    assert!(expired.stderr.contains("expired at"), "{expired:?}");

    let node = Node::builder(&data::reference("llama"))
        .state(state.path())
        .start();
    tool::dsctl_json(&node, &["status"]);
    assert_eq!(["ca.pem", "node.key", "admin.key"].map(read), before);
    for role in [Role::Node, Role::Admin] {
        // On a clock that is stepped back by an hour, too.
        pki::load(&folder, role, now - 3600).unwrap();
    }
}

/// They used to hold every place of a connection for as long as they liked.
#[test]
fn nine_hundred_silent_handshakes_keep_dsctl_in() {
    let node = Node::start(&data::reference("llama"));
    tool::dsctl_json(&node, &["status"]);
    let silent = SilentHandshakes::against(node.quic, 900);
    wait::until_true("places held by silent handshakes", || {
        900 <= silent.n_begun()
    });
    let mut worst = Duration::ZERO;
    for _ in 0..20 {
        let started = Instant::now();
        tool::dsctl_json(&node, &["--timeout", "1s", "status"]);
        worst = worst.max(started.elapsed());
    }
    assert!(worst < AT_ONCE, "{worst:?}");
    assert!(900 < silent.n_begun());
    drop(silent);
    node.must_serve();
}

/// A pipe called config.json stopped the listing for good; a link to /dev/zero cost the agent's life.
#[test]
fn strangers_in_the_places_of_files_stop_nobody() {
    let node = Node::builder(&data::reference("llama"))
        .allow("a model was not loaded")
        .start();
    let store = node.state().join("models");
    fs::create_dir(&store).unwrap();
    let text = node.state().join("text");
    fs::write(&text, "Once").unwrap();
    let before = node.memory_bytes("VmRSS");
    type Put = fn(&Path);
    let strangers: [(&str, Put); 3] = [
        ("pipe", |place| {
            let made = Command::new("mkfifo").arg(place).status();
            assert!(made.unwrap().success());
        }),
        ("zero", |place| symlink("/dev/zero", place).unwrap()),
        ("folder", |place| fs::create_dir(place).unwrap()),
    ];
    for (stranger, put) in strangers {
        for (model, file) in [
            ("qwen2", "config.json"),
            ("qwen2", "tokenizer.json"),
            ("qwen2", "model.safetensors"),
        ] {
            let copy = data::copy_of(&data::reference(model), &store);
            fs::remove_file(copy.join(file)).unwrap();
            put(&copy.join(file));
            let started = Instant::now();
            let list = tool::dsctl_json(&node, &["model", "list"]);
            assert!(list["models"].is_array(), "{list}");
            for verb in ["load", "verify"] {
                let outcome = tool::dsctl(&node, &["--json", "model", verb, model]);
                // The check of bytes needs no tokenizer; what it finds is no refusal.
                let is_refused = matches!(outcome.code, Some(1 | 2));
                let is_needed = file != "tokenizer.json" || verb == "load";
                assert_eq!(is_refused, is_needed, "{stranger} {file}: {outcome:?}");
            }
            let mut eval = tool::command("dsd");
            eval.args(["eval", "tokenize", "--text-file"]).arg(&text);
            eval.arg("--model").arg(&copy);
            let outcome = process::run(&mut eval, "");
            assert_ne!(outcome.code, Some(0), "{stranger} {file}: {outcome:?}");
            assert!(started.elapsed() < Duration::from_secs(20));
            fs::remove_dir_all(&copy).unwrap();
        }
    }
    let grown = node.memory_bytes("VmRSS").saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    assert_eq!(http::get(node.http, "/health").status, 200);
    node.must_serve();
}
