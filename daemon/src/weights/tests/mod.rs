//! Checkpoints written here, then damaged in every way the readers know; and real ones.

pub(crate) mod writer;
mod corrupt;
mod folder;
mod foreign;
mod quantized;
mod reference;
mod split;
mod verifying;

use std::path::PathBuf;

use super::WeightsError;

/// The folder of test data.
pub(crate) fn test_data() -> PathBuf {
    let folder = std::env::var_os("DSD_TEST_DATA").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-data"),
        PathBuf::from,
    );
    assert!(
        folder.is_dir(),
        "no test data at {}: run `make test-setup`",
        folder.display()
    );
    folder
}

/// A golden of the repository, `tests/data/NAME`.
pub(crate) fn golden(name: &str) -> serde_json::Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Variant and message of an error, the folder replaced by `@`.
fn describe(error: &WeightsError, folder: &std::path::Path) -> String {
    let debug = format!("{error:?}");
    let variant: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
    let shown = error
        .to_string()
        .replace(&format!("{}/", folder.display()), "@");
    let shown = shown.replace(&folder.display().to_string(), "@");
    format!("{variant}: {shown}")
}
