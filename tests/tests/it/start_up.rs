//! Everything that keeps a node from starting: exit code 1 and one line that says what and where.

use std::{
    fs,
    net::{TcpListener, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use dsd_tests::{data, process, tool};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Starts `dsd dev` for a checkpoint, which must be refused with a line that holds all of `expected`.
#[track_caller]
fn check_model(model: &Path, expected: &[&str]) {
    let state = TempDir::new().unwrap();
    let mut command = tool::command("dsd");
    command
        .args([
            "dev",
            "--http",
            "127.0.0.1:0",
            "--quic",
            "127.0.0.1:0",
            "--model",
        ])
        .arg(model)
        .arg("--state")
        .arg(state.path());
    check(&mut command, expected);
}

/// Runs a command that must exit with 1 and end its standard error with one line that holds all of
/// `expected`.
#[track_caller]
fn check(command: &mut std::process::Command, expected: &[&str]) {
    let outcome = process::run(command, "");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let last = outcome.stderr.lines().last().unwrap_or("");
    assert!(last.starts_with("dsd: "), "{outcome:?}");
    for text in expected {
        assert!(last.contains(text), "no {text:?} in {last:?}");
    }
    assert_eq!(outcome.stderr.matches("dsd: ").count(), 1, "{outcome:?}");
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    assert!(
        !outcome.stderr.contains('\x1b'),
        "colour codes in a pipe: {outcome:?}"
    );
}

/// A copy of a tiny checkpoint, to be damaged.
struct Copy {
    _folder: TempDir,
    path: PathBuf,
}

impl Copy {
    fn of(checkpoint: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let path = data::copy_of(&data::reference(checkpoint), folder.path());
        Self {
            _folder: folder,
            path,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn edit(&self, name: &str, from: &str, to: &str) {
        let text = fs::read_to_string(self.file(name)).unwrap();
        assert!(text.contains(from), "{name} has no {from:?}");
        fs::write(self.file(name), text.replace(from, to)).unwrap();
    }

    /// Rewrites a safetensors file's header; the bytes of the tensors stay as they are.
    fn edit_header(&self, name: &str, change: impl FnOnce(String) -> String) {
        let bytes = fs::read(self.file(name)).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = change(String::from_utf8(bytes[8..8 + len].to_vec()).unwrap());
        let new_len = (header.len() as u64).to_le_bytes();
        fs::write(
            self.file(name),
            [&new_len[..], header.as_bytes(), &bytes[8 + len..]].concat(),
        )
        .unwrap();
    }
}

const SHARD_1: &str = "model-00001-of-00002.safetensors";
const SHARD_2: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn damaged_shards_are_refused_with_file_tensor_expected_and_found() {
    let copy = Copy::of("deepseek_v2_lite");
    let len = fs::metadata(copy.file(SHARD_2)).unwrap().len();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(copy.file(SHARD_2))
        .unwrap();
    file.set_len(len - 100).unwrap();
    check_model(&copy.path, &[SHARD_2, "tensor `", " bytes needed, "]);
    file.set_len(4).unwrap();
    check_model(&copy.path, &[SHARD_2, "8 bytes needed, 4 there"]);
    file.set_len(0).unwrap();
    check_model(&copy.path, &[SHARD_2]);

    let copy = Copy::of("deepseek_v2_lite");
    let bytes = fs::read(copy.file(SHARD_1)).unwrap();
    fs::write(copy.file(SHARD_1), [&bytes[..], b"more"].concat()).unwrap();
    let (found, expected) = ((bytes.len() + 4).to_string(), bytes.len().to_string());
    check_model(&copy.path, &[SHARD_1, &found, &expected]);

    let copy = Copy::of("deepseek_v2_lite");
    fs::rename(copy.file(SHARD_1), copy.file("aside")).unwrap();
    fs::rename(copy.file(SHARD_2), copy.file(SHARD_1)).unwrap();
    fs::rename(copy.file("aside"), copy.file(SHARD_2)).unwrap();
    check_model(&copy.path, &[SHARD_1, "tensor `", INDEX]);

    let copy = Copy::of("deepseek_v2_lite");
    fs::remove_file(copy.file(SHARD_2)).unwrap();
    check_model(&copy.path, &[INDEX, SHARD_2, "is missing"]);

    let copy = Copy::of("deepseek_v2_lite");
    copy.edit(INDEX, SHARD_2, "../../etc/passwd");
    check_model(
        &copy.path,
        &[INDEX, "`../../etc/passwd`", "expected a plain file name"],
    );
}

#[test]
fn impossible_headers_are_refused_with_file_and_tensor() {
    const FILE: &str = "model.safetensors";
    let flip = |from: &str, to: &str, expected: &[&str]| {
        let copy = Copy::of("llama");
        copy.edit_header(FILE, |header| {
            assert!(header.contains(from), "{from}");
            header.replacen(from, to, 1)
        });
        check_model(&copy.path, expected);
    };
    flip(
        "\"model.norm.weight\"",
        "\"model.norm.weight",
        &[FILE, "is not valid safetensors header"],
    );
    flip(
        "model.norm.weight",
        "model.morn.weight",
        &["`model.norm.weight` is missing"],
    );
    flip("\"dtype\":\"BF16\"", "\"dtype\":\"BF99\"", &[FILE, "BF99"]);
    flip("\"shape\":[", "\"shape\":[99,", &[FILE, "tensor `"]);

    let copy = Copy::of("llama");
    let mut bytes = fs::read(copy.file(FILE)).unwrap();
    bytes[7] = 0xff;
    fs::write(copy.file(FILE), &bytes).unwrap();
    check_model(&copy.path, &[FILE]);
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(copy.file(FILE), &bytes).unwrap();
    check_model(&copy.path, &[FILE]);
}

#[test]
fn a_tensor_too_many_is_refused_by_its_name() {
    let copy = Copy::of("llama");
    copy.edit_header("model.safetensors", |header| {
        let end = header.rfind('}').unwrap();
        let data_len = fs::metadata(copy.file("model.safetensors")).unwrap().len()
            - 8
            - header.len() as u64;
        format!(
            "{},\"model.extra.weight\":{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[{data_len},{}]}}}}",
            &header[..end],
            data_len + 4
        )
    });
    let bytes = fs::read(copy.file("model.safetensors")).unwrap();
    fs::write(
        copy.file("model.safetensors"),
        [&bytes[..], &[0; 4]].concat(),
    )
    .unwrap();
    check_model(&copy.path, &["model.extra.weight"]);
}

#[test]
fn configurations_that_do_not_fit_are_refused_with_the_key() {
    let edit = |from: &str, to: &str, expected: &[&str]| {
        let copy = Copy::of("llama");
        copy.edit("config.json", from, to);
        check_model(
            &copy.path,
            &[&[copy.path.to_str().unwrap()], expected].concat(),
        );
    };
    edit(
        "\"model_type\": \"llama\"",
        "\"model_type\": \"deepseek_v41\"",
        &["deepseek_v41"],
    );
    edit("\"hidden_size\":", "\"hidden_sighs\":", &["hidden_size"]);
    edit(
        "\"num_hidden_layers\": ",
        "\"num_hidden_layers\": 99",
        &["`num_hidden_layers` is 992", "2 layers"],
    );
    edit("{", "", &["config.json", "line 2"]);

    let copy = Copy::of("llama");
    fs::remove_file(copy.file("config.json")).unwrap();
    check_model(&copy.path, &["config.json"]);
    let copy = Copy::of("llama");
    fs::remove_file(copy.file("model.safetensors")).unwrap();
    check_model(&copy.path, &["expected"]);
    let copy = Copy::of("llama");
    fs::remove_file(copy.file("tokenizer.json")).unwrap();
    check_model(&copy.path, &["tokenizer.json"]);
    let copy = Copy::of("llama");
    fs::write(copy.file("tokenizer.json"), "{}").unwrap();
    check_model(&copy.path, &["tokenizer.json"]);
}

#[test]
fn damaged_gguf_files_are_refused_with_file_and_tensor() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    fs::copy(data::smollm2(), &path).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len / 2).unwrap();
    check_model(&path, &["model.gguf", "tensor `"]);
    file.set_len(1000).unwrap();
    check_model(&path, &["model.gguf"]);
    file.set_len(3).unwrap();
    check_model(&path, &["model.gguf"]);
    fs::write(&path, b"GGML and not GGUF").unwrap();
    check_model(&path, &["model.gguf"]);
}

#[test]
fn models_that_are_not_there_are_refused_with_their_path() {
    check_model(Path::new("/nonexistent/model"), &["`/nonexistent/model`"]);
    check_model(Path::new("/dev/null"), &["/dev/null"]);
    let folder = TempDir::new().unwrap();
    check_model(folder.path(), &[folder.path().to_str().unwrap()]);
    // No --model, and nothing in the store.
    let mut command = tool::command("dsd");
    command.args(["dev", "--http", "127.0.0.1:0", "--quic", "127.0.0.1:0"]);
    command.arg("--state").arg(folder.path());
    check(&mut command, &["there is no model in", "--model PATH"]);
}

#[test]
fn a_state_folder_that_cannot_be_written_is_refused_with_its_path() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let model = data::reference("llama");
    // Also for root, whom file modes do not stop.
    for state in [file.join("state"), file.clone(), PathBuf::from("/proc/dsd")] {
        let mut command = tool::command("dsd");
        command.args([
            "dev",
            "--http",
            "127.0.0.1:0",
            "--quic",
            "127.0.0.1:0",
            "--model",
        ]);
        command.arg(&model).arg("--state").arg(&state);
        check(
            &mut command,
            &["cannot write the state folder", state.to_str().unwrap()],
        );
    }
}

#[test]
fn a_port_in_use_is_refused_with_address_and_option() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (http, quic) = (
        tcp.local_addr().unwrap().to_string(),
        udp.local_addr().unwrap().to_string(),
    );
    let state = TempDir::new().unwrap();
    let free = "127.0.0.1:0";
    for (http, quic, expected) in [
        (http.as_str(), free, [http.as_str(), "--http"]),
        (free, quic.as_str(), [quic.as_str(), "--quic"]),
    ] {
        let mut command = tool::command("dsd");
        command.args(["dev", "--http", http, "--quic", quic, "--model"]);
        command
            .arg(data::reference("llama"))
            .arg("--state")
            .arg(state.path());
        check(&mut command, &expected);
    }
}

