//! Sums and gathers among the ranks of a group, and the broadcast of what they run next.
//!
//! Knows no model and no step: values, a place in the step to name when somebody is missing, and a
//! deadline.
//!
//! Invariant: every wait on another rank ends: by its arrival, by its death, or at the deadline; only
//! a follower's wait for the next broadcast has no deadline, because idleness is not a failure.
//! Invariant: sums are taken in the order of ranks, so every rank gets the same bits.
//!
//! Called by runner and by model between the halves of a layer.

#[expect(
    unsafe_code,
    reason = "memory shared between processes is raw by nature; flags order who reads what"
)]
mod shm;

pub use shm::{Segment, SegmentError, ShmMember, Told};

use std::{fmt, ops::Range, time::Duration};

/// Where in a step ranks meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Site {
    /// Layer; 0 for what is outside of layers.
    pub layer: usize,
    /// What is exchanged there.
    pub op: Op,
}

/// What ranks exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// The plan of a step.
    Plan,
    /// Rows of the embedding.
    Embedding,
    /// The compressed query and latent of MLA.
    Latent,
    /// Attention's output.
    Attention,
    /// What experts are chosen by.
    Gate,
    /// The feed-forward part's output.
    FeedForward,
    /// Logits.
    Logits,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Plan,
        Self::Embedding,
        Self::Latent,
        Self::Attention,
        Self::Gate,
        Self::FeedForward,
        Self::Logits,
    ];

    /// Its name in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plan => "step plan",
            Self::Embedding => "embedding",
            Self::Latent => "latent",
            Self::Attention => "attention output",
            Self::Gate => "gate",
            Self::FeedForward => "feed-forward output",
            Self::Logits => "logits",
        }
    }
}

impl Site {
    /// Outside of layers.
    pub const fn outside(op: Op) -> Self {
        Self { layer: 0, op }
    }

    /// As one word of shared memory.
    const fn to_word(self) -> u32 {
        ((self.layer as u32) << 8) | self.op as u32
    }

    /// From shared memory; another process' word is not trusted to name an operation.
    fn from_word(word: u32) -> Self {
        let op = Op::ALL.get((word & 0xFF) as usize).copied();
        Self {
            layer: (word >> 8) as usize,
            op: op.unwrap_or(Op::Plan),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.op {
            Op::Plan | Op::Embedding | Op::Logits => f.write_str(self.op.name()),
            Op::Latent | Op::Attention | Op::Gate | Op::FeedForward => {
                write!(f, "layer {}, {}", self.layer, self.op.name())
            }
        }
    }
}

/// A rank did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} {reason} at {site}; it was last at {last_site}")]
pub struct Missing {
    /// The rank.
    pub rank: usize,
    /// What was waited for.
    pub site: Site,
    /// The last exchange the rank took part in.
    pub last_site: Site,
    /// How it is known to be missing.
    pub reason: MissingReason,
}

/// How a rank is known to be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingReason {
    /// Its process ended.
    Died,
    /// The deadline of this wait passed.
    Late(Duration),
}

impl fmt::Display for MissingReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Died => f.write_str("died"),
            Self::Late(after) => write!(f, "did not arrive within {:.1} s", after.as_secs_f64()),
        }
    }
}

/// One rank's end of its group.
#[derive(Debug)]
pub enum Collective {
    /// A group of one: nothing to exchange.
    Solo,
    /// Ranks that are processes of one machine.
    Shm(ShmMember),
}

impl Collective {
    /// `values = sum over ranks`, added in the order of ranks; the same bits on each.
    ///
    /// # Errors
    /// [`Missing`]; the group is of no use any more.
    pub fn all_reduce(&mut self, site: Site, values: &mut [f32]) -> Result<(), Missing> {
        match self {
            Self::Solo => Ok(()),
            Self::Shm(member) => member.all_reduce(site, values),
        }
    }

    /// Puts the ranks' columns side by side: each brings `n_rows` rows of `columns[rank].len()`
    /// values. `out`, where wanted, gets rows that are as wide as the last range ends.
    ///
    /// # Errors
    /// [`Missing`]; the group is of no use any more.
    pub fn gather_columns(
        &mut self,
        site: Site,
        local: &[f32],
        columns: &[Range<usize>],
        n_rows: usize,
        out: Option<&mut [f32]>,
    ) -> Result<(), Missing> {
        match self {
            Self::Solo => Ok(()),
            Self::Shm(member) => member.gather_columns(site, local, columns, n_rows, out),
        }
    }
}
