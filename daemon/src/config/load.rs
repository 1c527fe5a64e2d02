//! Reads file, drop-ins and environment into one `Config`, or says which line to change.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use dsd_proto::ids::NodeName;

use super::{
    keys::{Config, KEYS, ModelConfig, RawConfig, SECTIONS},
    suggest,
};

/// The one version of the file's format.
const VERSION: u64 = 1;
/// Longest file read; a configuration is a few hundred lines.
const FILE_LEN_MAX: u64 = 1 << 20;
/// Longest model name; it appears in URLs, metrics and logs.
const MODEL_NAME_LEN_MAX: usize = 128;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, from 1.
    Line {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
    },
    /// A file as a whole.
    File(PathBuf),
    /// An environment variable.
    Env(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{}:{line}", file.display()),
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Env(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// Not a configuration by size.
    #[error("`{}` has {len} bytes, at most {FILE_LEN_MAX} are read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// Not TOML, or a wrong type.
    #[error("{origin}: {problem}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What the TOML reader says.
        problem: String,
    },
    /// A key nobody knows.
    #[error("{origin}: unknown key `{key}`{}", suggestion.as_ref().map(|s| format!("; did you mean `{s}`?")).unwrap_or_default())]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// As written.
        key: String,
        /// The nearest known key.
        suggestion: Option<String>,
    },
    /// A number out of range.
    #[error("{origin}: `{key}` is {found}, expected {min} to {max}")]
    OutOfRange {
        /// Where.
        origin: Origin,
        /// Section and key.
        key: &'static str,
        /// The value.
        found: String,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// The file does not say which format it has.
    #[error("{origin}: `version = {VERSION}` is missing")]
    VersionMissing {
        /// The file.
        origin: Origin,
    },
    /// The file is of another format.
    #[error("{origin}: version {found} is not known, this program reads version {VERSION}")]
    Version {
        /// Where.
        origin: Origin,
        /// As written.
        found: u64,
    },
    /// A model name that cannot be used.
    #[error(
        "model name {name:?} must have 1 to {MODEL_NAME_LEN_MAX} printable characters without spaces"
    )]
    ModelName {
        /// As written.
        name: String,
    },
    /// A node name that cannot stand in a certificate.
    #[error("`node.name` cannot be used")]
    NodeName(#[source] dsd_proto::ids::NameError),
    /// Two models of one name.
    #[error("two models are called `{name}`")]
    ModelTwice {
        /// The name.
        name: String,
    },
    /// Two ways to say how large the KV cache is.
    #[error("`engine.kv_tokens` and `engine.kv_bytes` are both set; keep one")]
    KvTwice,
    /// A budget that the longest body does not fit into.
    #[error(
        "`http.body_budget_bytes` is {budget}, less than one body (`http.body_bytes_max`, {body})"
    )]
    BodyBudget {
        /// The budget.
        budget: usize,
        /// The longest body.
        body: usize,
    },
    /// A KV cache without room.
    #[error("`engine.{key}` is 0")]
    KvEmpty {
        /// The key.
        key: &'static str,
    },
}

/// A text and where it came from, to turn spans into lines.
pub(super) struct SourceText<'a> {
    text: &'a str,
    source: Source<'a>,
}

#[derive(Clone, Copy)]
enum Source<'a> {
    File(&'a Path),
    Env(&'a str),
}

impl SourceText<'_> {
    pub(super) fn origin(&self, span: Option<Range<usize>>) -> Origin {
        match (self.source, span) {
            (Source::Env(name), _) => Origin::Env(name.to_owned()),
            (Source::File(file), None) => Origin::File(file.to_owned()),
            (Source::File(file), Some(span)) => {
                let before = self.text.as_bytes().iter().take(span.start);
                Origin::Line {
                    file: file.to_owned(),
                    line: 1 + before.filter(|b| **b == b'\n').count(),
                }
            }
        }
    }

    fn parse(&self) -> Result<RawConfig, ConfigError> {
        let raw: RawConfig = toml::from_str(self.text).map_err(|e| self.error(&e))?;
        match &raw.version {
            Some(version) if *version.get_ref() != VERSION => Err(ConfigError::Version {
                origin: self.origin(Some(version.span())),
                found: *version.get_ref(),
            }),
            _ => Ok(raw),
        }
    }

    fn error(&self, error: &toml::de::Error) -> ConfigError {
        let origin = self.origin(error.span());
        let message = error.message();
        match message
            .strip_prefix("unknown field `")
            .and_then(|rest| rest.split_once('`'))
        {
            Some((key, _)) => ConfigError::UnknownKey {
                origin,
                key: key.to_owned(),
                suggestion: known_near(key),
            },
            None => ConfigError::Syntax {
                origin,
                problem: message.trim().to_owned(),
            },
        }
    }
}