#[test]
fn configuration_files_are_refused_with_file_line_and_suggestion() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("dsd.toml");
    let path_text = path.to_str().unwrap();
    for (text, expected) in [
        (
            "version = 1\n[http]\nlisen = \"x\"\n",
            [":3: ", "did you mean `http.listen`?"],
        ),
        ("version = 1\n[htpp]\n", [":2: ", "htpp"]),
        (
            "version = 1\n\n[http]\nlisten = 7\n",
            [":4: ", "expected socket address"],
        ),
        (
            "version = 1\n[engine]\nstep_tokens = 0\n",
            [":3: ", "1 to 1048576"],
        ),
        ("version = 2\n", [":1: ", "version 1"]),
        ("[http]\n", ["dsd.toml", "`version = 1` is missing"]),
        ("version = \n", [":1: ", "dsd.toml"]),
    ] {
        fs::write(&path, text).unwrap();
        for verb in ["serve", "check-config"] {
            check(
                tool::command("dsd").args([verb, "--config", path_text]),
                &expected,
            );
        }
    }
    let missing = folder.path().join("absent.toml");
    let command = &mut tool::command("dsd");
    check(
        command.args(["check-config", "--config", missing.to_str().unwrap()]),
        &["absent.toml"],
    );

    // Addresses that are free wherever this runs.
    let addresses = "[http]\nlisten = \"127.0.0.1:0\"\n[quic]\nlisten = \"127.0.0.1:0\"\n";
    fs::write(&path, format!("version = 1\n{addresses}")).unwrap();
    let state = folder.path().join("state");
    let mut command = tool::command("dsd");
    command
        .args(["check-config", "--config", path_text])
        .env("DSD_NODE__STATE_DIR", &state);
    let outcome = process::run(&mut command, "");
    assert_eq!(
        (
            outcome.code,
            outcome.stdout.as_str(),
            outcome.stderr.as_str()
        ),
        (Some(0), "", "")
    );
    assert!(!state.exists(), "a check changes nothing");
    // A folder that others may write is said; keys that others may read would be refused.
    fs::create_dir(&state).unwrap();
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
    let keys = folder.path().join("keys");
    fs::write(&keys, "sk-0123456789abcdef\n").unwrap();
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = tool::command("dsd");
    command
        .args(["check-config", "--config", path_text])
        .env("DSD_NODE__STATE_DIR", &state)
        .env("DSD_HTTP__API_KEYS_FILE", &keys);
    let outcome = process::run(&mut command, "");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    for expected in [
        format!("run `chmod go-w {}`", state.display()),
        format!("run `chmod 600 {}`", keys.display()),
    ] {
        assert!(outcome.stderr.contains(&expected), "{outcome:?}");
    }
    // A start refuses such keys.
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
    let mut command = tool::command("dsd");
    command
        .args(["serve", "--config", path_text])
        .env("DSD_NODE__STATE_DIR", &state)
        .env("DSD_HTTP__API_KEYS_FILE", &keys);
    check(
        &mut command,
        &["who may call", "may be read or written by others"],
    );
    let mut command = tool::command("dsd");
    command
        .args(["check-config", "--config", path_text])
        .env("DSD_ENGINE__KV_TOKENZ", "1");
    check(
        &mut command,
        &["DSD_ENGINE__KV_TOKENZ", "DSD_ENGINE__KV_TOKENS"],
    );
    fs::create_dir(folder.path().join("dsd.toml.d")).unwrap();
    fs::write(
        folder.path().join("dsd.toml.d/10-x.toml"),
        "\n[node]\nname = 3\n",
    )
    .unwrap();
    check(
        tool::command("dsd").args(["check-config", "--config", path_text]),
        &["10-x.toml:3: "],
    );
}

