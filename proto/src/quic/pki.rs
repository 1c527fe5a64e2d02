//! The certificates of a node that is its own CA: made once, renewed in time, kept as PEM files,
//! checked when read.
//!
//! The folder holds `ca.pem ca.key node.pem node.key admin.pem admin.key`; keys are readable by their
//! owner only. A key is made once and stays: a certificate is renewed for the key that is there, by
//! one rename, so that no reader ever finds a pair that does not fit.
//!
//! Does not know of other processes: whoever calls [`maintain`] sees to it that nobody else does.
//!
//! Invariant: an [`Identity`] is returned only when certificate, key, CA and names belong together
//! and neither certificate is expired at the moment given.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    ids::{ClusterName, NodeName},
    quic::identity::{Identity, PeerName, Role},
};

/// Every node's certificate has this DNS name beside its URI, and clients ask for it: the standard
/// verifier then proves that the other end is a node, which an operator's certificate cannot be.
pub(super) const NODE_DNS_NAME: &str = "node.dsd.internal";

/// A key or certificate has about 1 KiB; more is not one.
const FILE_LEN_MAX: u64 = 64 << 10;
const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_LIFE: Duration = Duration::from_secs(3650 * DAY.as_secs());
const LEAF_LIFE: Duration = Duration::from_secs(365 * DAY.as_secs());
/// Time left at which a certificate is renewed: a third of its life, so that a node which is down
/// for months still starts with one that is valid.
const LEAF_RENEW_BEFORE: Duration = Duration::from_secs(LEAF_LIFE.as_secs() / 3);
/// Two lives of what it signs, so that none outlives it.
const CA_RENEW_BEFORE: Duration = Duration::from_secs(2 * LEAF_LIFE.as_secs());
/// A fresh certificate is valid this long before it was made. Clocks of hosts differ by less than an
/// hour; one that was set from a hardware clock in local time is stepped back by up to 14 hours.
const CLOCK_SKEW: Duration = DAY;

/// Why there is no usable identity.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The folder cannot be made.
    #[error("cannot create folder `{}`", path.display())]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A file that must exist does not.
    #[error("`{}` does not exist", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A certificate without its key cannot be used, and is not replaced.
    #[error("`{}` exists but `{}` does not", present.display(), missing.display())]
    KeyMissing {
        /// The certificate.
        present: PathBuf,
        /// Where its key should be.
        missing: PathBuf,
    },
    /// The file holds something else.
    #[error("`{}` is not {expected}", path.display())]
    Garbled {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// A key that others may read or replace is no key.
    #[error(
        "others may read or write the key `{0}` (mode {mode:04o}); run `chmod 600 {0}`, and where it \
         may be known, remove it and its certificate to have both made anew",
        path.display()
    )]
    KeyExposed {
        /// The key file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key is of another certificate.
    #[error("`{}` is not the key of `{}`", key.display(), certificate.display())]
    KeyMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
    },
    /// The certificate was issued by another CA.
    #[error("`{}` was not issued by `{}`", certificate.display(), ca.display())]
    WrongIssuer {
        /// The certificate file.
        certificate: PathBuf,
        /// The CA file.
        ca: PathBuf,
    },
    /// The certificate names someone else.
    #[error("`{}` belongs to {found}, expected {expected}", path.display())]
    WrongName {
        /// The certificate file.
        path: PathBuf,
        /// Who it should belong to.
        expected: String,
        /// Who it belongs to.
        found: String,
    },
    /// The CA's key and certificate do not fit, and something was issued already.
    #[error(
        "`{}` is not the key of `{}`; put the pair that belongs together back, or remove the folder \
         `{}` to have everything made anew and copy admin.pem, admin.key and ca.pem again to where \
         dsctl is used",
        key.display(),
        certificate.display(),
        folder.display()
    )]
    CaMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
        /// Where both lie.
        folder: PathBuf,
    },
    /// The certificate's time has passed.
    #[error(
        "`{}` expired at {not_after_unix_s} (seconds since 1970); dsd renews those of its state \
         folder when it starts and while it runs, copies are to be copied again",
        path.display()
    )]
    Expired {
        /// The certificate file.
        path: PathBuf,
        /// Its last second.
        not_after_unix_s: i64,
    },
    /// The certificate's time has not come; most likely the clock is wrong.
    #[error("`{}` is valid only from {not_before_unix_s} (seconds since 1970) on; is the clock right?", path.display())]
    NotYetValid {
        /// The certificate file.
        path: PathBuf,
        /// Its first second.
        not_before_unix_s: i64,
    },
    /// A certificate or key cannot be made.
    #[error("cannot issue {what}")]
    Issue {
        /// What was to be made.
        what: &'static str,
        /// The library's word.
        #[source]
        source: rcgen::Error,
    },
}

