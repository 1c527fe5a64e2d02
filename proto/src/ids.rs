//! Newtypes for the names and numbers that cross process boundaries.
//!
//! Invariant: a name that exists is valid; it can stand in a URI, a file name and a log line.

use std::{fmt, str::FromStr};

/// Longest cluster or node name, that of a DNS label.
pub const NAME_LEN_MAX: usize = 63;

/// Membership version of a group; frames of a lower one are stale. 0 where no group is involved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Why a text is not a cluster or node name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing there.
    #[error("the name is empty")]
    Empty,
    /// Above [`NAME_LEN_MAX`].
    #[error("the name has {found} bytes, at most {NAME_LEN_MAX} are allowed")]
    TooLong {
        /// Bytes of the name.
        found: usize,
    },
    /// Something other than `a-z`, `0-9`, `-` and `.`, or a `-` or `.` at either end.
    #[error(
        "the name {found:?} may hold only a-z, 0-9, - and . and must not begin or end with - or ."
    )]
    BadCharacter {
        /// The name as it came.
        found: String,
    },
}

macro_rules! name {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                checked_name(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// Name of a cluster; certificates of another one are refused.
    ClusterName
}

name! {
    /// Name of a node or of an operator within a cluster.
    NodeName
}

impl NodeName {
    /// The operator for whom every node that is its own CA makes a certificate.
    pub fn admin() -> Self {
        Self("admin".to_owned())
    }
}

fn checked_name(text: &str) -> Result<String, NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if NAME_LEN_MAX < text.len() {
        return Err(NameError::TooLong { found: text.len() });
    }
    let is_inner = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.');
    let is_edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    if !bytes.iter().copied().all(is_inner) || !is_edge(bytes.first()) || !is_edge(bytes.last()) {
        return Err(NameError::BadCharacter {
            found: text.to_owned(),
        });
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_fit_a_uri_are_taken_and_others_named() {
        for good in ["a", "node-1", "rack4.node7", "0"] {
            assert_eq!(good.parse::<NodeName>().unwrap().as_str(), good);
        }
        for bad in ["Node", "a/b", "a b", "-a", "a.", "é"] {
            let found = bad.to_owned();
            assert_eq!(
                bad.parse::<NodeName>(),
                Err(NameError::BadCharacter { found })
            );
        }
        assert_eq!("".parse::<ClusterName>(), Err(NameError::Empty));
        assert_eq!(
            "a".repeat(64).parse::<ClusterName>(),
            Err(NameError::TooLong { found: 64 })
        );
    }
}
