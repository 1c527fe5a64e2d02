//! The files that say who may call: a file of tenants, or one of bare keys.
//!
//! Reads and checks; changes nothing.
//!
//! Invariant: what is returned is valid as a whole; the first thing that is wrong is an error with
//! its line. Files that others than their owner may read or write are not read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Deserialize;
use toml::Spanned;

use super::{
    Tenant,
    caps::Caps,
    keys::{self, KEY_LENS, Key, KeyDigest},
};
use crate::{
    config::{self, Origin},
    flow::Class,
    runtime::clock,
};

/// The one version of the file's format.
const VERSION: u64 = 1;
/// Longest file read.
pub(super) const FILE_LEN_MAX: u64 = 1 << 20;
/// Tenants of a node; each is a label in metrics.
pub const TENANTS_MAX: usize = 1000;
/// Bytes of a tenant's name.
pub const NAME_LEN_MAX: usize = 64;
/// Largest weight.
pub const WEIGHT_MAX: u32 = 10_000;
/// Keys of a tenant, replaced ones included.
const KEYS_MAX: usize = 16;
/// Models that a tenant may be limited to.
pub const MODELS_MAX: usize = 128;
/// Bytes of a model's name.
const MODEL_NAME_LEN_MAX: usize = 128;
/// How long a replaced key may stay valid.
pub const GRACE_MAX: Duration = Duration::from_secs(7 * 86_400);
/// Tokens of the smallest request: one in, one out.
const REQUEST_TOKENS_MIN: u64 = 2;
/// Words of the file, to suggest from.
const WORDS: [&str; 14] = [
    "version",
    "tenants",
    "name",
    "weight",
    "class",
    "caps",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "models",
    "key_digests",
    "retiring_keys",
    "digest",
    "until_unix_s",
];

/// Why a file of tenants or keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A pipe, a folder, a device.
    #[error("`{}` is no regular file", path.display())]
    NoFile {
        /// What was named.
        path: PathBuf,
    },
    /// Others than the owner may read or write it.
    #[error(
        "`{0}` may be read or written by others than its owner (mode {mode:04o}); run `chmod 600 {0}`",
        path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Too long to be what it should be.
    #[error("`{}` has more than {FILE_LEN_MAX} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Not TOML, or a wrong type.
    #[error("{origin}: {problem}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What the reader says.
        problem: String,
    },
    /// A key nobody knows.
    #[error("{origin}: unknown key `{key}`{}", suggestion.map(|s| format!("; did you mean `{s}`?")).unwrap_or_default())]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// As written.
        key: String,
        /// The nearest known key.
        suggestion: Option<&'static str>,
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
    /// A name that cannot be used.
    #[error(
        "{origin}: tenant name {name:?} must have 1 to {NAME_LEN_MAX} characters of `a-z`, `A-Z`, `0-9`, `.`, `_` and `-`"
    )]
    Name {
        /// Where.
        origin: Origin,
        /// As written.
        name: String,
    },
    /// Two tenants of one name.
    #[error("{origin}: another tenant is called `{name}`")]
    NameTwice {
        /// Where the second one is.
        origin: Origin,
        /// The name.
        name: String,
    },
    /// No share at all, or one beyond measure.
    #[error("{origin}: `weight` is {found}, expected 1 to {WEIGHT_MAX}")]
    Weight {
        /// Where.
        origin: Origin,
        /// As written.
        found: i64,
    },
    /// A class nobody knows.
    #[error("{origin}: `class` is {found:?}, expected \"interactive\" or \"batch\"")]
    Class {
        /// Where.
        origin: Origin,
        /// As written.
        found: String,
    },
    /// A cap that lets nothing through, or one beyond measure.
    #[error("{origin}: `{cap}` is {found}, expected 1 to {max}; leave it out for no limit")]
    Cap {
        /// Where.
        origin: Origin,
        /// Its key.
        cap: &'static str,
        /// As written.
        found: i64,
        /// Largest allowed.
        max: i64,
    },
    /// Caps that no request can meet together.
    #[error(
        "{origin}: `tokens_per_minute` is {tokens}, too little for {requests} requests of at least {REQUEST_TOKENS_MIN} tokens"
    )]
    CapsContradict {
        /// Where.
        origin: Origin,
        /// Tokens a minute.
        tokens: u64,
        /// Requests a minute, 1 where they are not limited.
        requests: u32,
    },
    /// A model's name that none can have.
    #[error(
        "{origin}: model name {name:?} must have 1 to {MODEL_NAME_LEN_MAX} printable characters without spaces"
    )]
    Model {
        /// Where.
        origin: Origin,
        /// As written.
        name: String,
    },
    /// A list of models that lets nothing through.
    #[error("{origin}: `models` is empty; leave it out for all models")]
    NoModel {
        /// Where.
        origin: Origin,
    },
    /// Not the digest of a key.
    #[error("{origin}: a key digest is `blake3:` and 64 hexadecimal digits")]
    Digest {
        /// Where.
        origin: Origin,
    },
    /// A key that means two tenants, or one twice.
    #[error("{origin}: this key is tenant `{other}`'s already")]
    KeyTwice {
        /// Where the second one is.
        origin: Origin,
        /// Whose it is.
        other: String,
    },
    /// More than is handled.
    #[error("{origin}: {found} {what}, at most {max} are allowed")]
    TooMany {
        /// Where.
        origin: Origin,
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// A line that is no key, in a file of bare keys.
    #[error("{origin}: a key has {} to {} visible ASCII characters", KEY_LENS.start(), KEY_LENS.end())]
    Key {
        /// Where.
        origin: Origin,
    },
    /// A file without anybody would lock everybody out.
    #[error("`{}` holds no {what}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// `tenant` or `key`.
        what: &'static str,
    },
}

