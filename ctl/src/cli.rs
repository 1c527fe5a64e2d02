//! The command line: flags, their defaults and their limits.
//!
//! Does not know what a command does.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

/// Operates dsd nodes.
#[derive(Debug, Parser)]
#[command(name = "dsctl", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Address of the node's QUIC endpoint
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT",
        env = "DSD_NODE",
        default_value = "127.0.0.1:7600"
    )]
    pub(crate) node: String,
    /// State folder; certificates are read from its `pki` folder
    /// [default: $XDG_STATE_HOME/dsd, else ~/.local/state/dsd]
    #[arg(long, global = true, value_name = "DIR", env = "DSD_STATE")]
    pub(crate) state: Option<PathBuf>,
    /// Print JSON: one object, or one per line where an answer comes in pieces
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Longest wait for an answer, or for the next piece of one (such as 500ms, 10s, 2m)
    /// [default: 10s, for pieces 5m]
    #[arg(long, global = true, value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Option<Duration>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show a node, its models and what they are doing
    Status,
    /// List, load, unload and verify models
    #[command(subcommand)]
    Model(ModelCommand),
    /// List, show, add, change and remove tenants, and change their keys
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Generate text from a prompt
    Generate(GenerateArgs),
    /// Talk to a model
    Chat(ChatArgs),
    /// Put load on a node over HTTP and measure its answers
    Bench(BenchArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Verbs on models.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Models loaded, and those in the model store that could be
    List,
    /// Load a model by its name in the store or by its path on the node
    Load {
        /// Name or path
        #[arg(value_name = "NAME|PATH")]
        path_or_name: String,
    },
    /// Unload a model; its running requests end
    Unload {
        /// Name
        name: String,
    },
    /// Check every byte of a model's files
    Verify {
        /// Name
        name: String,
    },
}

/// Verbs on tenants.
#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// All tenants and what they are doing
    List,
    /// One tenant, its caps and what it used
    Show {
        /// Name
        name: String,
    },
    /// Add a tenant and print its key, once
    Add {
        /// Name
        name: String,
        #[command(flatten)]
        settings: TenantSettings,
    },
    /// Change a tenant's settings; those not given stay
    Set {
        /// Name
        name: String,
        #[command(flatten)]
        settings: TenantSettings,
    },
    /// Give a tenant a new key instead of those it has and print it, once
    RotateKey {
        /// Name
        name: String,
        /// Seconds that the old keys stay valid, at most a week
        #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=604_800))]
        grace: u64,
    },
    /// Remove a tenant; its keys are refused at once, its requests end as they would
    Remove {
        /// Name
        name: String,
    },
}

/// Settings of a tenant.
#[derive(Debug, Clone, Args)]
pub(crate) struct TenantSettings {
    /// Share of the work against other tenants' [for a new one: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) weight: Option<u32>,
    /// Whether somebody waits for the first token [for a new one: interactive]
    #[arg(long, value_enum)]
    pub(crate) class: Option<TenantClassArg>,
    /// Choices running or waiting at once
    #[arg(long, value_name = "N|none", value_parser = cap)]
    pub(crate) concurrency: Option<Cap>,
    /// Requests a minute
    #[arg(long, value_name = "N|none", value_parser = cap)]
    pub(crate) requests_per_minute: Option<Cap>,
    /// Prompt and output tokens a minute
    #[arg(long, value_name = "N|none", value_parser = cap)]
    pub(crate) tokens_per_minute: Option<Cap>,
    /// A model it may use (may be given more than once; `all` for all)
    #[arg(long = "model", value_name = "NAME|all")]
    pub(crate) models: Vec<String>,
}

/// A limit, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cap(pub(crate) Option<u64>);

/// What a tenant's requests expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TenantClassArg {
    /// The first token soon, or a refusal that says when
    Interactive,
    /// Whenever there is room
    Batch,
}

fn cap(text: &str) -> Result<Cap, String> {
    if text == "none" {
        return Ok(Cap(None));
    }
    match text.parse() {
        Ok(0) => Err("0 would let nothing through; `none` is no limit".to_owned()),
        Ok(cap) => Ok(Cap(Some(cap))),
        Err(_) => Err(format!("{text:?} is neither a number nor `none`")),
    }
}