/// What [`maintain`] found and did.
#[derive(Debug)]
pub struct Maintained {
    /// The node's identity.
    pub identity: Identity,
    /// Certificates made or renewed.
    pub issued: Vec<PathBuf>,
    /// Why certificates that are still valid were not renewed though it is time.
    pub overdue: Vec<PkiError>,
}

/// [`maintain`] for those who need the identity only.
///
/// # Errors
/// [`PkiError`].
pub fn ensure(
    folder: &Path,
    cluster: &ClusterName,
    node: &NodeName,
    now_unix_s: u64,
) -> Result<Identity, PkiError> {
    maintain(folder, cluster, node, now_unix_s).map(|maintained| maintained.identity)
}

/// Makes what is missing in `folder` (CA, certificate of the node, certificate of an operator named
/// `admin`), renews what expires soon or has expired, makes a node's or operator's certificate anew
/// that does not fit its key or its CA, and returns the node's identity.
///
/// `now_unix_s` is the wall clock in seconds since 1970.
///
/// # Errors
/// [`PkiError`]; files that cannot be put right are left as they are.
pub fn maintain(
    folder: &Path,
    cluster: &ClusterName,
    node: &NodeName,
    now_unix_s: u64,
) -> Result<Maintained, PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| PkiError::CreateFolder {
            path: folder.to_owned(),
            source,
        })?;
    let files = Files { folder };
    let mut issued = Vec::new();
    let mut overdue = Vec::new();
    let mut note = |path: PathBuf, done: Result<(), PkiError>, is_needed: bool| match done {
        Ok(()) => {
            issued.push(path);
            Ok(())
        }
        Err(e) if is_needed => Err(e),
        Err(e) => {
            overdue.push(e);
            Ok(())
        }
    };
    let ca_path = files.certificate("ca");
    match files.state_of_ca(now_unix_s)? {
        State::Good => {}
        State::Due => note(ca_path, files.issue_ca(cluster, now_unix_s), false)?,
        State::Needed => note(ca_path, files.issue_ca(cluster, now_unix_s), true)?,
    }
    let node = PeerName {
        cluster: cluster.clone(),
        role: Role::Node,
        name: node.clone(),
    };
    let admin = PeerName {
        cluster: cluster.clone(),
        role: Role::Admin,
        name: NodeName::admin(),
    };
    for holder in [&node, &admin] {
        let path = files.certificate(holder.role.word());
        match files.state_of_leaf(holder, now_unix_s)? {
            State::Good => {}
            State::Due => note(path, files.issue_leaf(holder, now_unix_s), false)?,
            State::Needed => note(path, files.issue_leaf(holder, now_unix_s), true)?,
        }
        load(folder, holder.role, now_unix_s)?;
    }
    Ok(Maintained {
        identity: load(folder, Role::Node, now_unix_s)?,
        issued,
        overdue,
    })
}

/// What is to be done about a certificate.
enum State {
    /// Nothing.
    Good,
    /// It is valid and should be renewed.
    Due,
    /// It is missing, has expired, or does not fit its key or CA.
    Needed,
}

impl State {
    fn by_time(of: &X509Certificate<'_>, now_unix_s: u64, renew_before: Duration) -> Self {
        let now = i64::try_from(now_unix_s).unwrap_or(i64::MAX);
        let left_s = of.validity().not_after.timestamp().saturating_sub(now);
        // Both are a few years of seconds.
        if left_s < 0 {
            Self::Needed
        } else if left_s < renew_before.as_secs().cast_signed() {
            Self::Due
        } else {
            Self::Good
        }
    }
}

