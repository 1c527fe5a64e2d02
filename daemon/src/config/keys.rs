//! Every key: name, type, default, range, meaning. The one place to add one.

use std::{
    collections::BTreeMap,
    mem::take,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;
use toml::Spanned;

use super::load::{ConfigError, Origin, SourceText};

/// One key as documented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyDoc {
    /// Name of its table.
    pub section: &'static str,
    /// Its name.
    pub name: &'static str,
    /// Value when absent.
    pub default: &'static str,
    /// Values allowed.
    pub range: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// An entry of `[[models]]` may have it, too.
    pub per_model: bool,
}

/// Values that can be held against a range; absent ones are in every range.
trait InRange {
    type Bound: PartialOrd + Copy;

    fn bounded(&self) -> Option<Self::Bound>;

    fn in_range(&self, min: Self::Bound, max: Self::Bound) -> bool {
        self.bounded()
            .is_none_or(|value| min <= value && value <= max)
    }
}

macro_rules! in_range {
    ($($Type:ty),+) => {
        $(
            impl InRange for $Type {
                type Bound = Self;

                fn bounded(&self) -> Option<Self> {
                    Some(*self)
                }
            }
        )+
    };
}
in_range!(usize, u64, f64);

impl<T: InRange> InRange for Option<T> {
    type Bound = T::Bound;

    fn bounded(&self) -> Option<T::Bound> {
        self.as_ref().and_then(InRange::bounded)
    }
}

/// A value as a person writes it.
trait Shown {
    fn shown(&self) -> String;
}

macro_rules! shown {
    ($($Type:ty: $show:expr),+ $(,)?) => {
        $(
            impl Shown for $Type {
                fn shown(&self) -> String {
                    let show: fn(&$Type) -> String = $show;
                    show(self)
                }
            }
        )+
    };
}
shown! {
    bool: ToString::to_string,
    usize: ToString::to_string,
    u64: ToString::to_string,
    f64: ToString::to_string,
    String: String::clone,
    SocketAddr: ToString::to_string,
    Vec<String>: |list| list.join(", "),
    PathBuf: |path| path.display().to_string(),
    Activations: |format| format!("{format:?}").to_lowercase(),
    KvType: |format| format!("{format:?}").to_lowercase(),
    LogFormat: |format| format!("{format:?}").to_lowercase(),
    Class: |class| class.name().to_owned(),
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or_else(String::new, Shown::shown)
    }
}