/// The nearest key with its section, or the nearest section.
fn known_near(word: &str) -> Option<String> {
    let words = KEYS
        .iter()
        .map(|key| key.name)
        .chain(SECTIONS.iter().copied())
        .chain(["version"]);
    let nearest = suggest::nearest(word, words)?;
    let section = KEYS
        .iter()
        .find(|key| key.name == nearest)
        .map(|key| key.section);
    Some(section.map_or_else(
        || nearest.to_owned(),
        |section| format!("{section}.{nearest}"),
    ))
}

impl Config {
    /// Reads `path`, the drop-ins beside it and the variables given (`std::env::vars()` in `main`).
    ///
    /// # Errors
    /// [`ConfigError`], on the first thing that is wrong.
    pub fn load(
        path: &Path,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for (idx, file) in [path.to_owned()]
            .into_iter()
            .chain(drop_ins(path)?)
            .enumerate()
        {
            let text = read(&file)?;
            let text = SourceText {
                text: &text,
                source: Source::File(&file),
            };
            let raw = text.parse()?;
            if idx == 0 && raw.version.is_none() {
                return Err(ConfigError::VersionMissing {
                    origin: text.origin(None),
                });
            }
            raw.apply(&mut config, &text)?;
        }
        config.apply_env(env)?;
        Ok(config)
    }

    /// Lays `DSD_SECTION__KEY` variables over the configuration and checks it as a whole.
    ///
    /// # Errors
    /// When a variable names no key, its value is wrong, or values contradict each other.
    pub fn apply_env(
        &mut self,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), ConfigError> {
        // Sorted, so that the first error does not depend on the order of the environment.
        let vars: BTreeSet<(String, String)> = env.into_iter().collect();
        for (name, value) in &vars {
            let Some((section, key)) = name
                .strip_prefix("DSD_")
                .and_then(|rest| rest.split_once("__"))
            else {
                continue;
            };
            let (section, key) = (section.to_lowercase(), key.to_lowercase());
            if !KEYS
                .iter()
                .any(|known| known.section == section && known.name == key && section != "models")
            {
                let suggestion = known_near(&key)
                    .filter(|s| !s.starts_with("models"))
                    .and_then(|s| {
                        s.split_once('.')
                            .map(|(s, k)| format!("DSD_{s}__{k}").to_uppercase())
                    });
                return Err(ConfigError::UnknownKey {
                    origin: Origin::Env(name.clone()),
                    key: name.clone(),
                    suggestion,
                });
            }
            // A number is a number; whatever is no TOML value of the key's type is taken as text.
            let plain = format!("[{section}]\n{key} = {value}\n");
            let quoted = format!(
                "[{section}]\n{key} = {}\n",
                toml::Value::from(value.as_str())
            );
            let plain = SourceText {
                text: &plain,
                source: Source::Env(name),
            };
            let quoted = SourceText {
                text: &quoted,
                source: Source::Env(name),
            };
            let one_line = !value.contains(['\n', '\r']);
            match one_line.then(|| plain.parse()).and_then(Result::ok) {
                Some(raw) => raw.apply(self, &plain)?,
                None => quoted.parse()?.apply(self, &quoted)?,
            }
        }
        self.check()
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_models(&self.models)?;
        let name: Result<NodeName, _> = self.node.name.parse();
        name.map_err(ConfigError::NodeName)?;
        let (budget, body) = (self.http.body_budget_bytes, self.http.body_bytes_max);
        if budget < body {
            return Err(ConfigError::BodyBudget { budget, body });
        }
        match (self.engine.kv_tokens, self.engine.kv_bytes) {
            (Some(_), Some(_)) => Err(ConfigError::KvTwice),
            (Some(0), _) => Err(ConfigError::KvEmpty { key: "kv_tokens" }),
            (_, Some(0)) => Err(ConfigError::KvEmpty { key: "kv_bytes" }),
            _ => Ok(()),
        }
    }
}

