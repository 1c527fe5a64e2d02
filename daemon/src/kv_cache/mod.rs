//! Bookkeeping of KV blocks: which are free, which hold what, and which belong to a sequence in
//! what order.
//!
//! Holds ids, never memory, and knows no sequences or time. A full block is labelled with a
//! [`BlockKey`] of everything from position 0 to its end; a sequence with the same beginning takes
//! it over instead of computing it again. A block that nobody uses keeps its contents until its
//! memory is needed.
//!
//! Invariant: a block is free, idle (nobody's, but labelled) or used by as many [`BlockTable`]s as
//! its count says; giving one back too often, or one that was never handed out, panics.
//! Invariant: only full blocks are shared, and a table writes behind its last shared block only.
//! Invariant: the same calls give the same ids (free ones last in, first out; a fresh pool counts up
//! from its first id; then idle ones, least recently used first), so that a run can be replayed.
//!
//! Called by the scheduler; the engine cuts the pool's id range.

mod key;
mod pool;
mod table;
#[cfg(test)]
mod tests;

pub use key::BlockKey;
pub use pool::BlockPool;
pub use table::BlockTable;