/// Defines the sections: the checked struct, the struct that TOML is read into, and the table of keys. One list, so that
/// a key cannot lack its documentation, default or check. Keys that end in `per_model` may stand in `[[models]]`, too.
macro_rules! sections {
    ($(
        $(#[doc = $section_doc:literal])+
        $section:ident: $Checked:ident / $Raw:ident {
            $(
                #[doc = $doc:literal]
                $key:ident: $Type:ty = $default:expr, $default_doc:literal
                    $(, $min:literal ..= $max:literal)? $(; $scope:ident)?;
            )+
        }
    )+) => {
        $(
            $(#[doc = $section_doc])+
            #[derive(Debug, Clone, PartialEq)]
            pub struct $Checked {
                $(
                    #[doc = $doc]
                    pub $key: $Type,
                )+
            }

            impl Default for $Checked {
                fn default() -> Self {
                    Self { $($key: $default,)+ }
                }
            }

            impl $Checked {
                /// Every key of the section with its value as text, empty where it has none.
                pub fn shown(&self) -> Vec<(&'static str, String)> {
                    vec![$((stringify!($key), self.$key.shown()),)+]
                }
            }

            #[derive(Debug, Default, Deserialize)]
            #[serde(default, deny_unknown_fields)]
            struct $Raw {
                $($key: Option<Spanned<$Type>>,)+
            }

            impl $Raw {
                /// Lays the values over `to` and notes where they came from, under `section.key` or, for a model, `key`.
                fn apply(
                    self,
                    to: &mut $Checked,
                    text: &SourceText<'_>,
                    prefix: &str,
                    origins: &mut Origins,
                ) -> Result<(), ConfigError> {
                    $(
                        if let Some(value) = self.$key {
                            let key = format!("{prefix}{}", stringify!($key));
                            let origin = text.origin(Some(value.span()));
                            $(
                                let (min, max) = ($min, $max);
                                if !value.get_ref().in_range(min, max) {
                                    let prefix = if prefix.is_empty() { "models." } else { "" };
                                    return Err(ConfigError::OutOfRange {
                                        origin,
                                        key: format!("{prefix}{key}"),
                                        found: value.get_ref().shown(),
                                        range: format!("{min} to {max}"),
                                    });
                                }
                            )?
                            origins.0.insert(key, origin);
                            to.$key = value.into_inner();
                        }
                    )+
                    Ok(())
                }
            }
        )+

        /// Everything a node is told.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct Config {
            $(
                $(#[doc = $section_doc])+
                pub $section: $Checked,
            )+
            /// Models loaded at start.
            pub models: Vec<ModelConfig>,
            /// Where values came from, by `section.key`; those that are absent have their default.
            pub origins: Origins,
        }

        impl Config {
            /// Every key of every section with its value as text, as `section.key`.
            pub fn shown(&self) -> Vec<(String, String)> {
                let mut all = Vec::new();
                $(
                    let named = |(key, value)| (format!("{}.{key}", stringify!($section)), value);
                    all.extend(self.$section.shown().into_iter().map(named));
                )+
                all
            }
        }

        /// One file as TOML gives it.
        #[derive(Debug, Default, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(super) struct RawConfig {
            pub(super) version: Option<Spanned<u64>>,
            $($section: $Raw,)+
            models: Vec<RawModel>,
        }

        impl RawConfig {
            /// Lays the values of this file over `to`.
            pub(super) fn apply(self, to: &mut Config, text: &SourceText<'_>) -> Result<(), ConfigError> {
                $(
                    let prefix = concat!(stringify!($section), ".");
                    self.$section.apply(&mut to.$section, text, prefix, &mut to.origins)?;
                )+
                for model in self.models {
                    to.models.push(model.check(text)?);
                }
                Ok(())
            }
        }

        /// What an entry of `[[models]]` sets; the rest is as in the sections.
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct ModelOverrides {
            $($($(
                #[doc = concat!("In place of `", stringify!($section), ".", stringify!($key), "` (", stringify!($scope), ").")]
                pub $key: Option<$Type>,
            )?)+)+
        }

        impl ModelOverrides {
            /// Lays these values over those of the sections.
            pub(super) fn lay_over(&self, to: &mut ModelSettings) {
                $($($(
                    let $scope = &self.$key;
                    if let Some(value) = $scope {
                        to.$section.$key.clone_from(value);
                    }
                )?)+)+
            }
        }

        /// An entry of `[[models]]` as TOML gives it.
        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct RawModel {
            name: Spanned<String>,
            path: Spanned<PathBuf>,
            aliases: Option<Spanned<Vec<Spanned<String>>>>,
            thinking_aliases: Option<Spanned<Vec<Spanned<String>>>>,
            required: Option<Spanned<bool>>,
            $($($(
                #[doc = stringify!($scope)]
                $key: Option<Spanned<$Type>>,
            )?)+)+
        }

        impl RawModel {
            /// Checks every value by itself.
            fn check(self, text: &SourceText<'_>) -> Result<ModelConfig, ConfigError> {
                let mut origins = Origins::default();
                let mut overrides = ModelOverrides::default();
                $(
                    let mut raw = $Raw::default();
                    $($(
                        let $scope = self.$key;
                        overrides.$key = $scope.as_ref().map(|value| value.get_ref().clone());
                        raw.$key = $scope;
                    )?)+
                    take(&mut raw).apply(&mut $Checked::default(), text, "", &mut origins)?;
                )+
                let mut note = |key: &str, span| {
                    origins.0.insert(key.to_owned(), text.origin(Some(span)));
                };
                note("name", self.name.span());
                note("path", self.path.span());
                let mut aliases = Vec::new();
                for (key, list, thinks) in [
                    ("aliases", self.aliases, false),
                    ("thinking_aliases", self.thinking_aliases, true),
                ] {
                    let Some(list) = list else { continue };
                    note(key, list.span());
                    aliases.extend(list.into_inner().into_iter().map(|alias| Alias {
                        origin: text.origin(Some(alias.span())),
                        name: alias.into_inner(),
                        thinks,
                    }));
                }
                let required = self.required.is_none_or(|required| {
                    note("required", required.span());
                    required.into_inner()
                });
                Ok(ModelConfig {
                    name: self.name.into_inner(),
                    path: self.path.into_inner(),
                    aliases,
                    required,
                    overrides,
                    origins,
                })
            }
        }

        /// Names of all tables.
        pub(super) const SECTIONS: &[&str] = &[$(stringify!($section),)+ "models"];

        /// Every key, in the order of docs/CONFIG.md. Those with `per_model` are keys of `[[models]]`, too.
        pub const KEYS: &[KeyDoc] = &[
            $($(
                KeyDoc {
                    section: stringify!($section),
                    name: stringify!($key),
                    default: $default_doc,
                    range: concat!("" $(, stringify!($min), " to ", stringify!($max))?),
                    doc: $doc.trim_ascii(),
                    per_model: false $(|| !stringify!($scope).is_empty())?,
                },
            )+)+
            KeyDoc {
                section: "models",
                name: "name",
                default: "required",
                range: "1 to 128 bytes",
                doc: "Name in requests, metrics and logs.",
                per_model: false,
            },
            KeyDoc {
                section: "models",
                name: "path",
                default: "required",
                range: "",
                doc: "Checkpoint folder (safetensors), GGUF file or pack.",
                per_model: false,
            },
            KeyDoc {
                section: "models",
                name: "aliases",
                default: "none",
                range: "up to 16 names",
                doc: "Other names that requests may use, such as `deepseek-chat`; answers repeat the name that was used.",
                per_model: false,
            },
            KeyDoc {
                section: "models",
                name: "thinking_aliases",
                default: "none",
                range: "up to 16 names with `aliases`",
                doc: "The same, such as `deepseek-reasoner`; requests by these names think unless they say otherwise.",
                per_model: false,
            },
            KeyDoc {
                section: "models",
                name: "required",
                default: "true",
                range: "",
                doc: "`/ready` answers 503 while the model is not served; `false` leaves it out of `/ready`.",
                per_model: false,
            },
        ];
    };
}

sections! {
    /// The node itself.
    node: NodeConfig / RawNode {
        /// Name of the node in its certificate and in logs: `a-z`, `0-9`, `-` and `.`.
        name: String = "node".to_owned(), "`node`";
        /// Folder for certificates and state; must be writable.
        state_dir: PathBuf = PathBuf::from("/var/lib/dsd"), "`/var/lib/dsd`";
        /// Folder searched for models that are named without a path.
        models_dir: Option<PathBuf> = None, "folder `models` of `state_dir`";
        /// On stop, seconds that running requests get to finish.
        drain_timeout_s: u64 = 30, "30", 0..=3600;
    }

    /// The HTTP API.
    http: HttpConfig / RawHttp {
        /// Address and port.
        listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8000)), "`127.0.0.1:8000`";
        /// Bytes of a request body; longer ones are refused with 413.
        body_bytes_max: usize = 4_194_304, "4194304", 1024..=1_073_741_824;
        /// Bytes of all request bodies in flight, at least `body_bytes_max`; those of up to 16 KiB do not count. Without room a body waits up to 10 s, then gets 503; one that holds room and stands still for 2 s while others wait gets 408.
        body_budget_bytes: usize = 268_435_456, "268435456", 1024..=1_099_511_627_776;
        /// Connections at once; while all are taken, 64 more get one request each and a quarter of a second for its head, and further ones wait. Fewer when the limit of open files leaves no room for them.
        connections_max: usize = 1024, "1024", 1..=1_000_000;
        /// Seconds for a request's head to arrive once its first byte has.
        header_timeout_s: u64 = 15, "15", 1..=3600;
        /// Seconds for a connection to stay open without a request.
        idle_timeout_s: u64 = 75, "75", 1..=86_400;
        /// Seconds for a request's body to arrive, else 408.
        body_timeout_s: u64 = 60, "60", 1..=3600;
        /// Seconds for a client to take what is sent to it before it counts as gone.
        write_timeout_s: u64 = 60, "60", 1..=3600;
        /// Seconds from the end of the body to the end of the answer, else 504.
        request_timeout_s: u64 = 600, "600", 1..=86_400;
        /// Seconds of silence after which a stream gets a comment.
        keep_alive_s: u64 = 10, "10", 1..=3600;
        /// File of API keys, one per line, all of one tenant; absent, and without `service.tenants_file`: everybody may call.
        api_keys_file: Option<PathBuf> = None, "none";
        /// Origins whose pages may ask from a browser, such as `https://chat.example.com`; keys are needed all the same.
        cors_origins: Vec<String> = Vec::new(), "none";
        /// Prompts tokenised at once; a long body takes several places, the longest one all.
        encoders_max: usize = 4, "4", 1..=1024;
        /// `/ready` answers 503 when a model's last token is older than this many seconds.
        token_age_max_s: u64 = 15, "15", 1..=3600;
    }

    /// The QUIC endpoint for `dsctl` and other nodes.
    quic: QuicConfig / RawQuic {
        /// Address and port.
        listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 7600)), "`127.0.0.1:7600`";
    }

    /// Limits of each model's engine.
    engine: EngineConfig / RawEngine {
        /// Ranks that share each model (tensor parallelism), every one a process.
        tp: usize = 1, "1", 1..=64; per_model;
        /// Compute threads of each rank; 0 deals the cores to the ranks.
        threads: usize = 0, "0", 0..=4096; per_model;
        /// Seconds that a rank may be late in a step before its group is lost and formed again, at most: ten times what the step was expected to take and a second more are enough, but never less than 3.
        step_timeout_s: u64 = 30, "30", 1..=3600; per_model;
        /// Seconds that the agent may be silent before its ranks end: a frozen agent holds no streams.
        agent_timeout_s: u64 = 30, "30", 2..=3600; per_model;
        /// Positions in the KV cache of each model.
        kv_tokens: Option<usize> = None, "two full contexts, at most a quarter of the available memory, but one context where it fits", 1..=1_073_741_824; per_model;
        /// Bytes of the KV cache of each model, in place of `kv_tokens`.
        kv_bytes: Option<u64> = None, "none", 1..=1_125_899_906_842_624; per_model;
        /// Tokens computed in one step, prefill and decode together.
        step_tokens: usize = 512, "512", 1..=1_048_576; per_model;
        /// Milliseconds that a step may take by prediction: bounds how much of prompts rides along with running sequences. 100 on processor cores.
        step_target_ms: Option<u64> = None, "by device", 1..=60_000; per_model;
        /// Sequences running at once, at most `step_tokens`.
        running_max: usize = 32, "32", 1..=65_536; per_model;
        /// Interactive requests of one account waiting at once, a cap behind `service.ttft_target_s`; all accounts together may have twice as many.
        waiting_max: usize = 128, "128", 1..=1_048_576; per_model;
        /// Keep the keys and values of prompts for later ones that begin alike, within the KV cache.
        prefix_cache: bool = true, "true"; per_model;
        /// Seconds from one check of a pack's tensors to the next; the first begins at start.
        scrub_interval_s: u64 = 86_400, "86400", 60..=31_536_000;
        /// Bytes a second that such a check reads at most.
        scrub_bytes_per_s: u64 = 268_435_456, "268435456", 1_048_576..=1_099_511_627_776;
        /// `f32`, or `int8`: block-quantized layers round activations to bytes, attention over a `bf16` cache rounds queries and weights to bf16 (other bits, faster products).
        activations: Activations = Activations::F32, "`f32`"; per_model;
        /// How keys and values are stored: `f32`, `bf16` or `int8` (a scale for every position and head).
        kv_type: KvType = KvType::F32, "`f32`"; per_model;
    }

    /// Who may call, and what requests are promised.
    service: ServiceConfig / RawService {
        /// File of tenants with their keys, weights and caps (docs/API.md); instead of `http.api_keys_file`. Read again on SIGHUP.
        tenants_file: Option<PathBuf> = None, "none";
        /// Seconds within which the first token of an interactive request has to be predicted, else it gets 429 and a time to come back; a prompt that takes longer by itself has twice that time.
        ttft_target_s: f64 = 5.0, "5.0", 0.05..=3600.0; per_model;
        /// Class of requests that name none: `interactive`, refused when late; or `batch`, which waits.
        class: Class = Class::Interactive, "`interactive`"; per_model;
        /// Requests of class `batch` waiting at once; further ones get 429.
        batch_waiting_max: usize = 1024, "1024", 1..=1_048_576;
    }

    /// Logs, which go to standard error.
    log: LogConfig / RawLog {
        /// Levels by module, as in `info,dsd::engine=debug`.
        filter: String = "info".to_owned(), "`info`";
        /// `text` for eyes, `json` for programs.
        format: LogFormat = LogFormat::Text, "`text`";
    }
}

