//! Every key: name, type, default, range, meaning. The one place to add one.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::Deserialize;
use toml::Spanned;

use super::load::{ConfigError, SourceText};

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
}

/// Values that can be held against a range.
trait InRange: Sized + PartialOrd + ToString {
    fn in_range(&self, min: Self, max: Self) -> bool {
        min <= *self && *self <= max
    }
}
impl InRange for usize {}
impl InRange for u64 {}

/// Defines the sections: the checked struct, the struct that TOML is read into, and the table of keys. One list, so that
/// a key cannot lack its documentation, default or check.
macro_rules! sections {
    ($(
        $(#[doc = $section_doc:literal])+
        $section:ident: $Checked:ident / $Raw:ident {
            $(
                #[doc = $doc:literal]
                $key:ident: $Type:ty = $default:expr, $default_doc:literal $(, $min:literal ..= $max:literal)?;
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

            #[derive(Debug, Default, Deserialize)]
            #[serde(default, deny_unknown_fields)]
            struct $Raw {
                $($key: Option<Spanned<$Type>>,)+
            }

            impl $Raw {
                fn apply(self, to: &mut $Checked, _text: &SourceText<'_>) -> Result<(), ConfigError> {
                    $(
                        if let Some(value) = self.$key {
                            $(
                                if !value.get_ref().in_range($min, $max) {
                                    return Err(ConfigError::OutOfRange {
                                        origin: _text.origin(Some(value.span())),
                                        key: concat!(stringify!($section), ".", stringify!($key)),
                                        found: value.get_ref().to_string(),
                                        min: $min,
                                        max: $max,
                                    });
                                }
                            )?
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
        }

        /// One file as TOML gives it.
        #[derive(Debug, Default, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(super) struct RawConfig {
            pub(super) version: Option<Spanned<u64>>,
            $($section: $Raw,)+
            models: Vec<ModelConfig>,
        }

        impl RawConfig {
            /// Lays the values of this file over `to`.
            pub(super) fn apply(self, to: &mut Config, text: &SourceText<'_>) -> Result<(), ConfigError> {
                $(self.$section.apply(&mut to.$section, text)?;)+
                to.models.extend(self.models);
                Ok(())
            }
        }

        /// Names of all tables.
        pub(super) const SECTIONS: &[&str] = &[$(stringify!($section),)+ "models"];

        /// Every key, in the order of docs/CONFIG.md.
        pub const KEYS: &[KeyDoc] = &[
            $($(
                KeyDoc {
                    section: stringify!($section),
                    name: stringify!($key),
                    default: $default_doc,
                    range: concat!("" $(, stringify!($min), " to ", stringify!($max))?),
                    doc: $doc.trim_ascii(),
                },
            )+)+
            KeyDoc {
                section: "models",
                name: "name",
                default: "required",
                range: "1 to 128 bytes",
                doc: "Name in requests.",
            },
            KeyDoc {
                section: "models",
                name: "path",
                default: "required",
                range: "",
                doc: "Checkpoint folder (safetensors), GGUF file or pack.",
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
        /// Bytes of all request bodies in flight, at least `body_bytes_max`; the first 16 KiB of each do not count. Without room a body waits up to 10 s, then gets 503; one that holds room and stands still for 2 s while others wait gets 408.
        body_budget_bytes: usize = 268_435_456, "268435456", 1024..=1_099_511_627_776;
        /// Connections at once; while all are taken, 16 more get one request each and a second for its head, and further ones wait. Fewer when the limit of open files leaves no room for them.
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
        /// File of API keys, one per line; absent: everybody may call.
        api_keys_file: Option<PathBuf> = None, "none";
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
        tp: usize = 1, "1", 1..=64;
        /// Compute threads of each rank; 0 deals the cores to the ranks.
        threads: usize = 0, "0", 0..=4096;
        /// Seconds that a rank may be late in a step before its group is lost and formed again.
        step_timeout_s: u64 = 30, "30", 1..=3600;
        /// Positions in the KV cache of each model.
        kv_tokens: Option<usize> = None, "one full context, at most a quarter of the free memory";
        /// Bytes of the KV cache of each model; with `kv_tokens`, the smaller of both counts.
        kv_bytes: Option<u64> = None, "none";
        /// Tokens computed in one step, prefill and decode together.
        step_tokens: usize = 512, "512", 1..=1_048_576;
        /// Sequences running at once.
        running_max: usize = 32, "32", 1..=65_536;
        /// Requests waiting at once; further ones get 429.
        waiting_max: usize = 128, "128", 1..=1_048_576;
        /// Keep the keys and values of prompts for later ones that begin alike, within the KV cache.
        prefix_cache: bool = true, "true";
        /// Seconds from one check of a pack's tensors to the next; the first begins at start.
        scrub_interval_s: u64 = 86_400, "86400", 60..=31_536_000;
        /// Bytes a second that such a check reads at most.
        scrub_bytes_per_s: u64 = 268_435_456, "268435456", 1_048_576..=1_099_511_627_776;
        /// `f32`, or `int8`: block-quantized layers round activations to bytes, attention over a `bf16` cache rounds queries and weights to bf16 (other bits, faster products).
        activations: Activations = Activations::F32, "`f32`";
        /// How keys and values are stored: `f32`, `bf16` or `int8` (a scale for every position and head).
        kv_type: KvType = KvType::F32, "`f32`";
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
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Name in requests.
    pub name: String,
    /// Checkpoint folder, GGUF file or pack.
    pub path: PathBuf,
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