impl TenantsError {
    /// Where in the file to change something; `None` where it is the file itself.
    pub fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Read { .. }
            | Self::NoFile { .. }
            | Self::Exposed { .. }
            | Self::TooLong { .. }
            | Self::Empty { .. } => None,
            Self::Syntax { origin, .. }
            | Self::UnknownKey { origin, .. }
            | Self::VersionMissing { origin }
            | Self::Version { origin, .. }
            | Self::Name { origin, .. }
            | Self::NameTwice { origin, .. }
            | Self::Weight { origin, .. }
            | Self::Class { origin, .. }
            | Self::Cap { origin, .. }
            | Self::CapsContradict { origin, .. }
            | Self::Model { origin, .. }
            | Self::NoModel { origin }
            | Self::Digest { origin }
            | Self::KeyTwice { origin, .. }
            | Self::TooMany { origin, .. }
            | Self::Key { origin } => Some(origin),
        }
    }
}

/// Two clocks at one moment: files speak of the wall's, the rest of the node of the other.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Monotonic.
    pub instant: Instant,
    /// Seconds since 1970.
    pub unix_s: u64,
}

impl Now {
    /// What both clocks say.
    pub fn read() -> Self {
        Self {
            instant: clock::now(),
            unix_s: clock::unix_seconds(),
        }
    }