/// A model to serve.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Name in requests.
    pub name: String,
    /// Checkpoint folder, GGUF file or pack.
    pub path: PathBuf,
    /// Other names in requests.
    pub aliases: Vec<Alias>,
    /// The node is not ready without it.
    pub required: bool,
    /// Settings that differ from those of the sections.
    pub overrides: ModelOverrides,
    /// Where its keys are set, by key.
    pub origins: Origins,
}

impl ModelConfig {
    /// A required model with the settings of the sections.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            aliases: Vec::new(),
            required: true,
            overrides: ModelOverrides::default(),
            origins: Origins::default(),
        }
    }
}

/// Another name of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alias {
    /// The name.
    pub name: String,
    /// Where it stands.
    pub origin: Origin,
    /// Requests by it think unless they say otherwise.
    pub thinks: bool,
}

/// What a model runs with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ModelSettings {
    /// Limits of its engine.
    pub engine: EngineConfig,
    /// What its requests are promised.
    pub service: ServiceConfig,
}

/// Where values came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(pub(super) BTreeMap<String, Origin>);

impl Origins {
    /// Where the value of `key` came from; `None` for a default.
    pub fn of(&self, key: &str) -> Option<&Origin> {
        self.0.get(key)
    }
}

/// Which promise a request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Somebody waits for the first token.
    Interactive,
    /// Only the whole matters.
    Batch,
}

impl Class {
    /// As in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

/// Number format of activations in matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Exact.
    F32,
    /// Quantised per block.
    Int8,
}

/// Number format of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// As computed.
    F32,
    /// Half the bytes.
    Bf16,
    /// A quarter of the bytes, and scales.
    Int8,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For eyes.
    Text,
    /// One JSON object a line.
    Json,
}
