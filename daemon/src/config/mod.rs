//! The node's configuration: one TOML file, drop-ins and environment, checked once, then plain data.
//!
//! Opens no socket and loads no model. Called by `main`; every other module takes the part it needs.
//!
//! Invariant: a `Config` holds only values within the ranges of docs/CONFIG.md.

mod keys;
mod load;
mod problems;
mod suggest;

pub use keys::{
    Activations, Alias, Class, Config, EngineConfig, HttpConfig, KEYS, KeyDoc, KvType, LogConfig,
    LogFormat, ModelConfig, ModelOverrides, ModelSettings, NodeConfig, Origins, QuicConfig,
    ServiceConfig,
};
pub use load::{ConfigError, Contradiction, Origin, unread_variables};
pub use problems::problems;
pub(crate) use suggest::nearest;

use std::{
    collections::BTreeSet,
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

/// What is not the same in two configurations: keys as `section.key`, and `models.NAME`.
pub fn changes(old: &Config, new: &Config) -> Vec<String> {
    let keys = old.shown().into_iter().zip(new.shown());
    let changed = keys
        .filter(|(old, new)| old != new)
        .map(|((key, _), _)| key);
    let set = |config: &Config, name: &str| {
        let model = config.models.iter().find(|model| model.name == name)?;
        let mut plain = model.clone();
        plain.origins = Origins::default();
        let aliases = plain.aliases.drain(..).map(|alias| alias.name);
        let aliases: Vec<String> = aliases.collect();
        Some((plain, aliases))
    };
    let models = old.models.iter().chain(&new.models);
    let names: BTreeSet<&str> = models.map(|model| &*model.name).collect();
    let models = names
        .into_iter()
        .filter(|name| set(old, name) != set(new, name))
        .map(|name| format!("models.{name}"));
    changed.chain(models).collect()
}

/// docs/CONFIG.md as it must read.
pub fn markdown() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         `dsd` reads `/etc/dsd/dsd.toml`, then every `dsd.toml.d/*.toml` beside it in the order of their names, then the\n\
         environment (`DSD_HTTP__LISTEN=0.0.0.0:8000` sets `listen` of `[http]`). Later values replace earlier ones; `[[models]]`\n\
         entries add up. Unknown keys, wrong types, values out of range and misspelt `DSD_` variables stop the start with file, line\n\
         and a suggestion; `dsd check-config` names all of them at once, and what else a start would refuse.\n\n\
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
    fn changes_are_named_by_their_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dsd.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Config::load(&path, []).unwrap()
        };
        let model = |name: &str, more: &str| {
            format!("[[models]]\nname = \"{name}\"\npath = \"/m\"\n{more}\n")
        };
        let old = read(&format!(
            "version = 1\n[engine]\ntp = 2\n{}{}{}",
            model("a", "aliases = [\"x\"]"),
            model("b", ""),
            model("c", "")
        ));
        let new = read(&format!(
            "version = 1\n\n\n[engine]\ntp = 3\n[http]\nkeep_alive_s = 11\n{}{}{}",
            model("c", "tp = 4"),
            model("a", "\naliases = [\"x\"]"),
            model("d", "")
        ));
        assert_eq!(
            changes(&old, &new),
            [
                "http.keep_alive_s",
                "engine.tp",
                "models.b",
                "models.c",
                "models.d"
            ]
        );
        assert!(changes(&old, &old).is_empty());
    }

    #[test]
    fn dev_mode_listens_on_loopback_only() {
        let config = Config::dev("/tmp/x".into(), Vec::new()).unwrap();
        assert!(config.http.listen.ip().is_loopback() && config.quic.listen.ip().is_loopback());
    }
}
