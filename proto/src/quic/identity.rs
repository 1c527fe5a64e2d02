//! Who a peer is: cluster, role and name, as its certificate says.
//!
//! Does not know files; `pki` reads and writes them.

use std::{fmt, sync::Arc};

use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::{
    extensions::GeneralName,
    prelude::{FromDer, X509Certificate},
};

use crate::ids::{ClusterName, NodeName};

/// What a certificate's holder may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// A node: may serve, and may ask other nodes for status and generation.
    Node,
    /// An operator: may ask a node anything.
    Admin,
}

impl Role {
    /// The word in the certificate and in file names.
    pub fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The URI `ds://<cluster>/<role>/<name>` of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerName {
    /// Cluster whose CA issued it.
    pub cluster: ClusterName,
    /// What the holder may do.
    pub role: Role,
    /// The holder's name.
    pub name: NodeName,
}

impl PeerName {
    /// Reads the URI form; `None` when the text is anything else.
    pub fn parse(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix("ds://")?.split('/');
        let cluster = parts.next()?.parse().ok()?;
        let role = match parts.next()? {
            "node" => Role::Node,
            "admin" => Role::Admin,
            _ => return None,
        };
        let name = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self {
            cluster,
            role,
            name,
        })
    }

    /// Reads the one `ds://` URI of a certificate; `None` when there is none or more than one.
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        let mut uris = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with("ds://") => Some(*uri),
                // Foreign enum: every other form of name is of no interest.
                _ => None,
            });
        let uri = uris.next()?;
        uris.next().is_none().then(|| Self::parse(uri))?
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ds://{}/{}/{}", self.cluster, self.role, self.name)
    }
}

/// A certificate with its private key and the CA it trusts; checked to belong together.
#[derive(Clone)]
pub struct Identity {
    name: PeerName,
    ca: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl Identity {
    /// Joins parts that `pki` has checked.
    pub(super) fn new(
        name: PeerName,
        ca: CertificateDer<'static>,
        certificate: CertificateDer<'static>,
        key: PrivateKeyDer<'static>,
    ) -> Self {
        Self {
            name,
            ca,
            certificate,
            key: Arc::new(key),
        }
    }

    /// Who this is.
    pub fn name(&self) -> &PeerName {
        &self.name
    }

    /// The CA whose certificates are believed.
    pub(super) fn ca(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// The chain to present.
    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    /// The private key.
    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The key stays out of logs.
        f.debug_struct("Identity")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_uri_is_a_name() {
        let name = PeerName::parse("ds://lab/admin/alice").unwrap();
        assert_eq!(name.role, Role::Admin);
        assert_eq!(name.to_string(), "ds://lab/admin/alice");
        for bad in [
            "ds://lab/admin",
            "ds://lab/admin/alice/x",
            "ds://lab/root/alice",
            "ds:///admin/alice",
            "http://lab/admin/alice",
            "ds://lab/admin/",
            "ds://LAB/admin/alice",
        ] {
            assert_eq!(PeerName::parse(bad), None, "{bad}");
        }
    }
}
