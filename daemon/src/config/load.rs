//! Reads file, drop-ins and environment into one `Config`, or says which line to change.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use dsd_proto::ids::NodeName;

use super::{
    keys::{Alias, Config, KEYS, ModelConfig, ModelSettings, RawConfig, SECTIONS},
    suggest,
};

/// The one version of the file's format.
const VERSION: u64 = 1;
/// Longest file read; a configuration is a few hundred lines.
const FILE_LEN_MAX: u64 = 1 << 20;
/// Other names a model may have.
const ALIASES_MAX: usize = 16;
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
    /// An option of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{}:{line}", file.display()),
            Self::File(file) => write!(f, "{}", file.display()),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "option {name}"),
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
    #[error("{origin}: `{key}` is {found}, expected {range}")]
    OutOfRange {
        /// Where.
        origin: Origin,
        /// Section and key.
        key: String,
        /// The value.
        found: String,
        /// Smallest and largest allowed.
        range: String,
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
        "{}model name {name:?} must have 1 to {MODEL_NAME_LEN_MAX} printable characters without spaces",
        at(origin.as_ref())
    )]
    ModelName {
        /// Where.
        origin: Option<Origin>,
        /// As written.
        name: String,
    },
    /// A node name that cannot stand in a certificate.
    #[error("{}`node.name` cannot be used", at(origin.as_ref()))]
    NodeName {
        /// Where.
        origin: Option<Origin>,
        /// Why.
        #[source]
        source: dsd_proto::ids::NameError,
    },
    /// Two models of one name.
    #[error("{}two models are called `{name}`", at(origin.as_ref()))]
    ModelTwice {
        /// Where the second stands.
        origin: Option<Origin>,
        /// The name.
        name: String,
    },
    /// What no browser sends as its page's origin.
    #[error(
        "{}`http.cors_origins` has {found:?}; an origin is scheme, host and port in small letters, such as `https://chat.example.com`",
        at(origin.as_ref())
    )]
    NoOrigin {
        /// Where it stands.
        origin: Option<Origin>,
        /// It.
        found: String,
    },
    /// A budget that the longest body does not fit into.
    #[error(
        "{}`http.body_budget_bytes` is {budget}, less than one body (`http.body_bytes_max`, {body})",
        at(origin.as_ref())
    )]
    BodyBudget {
        /// Where either is.
        origin: Option<Origin>,
        /// The budget.
        budget: usize,
        /// The longest body.
        body: usize,
    },
    /// Two ways to say who may call.
    #[error(
        "{}`http.api_keys_file` and `service.tenants_file` are both set; keep one",
        at(origin.as_ref())
    )]
    KeysTwice {
        /// Where one of them is.
        origin: Option<Origin>,
    },
    /// An alias that leads somewhere else already.
    #[error("{origin}: the alias `{alias}` of the model `{model}` is {taken} already")]
    AliasTaken {
        /// Where.
        origin: Origin,
        /// The alias.
        alias: String,
        /// Whose alias it should be.
        model: String,
        /// What it is.
        taken: String,
    },
    /// More aliases than anybody needs.
    #[error("{origin}: the model `{model}` has {found} aliases, at most {ALIASES_MAX} are allowed")]
    Aliases {
        /// Where.
        origin: Origin,
        /// The model.
        model: String,
        /// How many.
        found: usize,
    },
    /// Two keys of which only one can be followed.
    #[error(transparent)]
    Contradiction(Box<Contradiction>),
}

impl ConfigError {
    /// Where to change something.
    pub fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Read { .. } | Self::TooLong { .. } => None,
            Self::Syntax { origin, .. }
            | Self::UnknownKey { origin, .. }
            | Self::OutOfRange { origin, .. }
            | Self::VersionMissing { origin }
            | Self::Version { origin, .. }
            | Self::AliasTaken { origin, .. }
            | Self::Aliases { origin, .. } => Some(origin),
            Self::ModelName { origin, .. }
            | Self::NodeName { origin, .. }
            | Self::ModelTwice { origin, .. }
            | Self::NoOrigin { origin, .. }
            | Self::BodyBudget { origin, .. }
            | Self::KeysTwice { origin } => origin.as_ref(),
            Self::Contradiction(contradiction) => Some(&contradiction.first),
        }
    }

    /// What was probably meant.
    pub fn suggestion(&self) -> Option<String> {
        match self {
            Self::UnknownKey { suggestion, .. } => suggestion.clone(),
            Self::OutOfRange { range, .. } => Some(range.clone()),
            Self::VersionMissing { .. } | Self::Version { .. } => {
                Some(format!("version = {VERSION}"))
            }
            _ => None,
        }
    }
}

