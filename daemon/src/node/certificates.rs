//! Keeps the node's own certificates valid while it runs.
//!
//! Does not know how they are made, that is `dsd_proto::quic::pki`; nor who connects.
//!
//! Invariant: a certificate is renewed on disk before the server shows it, so that a restart goes on
//! with the same one.

use std::{path::PathBuf, time::Duration};

use dsd_proto::{
    ids::{ClusterName, NodeName},
    quic::{Identity, IdentityHandle, PkiError, ServerError, pki},
};
use tracing::{info, warn};

use super::NodeError;
use crate::{runtime::clock, telemetry::chain};

/// How often the dates are looked at: a clock that jumps by years leaves `dsctl` out for so long.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Why the certificates of a running node could not be looked after.
#[derive(Debug, thiserror::Error)]
pub(super) enum RenewError {
    #[error("cannot renew the certificates in `{}`", folder.display())]
    Pki {
        folder: PathBuf,
        #[source]
        source: PkiError,
    },
    #[error("cannot show a renewed certificate")]
    Server(#[source] ServerError),
}

/// The certificates of one node.
#[derive(Debug, Clone)]
pub(super) struct Certificates {
    pub(super) folder: PathBuf,
    pub(super) cluster: ClusterName,
    pub(super) node: NodeName,
}

impl Certificates {
    /// What the node shows from the start: made, renewed or just read.
    ///
    /// # Errors
    /// [`NodeError::Pki`].
    pub(super) fn identity(&self) -> Result<Identity, NodeError> {
        let now_unix_s = clock::unix_seconds();
        pki::ensure(&self.folder, &self.cluster, &self.node, now_unix_s).map_err(|source| {
            NodeError::Pki {
                path: self.folder.clone(),
                source,
            }
        })
    }

    /// Renews in place whatever is due, now and then, for as long as the node runs. What cannot be
    /// renewed is said once, and again when something else is wrong.
    pub(super) async fn keep(self, server: IdentityHandle) {
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        let mut said = String::new();
        loop {
            looks.tick().await;
            let (certificates, server) = (self.clone(), server.clone());
            // Files are read, and now and then written and synced.
            let look = move || certificates.renew(&server, clock::unix_seconds());
            let trouble = match tokio::task::spawn_blocking(look).await {
                Ok(Ok(overdue)) => overdue.join("; "),
                Ok(Err(e)) => chain(&e),
                Err(e) => e.to_string(),
            };
            if !trouble.is_empty() && trouble != said {
                warn!(error = %trouble, "certificates need a look");
            }
            said = trouble;
        }
    }

    /// Renews what is due and has the server show it. Returns what cannot be renewed yet must be
    /// soon.
    fn renew(&self, server: &IdentityHandle, now_unix_s: u64) -> Result<Vec<String>, RenewError> {
        let maintained = pki::maintain(&self.folder, &self.cluster, &self.node, now_unix_s)
            .map_err(|source| RenewError::Pki {
                folder: self.folder.clone(),
                source,
            })?;
        if !maintained.issued.is_empty() {
            let files = maintained.issued.iter().map(|p| p.display().to_string());
            info!(files = %files.collect::<Vec<_>>().join(", "), "certificates renewed");
            server
                .replace(maintained.identity)
                .map_err(RenewError::Server)?;
        }
        let overdue = maintained.overdue.iter().map(|e| chain(e));
        Ok(overdue.collect())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{SocketAddr, UdpSocket},
        sync::Arc,
    };

    use dsd_proto::{
        quic::{Client, ClientError, Role, Server, ServerLimits},
        wire::admin::StatusRequest,
    };
    use tokio::{
        task::JoinSet,
        time::{Instant, sleep},
    };

    use super::*;
    use crate::{
        admin::Admin,
        catalog::Catalog,
        config::Config,
        node::{NodeAddresses, admin_config, loader},
    };

    const DEADLINE: Duration = Duration::from_secs(120);
    const YEAR_S: u64 = 365 * 24 * 3600;

    /// A node's admin service with `identity`, for as long as the set is kept.
    fn serve(identity: &Identity) -> (SocketAddr, IdentityHandle, JoinSet<()>) {
        let config = Config::default();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let addresses = NodeAddresses {
            http: address,
            quic: address,
        };
        let catalog = Arc::new(Catalog::new(loader::new(&config)));
        let tenants = Arc::new(crate::tenants::Tenants::open(clock::now()));
        let admin = Admin::new(admin_config(&config, addresses), catalog, tenants);
        let server = Server::new(socket, identity, admin, ServerLimits::default()).unwrap();
        let handle = server.identity_handle();
        let mut serving = JoinSet::new();
        serving.spawn(server.run(std::future::pending()));
        (address, handle, serving)
    }

    /// An expired certificate used to stop `dsctl` until somebody removed it and started dsd again.
    #[tokio::test]
    async fn a_certificate_that_expires_while_the_node_serves_is_renewed_in_place() {
        let folder = tempfile::tempdir().unwrap();
        let certificates = Certificates {
            folder: folder.path().to_owned(),
            cluster: "dsd".parse().unwrap(),
            node: "node-1".parse().unwrap(),
        };
        let (cluster, node) = (&certificates.cluster, &certificates.node);
        // A disk that syncs slowly may take the first of these lives; one of them is long enough.
        let mut lives_s = [5, 20, 60].into_iter();
        let (address, operator, handle, open, _serving) = loop {
            let left_s = lives_s.next().expect("a machine that connects in a minute");
            let folder = folder.path();
            for entry in std::fs::read_dir(folder).unwrap() {
                std::fs::remove_file(entry.unwrap().path()).unwrap();
            }
            // Made so long ago that little is left of it.
            let past = clock::unix_seconds() - YEAR_S + left_s;
            let identity = pki::ensure(folder, cluster, node, past).unwrap();
            let operator = pki::load(folder, Role::Admin, past).unwrap();
            let (address, handle, serving) = serve(&identity);
            match Client::connect(address, &operator, DEADLINE).await {
                Ok(open) => break (address, operator, handle, open, serving),
                Err(ClientError::Untrusted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
        let deadline = Instant::now() + DEADLINE;
        loop {
            match Client::connect(address, &operator, DEADLINE).await {
                Ok(client) => client.close().await,
                Err(ClientError::Untrusted { .. }) => break,
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "it does not expire");
            sleep(Duration::from_millis(50)).await;
        }
        let overdue = certificates.renew(&handle, clock::unix_seconds()).unwrap();
        assert!(overdue.is_empty(), "{overdue:?}");
        let operator = pki::load(folder.path(), Role::Admin, clock::unix_seconds()).unwrap();
        loop {
            match Client::connect(address, &operator, DEADLINE).await {
                Ok(client) => break drop(client.call(&StatusRequest {}, DEADLINE).await.unwrap()),
                // The server takes it up at its next turn.
                Err(ClientError::Untrusted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "the renewed one is not shown");
        }
        open.call(&StatusRequest {}, DEADLINE).await.unwrap();
    }
}