/// How tokens are chosen; what is not given is as in the HTTP API.
#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// Model; the only one loaded when left out
    #[arg(long, short, default_value = "")]
    pub(crate) model: String,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_tokens: Option<u32>,
    /// 0 takes the likeliest token
    #[arg(long, value_name = "X")]
    pub(crate) temperature: Option<f32>,
    /// Keep the smallest set of likeliest tokens with this mass
    #[arg(long, value_name = "X")]
    pub(crate) top_p: Option<f32>,
    /// Keep this many likeliest tokens
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<u32>,
    /// Drop tokens below this fraction of the likeliest one's probability
    #[arg(long, value_name = "X")]
    pub(crate) min_p: Option<f32>,
    /// Weaken tokens seen in prompt or output; 1 is off
    #[arg(long, value_name = "X")]
    pub(crate) repetition_penalty: Option<f32>,
    /// Weaken tokens by how often they came out
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Weaken tokens that came out
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// The same seed gives the same answer
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// End before this text (may be given more than once)
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Whether a model that can think first shall
    #[arg(long, value_name = "BOOL")]
    pub(crate) thinking: Option<bool>,
}

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// What to go on from; `-` or nothing reads it from stdin
    pub(crate) prompt: Option<String>,
    /// Send the prompt as a person's turn through the chat template
    #[arg(long)]
    pub(crate) chat: bool,
    /// Send the prompt as token ids, separated by commas or blanks
    #[arg(long, conflicts_with = "chat")]
    pub(crate) tokens: bool,
    /// Instructions before the person's turn
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Arguments of `chat`.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    /// Instructions before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Arguments of `bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// Base URL of the node's HTTP edge
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) http: String,
    /// Sent as a bearer token
    #[arg(long, value_name = "KEY", env = "DSD_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Model; the first of /v1/models when left out
    #[arg(long, short)]
    pub(crate) model: Option<String>,
    /// Use /v1/chat/completions instead of /v1/completions
    #[arg(long)]
    pub(crate) chat: bool,
    /// Closed loop: requests under way at any time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: u32,
    /// Closed loop: requests in all
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) requests: u32,
    /// Open loop: requests per second on average, arriving as a Poisson process
    #[arg(long, value_name = "R", value_parser = rate, conflicts_with_all = ["concurrency", "requests"])]
    pub(crate) rate: Option<f64>,
    /// Open loop: for how long requests arrive
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration, requires = "rate")]
    pub(crate) duration: Duration,
    /// Words of each prompt
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) prompt_len: u32,
    /// Tokens to ask for
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) output_len: u32,
    /// Ask the node to generate on past the end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Open a connection for each request, as servers need that close them after a streamed answer
    #[arg(long)]
    pub(crate) reconnect: bool,
    /// Prompts and arrival times follow from it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Longest a request may take
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    pub(crate) request_timeout: Duration,
}

/// Reads `500ms`, `10s`, `2m`, `1h` or bare seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let seconds_per_unit = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}, expected ms, s, m or h")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("{number:?} is not a number"))?;
    let seconds = number * seconds_per_unit;
    if !(0.001..=86_400.0).contains(&seconds) {
        return Err("expected 1ms to 24h".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text
        .parse()
        .map_err(|_| format!("{text:?} is not a number"))?;
    if !(0.001..=100_000.0).contains(&rate) {
        return Err("expected 0.001 to 100000".to_owned());
    }
    Ok(rate)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read_with_units_and_bounds() {
        let ms = |text| duration(text).map(|d| d.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("10"), Ok(10_000));
        assert_eq!(ms("1.5s"), Ok(1500));
        assert_eq!(ms("2m"), Ok(120_000));
        for bad in ["", "s", "0", "1d", "-1s", "1e9", "48h", "1.2.3"] {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn caps_are_numbers_or_none() {
        assert_eq!(cap("none"), Ok(Cap(None)));
        assert_eq!(cap("8"), Ok(Cap(Some(8))));
        for bad in ["", "0", "-1", "1.5", "None", "99999999999999999999"] {
            assert!(cap(bad).is_err(), "{bad}");
        }
        assert!(parse("dsctl tenant rotate-key a --grace 604800").is_ok());
        assert!(parse("dsctl tenant rotate-key a --grace 604801").is_err());
        assert!(parse("dsctl tenant add a --weight 0").is_err());
        assert!(parse("dsctl tenant add a --class bulk").is_err());
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn global_flags_go_before_and_after_the_command() {
        for line in [
            "dsctl --json --node h:1 status",
            "dsctl status --json --node h:1",
        ] {
            let cli = parse(line).unwrap();
            assert!(cli.global.json && cli.global.node == "h:1", "{line}");
        }
    }

    #[test]
    fn open_and_closed_loop_exclude_each_other() {
        assert!(parse("dsctl bench --rate 5 --duration 10s").is_ok());
        assert!(parse("dsctl bench --concurrency 4 --requests 10").is_ok());
        assert!(parse("dsctl bench --rate 5 --requests 10").is_err());
        assert!(parse("dsctl bench --duration 10s").is_err());
        assert!(parse("dsctl bench --rate 0").is_err());
    }
}