/// Reads the identity of `role` from `folder`.
///
/// # Errors
/// [`PkiError`].
pub fn load(folder: &Path, role: Role, now_unix_s: u64) -> Result<Identity, PkiError> {
    let files = Files { folder };
    let ca_path = files.certificate("ca");
    let path = files.certificate(role.word());
    let key_path = files.key(role.word());

    let ca_der = read_certificate(&ca_path)?;
    let der = read_certificate(&path)?;
    if !exists(&key_path)? {
        return Err(PkiError::KeyMissing {
            present: path,
            missing: key_path,
        });
    }
    let key_pair = read_key(&key_path)?;

    let ca = parse_certificate(&ca_path, &ca_der)?;
    let certificate = parse_certificate(&path, &der)?;
    if !fits(&certificate, &key_pair) {
        return Err(PkiError::KeyMismatch {
            key: key_path,
            certificate: path,
        });
    }
    if certificate.verify_signature(Some(ca.public_key())).is_err() {
        return Err(PkiError::WrongIssuer {
            certificate: path,
            ca: ca_path,
        });
    }
    check_time(&ca_path, &ca, now_unix_s)?;
    check_time(&path, &certificate, now_unix_s)?;
    let name = PeerName::of_certificate(&der).ok_or_else(|| PkiError::Garbled {
        path: path.clone(),
        expected: "a certificate with a ds:// name",
    })?;
    if name.role != role {
        return Err(PkiError::WrongName {
            path,
            expected: format!("a holder of role {role}"),
            found: name.to_string(),
        });
    }
    let key = PrivateKeyDer::Pkcs8(key_pair.serialize_der().into());
    Ok(Identity::new(name, ca_der, der, key))
}

struct Files<'a> {
    folder: &'a Path,
}