/// Two keys that exclude each other.
#[derive(Debug, thiserror::Error)]
#[error("{first}: `{first_key}` contradicts `{second_key}` ({second}): {rule}")]
pub struct Contradiction {
    /// Where the first stands.
    pub first: Origin,
    /// The first key.
    pub first_key: String,
    /// Where the second stands.
    pub second: Origin,
    /// The second key.
    pub second_key: String,
    /// What they break.
    pub rule: String,
}

fn at(origin: Option<&Origin>) -> String {
    origin.map_or_else(String::new, |origin| format!("{origin}: "))
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
    Flag(&'a str),
}

impl SourceText<'_> {
    pub(super) fn origin(&self, span: Option<Range<usize>>) -> Origin {
        match (self.source, span) {
            (Source::Env(name), _) => Origin::Env(name.to_owned()),
            (Source::Flag(name), _) => Origin::Flag(name.to_owned()),
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

    /// The table that a place of the text is in.
    fn table(&self, span: Option<Range<usize>>) -> Option<&str> {
        let before = self.text.get(..span?.start)?;
        let heading = before.lines().rev().find(|line| line.starts_with('['))?;
        heading
            .split(['[', ']'])
            .map(str::trim)
            .find(|part| !part.is_empty())
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
                suggestion: known_near(key, self.table(error.span())),
            },
            None => ConfigError::Syntax {
                origin,
                problem: message.trim().to_owned(),
            },
        }
    }
}