/// What a start would refuse one by one, named at once.
#[test]
fn a_check_names_everything_that_a_start_would_refuse() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("dsd.toml");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let wrong = folder.path().join("wrong.gguf");
    fs::write(&wrong, "this is no model").unwrap();
    let tenants = folder.path().join("tenants.toml");
    fs::write(
        &tenants,
        "version = 1\n[[tenants]]\nname = \"a\"\nweigth = 1\n",
    )
    .unwrap();
    fs::set_permissions(&tenants, fs::Permissions::from_mode(0o600)).unwrap();
    let file = folder.path().join("a-file");
    fs::write(&file, "").unwrap();
    let text = format!(
        "version = 1\n\
         [node]\nstate_dir = {:?}\n\
         [http]\nlisten = \"{taken}\"\n\
         [quic]\nlisten = \"192.0.2.1:7600\"\n\
         [log]\nfilter = \"info,dsd::gatewy=debug\"\n\
         [service]\ntenants_file = {tenants:?}\n\
         [[models]]\nname = \"gone\"\npath = \"/nonexistent\"\n\
         [[models]]\nname = \"wrong\"\npath = {wrong:?}\n\
         [[models]]\nname = \"spare\"\npath = \"/nonexistent\"\nrequired = false\n\
         [[models]]\nname = \"good\"\npath = {:?}\nkv_tokens = 64\n",
        file.join("state"),
        data::reference("llama"),
    );
    fs::write(&path, text).unwrap();
    let check = |more: &[&str], env: &[(&str, &str)]| {
        let mut command = tool::command("dsd");
        command.args(["check-config", "--config", path.to_str().unwrap()]);
        command.args(more).envs(env.iter().copied());
        process::run(&mut command, "")
    };
    let outcome = check(&["--json"], &[("DSD_QUITE_ANOTHER", "1")]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let found: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let lines = |list: &str| {
        let line = |finding: &Value| {
            let file = finding["file"].as_str().unwrap_or("-");
            let name = file.rsplit('/').next().unwrap().to_owned();
            (name, finding["line"].as_u64().unwrap_or(0))
        };
        found[list]
            .as_array()
            .unwrap()
            .iter()
            .map(line)
            .collect::<Vec<_>>()
    };
    let at = |line| ("dsd.toml".to_owned(), line);
    let mut errors = lines("errors");
    errors.sort();
    let of_tenants = ("tenants.toml".to_owned(), 4);
    let expected = [at(3), at(5), at(7), at(9), at(14), at(17), of_tenants];
    assert_eq!(errors, expected, "{found:#}");
    let mut warnings = lines("warnings");
    warnings.sort();
    assert_eq!(warnings, [("-".to_owned(), 0), at(20)], "{found:#}");
    for suggestion in [
        "did you mean `dsd::gateway`?",
        "choose another with http.listen",
    ] {
        assert!(outcome.stdout.contains(suggestion), "{found:#}");
    }

    let outcome = check(&[], &[]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let n_errors = outcome
        .stderr
        .lines()
        .filter(|line| !line.contains("warning: "));
    assert_eq!(n_errors.count(), expected.len(), "{outcome:?}");
    for part in [
        "dsd.toml:3: cannot write the state folder",
        "dsd.toml:14: model `gone` at `/nonexistent`: its path cannot be read",
        "tenants.toml:4: unknown key `weigth`; did you mean `weight`?",
        "dsd: warning: ",
    ] {
        assert!(outcome.stderr.contains(part), "no {part}: {outcome:?}");
    }
    // Of a file that is wrong itself, only what it says is looked at.
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("listen = \"192", "lisen = \"192")).unwrap();
    let outcome = check(&[], &[("DSD_HTTP_LISTEN", "x"), ("DSD_LOG", "inof")]);
    for part in [
        "dsd.toml:7: unknown key `lisen`",
        "environment variable DSD_HTTP_LISTEN: unknown key `DSD_HTTP_LISTEN`; did you mean `DSD_HTTP__LISTEN`?",
        "environment variable DSD_LOG: log filter `inof`: nothing in this program is called `inof`; did you mean `info`?",
    ] {
        assert!(outcome.stderr.contains(part), "no {part}: {outcome:?}");
    }
}