impl Files<'_> {
    fn certificate(&self, stem: &str) -> PathBuf {
        self.folder.join(format!("{stem}.pem"))
    }

    fn key(&self, stem: &str) -> PathBuf {
        self.folder.join(format!("{stem}.key"))
    }

    fn state_of_ca(&self, now_unix_s: u64) -> Result<State, PkiError> {
        let path = self.certificate("ca");
        if !exists(&path)? {
            // A certificate that this key signed would be worth nothing under another name.
            return Ok(State::Needed);
        }
        let der = read_certificate(&path)?;
        let ca = parse_certificate(&path, &der)?;
        let key_path = self.key("ca");
        // A CA whose key is kept elsewhere is as good as long as nothing must be issued.
        if exists(&key_path)? && !fits(&ca, &read_key(&key_path)?) {
            for role in [Role::Node, Role::Admin] {
                if exists(&self.certificate(role.word()))? {
                    return Err(PkiError::CaMismatch {
                        key: key_path,
                        certificate: path,
                        folder: self.folder.to_owned(),
                    });
                }
            }
            return Ok(State::Needed);
        }
        Ok(State::by_time(&ca, now_unix_s, CA_RENEW_BEFORE))
    }

    /// # Errors
    /// When a file is there and cannot be read, or belongs to somebody else.
    fn state_of_leaf(&self, holder: &PeerName, now_unix_s: u64) -> Result<State, PkiError> {
        let path = self.certificate(holder.role.word());
        let key_path = self.key(holder.role.word());
        if !exists(&path)? {
            return Ok(State::Needed);
        }
        let der = read_certificate(&path)?;
        let certificate = parse_certificate(&path, &der)?;
        let name = PeerName::of_certificate(&der).ok_or_else(|| PkiError::Garbled {
            path: path.clone(),
            expected: "a certificate with a ds:// name",
        })?;
        if name != *holder {
            return Err(PkiError::WrongName {
                path,
                expected: holder.to_string(),
                found: name.to_string(),
            });
        }
        if !exists(&key_path)? || !fits(&certificate, &read_key(&key_path)?) {
            return Ok(State::Needed);
        }
        let ca_path = self.certificate("ca");
        let ca_der = read_certificate(&ca_path)?;
        let ca = parse_certificate(&ca_path, &ca_der)?;
        if certificate.verify_signature(Some(ca.public_key())).is_err() {
            return Ok(State::Needed);
        }
        Ok(State::by_time(&certificate, now_unix_s, LEAF_RENEW_BEFORE))
    }

    fn issue_ca(&self, cluster: &ClusterName, now_unix_s: u64) -> Result<(), PkiError> {
        let path = self.certificate("ca");
        // Without its key it cannot be renewed, only replaced, and then nothing it issued is good.
        if exists(&path)? && !exists(&self.key("ca"))? {
            return Err(PkiError::KeyMissing {
                present: path,
                missing: self.key("ca"),
            });
        }
        let key = self.key_or_new("ca")?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("dsd CA of {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial(0, now_unix_s));
        set_life(&mut params, now_unix_s, CA_LIFE);
        let certificate = params.self_signed(&key).map_err(|source| PkiError::Issue {
            what: "the CA certificate",
            source,
        })?;
        write_private(&path, &certificate.pem())
    }

    fn issue_leaf(&self, holder: &PeerName, now_unix_s: u64) -> Result<(), PkiError> {
        let what = "a certificate";
        let ca_path = self.certificate("ca");
        let ca_key_path = self.key("ca");
        let ca_der = read_certificate(&ca_path)?;
        if !exists(&ca_key_path)? {
            return Err(PkiError::KeyMissing {
                present: ca_path,
                missing: ca_key_path,
            });
        }
        let ca_key = read_key(&ca_key_path)?;
        let ca = parse_certificate(&ca_path, &ca_der)?;
        if !fits(&ca, &ca_key) {
            return Err(PkiError::CaMismatch {
                key: ca_key_path,
                certificate: ca_path,
                folder: self.folder.to_owned(),
            });
        }
        let issuer = Issuer::from_ca_cert_der(&ca_der, ca_key)
            .map_err(|source| PkiError::Issue { what, source })?;

        let key = self.key_or_new(holder.role.word())?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, holder.name.as_str());
        let uri = holder
            .to_string()
            .try_into()
            .map_err(|source| PkiError::Issue { what, source })?;
        params.subject_alt_names.push(SanType::URI(uri));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if holder.role == Role::Node {
            let dns_name = NODE_DNS_NAME
                .try_into()
                .map_err(|source| PkiError::Issue { what, source })?;
            params.subject_alt_names.push(SanType::DnsName(dns_name));
            params
                .extended_key_usages
                .push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        let of_role = match holder.role {
            Role::Node => 1,
            Role::Admin => 2,
        };
        params.serial_number = Some(serial(of_role, now_unix_s));
        set_life(&mut params, now_unix_s, LEAF_LIFE);
        let certificate = params
            .signed_by(&key, &issuer)
            .map_err(|source| PkiError::Issue { what, source })?;
        write_private(&self.certificate(holder.role.word()), &certificate.pem())
    }

    /// The key is written before its certificate, so a crash in between leaves a key that the next
    /// start takes up.
    fn key_or_new(&self, stem: &str) -> Result<KeyPair, PkiError> {
        let path = self.key(stem);
        if exists(&path)? {
            return read_key(&path);
        }
        let key = KeyPair::generate().map_err(|source| PkiError::Issue {
            what: "a key",
            source,
        })?;
        write_private(&path, &key.serialize_pem())?;
        Ok(key)
    }
}

fn fits(certificate: &X509Certificate<'_>, key: &KeyPair) -> bool {
    certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw()
}

/// Differs for everything a CA issues; the library's own is a digest of the key, which stays when a
/// certificate is renewed.
fn serial(of_holder: u8, now_unix_s: u64) -> SerialNumber {
    // Positive and without leading zeros, as DER wants it.
    let mut bytes = vec![1, of_holder];
    bytes.extend(now_unix_s.to_be_bytes());
    SerialNumber::from(bytes)
}

fn set_life(params: &mut CertificateParams, now_unix_s: u64, life: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    // Above the year 9999 the library's time type ends; such a clock is capped rather than trusted.
    let now = Duration::from_secs(now_unix_s.min(200_000_000_000));
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + (now + life);
}