    /// When a moment of the wall clock comes, at most [`GRACE_MAX`] from now, so that a wall clock
    /// that was set back keeps no key alive.
    fn instant_of(self, unix_s: u64) -> Instant {
        self.instant + Duration::from_secs(unix_s.saturating_sub(self.unix_s)).min(GRACE_MAX)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    version: Option<Spanned<u64>>,
    #[serde(default)]
    tenants: Vec<RawTenant>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTenant {
    name: Spanned<String>,
    weight: Option<Spanned<i64>>,
    class: Option<Spanned<String>>,
    #[serde(default)]
    caps: RawCaps,
    models: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(default)]
    key_digests: Vec<Spanned<String>>,
    #[serde(default)]
    retiring_keys: Vec<RawRetiring>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawCaps {
    concurrency: Option<Spanned<i64>>,
    requests_per_minute: Option<Spanned<i64>>,
    tokens_per_minute: Option<Spanned<i64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRetiring {
    digest: Spanned<String>,
    until_unix_s: u64,
}

/// A text and its file, to turn spans into lines.
struct SourceText<'a> {
    text: &'a str,
    path: &'a Path,
}

impl SourceText<'_> {
    fn origin(&self, span: Option<Range<usize>>) -> Origin {
        let file = self.path.to_owned();
        match span {
            None => Origin::File(file),
            Some(span) => {
                let before = self.text.as_bytes().iter().take(span.start);
                let line = 1 + before.filter(|b| **b == b'\n').count();
                Origin::Line { file, line }
            }
        }
    }

    fn error(&self, error: &toml::de::Error) -> TenantsError {
        let origin = self.origin(error.span());
        let message = error.message().trim();
        let unknown = message.strip_prefix("unknown field `");
        match unknown.and_then(|rest| rest.split_once('`')) {
            Some((key, _)) => TenantsError::UnknownKey {
                origin,
                key: key.to_owned(),
                suggestion: config::nearest(key, WORDS),
            },
            None => TenantsError::Syntax {
                origin,
                problem: message.to_owned(),
            },
        }
    }
}

/// Reads a file that only its owner may touch.
pub(super) fn read_private(path: &Path) -> Result<String, TenantsError> {
    let failed = |source| TenantsError::Read {
        path: path.to_owned(),
        source,
    };
    // Without O_NONBLOCK the opening of a pipe waits for its other end.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    // Of the file that was opened: the name may lead elsewhere by now.
    let metadata = file.metadata().map_err(failed)?;
    let path = || path.to_owned();
    if !metadata.is_file() {
        return Err(TenantsError::NoFile { path: path() });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(TenantsError::Exposed { path: path(), mode });
    }
    let mut text = String::new();
    let read = file.take(FILE_LEN_MAX + 1).read_to_string(&mut text);
    read.map_err(failed)?;
    if FILE_LEN_MAX < text.len() as u64 {
        return Err(TenantsError::TooLong { path: path() });
    }
    Ok(text)
}

/// The tenants of a file's text.
pub(super) fn parse(text: &str, path: &Path, now: Now) -> Result<Vec<Tenant>, TenantsError> {
    let source = SourceText { text, path };
    let raw: RawFile = toml::from_str(text).map_err(|e| source.error(&e))?;
    match raw.version {
        None => {
            return Err(TenantsError::VersionMissing {
                origin: source.origin(None),
            });
        }
        Some(version) if *version.get_ref() != VERSION => {
            return Err(TenantsError::Version {
                origin: source.origin(Some(version.span())),
                found: *version.get_ref(),
            });
        }
        Some(_) => {}
    }
    source.check_count("tenants", raw.tenants.len(), TENANTS_MAX, None)?;
    let mut names = BTreeSet::new();
    let mut owners: BTreeMap<[u8; 32], String> = BTreeMap::new();
    let mut tenants = Vec::with_capacity(raw.tenants.len());
    for raw in raw.tenants {
        let name_span = raw.name.span();
        let tenant = source.tenant(raw, &mut owners, now)?;
        if !names.insert(Arc::clone(&tenant.name)) {
            return Err(TenantsError::NameTwice {
                origin: source.origin(Some(name_span)),
                name: tenant.name.to_string(),
            });
        }
        tenants.push(tenant);
    }
    if tenants.is_empty() {
        return Err(TenantsError::Empty {
            path: path.to_owned(),
            what: "tenant",
        });
    }
    Ok(tenants)
}

impl SourceText<'_> {
    fn tenant(
        &self,
        raw: RawTenant,
        owners: &mut BTreeMap<[u8; 32], String>,
        now: Now,
    ) -> Result<Tenant, TenantsError> {
        let at = |span: Range<usize>| self.origin(Some(span));
        let name = raw.name.get_ref();
        let is_allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if name.is_empty() || NAME_LEN_MAX < name.len() || !name.bytes().all(is_allowed) {
            return Err(TenantsError::Name {
                origin: at(raw.name.span()),
                name: name.chars().take(2 * NAME_LEN_MAX).collect(),
            });
        }
        let weight = match &raw.weight {
            None => 1,
            Some(weight) => u32::try_from(*weight.get_ref())
                .ok()
                .filter(|weight| (1..=WEIGHT_MAX).contains(weight))
                .ok_or_else(|| TenantsError::Weight {
                    origin: at(weight.span()),
                    found: *weight.get_ref(),
                })?,
        };
        let class = match &raw.class {
            None => Class::Interactive,
            Some(class) => match class.get_ref().as_str() {
                "interactive" => Class::Interactive,
                "batch" => Class::Batch,
                other => {
                    return Err(TenantsError::Class {
                        origin: at(class.span()),
                        found: other.chars().take(NAME_LEN_MAX).collect(),
                    });
                }
            },
        };
        let caps = self.caps(&raw.caps)?;
        let models = raw.models.map(|models| self.models(models)).transpose()?;
        let n_keys = raw.key_digests.len() + raw.retiring_keys.len();
        self.check_count("keys", n_keys, KEYS_MAX, Some(raw.name.span()))?;
        let lasting = raw.key_digests.into_iter().map(|digest| (digest, None));
        let retiring = raw.retiring_keys.into_iter();
        let retiring = retiring.map(|raw| (raw.digest, Some(now.instant_of(raw.until_unix_s))));
        let mut keys = Vec::with_capacity(n_keys);
        for (text, until) in lasting.chain(retiring) {
            let digest = KeyDigest::parse(text.get_ref()).ok_or_else(|| TenantsError::Digest {
                origin: at(text.span()),
            })?;
            if let Some(other) = owners.insert(*digest.bytes(), name.clone()) {
                let origin = at(text.span());
                return Err(TenantsError::KeyTwice { origin, other });
            }
            keys.push(Key { digest, until });
        }
        let mut tenant = Tenant::new(name);
        tenant.weight = weight;
        tenant.class = class;
        tenant.caps = caps;
        tenant.models = models;
        tenant.keys = keys;
        Ok(tenant)
    }

