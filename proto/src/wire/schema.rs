//! What a message type is: its numbers, its size class and a hash of its fields.
//!
//! The hash is FNV-1a over a canonical text: kind and name of the type, then each field's name and
//! the hash of that field's own type, in order. It is computed by the compiler from the very tokens
//! that define the struct, so the two cannot part. Renaming, reordering, adding or retyping a field
//! anywhere below a message changes the hash of the message.

use crate::wire::frame::Body;

/// A type that may stand in a message.
pub trait Schema {
    /// Hash of the canonical text.
    const HASH: u32;
}

/// Start value of FNV-1a, 32 bits.
pub const HASH_START: u32 = 0x811c_9dc5;
const HASH_PRIME: u32 = 0x0100_0193;

/// Continues `hash` over the bytes of `text` and a closing zero byte.
pub const fn hash_text(mut hash: u32, text: &str) -> u32 {
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u32).wrapping_mul(HASH_PRIME);
        i += 1;
    }
    hash.wrapping_mul(HASH_PRIME)
}

/// Continues `hash` over the little-endian bytes of `number`.
pub const fn hash_number(mut hash: u32, number: u32) -> u32 {
    let bytes = number.to_le_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u32).wrapping_mul(HASH_PRIME);
        i += 1;
    }
    hash
}

macro_rules! leaf {
    ($($ty:ty = $text:literal),*) => {
        $(impl Schema for $ty {
            const HASH: u32 = hash_text(HASH_START, $text);
        })*
    };
}

leaf!(
    bool = "bool",
    u8 = "u8",
    u16 = "u16",
    u32 = "u32",
    u64 = "u64",
    f32 = "f32",
    f64 = "f64",
    String = "string"
);

impl<T: Schema> Schema for Vec<T> {
    const HASH: u32 = hash_number(hash_text(HASH_START, "list"), T::HASH);
}

impl<T: Schema> Schema for Option<T> {
    const HASH: u32 = hash_number(hash_text(HASH_START, "option"), T::HASH);
}

/// Groups messages by how long they may be (control-plane limits: a prompt of 160 Ki tokens is
/// 640 KiB of ids, and text is a few times that).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Operation of a node: 1 MiB.
    Control,
    /// Carries prompts: 4 MiB.
    Request,
}

impl Class {
    /// Longest body in bytes.
    pub const fn body_len_max(self) -> u32 {
        match self {
            Self::Control => 1 << 20,
            Self::Request => 4 << 20,
        }
    }

    /// Longest raw tail in bytes; no message of today has one.
    pub const fn tail_len_max(self) -> u32 {
        match self {
            Self::Control | Self::Request => 0,
        }
    }
}

/// A type that may be the body of a frame.
pub trait Message: Schema + Body + Send + Sync + 'static {
    /// Type number; never reused.
    const TYPE: u16;
    /// Version of the layout under that number.
    const VERSION: u16;
    /// Size class.
    const CLASS: Class;
    /// Name in errors and file names.
    const NAME: &'static str;
}

/// The constants of a message type as a value, for lookup by header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Name in errors.
    pub name: &'static str,
    /// Type number.
    pub type_id: u16,
    /// Layout version.
    pub version: u16,
    /// Hash of the fields.
    pub schema_hash: u32,
    /// Size class.
    pub class: Class,
}

impl Kind {
    /// The kind of `M`.
    pub const fn of<M: Message>() -> Self {
        Self {
            name: M::NAME,
            type_id: M::TYPE,
            version: M::VERSION,
            schema_hash: M::HASH,
            class: M::CLASS,
        }
    }
}

/// Defines a struct of plain fields that can stand in a message, with its [`Schema`].
macro_rules! wire_struct {
    ($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)*
    }) => {
        $(#[$meta])*
        #[derive(
            Debug, Clone, PartialEq, serde::Serialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $ty,)*
        }

        impl $crate::wire::schema::Schema for $name {
            const HASH: u32 = {
                use $crate::wire::schema::{HASH_START, hash_text};
                let hash = hash_text(HASH_START, concat!("struct ", stringify!($name)));
                $(let hash = $crate::wire::schema::hash_number(
                    hash_text(hash, stringify!($field)),
                    <$ty as $crate::wire::schema::Schema>::HASH,
                );)*
                hash
            };
        }
    };
}

/// Defines an enum of bare or one-field variants that can stand in a message, with its [`Schema`].
macro_rules! wire_enum {
    ($(#[$meta:meta])* pub enum $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident $(($ty:ty))?,)*
    }) => {
        $(#[$meta])*
        #[derive(
            Debug, Clone, PartialEq, serde::Serialize, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize,
        )]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($(#[$variant_meta])* $variant $(($ty))?,)*
        }

        impl $crate::wire::schema::Schema for $name {
            const HASH: u32 = {
                use $crate::wire::schema::{HASH_START, hash_text};
                let hash = hash_text(HASH_START, concat!("enum ", stringify!($name)));
                $(let hash = hash_text(hash, stringify!($variant));
                $(let hash = $crate::wire::schema::hash_number(
                    hash,
                    <$ty as $crate::wire::schema::Schema>::HASH,
                );)?)*
                hash
            };
        }
    };
}

/// Gives structs their place as frame bodies: `Name = type number, version, class;`.
macro_rules! wire_messages {
    ($($name:ident = $type_id:literal, $version:literal, $class:ident;)*) => {
        $(impl $crate::wire::schema::Message for $name {
            const TYPE: u16 = $type_id;
            const VERSION: u16 = $version;
            const CLASS: $crate::wire::schema::Class = $crate::wire::schema::Class::$class;
            const NAME: &'static str = stringify!($name);
        })*
    };
}

pub(crate) use {wire_enum, wire_messages, wire_struct};