fn exists(path: &Path) -> Result<bool, PkiError> {
    path.try_exists().map_err(|source| PkiError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_text(path: &Path, expected: &'static str) -> Result<String, PkiError> {
    let read = |source| PkiError::Read {
        path: path.to_owned(),
        source,
    };
    // A pipe would wait for a writer for ever.
    let opened = fs::metadata(path).and_then(|metadata| match metadata.is_file() {
        true => fs::File::open(path),
        false => Err(io::Error::other("not a regular file")),
    });
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(PkiError::Missing {
                path: path.to_owned(),
            });
        }
        Err(e) => return Err(read(e)),
    };
    let mut bytes = Vec::new();
    file.take(FILE_LEN_MAX)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    String::from_utf8(bytes).map_err(|_| PkiError::Garbled {
        path: path.to_owned(),
        expected,
    })
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    let expected = "a PEM certificate";
    let text = read_text(path, expected)?;
    CertificateDer::from_pem_slice(text.as_bytes()).map_err(|_| PkiError::Garbled {
        path: path.to_owned(),
        expected,
    })
}

fn parse_certificate<'d>(path: &Path, der: &'d [u8]) -> Result<X509Certificate<'d>, PkiError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(PkiError::Garbled {
            path: path.to_owned(),
            expected: "an X.509 certificate",
        }),
    }
}

fn read_key(path: &Path) -> Result<KeyPair, PkiError> {
    let expected = "a PEM private key";
    if let Ok(metadata) = fs::metadata(path)
        && metadata.mode() & 0o077 != 0
    {
        return Err(PkiError::KeyExposed {
            path: path.to_owned(),
            mode: metadata.mode() & 0o7777,
        });
    }
    let text = read_text(path, expected)?;
    KeyPair::from_pem(&text).map_err(|_| PkiError::Garbled {
        path: path.to_owned(),
        expected,
    })
}

fn check_time(path: &Path, of: &X509Certificate<'_>, now_unix_s: u64) -> Result<(), PkiError> {
    let now = i64::try_from(now_unix_s).unwrap_or(i64::MAX);
    let not_before = of.validity().not_before.timestamp();
    let not_after = of.validity().not_after.timestamp();
    if now < not_before {
        let path = path.to_owned();
        return Err(PkiError::NotYetValid {
            path,
            not_before_unix_s: not_before,
        });
    }
    if not_after < now {
        return Err(PkiError::Expired {
            path: path.to_owned(),
            not_after_unix_s: not_after,
        });
    }
    Ok(())
}

