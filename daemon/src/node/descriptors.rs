//! Open files, planned like memory: what ranks and models need is kept from connections.
//!
//! A node that spent its last file on an idle connection could neither start a killed rank again
//! nor load a model.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use crate::{config::Config, gateway};

/// Standard streams, sockets, signals, the runtime, state, and the files of a checkpoint being read,
/// which are mapped one after the other.
const NODE_FILES: u64 = 64;
/// A model's event and what starting a rank opens for a moment: sockets, pipes, shared memory.
const MODEL_FILES: u64 = 8;
/// A rank's socket and process, twice, since one may be on its way out while the next one comes in, and
/// what of its keys and values outlives it.
const RANK_FILES: u64 = 5;
/// Models that may come besides those of the configuration.
const MODELS_LATER: u64 = 2;
/// With less than this there is no point in serving.
const CONNECTIONS_MIN: u64 = 16;

/// The limit of open files leaves no room for a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{limit} files may be open, {needed} are needed; raise the limit (LimitNOFILE, ulimit -n)")]
pub struct TooFewFiles {
    /// Files that the system lets this process open.
    pub limit: u64,
    /// Files of the node, its ranks and a few connections.
    pub needed: u64,
}

/// Raises the limit of open files as far as it goes and says how many connections fit under it,
/// `http.connections_max` at most.
pub(super) fn connections(config: &Config) -> Result<usize, TooFewFiles> {
    let wanted = config.http.connections_max;
    let limit = raise_limit();
    let fitting = fitting(limit, reserve(config), wanted)?;
    if fitting < wanted {
        warn!(
            connections_max = fitting,
            wanted,
            open_files_max = limit,
            kept_for_ranks_and_files = reserve(config),
            "fewer connections than configured: the limit of open files leaves no room for more"
        );
    }
    Ok(fitting)
}

/// Files kept from connections.
fn reserve(config: &Config) -> u64 {
    let of_model = |n_ranks: usize| MODEL_FILES + RANK_FILES * n_ranks as u64;
    let configured = config.models.iter();
    let configured = configured.map(|model| of_model(config.settings(model).engine.tp));
    let later = MODELS_LATER * of_model(config.engine.tp);
    NODE_FILES + gateway::CONNECTIONS_EXTRA as u64 + configured.sum::<u64>() + later
}

fn fitting(limit: u64, reserve: u64, wanted: usize) -> Result<usize, TooFewFiles> {
    let room = limit.saturating_sub(reserve);
    let wanted = wanted as u64;
    if room < CONNECTIONS_MIN.min(wanted) {
        let needed = reserve + CONNECTIONS_MIN.min(wanted);
        return Err(TooFewFiles { limit, needed });
    }
    // Not above `wanted`, which is a `usize`.
    Ok(usize::try_from(room.min(wanted)).unwrap_or(usize::MAX))
}

/// The limit after raising it; `u64::MAX` where there is none.
fn raise_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    let in_force = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(e) => {
            warn!(error = %e, "cannot raise the limit of open files");
            current
        }
    };
    in_force.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn connections_get_what_ranks_and_files_leave() {
        let check = |limit, wanted, expected| {
            assert_eq!(fitting(limit, 104, wanted), expected, "{limit}, {wanted}");
        };
        check(20_000, 1024, Ok(1024));
        check(u64::MAX, 1_000_000, Ok(1_000_000));
        check(256, 1024, Ok(152));
        check(120, 1024, Ok(16));
        check(105, 1, Ok(1));
        let few = |limit| Err(TooFewFiles { limit, needed: 120 });
        check(119, 1024, few(119));
        check(10, 1024, few(10));
    }

    #[test]
    fn each_rank_and_model_is_planned_for() {
        let mut config = Config::default();
        let alone = reserve(&config);
        config.engine.tp = 4;
        assert_eq!(reserve(&config) - alone, MODELS_LATER * 3 * RANK_FILES);
        assert!(reserve(&config) < 256, "a node fits under a small limit");
        let alone = reserve(&config);
        let mut model = ModelConfig::new("m", "/m");
        model.overrides.tp = Some(8);
        config.models.push(model);
        assert_eq!(reserve(&config) - alone, MODEL_FILES + 8 * RANK_FILES);
    }
}