    fn caps(&self, raw: &RawCaps) -> Result<Caps, TenantsError> {
        let number = |cap: &'static str, value: &Option<Spanned<i64>>, max: i64| match value {
            None => Ok(None),
            Some(value) if (1..=max).contains(value.get_ref()) => Ok(Some(*value.get_ref())),
            Some(value) => Err(TenantsError::Cap {
                origin: self.origin(Some(value.span())),
                cap,
                found: *value.get_ref(),
                max,
            }),
        };
        let small = |value: Option<i64>| value.map(|v| u32::try_from(v).unwrap_or(u32::MAX));
        let concurrency = number("concurrency", &raw.concurrency, 1_000_000)?;
        let requests = number(
            "requests_per_minute",
            &raw.requests_per_minute,
            1_000_000_000,
        )?;
        let tokens = number(
            "tokens_per_minute",
            &raw.tokens_per_minute,
            1_000_000_000_000,
        )?;
        let caps = Caps {
            concurrency: small(concurrency),
            requests_per_minute: small(requests),
            tokens_per_minute: tokens.map(i64::unsigned_abs),
        };
        let requests = caps.requests_per_minute.unwrap_or(1);
        match (&raw.tokens_per_minute, caps.tokens_per_minute) {
            (Some(at), Some(tokens)) if tokens < u64::from(requests) * REQUEST_TOKENS_MIN => {
                Err(TenantsError::CapsContradict {
                    origin: self.origin(Some(at.span())),
                    tokens,
                    requests,
                })
            }
            _ => Ok(caps),
        }
    }

    fn models(
        &self,
        models: Spanned<Vec<Spanned<String>>>,
    ) -> Result<BTreeSet<String>, TenantsError> {
        let span = models.span();
        let models = models.into_inner();
        if models.is_empty() {
            let origin = self.origin(Some(span));
            return Err(TenantsError::NoModel { origin });
        }
        self.check_count("models", models.len(), MODELS_MAX, Some(span))?;
        let mut names = BTreeSet::new();
        for model in models {
            let span = model.span();
            let name = model.into_inner();
            let is_odd = |c: char| c.is_control() || c.is_whitespace();
            if name.is_empty() || MODEL_NAME_LEN_MAX < name.len() || name.contains(is_odd) {
                return Err(TenantsError::Model {
                    origin: self.origin(Some(span)),
                    name: name.chars().take(MODEL_NAME_LEN_MAX).collect(),
                });
            }
            names.insert(name);
        }
        Ok(names)
    }

    fn check_count(
        &self,
        what: &'static str,
        found: usize,
        max: usize,
        span: Option<Range<usize>>,
    ) -> Result<(), TenantsError> {
        if found <= max {
            return Ok(());
        }
        Err(TenantsError::TooMany {
            origin: self.origin(span),
            what,
            found,
            max,
        })
    }
}