/// What the node that runs holds is not free, and no reason against it.
#[test]
fn the_configuration_of_a_running_node_can_be_checked() {
    let model = data::reference("llama");
    let text = format!("version = 1\n[[models]]\nname = \"llama\"\npath = {model:?}\n");
    let node = dsd_tests::node::Node::builder(&model)
        .configuration(&text)
        .start();
    let mut command = tool::command("dsd");
    command
        .args(["check-config", "--config"])
        .arg(node.state().join("dsd.toml"))
        .env("DSD_NODE__STATE_DIR", node.state())
        .env("DSD_ENGINE__KV_TOKENS", "4096")
        .env("DSD_HTTP__LISTEN", node.http.to_string())
        .env("DSD_QUIC__LISTEN", node.quic.to_string());
    let outcome = process::run(&mut command, "");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    for part in [
        "is in use by another dsd",
        "cannot listen on HTTP",
        "cannot listen on QUIC",
    ] {
        assert!(outcome.stderr.contains(part), "no {part}: {outcome:?}");
    }
}

/// Such a filter used to keep from the log what it was written to show.
#[test]
fn a_log_filter_that_names_nothing_is_refused() {
    for (filter, expected) in [
        ("info,dds=debug", "did you mean `dsd`?"),
        (
            "dsd::nonsense=debug",
            "nothing in this program is called `dsd::nonsense`",
        ),
        ("info,=x=", "is not understood"),
    ] {
        let state = TempDir::new().unwrap();
        let mut command = tool::command("dsd");
        command
            .args([
                "dev",
                "--http",
                "127.0.0.1:0",
                "--quic",
                "127.0.0.1:0",
                "--state",
            ])
            .arg(state.path())
            .arg("--model")
            .arg(data::reference("llama"))
            .env("DSD_LOG", filter);
        check(&mut command, &[expected]);
    }
}

