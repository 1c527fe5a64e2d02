//! Log filters: which parts of the program say how much.
//!
//! Invariant: every target of a filter is a part of this program that can log; a misspelt one would keep
//! what it should show from the log without a word.

use std::env;

use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{LOG_FILTER_ENV, TelemetryError};
use crate::config::{self, LogConfig};

/// This package's modules.
const MODULES: &[&str] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));
/// Other packages in the program that log, by their crates' names.
const CRATES: &[&str] = &[
    "dsd_kernels",
    "dsd_proto",
    "quinn",
    "quinn_proto",
    "quinn_udp",
    "rustls",
    "tokenizers",
];
const LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];

/// The filter that a start would use, and whether the environment says it.
pub fn log_filter(config: &LogConfig) -> (String, bool) {
    match env::var(LOG_FILTER_ENV) {
        Ok(filter) => (filter, true),
        Err(_) => (config.filter.clone(), false),
    }
}

/// Reads a filter.
///
/// # Errors
/// When it is not understood, or one of its targets is no part of this program.
pub fn read_filter(filter: &str) -> Result<EnvFilter, TelemetryError> {
    let read = EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter {
        filter: filter.to_owned(),
        source,
    })?;
    match targets(filter).find(|target| !is_known(target)) {
        None => Ok(read),
        Some(target) => {
            let words = MODULES.iter().chain(CRATES).chain(LEVELS).copied();
            Err(TelemetryError::NoTarget {
                filter: filter.to_owned(),
                target: target.to_owned(),
                suggestion: config::nearest(target, words).map(str::to_owned),
            })
        }
    }
}

/// The targets that a filter names; a directive may be a level or a span alone.
fn targets(filter: &str) -> impl Iterator<Item = &str> {
    filter
        .split(',')
        .map(str::trim)
        .filter(|directive| directive.parse::<LevelFilter>().is_err())
        .map(|directive| {
            let end = directive.find(['[', '=']).unwrap_or(directive.len());
            directive[..end].trim()
        })
        .filter(|target| !target.is_empty())
}

/// Whether anything in the program logs under the target: a filter matches what begins with it.
fn is_known(target: &str) -> bool {
    let in_crate = |name: &str| {
        let inside = target.strip_prefix(name);
        inside.is_some_and(|rest| rest.starts_with("::"))
    };
    let mut all = MODULES.iter().chain(CRATES);
    all.any(|name| name.starts_with(target)) || CRATES.iter().any(|name| in_crate(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_parts_of_the_program() {
        for filter in [
            "",
            "info",
            "warn,dsd=debug",
            "dsd::gateway=trace,dsd::group::supervisor=debug,quinn=off",
            "DEBUG,dsd_proto::quic=info,rustls",
            "dsd[request{id=1}]=debug,[step]=trace",
            "dsd::commands=info",
            "3",
        ] {
            let read = read_filter(filter);
            assert!(read.is_ok(), "{filter}: {:?}", read.err());
        }
        let check = |filter: &str, named: &str, suggested: Option<&str>| match read_filter(filter) {
            Err(TelemetryError::NoTarget {
                target, suggestion, ..
            }) => assert_eq!(
                (&*target, suggestion.as_deref()),
                (named, suggested),
                "{filter}"
            ),
            other => panic!("{filter}: {other:?}"),
        };
        check("inof", "inof", Some("info"));
        check("info,dds=debug", "dds", Some("dsd"));
        check("dsd::gatewy=debug", "dsd::gatewy", Some("dsd::gateway"));
        check(
            "dsd::group::supervisr",
            "dsd::group::supervisr",
            Some("dsd::group::supervisor"),
        );
        check(
            "dsd[a{b=1}]=info,dsd_porto=warn",
            "dsd_porto",
            Some("dsd_proto"),
        );
        check("info,postgres=debug", "postgres", None);
        check("dsd_proto_x::y=info", "dsd_proto_x::y", Some("dsd_proto"));
    }

    #[test]
    fn other_packages_are_in_the_program() {
        let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock");
        let lock = std::fs::read_to_string(lock).unwrap().replace('-', "_");
        for name in CRATES {
            assert!(lock.contains(&format!("name = \"{name}\"\n")), "{name}");
        }
    }
}