/// Names must be usable and different.
pub(super) fn check_models(models: &[ModelConfig]) -> Result<(), ConfigError> {
    let mut names = BTreeSet::new();
    for model in models {
        let name = &model.name;
        let usable = !name.is_empty() && name.len() <= MODEL_NAME_LEN_MAX;
        if !usable || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(ConfigError::ModelName { name: name.clone() });
        }
        if !names.insert(name) {
            return Err(ConfigError::ModelTwice { name: name.clone() });
        }
    }
    Ok(())
}

/// Files of `<path>.d`, by name; none when there is no such folder.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut dir = path.as_os_str().to_owned();
    dir.push(".d");
    let dir = PathBuf::from(dir);
    let failed = |source| ConfigError::Read {
        path: dir.clone(),
        source,
    };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(failed)?.path();
        if file.extension().is_some_and(|ext| ext == "toml") {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let len = fs::metadata(path).map_err(failed)?.len();
    if FILE_LEN_MAX < len {
        return Err(ConfigError::TooLong {
            path: path.to_owned(),
            len,
        });
    }
    fs::read_to_string(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Activations;

    fn load(
        main: &str,
        drop_ins: &[(&str, &str)],
        env: &[(&str, &str)],
    ) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dsd.toml");
        fs::write(&path, main).unwrap();
        fs::create_dir(dir.path().join("dsd.toml.d")).unwrap();
        for (name, text) in drop_ins {
            fs::write(dir.path().join("dsd.toml.d").join(name), text).unwrap();
        }
        Config::load(
            &path,
            env.iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned())),
        )
    }

    /// The error's text without the temporary folder.
    fn error(main: &str, drop_ins: &[(&str, &str)], env: &[(&str, &str)]) -> String {
        let text = load(main, drop_ins, env)
            .expect_err("the configuration is wrong")
            .to_string();
        match text.find("/dsd.toml") {
            Some(at) if text.starts_with('/') => text[at + 1..].to_owned(),
            _ => text,
        }
    }

    #[test]
    fn a_bare_file_gives_the_defaults() {
        assert_eq!(load("version = 1\n", &[], &[]).unwrap(), Config::default());
    }

    #[test]
    fn later_sources_replace_earlier_ones() {
        let config = load(
            "version = 1\n[http]\nlisten = \"0.0.0.0:80\"\nbody_bytes_max = 2048\n[[models]]\nname = \"a\"\npath = \"/a\"\n",
            &[
                ("20-b.toml", "[http]\nbody_bytes_max = 8192\n[[models]]\nname = \"b\"\npath = \"/b\"\n"),
                ("10-a.toml", "[http]\nbody_bytes_max = 4096\n[engine]\nactivations = \"int8\"\n"),
                ("ignored.txt", "nonsense"),
            ],
            &[
                ("DSD_ENGINE__KV_TOKENS", "4096"),
                ("DSD_NODE__NAME", "7"),
                ("DSD_NODE__STATE_DIR", "/tmp/\"odd\""),
                ("DSD_STATE", "x"),
                ("PATH", "y"),
            ],
        )
        .unwrap();
        assert_eq!(
            (config.http.listen.port(), config.http.body_bytes_max),
            (80, 8192)
        );
        assert_eq!(config.engine.activations, Activations::Int8);
        assert_eq!(config.engine.kv_tokens, Some(4096));
        assert_eq!(
            (config.node.name.as_str(), config.node.state_dir.to_str()),
            ("7", Some("/tmp/\"odd\""))
        );
        assert_eq!(
            config
                .models
                .iter()
                .map(|m| m.name.as_str())
                .collect::<Vec<_>>(),
            ["a", "b"]
        );
    }

    #[test]
    fn errors_name_file_line_and_remedy() {
        for (main, expected) in [
            ("", "dsd.toml: `version = 1` is missing"),
            (
                "version = 2\n",
                "dsd.toml:1: version 2 is not known, this program reads version 1",
            ),
            (
                "version = 1\n\n[http]\nlisen = \"x\"\n",
                "dsd.toml:4: unknown key `lisen`; did you mean `http.listen`?",
            ),
            (
                "version = 1\n[htp]\n",
                "dsd.toml:2: unknown key `htp`; did you mean `http`?",
            ),
            (
                "version = 1\n[http]\nzzzzzz = 1\n",
                "dsd.toml:3: unknown key `zzzzzz`",
            ),
            (
                "version = 1\n[http]\nbody_bytes_max = 5\n",
                "dsd.toml:3: `http.body_bytes_max` is 5, expected 1024 to 1073741824",
            ),
            (
                "version = 1\n[http]\nbody_bytes_max = \"5\"\n",
                "dsd.toml:3: invalid type: string \"5\", expected usize",
            ),
            (
                "version = 1\n[http]\nlisten = \"nowhere\"\n",
                "dsd.toml:3: invalid socket address syntax",
            ),
            (
                "version = 1\n[engine]\nactivations = \"int4\"\n",
                "dsd.toml:3: unknown variant `int4`, expected `f32` or `int8`",
            ),
            (
                "version = 1\n[[models]]\nname = \"a\"\n",
                "dsd.toml:2: missing field `path`",
            ),
            (
                "version = 1\n[[models]]\nname = \"a b\"\npath = \"/a\"\n",
                "model name \"a b\" must have 1 to 128 printable characters without spaces",
            ),
            (
                "version = 1\n[[models]]\nname = \"a\"\npath = \"/a\"\n[[models]]\nname = \"a\"\npath = \"/b\"\n",
                "two models are called `a`",
            ),
            (
                "version = 1\n[http]\nbody_budget_bytes = 4194303\n",
                "`http.body_budget_bytes` is 4194303, less than one body (`http.body_bytes_max`, 4194304)",
            ),
            (
                "version = 1\n[engine]\nkv_tokens = 1\nkv_bytes = 1\n",
                "`engine.kv_tokens` and `engine.kv_bytes` are both set; keep one",
            ),
            (
                "version = 1\n[engine]\nkv_tokens = 0\n",
                "`engine.kv_tokens` is 0",
            ),
            (
                "version = 1\n[node]\nname = \"Node 1\"\n",
                "`node.name` cannot be used",
            ),
        ] {
            assert_eq!(error(main, &[], &[]), expected, "{main}");
        }
        assert!(error("version = 1\n[http\n", &[], &[]).starts_with("dsd.toml:2: "));
    }

    #[test]
    fn errors_of_drop_ins_and_environment_name_them() {
        assert_eq!(
            error(
                "version = 1\n",
                &[("a.toml", "\n[engine]\nthread = 1\n")],
                &[]
            ),
            "dsd.toml.d/a.toml:3: unknown key `thread`; did you mean `engine.threads`?"
        );
        assert_eq!(
            error("version = 1\n", &[], &[("DSD_HTTP__LISEN", "x")]),
            "environment variable DSD_HTTP__LISEN: unknown key `DSD_HTTP__LISEN`; did you mean `DSD_HTTP__LISTEN`?"
        );
        assert_eq!(
            error("version = 1\n", &[], &[("DSD_ENGINE__RUNNING_MAX", "0")]),
            "environment variable DSD_ENGINE__RUNNING_MAX: `engine.running_max` is 0, expected 1 to 65536"
        );
        assert!(
            error(
                "version = 1\n",
                &[],
                &[("DSD_ENGINE__THREADS", "a\n[http]\nlisten = 5")]
            )
            .starts_with("environment variable DSD_ENGINE__THREADS: invalid type")
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nonexistent/dsd.toml"), [])
            .expect_err("there is no such file");
        assert_eq!(error.to_string(), "cannot read `/nonexistent/dsd.toml`");
    }
}