/// The keys of a file that holds one per line; empty lines and lines that begin with `#` are skipped.
pub(super) fn parse_keys(text: &str, path: &Path) -> Result<Vec<Key>, TenantsError> {
    let mut keys = Vec::new();
    let mut seen = BTreeSet::new();
    for (idx, line) in text.lines().enumerate() {
        let key = line.trim();
        if key.is_empty() || key.starts_with('#') {
            continue;
        }
        if !keys::is_key(key) {
            return Err(TenantsError::Key {
                origin: Origin::Line {
                    file: path.to_owned(),
                    line: idx + 1,
                },
            });
        }
        let digest = KeyDigest::of(key);
        if seen.insert(*digest.bytes()) {
            keys.push(Key {
                digest,
                until: None,
            });
        }
    }
    if keys.is_empty() {
        return Err(TenantsError::Empty {
            path: path.to_owned(),
            what: "key",
        });
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    const A: &str = "blake3:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "blake3:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn now() -> Now {
        Now {
            instant: clock::now(),
            unix_s: 1_790_000_000,
        }
    }

    fn read(body: &str) -> Result<Vec<Tenant>, TenantsError> {
        parse(
            &format!("version = 1\n{body}"),
            Path::new("tenants.toml"),
            now(),
        )
    }

    #[test]
    fn every_field_is_read_and_has_a_default() {
        let body = format!(
            r#"
            [[tenants]]
            name = "team-a.1_x"
            weight = 3
            class = "batch"
            caps = {{ concurrency = 4, requests_per_minute = 60, tokens_per_minute = 120 }}
            models = ["tiny", "org/other"]
            key_digests = ["{A}"]
            retiring_keys = [{{ digest = "{B}", until_unix_s = 1_790_000_060 }}]
            [[tenants]]
            name = "b"
            "#
        );
        let tenants = read(&body).unwrap();
        let a = &tenants[0];
        assert_eq!(
            (&*a.name, a.weight, a.class),
            ("team-a.1_x", 3, Class::Batch)
        );
        assert_eq!(a.caps.concurrency, Some(4));
        assert_eq!(a.caps.requests_per_minute, Some(60));
        assert_eq!(a.caps.tokens_per_minute, Some(120));
        let models = ["org/other".to_owned(), "tiny".to_owned()];
        assert_eq!(a.models, Some(BTreeSet::from(models)));
        assert_eq!(a.keys[0].until, None);
        let left = a.keys[1].until.unwrap() - clock::now();
        assert!(
            (59..=60).contains(&(left + Duration::from_millis(500)).as_secs()),
            "{left:?}"
        );
        let b = &tenants[1];
        assert_eq!((b.weight, b.class), (1, Class::Interactive));
        assert_eq!((b.caps, &b.models), (Caps::default(), &None));
        assert!(b.keys.is_empty());
        assert!(a.id != b.id && a.id != 0 && b.id != 0);
    }

    #[test]
    fn a_wall_clock_that_was_set_back_keeps_no_key_alive_for_long() {
        let body = format!(
            "[[tenants]]\nname = \"a\"\nretiring_keys = [{{ digest = \"{A}\", until_unix_s = 9_000_000_000 }}]\n"
        );
        let until = read(&body).unwrap()[0].keys[0].until.unwrap();
        assert!(until <= clock::now() + GRACE_MAX);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let check = |body: &str, expected: &str| {
            let error = read(body).expect_err(expected).to_string();
            assert_eq!(error, format!("tenants.toml{expected}"), "{body}");
        };
        let one = |line: &str| format!("[[tenants]]\nname = \"a\"\n{line}\n");
        check(
            &one("wieght = 2"),
            ":4: unknown key `wieght`; did you mean `weight`?",
        );
        check(
            &one("caps = { tokens_per_minut = 2 }"),
            ":4: unknown key `tokens_per_minut`; did you mean `tokens_per_minute`?",
        );
        check(
            "[[tenant]]\nname = \"a\"\n",
            ":2: unknown key `tenant`; did you mean `tenants`?",
        );
        check(&one("weight = 0"), ":4: `weight` is 0, expected 1 to 10000");
        check(
            &one("weight = -3"),
            ":4: `weight` is -3, expected 1 to 10000",
        );
        check(
            &one("class = \"bulk\""),
            ":4: `class` is \"bulk\", expected \"interactive\" or \"batch\"",
        );
        check(
            &one("caps = { concurrency = 0 }"),
            ":4: `concurrency` is 0, expected 1 to 1000000; leave it out for no limit",
        );
        check(
            &one("caps = { tokens_per_minute = 1 }"),
            ":4: `tokens_per_minute` is 1, too little for 1 requests of at least 2 tokens",
        );
        check(
            &one("caps = { requests_per_minute = 60, tokens_per_minute = 100 }"),
            ":4: `tokens_per_minute` is 100, too little for 60 requests of at least 2 tokens",
        );
        check(
            &one("models = []"),
            ":4: `models` is empty; leave it out for all models",
        );
        check(
            &one("models = [\"tiny\", \"a b\"]"),
            ":4: model name \"a b\" must have 1 to 128 printable characters without spaces",
        );
        check(
            &one("key_digests = [\n  \"sk-plain-key-in-the-file\" ]"),
            ":5: a key digest is `blake3:` and 64 hexadecimal digits",
        );
        check(
            &one(&format!("key_digests = [\"{A}\",\n\"{A}\"]")),
            ":5: this key is tenant `a`'s already",
        );
        check(
            &format!(
                "[[tenants]]\nname = \"a\"\nkey_digests = [\"{A}\"]\n[[tenants]]\nname = \"b\"\nkey_digests = [\"{A}\"]\n"
            ),
            ":7: this key is tenant `a`'s already",
        );
        check(
            "[[tenants]]\nname = \"a\"\n[[tenants]]\nname = \"a\"\n",
            ":5: another tenant is called `a`",
        );
        check(
            "[[tenants]]\nname = \"a b\"\n",
            ":3: tenant name \"a b\" must have 1 to 64 characters of `a-z`, `A-Z`, `0-9`, `.`, `_` and `-`",
        );
        let many: String = (0..=KEYS_MAX)
            .map(|n| format!("\"blake3:{n:064x}\","))
            .collect();
        check(
            &one(&format!("key_digests = [{many}]")),
            ":3: 17 keys, at most 16 are allowed",
        );
        check(
            "tenants = 3\n",
            ":2: invalid type: integer `3`, expected a sequence",
        );
    }

    #[test]
    fn files_of_another_format_or_without_anybody_are_refused() {
        let text = |text: &str| {
            parse(text, Path::new("t"), now())
                .expect_err(text)
                .to_string()
        };
        assert_eq!(text(""), "t: `version = 1` is missing");
        assert_eq!(text("version = 1"), "`t` holds no tenant");
        assert_eq!(
            text("\nversion = 2"),
            "t:2: version 2 is not known, this program reads version 1"
        );
    }

    #[test]
    fn files_that_are_no_private_regular_file_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tenants.toml");
        fs::write(&path, "x").unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let error = read_private(&path).unwrap_err();
            assert!(
                matches!(error, TenantsError::Exposed { mode: found, .. } if found == mode),
                "{error}"
            );
            assert!(error.to_string().contains("chmod 600 "), "{error}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(read_private(&path).unwrap(), "x");
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(FILE_LEN_MAX + 1).unwrap();
        assert!(matches!(
            read_private(&path),
            Err(TenantsError::TooLong { .. })
        ));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for odd in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            assert!(
                matches!(read_private(odd), Err(TenantsError::NoFile { .. })),
                "{}",
                odd.display()
            );
        }
        assert!(matches!(
            read_private(Path::new("/nonexistent")),
            Err(TenantsError::Read { .. })
        ));
        fs::write(&path, [0xff]).unwrap();
        assert!(matches!(
            read_private(&path),
            Err(TenantsError::Read { .. })
        ));
    }

    #[test]
    fn bare_keys_that_would_surprise_are_refused() {
        let keys = |text: &str| parse_keys(text, Path::new("keys"));
        let two = keys("# team a\nsk-0123456789abcdef\n\n  sk-fedcba9876543210  \n").unwrap();
        assert_eq!(two.len(), 2);
        assert_eq!(two[1].digest, KeyDigest::of("sk-fedcba9876543210"));
        for empty in ["", "# only a comment\n"] {
            assert!(matches!(keys(empty), Err(TenantsError::Empty { .. })));
        }
        let error = keys("sk-0123456789abcdef\nshort\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "keys:2: a key has 16 to 256 visible ASCII characters"
        );
    }
}