/// Writes under another name and renames, so that nobody ever reads half a file, and what was
/// written before is on disk when this is.
fn write_private(path: &Path, text: &str) -> Result<(), PkiError> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|source| PkiError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn made(folder: &Path) -> Identity {
        ensure(
            folder,
            &"lab".parse().unwrap(),
            &"node-1".parse().unwrap(),
            NOW,
        )
        .unwrap()
    }

    #[test]
    fn files_are_made_once_and_keys_are_private() {
        let folder = tempfile::tempdir().unwrap();
        let pki = folder.path().join("state/pki");
        let identity = made(&pki);
        assert_eq!(identity.name().to_string(), "ds://lab/node/node-1");
        let names = [
            "ca.pem",
            "ca.key",
            "node.pem",
            "node.key",
            "admin.pem",
            "admin.key",
        ];
        let read = || names.map(|name| fs::read(pki.join(name)).unwrap());
        let first = read();
        made(&pki);
        assert_eq!(read(), first);
        for name in names {
            let mode = fs::metadata(pki.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert_eq!(fs::read_dir(&pki).unwrap().count(), names.len());
        let admin = load(&pki, Role::Admin, NOW).unwrap();
        assert_eq!(admin.name().to_string(), "ds://lab/admin/admin");
    }

    #[test]
    fn a_key_left_by_a_crash_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path());
        let key = fs::read(folder.path().join("node.key")).unwrap();
        fs::remove_file(folder.path().join("node.pem")).unwrap();
        made(folder.path());
        assert_eq!(fs::read(folder.path().join("node.key")).unwrap(), key);
    }

    fn check(damage: impl Fn(&Path), now: u64, expected: &str) {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path());
        damage(folder.path());
        let cluster = "lab".parse().unwrap();
        let error = ensure(folder.path(), &cluster, &"node-1".parse().unwrap(), now).unwrap_err();
        let found = error
            .to_string()
            .replace(&format!("{}/", folder.path().display()), "");
        assert!(found.starts_with(expected), "{found}");
    }

    #[test]
    fn damaged_or_mixed_files_are_refused_by_name() {
        check(
            |p| fs::write(p.join("ca.pem"), "x").unwrap(),
            NOW,
            "`ca.pem` is not a PEM",
        );
        check(
            |p| fs::write(p.join("node.key"), "x").unwrap(),
            NOW,
            "`node.key` is not a PEM",
        );
        check(
            |p| fs::write(p.join("node.key"), [0xff]).unwrap(),
            NOW,
            "`node.key` is not a PEM",
        );
        check(
            |p| {
                let other = tempfile::tempdir().unwrap();
                made(other.path());
                fs::copy(other.path().join("ca.pem"), p.join("ca.pem")).unwrap();
            },
            NOW,
            "`ca.key` is not the key of `ca.pem`; put the pair",
        );
        check(
            |p| {
                fs::copy(p.join("admin.key"), p.join("node.key")).unwrap();
                fs::copy(p.join("admin.pem"), p.join("node.pem")).unwrap();
            },
            NOW,
            "`node.pem` belongs to ds://lab/admin/admin, expected ds://lab/node/node-1",
        );
        let exposed = |p: &Path| {
            let mode = fs::Permissions::from_mode(0o640);
            fs::set_permissions(p.join("admin.key"), mode).unwrap();
        };
        check(
            exposed,
            NOW,
            "others may read or write the key `admin.key` (mode 0640); run `chmod 600 admin.key`",
        );
        check(
            |p| {
                fs::remove_file(p.join("ca.key")).unwrap();
                fs::remove_file(p.join("admin.pem")).unwrap();
            },
            NOW,
            "`ca.pem` exists but `ca.key` does not",
        );
        let later = NOW + 2 * LEAF_LIFE.as_secs();
        check(
            |p| fs::remove_file(p.join("ca.key")).unwrap(),
            later,
            "`ca.pem` exists but `ca.key` does not",
        );
        check(|_| {}, NOW - 2 * 86_400, "`ca.pem` is valid only from");
    }

    fn maintained(folder: &Path, now_unix_s: u64) -> Maintained {
        let cluster = "lab".parse().unwrap();
        maintain(folder, &cluster, &"node-1".parse().unwrap(), now_unix_s).unwrap()
    }

    /// Names of what was issued.
    fn issued(folder: &Path, now_unix_s: u64) -> Vec<String> {
        let Maintained {
            issued, overdue, ..
        } = maintained(folder, now_unix_s);
        assert!(overdue.is_empty(), "{overdue:?}");
        // Both must be good now, whatever was there before.
        for role in [Role::Node, Role::Admin] {
            load(folder, role, now_unix_s).unwrap();
        }
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        issued.iter().map(name).collect()
    }

    /// Two first starts at once used to leave such folders, which no later start could use.
    #[test]
    fn a_certificate_that_does_not_fit_its_key_or_ca_is_made_anew() {
        let check = |damage: &dyn Fn(&Path), expected: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            made(folder.path());
            damage(folder.path());
            assert_eq!(issued(folder.path(), NOW), expected);
            assert!(issued(folder.path(), NOW).is_empty());
        };
        check(&|_| {}, &[]);
        check(
            &|p| fs::remove_file(p.join("node.key")).unwrap(),
            &["node.pem"],
        );
        check(
            &|p| {
                fs::copy(p.join("admin.key"), p.join("node.key")).unwrap();
            },
            &["node.pem"],
        );
        check(
            &|p| fs::remove_file(p.join("admin.pem")).unwrap(),
            &["admin.pem"],
        );
        // A whole CA of another start.
        let of_other = |p: &Path, names: &[&str]| {
            let other = tempfile::tempdir().unwrap();
            made(other.path());
            for name in names {
                fs::copy(other.path().join(name), p.join(name)).unwrap();
            }
        };
        check(
            &|p| of_other(p, &["ca.pem", "ca.key"]),
            &["node.pem", "admin.pem"],
        );
        check(
            &|p| of_other(p, &["admin.pem", "node.key"]),
            &["node.pem", "admin.pem"],
        );
        // A mixed CA that has issued nothing.
        check(
            &|p| {
                of_other(p, &["ca.pem"]);
                for name in ["node.pem", "admin.pem"] {
                    fs::remove_file(p.join(name)).unwrap();
                }
            },
            &["ca.pem", "node.pem", "admin.pem"],
        );
    }

    /// A start that was killed anywhere: the files of a whole one exist up to some point.
    #[test]
    fn a_first_start_that_broke_off_is_taken_up_wherever_it_was() {
        let names = [
            "ca.key",
            "ca.pem",
            "node.key",
            "node.pem",
            "admin.key",
            "admin.pem",
        ];
        for n_left in 0..=names.len() {
            let folder = tempfile::tempdir().unwrap();
            made(folder.path());
            for name in &names[n_left..] {
                fs::remove_file(folder.path().join(name)).unwrap();
            }
            for name in ["ca.new", "node.new"] {
                fs::write(folder.path().join(name), "half").unwrap();
            }
            let kept = |name: &&&str| fs::read(folder.path().join(name)).unwrap();
            let before: Vec<_> = names[..n_left].iter().map(|n| kept(&n)).collect();
            made(folder.path());
            let after: Vec<_> = names[..n_left].iter().map(|n| kept(&n)).collect();
            assert_eq!(before, after, "{n_left}");
            assert!(issued(folder.path(), NOW).is_empty());
        }
    }

    #[test]
    fn certificates_are_renewed_in_time_and_keys_stay() {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path());
        let keys = || ["ca.key", "node.key", "admin.key"].map(|n| fs::read(folder.path().join(n)));
        let before = keys().map(Result::unwrap);
        let day = DAY.as_secs();
        assert!(issued(folder.path(), NOW + 243 * day).is_empty());
        assert_eq!(
            issued(folder.path(), NOW + 244 * day),
            ["node.pem", "admin.pem"]
        );
        // A renewed one is valid on a clock that was stepped back by an hour, and 20 more.
        assert!(issued(folder.path(), NOW + 244 * day - 21 * 3600).is_empty());
        // Long expired.
        let later = NOW + 5 * LEAF_LIFE.as_secs();
        assert_eq!(issued(folder.path(), later), ["node.pem", "admin.pem"]);
        // The CA before what it signs could outlive it.
        let late = NOW + CA_LIFE.as_secs() - CA_RENEW_BEFORE.as_secs() + day;
        assert_eq!(
            issued(folder.path(), late),
            ["ca.pem", "node.pem", "admin.pem"]
        );
        assert!(issued(folder.path(), late + CA_LIFE.as_secs() / 2).len() == 2);
        assert_eq!(
            issued(folder.path(), late + 2 * CA_LIFE.as_secs()),
            ["ca.pem", "node.pem", "admin.pem"]
        );
        assert_eq!(keys().map(Result::unwrap), before);
    }

    /// An operator who keeps the CA's key elsewhere is told, and served until the last day.
    #[test]
    fn what_cannot_be_renewed_is_overdue_until_it_expires() {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path());
        fs::remove_file(folder.path().join("ca.key")).unwrap();
        let soon = NOW + 300 * DAY.as_secs();
        let Maintained {
            issued, overdue, ..
        } = maintained(folder.path(), soon);
        assert!(issued.is_empty());
        assert_eq!(overdue.len(), 2);
        for error in overdue {
            assert!(matches!(error, PkiError::KeyMissing { .. }), "{error}");
        }
    }

    #[test]
    fn files_of_another_node_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        made(folder.path());
        let name = "node-2".parse().unwrap();
        let error = ensure(folder.path(), &"lab".parse().unwrap(), &name, NOW).unwrap_err();
        assert!(matches!(error, PkiError::WrongName { .. }), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let pki = file.join("pki");
        let name = "node-1".parse().unwrap();
        let error = ensure(&pki, &"lab".parse().unwrap(), &name, NOW).unwrap_err();
        assert!(matches!(error, PkiError::CreateFolder { ref path, .. } if *path == pki));
    }

    #[test]
    fn an_operator_without_certificates_is_told_which_file_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let error = load(folder.path(), Role::Admin, NOW).unwrap_err();
        assert!(matches!(error, PkiError::Missing { ref path } if path.ends_with("ca.pem")));
    }
}