/// The nearest key with its section, or the nearest section. Of keys that several sections have, the
/// one of `table`.
fn known_near(word: &str, table: Option<&str>) -> Option<String> {
    let words = KEYS
        .iter()
        .map(|key| key.name)
        .chain(SECTIONS.iter().copied())
        .chain(["version"]);
    let nearest = suggest::nearest(word, words)?;
    let sections = || {
        KEYS.iter()
            .filter(|key| key.name == nearest)
            .flat_map(|key| [Some(key.section), key.per_model.then_some("models")])
            .flatten()
    };
    let here = sections().find(|section| Some(*section) == table);
    let section = here.or_else(|| sections().next());
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
        let mut files = Vec::new();
        for file in [path.to_owned()].into_iter().chain(drop_ins(path)?) {
            let text = read(&file)?;
            files.push((file, text));
        }
        Self::of(&files, true, env)
    }

    /// The configuration of these texts, the first of which has to say its version if `is_versioned`.
    pub(super) fn of(
        files: &[(PathBuf, String)],
        is_versioned: bool,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for (idx, (file, text)) in files.iter().enumerate() {
            let source = Source::File(file);
            let text = SourceText { text, source };
            let raw = text.parse()?;
            if idx == 0 && is_versioned && raw.version.is_none() {
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
            let Some(rest) = name.strip_prefix("DSD_") else {
                continue;
            };
            let Some((section, key)) = rest.split_once("__") else {
                if let Some(suggestion) = variable_near(name) {
                    return Err(ConfigError::UnknownKey {
                        origin: Origin::Env(name.clone()),
                        key: name.clone(),
                        suggestion: Some(suggestion),
                    });
                }
                continue;
            };
            let (section, key) = (section.to_lowercase(), key.to_lowercase());
            if !KEYS
                .iter()
                .any(|known| known.section == section && known.name == key && section != "models")
            {
                let suggestion = known_near(&key, Some(&section))
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
            self.set(Source::Env(name), &section, &key, value)?;
        }
        self.check()
    }

    /// Sets one key from an option of the command line, which counts as far as the check of its range.
    ///
    /// # Errors
    /// When the value is wrong.
    pub fn set_from_flag(
        &mut self,
        flag: &str,
        section: &str,
        key: &str,
        value: &str,
    ) -> Result<(), ConfigError> {
        self.set(Source::Flag(flag), section, key, value)
    }

    fn set(
        &mut self,
        source: Source<'_>,
        section: &str,
        key: &str,
        value: &str,
    ) -> Result<(), ConfigError> {
        // A number is a number; whatever is no TOML value of the key's type is taken as text.
        let plain = format!("[{section}]\n{key} = {value}\n");
        let quoted = format!("[{section}]\n{key} = {}\n", toml::Value::from(value));
        let text = |text| SourceText { text, source };
        let (plain, quoted) = (text(&plain), text(&quoted));
        let one_line = !value.contains(['\n', '\r']);
        match one_line.then(|| plain.parse()).and_then(Result::ok) {
            Some(raw) => raw.apply(self, &plain),
            None => quoted.parse()?.apply(self, &quoted),
        }
    }

    fn check(&self) -> Result<(), ConfigError> {
        let origin = |key| self.origins.of(key).cloned();
        let name: Result<NodeName, _> = self.node.name.parse();
        name.map_err(|source| ConfigError::NodeName {
            origin: origin("node.name"),
            source,
        })?;
        let (budget, body) = (self.http.body_budget_bytes, self.http.body_bytes_max);
        if budget < body {
            let origin = origin("http.body_budget_bytes").or_else(|| origin("http.body_bytes_max"));
            return Err(ConfigError::BodyBudget {
                origin,
                budget,
                body,
            });
        }
        if let Some(found) = self.http.cors_origins.iter().find(|text| !is_origin(text)) {
            return Err(ConfigError::NoOrigin {
                origin: self.origins.of("http.cors_origins").cloned(),
                found: found.chars().take(100).collect(),
            });
        }
        if self.http.api_keys_file.is_some() && self.service.tenants_file.is_some() {
            let origin = origin("http.api_keys_file");
            return Err(ConfigError::KeysTwice { origin });
        }
        check_models(&self.models)?;
        self.contradiction(None)?;
        self.models
            .iter()
            .try_for_each(|model| self.contradiction(Some(model)))
    }

    /// What `model` runs with: the sections, and what its entry says otherwise.
    pub fn settings(&self, model: &ModelConfig) -> ModelSettings {
        let mut settings = self.settings_default();
        // Each says how large the cache is: the one of the entry replaces either.
        if model.overrides.kv_tokens.is_some() || model.overrides.kv_bytes.is_some() {
            settings.engine.kv_tokens = None;
            settings.engine.kv_bytes = None;
        }
        model.overrides.lay_over(&mut settings);
        settings
    }

    /// What a model runs with that has no entry.
    pub fn settings_default(&self) -> ModelSettings {
        ModelSettings {
            engine: self.engine.clone(),
            service: self.service.clone(),
        }
    }

    /// Where a model's value of `section.key` comes from; `None` for a default.
    pub fn origin<'a>(
        &'a self,
        model: Option<&'a ModelConfig>,
        section: &str,
        key: &str,
    ) -> Option<&'a Origin> {
        model
            .and_then(|model| model.origins.of(key))
            .or_else(|| self.origins.of(&format!("{section}.{key}")))
    }

    /// Refuses two keys that exclude each other, in the sections or for a model. Defaults give way.
    fn contradiction(&self, model: Option<&ModelConfig>) -> Result<(), ConfigError> {
        let table = |origin_of_model: bool| if origin_of_model { "models" } else { "engine" };
        let origin = |key: &str| {
            let of_model = model.is_some_and(|model| model.origins.of(key).is_some());
            self.origin(model, "engine", key)
                .map(|origin| (origin.clone(), format!("{}.{key}", table(of_model))))
        };
        let refuse = |first: &str, second: &str, rule: String| match (origin(first), origin(second))
        {
            (Some((first, first_key)), Some((second, second_key))) => {
                Err(ConfigError::Contradiction(Box::new(Contradiction {
                    first,
                    first_key,
                    second,
                    second_key,
                    rule,
                })))
            }
            _ => Ok(()),
        };
        let settings = model.map_or_else(|| self.settings_default(), |model| self.settings(model));
        let engine = &settings.engine;
        if engine.kv_tokens.is_some() && engine.kv_bytes.is_some() {
            let rule = "both say how large the KV cache is; keep one".to_owned();
            refuse("kv_bytes", "kv_tokens", rule)?;
        }
        if engine.step_tokens < engine.running_max {
            let rule = format!(
                "a step of {} tokens has no room for {} sequences",
                engine.step_tokens, engine.running_max
            );
            refuse("running_max", "step_tokens", rule)?;
        }
        Ok(())
    }
}

