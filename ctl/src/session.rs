//! From the global flags to a connection.

use std::{env, net::SocketAddr, path::PathBuf, time::Duration};

use dsd_proto::quic::{Client, ClientError, Role, pki};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    cli::Global,
    clock,
    failure::{Exit, Failure},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Addresses of one name that are tried in turn.
const ADDRESSES_MAX: usize = 4;
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A node that loads hundreds of gigabytes from a slow disk is silent for a while.
const PIECE_TIMEOUT: Duration = Duration::from_secs(300);

/// Connects to the node that the flags name.
pub(crate) async fn connect(global: &Global) -> Result<Client, Failure> {
    let folder = state_folder(global)?.join("pki");
    let identity =
        pki::load(&folder, Role::Admin, clock::unix_seconds()).map_err(|e| Failure::of_pki(&e))?;
    let addresses = resolve(&global.node).await?;
    let deadline = global
        .timeout
        .unwrap_or(CONNECT_TIMEOUT)
        .min(CONNECT_TIMEOUT);
    // A name such as `localhost` has an address per protocol, and the node may listen at one only.
    let mut failure = bad_node(&global.node, "no address");
    for address in addresses {
        match Client::connect(address, &identity, deadline).await {
            Ok(client) => return Ok(client),
            Err(error @ ClientError::Unreachable { .. }) => failure = Failure::of_call(&error),
            Err(error) => return Err(Failure::of_call(&error)),
        }
    }
    Err(failure)
}

/// Longest wait for a reply.
pub(crate) fn call_timeout(global: &Global) -> Duration {
    global.timeout.unwrap_or(CALL_TIMEOUT)
}

/// Longest wait for the next frame of a stream.
pub(crate) fn piece_timeout(global: &Global) -> Duration {
    global.timeout.unwrap_or(PIECE_TIMEOUT)
}

/// Ctrl-C from now on. Made once per command, because one that falls between two listeners is lost.
pub(crate) fn interrupts() -> Result<Signal, Failure> {
    signal(SignalKind::interrupt()).map_err(|e| {
        Failure::new(
            Exit::Refused,
            "signal",
            format!("cannot listen for Ctrl-C: {e}"),
        )
    })
}

fn state_folder(global: &Global) -> Result<PathBuf, Failure> {
    if let Some(folder) = &global.state {
        return Ok(folder.clone());
    }
    // Empty counts as unset, and relative paths are ignored (XDG base directory specification).
    let absolute = |name| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|folder| folder.join("dsd"))
        .ok_or_else(|| {
            Failure::new(Exit::Refused, "usage", "no state folder: HOME is not set")
                .hint("name the folder with --state")
        })
}

async fn resolve(node: &str) -> Result<Vec<SocketAddr>, Failure> {
    let addresses = tokio::net::lookup_host(node)
        .await
        .map_err(|e| bad_node(node, &e.to_string()))?;
    Ok(addresses.take(ADDRESSES_MAX).collect())
}

fn bad_node(node: &str, why: &str) -> Failure {
    Failure::new(Exit::Refused, "usage", format!("--node {node}: {why}"))
        .hint("expected HOST:PORT, such as 127.0.0.1:7600")
}
