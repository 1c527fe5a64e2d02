//! The node's configuration: one TOML file, drop-ins and environment, checked once, then plain data.
//!
//! Opens no socket and loads no model. Called by `main`; every other module takes the part it needs.
//!
//! Invariant: a `Config` holds only values within the ranges of docs/CONFIG.md.

mod keys;
mod load;
mod suggest;

pub use keys::{
    Activations, Alias, Class, Config, EngineConfig, HttpConfig, KEYS, KeyDoc, KvType, LogConfig,
    LogFormat, ModelConfig, ModelOverrides, ModelSettings, NodeConfig, Origins, QuicConfig,
    ServiceConfig,
};
pub use load::{ConfigError, Contradiction, Origin};
pub(crate) use suggest::nearest;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

/// Where the configuration lies unless the command line says otherwise.
pub const PATH_DEFAULT: &str = "/etc/dsd/dsd.toml";

impl Config {
    /// Settings of `dsd dev`: loopback only, no keys, given models, state in the user's folder.
    ///
    /// # Errors
    /// When two models have the same name.
    pub fn dev(state_dir: PathBuf, models: Vec<ModelConfig>) -> Result<Self, ConfigError> {
        let mut config = Self {
            models,
            ..Self::default()
        };
        config.node.state_dir = state_dir;
        config.http.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 8000));
        config.quic.listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 7600));
        load::check_models(&config.models)?;
        Ok(config)
    }
}

/// docs/CONFIG.md as it must read.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         `dsd` reads `/etc/dsd/dsd.toml`, then every `dsd.toml.d/*.toml` beside it in the order of their names, then the\n\
         environment (`DSD_HTTP__LISTEN=0.0.0.0:8000` sets `listen` of `[http]`). Later values replace earlier ones; `[[models]]`\n\
         entries add up. Unknown keys, wrong types and values out of range stop the start with file, line and a suggestion.\n\n\
         The file begins with `version = 1`.\n",
    );
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            let heading = if section == "models" {
                "[[models]]".to_owned()
            } else {
                format!("[{section}]")
            };
            text.push_str(&format!(
                "\n## {heading}\n\n| key | default | range | meaning |\n|---|---|---|---|\n"
            ));
        }
        text.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            key.name, key.default, key.range, key.doc
        ));
    }
    for key in KEYS.iter().filter(|key| key.per_model) {
        text.push_str(&format!(
            "| `{}` | `{}.{0}` | {} | {} |\n",
            key.name, key.section, key.range, "In place of that key, for this model."
        ));
    }
    text.push_str(
        "\nA model that is loaded by hand (`dsctl model load`) has the settings of the entry of its name, else those of the\n\
         sections. `kv_tokens` or `kv_bytes` of an entry replace both of `[engine]`. `dsd check-config --explain` prints what each\n\
         model runs with and where each value comes from.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_is_the_table_of_keys() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/CONFIG.md");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(path, markdown()).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap();
        assert_eq!(
            found,
            markdown(),
            "run the test with UPDATE_GOLDEN=1 to rewrite docs/CONFIG.md"
        );
    }

    #[test]
    fn documented_defaults_are_the_real_ones() {
        // A file that spells out every plain default must change nothing.
        let mut text = String::from("version = 1\n");
        let mut n_spelled_out = 0;
        for key in KEYS.iter().filter(|key| key.section != "models") {
            let plain = key.default.trim_matches('`');
            let value = match key.default {
                number if number.parse::<f64>().is_ok() => number.to_owned(),
                quoted if quoted.len() == plain.len() + 2 => format!("{plain:?}"),
                _ => continue,
            };
            text.push_str(&format!("{}.{} = {value}\n", key.section, key.name));
            n_spelled_out += 1;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("dsd.toml"), text).unwrap();
        let mut config = Config::load(&dir.path().join("dsd.toml"), []).unwrap();
        config.origins = Origins::default();
        assert_eq!(config, Config::default());
        assert!(15 <= n_spelled_out, "{n_spelled_out}");
    }

    #[test]
    fn dev_mode_listens_on_loopback_only() {
        let config = Config::dev("/tmp/x".into(), Vec::new()).unwrap();
        assert!(config.http.listen.ip().is_loopback() && config.quic.listen.ip().is_loopback());
    }
}