/// Variables of the programs of this package that are no keys.
const VARIABLES: [&str; 4] = ["DSD_LOG", "DSD_STATE", "DSD_NODE", "DSD_API_KEY"];

/// Whether a variable without `__` is one of this package's, or one that Kubernetes gives every
/// container beside a service that is called `dsd`.
fn is_variable(name: &str) -> bool {
    let of_kubernetes = ["DSD_SERVICE_HOST", "DSD_SERVICE_PORT", "DSD_PORT"];
    VARIABLES.contains(&name) || of_kubernetes.iter().any(|prefix| name.starts_with(prefix))
}

/// The variable that is meant by one without `__` that nobody reads.
fn variable_near(name: &str) -> Option<String> {
    if is_variable(name) {
        return None;
    }
    let keys = KEYS.iter().filter(|key| key.section != "models");
    let keys = keys.map(|key| format!("{}__{}", key.section, key.name).to_uppercase());
    let others = VARIABLES
        .iter()
        .filter_map(|name| name.strip_prefix("DSD_"));
    let words: Vec<String> = keys.chain(others.map(str::to_owned)).collect();
    let word = name.strip_prefix("DSD_")?.to_uppercase();
    let nearest = suggest::nearest(&word, words.iter().map(String::as_str))?;
    Some(format!("DSD_{nearest}"))
}

/// Variables that look like this program's, and that nobody reads.
pub fn unread_variables(env: impl IntoIterator<Item = (String, String)>) -> Vec<String> {
    let names = env.into_iter().map(|(name, _)| name);
    let is_unread = |name: &String| {
        let is_ours = name.starts_with("DSD_") && !name.contains("__");
        is_ours && !is_variable(name)
    };
    names.filter(is_unread).collect()
}

/// Names must be usable, and every name lead to one model.
/// Whether a browser could send it as a page's origin.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else {
        return false;
    };
    let is_plain = |byte: u8| {
        byte.is_ascii_lowercase()
            || byte.is_ascii_digit()
            || matches!(byte, b'.' | b'-' | b':' | b'[' | b']')
    };
    !scheme.is_empty()
        && scheme
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        && !host.is_empty()
        && host.bytes().all(is_plain)
}

pub(super) fn check_models(models: &[ModelConfig]) -> Result<(), ConfigError> {
    let usable = |name: &str| {
        (1..=MODEL_NAME_LEN_MAX).contains(&name.len())
            && !name.chars().any(|c| c.is_control() || c.is_whitespace())
    };
    let mut names = BTreeSet::new();
    for model in models {
        let (name, origin) = (&model.name, model.origins.of("name").cloned());
        if !usable(name) {
            let name = name.clone();
            return Err(ConfigError::ModelName { origin, name });
        }
        if !names.insert(name) {
            let name = name.clone();
            return Err(ConfigError::ModelTwice { origin, name });
        }
    }
    let mut aliases: BTreeMap<&str, &str> = BTreeMap::new();
    for model in models {
        if ALIASES_MAX < model.aliases.len() {
            return Err(ConfigError::Aliases {
                origin: model.aliases[ALIASES_MAX].origin.clone(),
                model: model.name.clone(),
                found: model.aliases.len(),
            });
        }
        for Alias { name, origin, .. } in &model.aliases {
            if !usable(name) {
                return Err(ConfigError::ModelName {
                    origin: Some(origin.clone()),
                    name: name.clone(),
                });
            }
            let taken = if names.contains(name) {
                "the name of a model".to_owned()
            } else if let Some(other) = aliases.insert(name, &model.name) {
                format!("an alias of the model `{other}`")
            } else {
                continue;
            };
            return Err(ConfigError::AliasTaken {
                origin: origin.clone(),
                alias: name.clone(),
                model: model.name.clone(),
                taken,
            });
        }
    }
    Ok(())
}

