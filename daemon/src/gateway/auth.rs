//! API keys: who may call at all.

use std::path::Path;

use axum::http::{HeaderMap, header};
use dsd_proto::code::Code;

use super::error::ApiError;
use crate::{
    flow::CacheOwner,
    runtime::file::{self, SecretError},
};

/// Longest key file read.
const FILE_LEN_MAX: u64 = 1 << 20;

/// The keys that may call; empty lets everybody in. Holds digests, so that a memory dump of the
/// node shows no key.
#[derive(Debug, Clone, Default)]
pub struct ApiKeys(Vec<blake3::Hash>);

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiKeysError {
    /// The file cannot be read, or others may.
    #[error("cannot read API keys from `{path}`")]
    Read {
        /// The file.
        path: String,
        /// Cause.
        #[source]
        source: SecretError,
    },
    /// The file is too long, or a key in it is too short or has spaces.
    #[error("`{path}` line {line}: a key has 16 to 256 visible ASCII characters")]
    Key {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// A file without keys would lock everybody out.
    #[error("`{path}` holds no key")]
    Empty {
        /// The file.
        path: String,
    },
}

impl ApiKeys {
    /// Reads one key per line; empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`ApiKeysError`], on the first thing that is wrong.
    pub fn read(path: &Path) -> Result<Self, ApiKeysError> {
        let name = path.display().to_string();
        let failed = |source| ApiKeysError::Read {
            path: name.clone(),
            source,
        };
        let text = file::read_secret(path, FILE_LEN_MAX).map_err(failed)?;
        let mut keys = Vec::new();
        for (idx, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if !(16..=256).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(ApiKeysError::Key {
                    path: name,
                    line: idx + 1,
                });
            }
            keys.push(blake3::hash(key.as_bytes()));
        }
        if keys.is_empty() {
            return Err(ApiKeysError::Empty { path: name });
        }
        Ok(Self(keys))
    }

    /// Lets a request in, and says with whom it may share cached prompts, or why not.
    ///
    /// # Errors
    /// 401 without a key or with a wrong one.
    pub(super) fn admit(&self, headers: &HeaderMap) -> Result<CacheOwner, ApiError> {
        if self.0.is_empty() {
            return Ok(CacheOwner::default());
        }
        let value = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let Some(value) = value else {
            return Err(ApiError::new(
                Code::Unauthorized,
                "an API key is needed: `Authorization: Bearer KEY`",
            ));
        };
        let key = match value.split_once(' ') {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
            _ => {
                return Err(ApiError::new(
                    Code::Unauthorized,
                    "the authorization scheme is not Bearer",
                ));
            }
        };
        // Digests are compared in constant time, and all of them, so that time tells nothing.
        let digest = blake3::hash(key.as_bytes());
        let known = self
            .0
            .iter()
            .fold(false, |known, other| known | (*other == digest));
        if known {
            Ok(CacheOwner(*digest.as_bytes()))
        } else {
            Err(ApiError::new(
                Code::Unauthorized,
                "the API key is not known",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::runtime::file::tests::for_each_stranger;

    fn keys(text: &str) -> Result<ApiKeys, ApiKeysError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        ApiKeys::read(file.path())
    }

    #[test]
    fn only_known_keys_are_let_in() {
        let keys = keys("# team a\nsk-0123456789abcdef\n\n  sk-fedcba9876543210  \n").unwrap();
        let admit = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            keys.admit(&headers).is_ok()
        };
        assert!(admit("Bearer sk-0123456789abcdef"));
        assert!(admit("bearer sk-fedcba9876543210"));
        assert!(!admit("Bearer sk-0123456789abcdeF"));
        assert!(!admit("Bearer "));
        assert!(!admit("Basic sk-0123456789abcdef"));
        assert!(keys.admit(&HeaderMap::new()).is_err());
        assert!(ApiKeys::default().admit(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn what_is_no_file_of_keys_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("keys");
        for_each_stranger(&place, |what| {
            let refused = matches!(ApiKeys::read(&place), Err(ApiKeysError::Read { .. }));
            assert!(refused, "{what}");
        });
    }

    #[test]
    fn key_files_that_would_surprise_are_refused() {
        assert!(matches!(keys(""), Err(ApiKeysError::Empty { .. })));
        assert!(matches!(
            keys("# only a comment\n"),
            Err(ApiKeysError::Empty { .. })
        ));
        assert!(matches!(
            keys("sk-0123456789abcdef\nshort\n"),
            Err(ApiKeysError::Key { line: 2, .. })
        ));
        assert!(matches!(
            ApiKeys::read(Path::new("/nonexistent")),
            Err(ApiKeysError::Read { .. })
        ));
    }
}
