//! Messages between processes, by subject, and the frame that carries them.
//!
//! Does not know sockets or streams.
//!
//! Invariant: messages are flat: no recursion, no maps, no sharing. rkyv's check of a recursive type
//! uses stack in proportion to the bytes it is given, so a peer could end the process with one.
//!
//! Invariant: a message whose layout changes gets a new version; `testdata/` holds the bytes of
//! every (type, version) and a test compares them. `DSD_REWRITE_GOLDEN=1 cargo test -p dsd-proto`
//! writes the files of new ones.

// The envelope: header, limits, checked access.
pub mod frame;
// Hashes of field lists, and the macros that define messages.
pub mod schema;

// Messages.
pub mod admin;
pub mod generate;
pub mod group;

pub use frame::{FrameError, Header};
pub use schema::{Class, Kind, Message};

/// Every message there is, for tests and for tools that name them.
pub const KINDS: &[Kind] = &[
    Kind::of::<admin::ErrorReply>(),
    Kind::of::<admin::StatusRequest>(),
    Kind::of::<admin::StatusReply>(),
    Kind::of::<admin::ModelListRequest>(),
    Kind::of::<admin::ModelListReply>(),
    Kind::of::<admin::ModelLoadRequest>(),
    Kind::of::<admin::ModelLoadReply>(),
    Kind::of::<admin::ModelUnloadRequest>(),
    Kind::of::<admin::ModelUnloadReply>(),
    Kind::of::<admin::ModelVerifyRequest>(),
    Kind::of::<admin::ModelVerifyReply>(),
    Kind::of::<admin::Progress>(),
    Kind::of::<admin::TenantListRequest>(),
    Kind::of::<admin::TenantListReply>(),
    Kind::of::<admin::TenantShowRequest>(),
    Kind::of::<admin::TenantShowReply>(),
    Kind::of::<admin::TenantAddRequest>(),
    Kind::of::<admin::TenantSetRequest>(),
    Kind::of::<admin::TenantRotateKeyRequest>(),
    Kind::of::<admin::TenantKeyReply>(),
    Kind::of::<admin::TenantRemoveRequest>(),
    Kind::of::<admin::TenantRemoveReply>(),
    Kind::of::<generate::GenerateRequest>(),
    Kind::of::<generate::GenerateDelta>(),
    Kind::of::<generate::GenerateDone>(),
    Kind::of::<group::RankStart>(),
    Kind::of::<group::RankReady>(),
    Kind::of::<group::RankFailed>(),
    Kind::of::<group::RankFault>(),
    Kind::of::<group::GroupSubmit>(),
    Kind::of::<group::GroupCancel>(),
    Kind::of::<group::GroupStop>(),
    Kind::of::<group::GroupEvents>(),
];

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;