/// Files of `<path>.d`, by name; none when there is no such folder.
pub(super) fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
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

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
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
    use crate::config::{Activations, Class};

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
        let folder = text.find('/').zip(text.find("/dsd.toml"));
        match folder {
            Some((start, end)) => text.replace(&text[start..=end], ""),
            None => text,
        }
    }

    #[test]
    fn a_bare_file_gives_the_defaults() {
        assert_eq!(load("version = 1\n", &[], &[]).unwrap(), Config::default());
    }

    #[test]
    fn a_model_has_what_its_entry_says_and_the_rest_from_the_sections() {
        let config = load(
            "version = 1\n[engine]\ntp = 2\nkv_tokens = 4096\nrunning_max = 8\n\
             [[models]]\nname = \"a\"\npath = \"/a\"\naliases = [\"deepseek-chat\", \"x\"]\n\
             kv_bytes = 1048576\nstep_tokens = 64\nttft_target_s = 5\nclass = \"batch\"\n\
             [[models]]\nname = \"b\"\npath = \"/b\"\nrequired = false\nstep_target_ms = 50\n",
            &[("a.toml", "[service]\nttft_target_s = 0.5\n")],
            &[("DSD_ENGINE__THREADS", "3")],
        )
        .unwrap();
        let [a, b] = &config.models[..] else {
            panic!("{:?}", config.models)
        };
        let aliases = |model: &ModelConfig| model.aliases.iter().map(|a| a.name.clone()).collect();
        let names: [Vec<String>; 2] = [aliases(a), aliases(b)];
        assert_eq!(
            names,
            [vec!["deepseek-chat".to_owned(), "x".to_owned()], vec![]]
        );
        assert!(a.required && !b.required);
        let (of_a, of_b) = (config.settings(a), config.settings(b));
        assert_eq!(
            (of_a.engine.tp, of_a.engine.threads, of_a.engine.running_max),
            (2, 3, 8)
        );
        assert_eq!(
            (
                of_a.engine.kv_tokens,
                of_a.engine.kv_bytes,
                of_a.engine.step_tokens
            ),
            (None, Some(1_048_576), 64)
        );
        assert_eq!(
            (of_a.service.ttft_target_s, of_a.service.class),
            (5.0, Class::Batch)
        );
        assert_eq!(of_b.engine.step_target_ms, Some(50));
        assert_eq!(
            (of_b.engine.kv_tokens, of_b.engine.step_tokens),
            (Some(4096), 512)
        );
        assert_eq!(
            (of_b.service.ttft_target_s, of_b.service.class),
            (0.5, Class::Interactive)
        );
        let origin = |model, section, key| {
            config.origin(Some(model), section, key).map(|origin| {
                let text = origin.to_string();
                text.rsplit('/').next().unwrap().to_owned()
            })
        };
        for (model, section, key, expected) in [
            (a, "engine", "tp", Some("dsd.toml:3")),
            (a, "engine", "kv_bytes", Some("dsd.toml:10")),
            (a, "service", "ttft_target_s", Some("dsd.toml:12")),
            (b, "service", "ttft_target_s", Some("a.toml:2")),
            (
                b,
                "engine",
                "threads",
                Some("environment variable DSD_ENGINE__THREADS"),
            ),
            (b, "engine", "step_tokens", None),
        ] {
            assert_eq!(origin(model, section, key).as_deref(), expected, "{key}");
        }
    }

    #[test]
    fn every_key_for_models_is_taken_from_an_entry_and_no_other() {
        let config = |key: &str, value: &str| {
            let text =
                format!("version = 1\n[[models]]\nname = \"a\"\npath = \"/a\"\n{key} = {value}\n");
            load(&text, &[], &[])
        };
        let default = Config::default();
        let shown = [
            ("engine", default.engine.shown()),
            ("service", default.service.shown()),
        ];
        let mut n_per_model = 0;
        for (section, values) in shown {
            for (name, value) in values {
                let doc = KEYS
                    .iter()
                    .find(|key| (key.section, key.name) == (section, name));
                let per_model = doc.unwrap().per_model;
                let value = match value.as_str() {
                    "" => "7".to_owned(),
                    plain if plain.parse::<f64>().is_ok() || plain == "true" => plain.to_owned(),
                    text => format!("{text:?}"),
                };
                match config(name, &value) {
                    Ok(config) => {
                        assert!(per_model, "{name}");
                        assert!(config.models[0].origins.of(name).is_some(), "{name}");
                        n_per_model += 1;
                    }
                    Err(ConfigError::UnknownKey { .. }) => assert!(!per_model, "{name}"),
                    Err(e) => panic!("{name}: {e}"),
                }
            }
        }
        assert_eq!(n_per_model, KEYS.iter().filter(|key| key.per_model).count());
    }

    #[test]
    fn what_a_model_cannot_have_is_refused_by_name_with_the_line() {
        const A: &str = "version = 1\n[[models]]\nname = \"a\"\npath = \"/a\"\n";
        const B: &str = "[[models]]\nname = \"b\"\npath = \"/b\"\n";
        let check = |lines: &str, expected: &str| {
            assert_eq!(error(&format!("{A}{lines}"), &[], &[]), expected, "{lines}");
        };
        check(
            "kv_token = 5\n",
            "dsd.toml:5: unknown key `kv_token`; did you mean `models.kv_tokens`?",
        );
        check("tp = 0\n", "dsd.toml:5: `models.tp` is 0, expected 1 to 64");
        check(
            "tp = 65\n",
            "dsd.toml:5: `models.tp` is 65, expected 1 to 64",
        );
        check(
            "ttft_target_s = 0.01\n",
            "dsd.toml:5: `models.ttft_target_s` is 0.01, expected 0.05 to 3600",
        );
        check(
            "ttft_target_s = nan\n",
            "dsd.toml:5: `models.ttft_target_s` is NaN, expected 0.05 to 3600",
        );
        check(
            "class = \"idle\"\n",
            "dsd.toml:5: unknown variant `idle`, expected `interactive` or `batch`",
        );
        check(
            "required = 1\n",
            "dsd.toml:5: invalid type: integer `1`, expected a boolean",
        );
        check(
            "kv_tokens = 64\nkv_bytes = 64\n",
            "dsd.toml:6: `models.kv_bytes` contradicts `models.kv_tokens` (dsd.toml:5): both say how large \
             the KV cache is; keep one",
        );
        check(
            "running_max = 33\nstep_tokens = 32\n",
            "dsd.toml:5: `models.running_max` contradicts `models.step_tokens` (dsd.toml:6): a step of 32 \
             tokens has no room for 33 sequences",
        );
        check(
            "step_tokens = 32\n[engine]\nrunning_max = 40\n",
            "dsd.toml:7: `engine.running_max` contradicts `models.step_tokens` (dsd.toml:5): a step of 32 \
             tokens has no room for 40 sequences",
        );
        check(
            &format!("aliases = [\"b\"]\n{B}"),
            "dsd.toml:5: the alias `b` of the model `a` is the name of a model already",
        );
        check(
            "aliases = [\"a\"]\n",
            "dsd.toml:5: the alias `a` of the model `a` is the name of a model already",
        );
        check(
            &format!("aliases = [\"x\"]\n{B}aliases = [\n  \"y\",\n  \"x\",\n]\n"),
            "dsd.toml:11: the alias `x` of the model `b` is an alias of the model `a` already",
        );
        check(
            "aliases = [\"x y\"]\n",
            "dsd.toml:5: model name \"x y\" must have 1 to 128 printable characters without spaces",
        );
        let many = (0..17)
            .map(|i| format!("\"x{i}\""))
            .collect::<Vec<_>>()
            .join(",");
        check(
            &format!("aliases = [{many}]\n"),
            "dsd.toml:5: the model `a` has 17 aliases, at most 16 are allowed",
        );
        // A default gives way to what is said.
        assert!(load(&format!("{A}step_tokens = 16\n"), &[], &[]).is_ok());
    }

    #[test]
    fn an_option_of_the_command_line_is_checked_like_a_key() {
        let mut config = Config::default();
        let set = |config: &mut Config, value| {
            let set = config.set_from_flag("--ttft-target", "service", "ttft_target_s", value);
            set.map_err(|e| e.to_string())
        };
        assert_eq!(set(&mut config, "1.5"), Ok(()));
        assert_eq!(config.service.ttft_target_s, 1.5);
        assert_eq!(
            set(&mut config, "0"),
            Err(
                "option --ttft-target: `service.ttft_target_s` is 0, expected 0.05 to 3600"
                    .to_owned()
            )
        );
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
                "dsd.toml:3: model name \"a b\" must have 1 to 128 printable characters without spaces",
            ),
            (
                "version = 1\n[[models]]\nname = \"a\"\npath = \"/a\"\n[[models]]\nname = \"a\"\npath = \"/b\"\n",
                "dsd.toml:6: two models are called `a`",
            ),
            (
                "version = 1\n[http]\nbody_budget_bytes = 4194303\n",
                "dsd.toml:3: `http.body_budget_bytes` is 4194303, less than one body (`http.body_bytes_max`, 4194304)",
            ),
            (
                "version = 1\n[engine]\nkv_tokens = 1\nkv_bytes = 1\n",
                "dsd.toml:4: `engine.kv_bytes` contradicts `engine.kv_tokens` (dsd.toml:3): both say how \
                 large the KV cache is; keep one",
            ),
            (
                "version = 1\n[http]\napi_keys_file = \"a\"\n[service]\ntenants_file = \"b\"\n",
                "dsd.toml:3: `http.api_keys_file` and `service.tenants_file` are both set; keep one",
            ),
            (
                "version = 1\n[engine]\nkv_tokens = 0\n",
                "dsd.toml:3: `engine.kv_tokens` is 0, expected 1 to 1073741824",
            ),
            (
                "version = 1\n[node]\nname = \"Node 1\"\n",
                "dsd.toml:3: `node.name` cannot be used",
            ),
        ] {
            assert_eq!(error(main, &[], &[]), expected, "{main}");
        }
        assert!(error("version = 1\n[http\n", &[], &[]).starts_with("dsd.toml:2: "));
    }

    #[test]
    fn origins_are_what_browsers_send() {
        let found = |list: &str| {
            let text = format!("version = 1\n[http]\ncors_origins = {list}\n");
            load(&text, &[], &[]).unwrap()
        };
        for good in [
            "https://a.example.com",
            "http://localhost:3000",
            "http://[::1]:80",
        ] {
            assert_eq!(found(&format!("[{good:?}]")).http.cors_origins, [good]);
        }
        for bad in [
            "*",
            "null",
            "https://a/",
            "https://A",
            "a.example.com",
            "https://a b",
        ] {
            let text = format!("version = 1\n[http]\ncors_origins = [\"http://a\", {bad:?}]\n");
            let words = format!("dsd.toml:3: `http.cors_origins` has {bad:?}; an origin is");
            assert!(error(&text, &[], &[]).starts_with(&words), "{bad}");
        }
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
        for (wrong, right) in [
            ("DSD_HTTP_LISTEN", "DSD_HTTP__LISTEN"),
            ("DSD_HTTP_API_KEYS_FILE", "DSD_HTTP__API_KEYS_FILE"),
            ("DSD_LOGS", "DSD_LOG"),
            ("DSD_LOG_FILTER", "DSD_LOG__FILTER"),
        ] {
            assert_eq!(
                error("version = 1\n", &[], &[(wrong, "x")]),
                format!(
                    "environment variable {wrong}: unknown key `{wrong}`; did you mean `{right}`?"
                )
            );
        }
        let others = [
            "DSD_TEST_DATA",
            "DSD_BIN",
            "DSD_PORT",
            "DSD_PORT_8000_TCP_ADDR",
            "DSD_SERVICE_HOST",
            "DSD_SERVICE_PORT_HTTP",
            "DSD_LOG",
            "DSD_STATE",
            "PATH",
        ];
        let env = || others.map(|name| (name.to_owned(), "x".to_owned()));
        Config::default().apply_env(env()).unwrap();
        assert_eq!(unread_variables(env()), ["DSD_TEST_DATA", "DSD_BIN"]);
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
