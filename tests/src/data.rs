//! Where checkpoints, programs and the official client lie.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// A tiny checkpoint of an architecture, such as `deepseek_v3`.
///
/// # Panics
/// When it was not set up.
pub fn reference(name: &str) -> PathBuf {
    set_up(repository().join("target/test-data/reference").join(name))
}

/// SmolLM2-135M-Instruct as GGUF.
///
/// # Panics
/// When it was not set up.
pub fn smollm2() -> PathBuf {
    set_up(repository().join("target/test-data/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// Folder for `PYTHONPATH` with the official client.
///
/// # Panics
/// When it was not set up.
pub fn python_path() -> PathBuf {
    let folder = set_up(repository().join("target/test-python"));
    set_up(folder.join("openai"));
    folder
}

/// Folder with Anthropic's Python client.
///
/// # Panics
/// When it was not set up.
pub fn anthropic_path() -> PathBuf {
    let folder = set_up(repository().join("target/test-python-anthropic"));
    set_up(folder.join("anthropic"));
    folder
}

/// Folder with the packages of a client, by its name in `tests/setup.py`.
///
/// # Panics
/// When it was not set up.
pub fn client(name: &str) -> PathBuf {
    set_up(repository().join("target/test-clients").join(name))
}

/// A program of this workspace, of the same profile as the test.
///
/// # Panics
/// When it was not built.
pub fn program(name: &str) -> PathBuf {
    // target/<profile>/deps/<test>
    let test = env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join(name);
    assert!(
        path.is_file(),
        "{} is missing; run `cargo build --workspace`",
        path.display()
    );
    path
}

/// A copy of a checkpoint folder that a test may damage.
pub fn copy_of(checkpoint: &Path, into: &Path) -> PathBuf {
    let copy = into.join(checkpoint.file_name().unwrap());
    fs::create_dir_all(&copy).unwrap();
    for entry in fs::read_dir(checkpoint).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

fn set_up(path: PathBuf) -> PathBuf {
    assert!(
        path.exists(),
        "{} is missing; run `make test-setup`",
        path.display()
    );
    path
}