#[test]
fn what_a_model_runs_with_is_explained_with_where_it_comes_from_and_its_memory() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("dsd.toml");
    let path_text = path.to_str().unwrap();
    let models = format!(
        "version = 1\n[engine]\nrunning_max = 8\n\
         [[models]]\nname = \"r1\"\npath = {:?}\naliases = [\"deepseek-chat\"]\nkv_tokens = 256\n\
         [[models]]\nname = \"gone\"\npath = \"/nonexistent\"\nrequired = false\ntp = 2\n",
        data::reference("llama")
    );
    fs::write(&path, &models).unwrap();
    fs::create_dir(folder.path().join("dsd.toml.d")).unwrap();
    let drop_in = "[service]\nttft_target_s = 1.5\n";
    fs::write(folder.path().join("dsd.toml.d/a.toml"), drop_in).unwrap();
    let explain = |more: &[&str]| {
        let mut command = tool::command("dsd");
        command
            .args(["check-config", "--config", path_text, "--explain"])
            .args(more)
            .env("DSD_ENGINE__THREADS", "1");
        process::run(&mut command, "")
    };
    let outcome = explain(&["--json"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let explained: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let setting = |model: usize, key: &str| {
        let settings = explained["models"][model]["settings"].as_array().unwrap();
        let found = settings
            .iter()
            .find(|setting| setting["key"] == key)
            .unwrap();
        let from = found["from"].as_str().unwrap();
        let from = from.rsplit('/').next().unwrap().to_owned();
        (found["value"].as_str().unwrap().to_owned(), from)
    };
    for (model, key, value, from) in [
        (0, "aliases", "deepseek-chat", "dsd.toml:7"),
        (0, "kv_tokens", "256", "dsd.toml:8"),
        (0, "running_max", "8", "dsd.toml:3"),
        (0, "tp", "1", "default"),
        (
            0,
            "threads",
            "1",
            "environment variable DSD_ENGINE__THREADS",
        ),
        (1, "ttft_target_s", "1.5", "a.toml:2"),
        (1, "tp", "2", "dsd.toml:13"),
        (1, "required", "false", "dsd.toml:12"),
    ] {
        assert_eq!(
            setting(model, key),
            (value.to_owned(), from.to_owned()),
            "{key}"
        );
    }
    let plan = &explained["models"][0]["plan"];
    assert_eq!(
        (&plan["architecture"], &plan["kv_tokens"]),
        (&json!("llama"), &json!(256))
    );
    let own = plan["ranks"][0]["kv_bytes"].as_u64().unwrap();
    assert!(own < plan["own_bytes"].as_u64().unwrap(), "{plan}");
    let error = explained["models"][1]["error"].as_str().unwrap();
    assert!(error.contains("cannot be read"), "{error}");

    let outcome = explain(&[]);
    for expected in ["r1 (", "deepseek-chat", "kv cache", "environment variable"] {
        assert!(outcome.stdout.contains(expected), "{}", outcome.stdout);
    }

    // A model that would not be loaded is a failure.
    fs::write(&path, models.replace("kv_tokens = 256", "tp = 64")).unwrap();
    let outcome = explain(&[]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let expected = "would not be loaded: ";
    assert!(outcome.stdout.contains(expected), "{}", outcome.stdout);
}
