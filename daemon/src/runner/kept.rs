//! Keys and values of long sequences, kept where the end of a rank's process does not reach them: in
//! memory that its agent holds, from where the next process takes them instead of computing them again.
//!
//! Each rank has a file: whose weights made it, a key and a mark for each block, and the blocks' bytes.
//! Only the first rank's has keys, and a block counts when it has one. Short sequences are computed again
//! sooner than they are worth copying.
//!
//! Invariant: a key is there only while every rank's file holds all of the block. It goes before a step
//! that writes the block anew, and comes one step after the one that filled it: by then all ranks have
//! copied what they had.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::StepPlan;

/// Sequences with as many positions are kept.
const LONG_MIN: usize = 256;
/// Bytes of a key.
const KEY_LEN: usize = 16;
/// Bytes that name the weights.
const IDENTITY_LEN: usize = 32;
/// Where the keys begin, and what the blocks are aligned to.
const PAGE: u64 = 4096;

/// What names a block's contents.
pub type KeptKey = [u8; KEY_LEN];

/// Bytes of one layer's block, to copy from or into.
pub(super) trait BlockBytes {
    /// Layers.
    fn n_layers(&self) -> usize;
    /// Of a layer's block.
    fn block(&self, layer: usize, block: usize) -> &[u8];
    /// The same, to be written.
    fn block_mut(&mut self, layer: usize, block: usize) -> &mut [u8];
}

/// The file of one rank.
#[derive(Debug)]
pub(super) struct KeptBlocks {
    file: File,
    block_len: usize,
    /// Bytes of a block of all layers.
    block_bytes: u64,
    /// By block.
    states: Vec<State>,
    /// Blocks that the file has taken memory for, and how many it may.
    n_touched: usize,
    touched_max: usize,
    /// Keys of the last step.
    pending: Vec<(u32, KeptKey)>,
    /// Whether this rank's file has the keys.
    has_keys: bool,
    is_broken: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    is_kept: bool,
    has_key: bool,
    is_touched: bool,
}

/// What a file is made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeptShape {
    /// Blocks of the cache.
    pub(super) n_blocks: usize,
    /// Positions in a block.
    pub(super) block_len: usize,
    /// Bytes of a block of all layers.
    pub(super) block_bytes: usize,
    /// Bytes that kept blocks may take.
    pub(super) bytes_max: u64,
}

impl KeptBlocks {
    /// Opens a rank's file and puts back into `caches` what it keeps, if it was made by the same weights;
    /// else it is emptied. The first rank, which knows the `others`' files, gets the keys of blocks that
    /// all of them keep.
    ///
    /// # Errors
    /// From the system; the caches are not to be used then.
    pub(super) fn open(
        path: &Path,
        shape: KeptShape,
        identity: [u8; IDENTITY_LEN],
        others: Option<&[PathBuf]>,
        caches: &mut dyn BlockBytes,
    ) -> io::Result<(Self, Vec<(u32, KeptKey)>)> {
        let file = File::options().read(true).write(true).open(path)?;
        let block_bytes = shape.block_bytes as u64;
        let mut kept = Self {
            file,
            block_len: shape.block_len,
            block_bytes,
            states: vec![State::default(); shape.n_blocks],
            n_touched: 0,
            touched_max: usize::try_from(shape.bytes_max / block_bytes.max(1))
                .unwrap_or(usize::MAX),
            pending: Vec::new(),
            has_keys: others.is_some(),
            is_broken: false,
        };
        if !is_of(&kept.file, identity)? {
            kept.file.set_len(0)?;
            kept.file.set_len(kept.data_at(shape.n_blocks))?;
            kept.file.write_all_at(&identity, 0)?;
            return Ok((kept, Vec::new()));
        }
        let mut is_everywhere = vec![true; shape.n_blocks];
        for path in others.unwrap_or_default() {
            kept.intersect(&File::open(path)?, identity, &mut is_everywhere)?;
        }
        let keys = kept.restore(&is_everywhere, caches)?;
        Ok((kept, keys))
    }

    /// Takes out the blocks that another rank's file does not keep: it may have had no memory for them.
    fn intersect(
        &self,
        other: &File,
        identity: [u8; IDENTITY_LEN],
        is_everywhere: &mut [bool],
    ) -> io::Result<()> {
        if !is_of(other, identity)? {
            is_everywhere.fill(false);
            return Ok(());
        }
        let mut marks = vec![0; is_everywhere.len()];
        other.read_exact_at(&mut marks, self.mark_at(0))?;
        for (is_kept, mark) in is_everywhere.iter_mut().zip(marks) {
            *is_kept &= mark != 0;
        }
        Ok(())
    }

    fn key_at(block: usize) -> u64 {
        PAGE + (block * KEY_LEN) as u64
    }

    fn mark_at(&self, block: usize) -> u64 {
        Self::key_at(self.states.len()) + block as u64
    }

    fn data_at(&self, block: usize) -> u64 {
        self.mark_at(self.states.len()).next_multiple_of(PAGE) + block as u64 * self.block_bytes
    }

    /// Copies what counts into the caches.
    fn restore(
        &mut self,
        is_everywhere: &[bool],
        caches: &mut dyn BlockBytes,
    ) -> io::Result<Vec<(u32, KeptKey)>> {
        let n_blocks = is_everywhere.len();
        let (mut marks, mut all_keys) = (vec![0; n_blocks], vec![[0; KEY_LEN]; n_blocks]);
        self.file.read_exact_at(&mut marks, self.mark_at(0))?;
        if self.has_keys {
            let keys = all_keys.as_flattened_mut();
            self.file.read_exact_at(keys, Self::key_at(0))?;
        }
        let mut keys = Vec::new();
        let found = marks.into_iter().zip(all_keys).zip(is_everywhere);
        for (block, ((mark, key), is_everywhere)) in found.enumerate() {
            if mark == 0 {
                continue;
            }
            self.states[block].is_touched = true;
            self.n_touched += 1;
            if self.has_keys {
                if key == [0; KEY_LEN] || !is_everywhere {
                    self.file.write_all_at(&[0; KEY_LEN], Self::key_at(block))?;
                    self.file.write_all_at(&[0], self.mark_at(block))?;
                    continue;
                }
                keys.push((block as u32, key));
            }
            let mut at = self.data_at(block);
            for layer in 0..caches.n_layers() {
                let bytes = caches.block_mut(layer, block);
                self.file.read_exact_at(bytes, at)?;
                at += bytes.len() as u64;
            }
            self.states[block].is_kept = true;
            self.states[block].has_key = self.has_keys;
        }
        Ok(keys)
    }

    /// Forgets the blocks that a step writes.
    pub(super) fn before_step(&mut self, plan: &StepPlan) {
        self.attempt(|kept| {
            for span in &plan.spans {
                let (first, end) = (span.first_pos, span.first_pos + span.tokens.len());
                let written = first / kept.block_len..end.div_ceil(kept.block_len);
                for id in &plan.blocks[span.blocks.clone()][written] {
                    kept.forget(*id as usize)?;
                }
            }
            Ok(())
        });
    }

    fn forget(&mut self, block: usize) -> io::Result<()> {
        let state = &mut self.states[block];
        if std::mem::take(&mut state.has_key) {
            self.file.write_all_at(&[0; KEY_LEN], Self::key_at(block))?;
        }
        self.pending.retain(|(id, _)| *id as usize != block);
        if std::mem::take(&mut self.states[block].is_kept) {
            self.file.write_all_at(&[0], self.mark_at(block))?;
        }
        Ok(())
    }

    /// Keeps the full blocks of a step's long sequences. Every rank has those of the step before: their
    /// keys are written now.
    pub(super) fn after_step(&mut self, plan: &StepPlan, caches: &dyn BlockBytes) {
        self.attempt(|kept| {
            for (block, key) in std::mem::take(&mut kept.pending) {
                kept.file.write_all_at(&key, Self::key_at(block as usize))?;
                kept.states[block as usize].has_key = true;
            }
            for span in &plan.spans {
                let end = span.first_pos + span.tokens.len();
                if end < LONG_MIN {
                    continue;
                }
                let table = &plan.blocks[span.blocks.clone()];
                for id in &table[..end / kept.block_len] {
                    kept.keep(*id as usize, caches)?;
                }
            }
            Ok(())
        });
    }

    fn keep(&mut self, block: usize, caches: &dyn BlockBytes) -> io::Result<()> {
        let state = self.states[block];
        let is_full = self.touched_max <= self.n_touched && !state.is_touched;
        if state.is_kept || is_full {
            return Ok(());
        }
        let mut at = self.data_at(block);
        for layer in 0..caches.n_layers() {
            let bytes = caches.block(layer, block);
            self.file.write_all_at(bytes, at)?;
            at += bytes.len() as u64;
        }
        self.file.write_all_at(&[1], self.mark_at(block))?;
        self.n_touched += usize::from(!state.is_touched);
        self.states[block] = State {
            is_kept: true,
            has_key: false,
            is_touched: true,
        };
        Ok(())
    }

    /// Notes what the blocks hold that the last step filled.
    pub(super) fn note_keys(&mut self, keys: impl Iterator<Item = (u32, KeptKey)>) {
        for (block, key) in keys {
            let state = self.states[block as usize];
            let is_pending = || self.pending.iter().any(|(id, _)| *id == block);
            if self.has_keys && state.is_kept && !state.has_key && !is_pending() {
                self.pending.push((block, key));
            }
        }
    }

    /// Without memory for it nothing is kept, and everything else goes on.
    fn attempt(&mut self, work: impl FnOnce(&mut Self) -> io::Result<()>) {
        if self.is_broken {
            return;
        }
        if let Err(e) = work(self) {
            tracing::warn!(error = %e, "keys and values are not kept for a lost rank any more");
            self.is_broken = true;
            // What is in the file may be half of something.
            let _ = self.file.set_len(0);
        }
    }
}

/// True for a file that the same weights made in the same shape, which they name.
fn is_of(file: &File, identity: [u8; IDENTITY_LEN]) -> io::Result<bool> {
    if file.metadata()?.len() < PAGE {
        return Ok(false);
    }
    let mut found = [0; IDENTITY_LEN];
    file.read_exact_at(&mut found, 0)?;
    Ok(found == identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::LogitRows;

    const BLOCK_LEN: usize = 32;
    const N_BLOCKS: usize = 40;
    const N_LAYERS: usize = 2;

    /// Two layers of blocks of 8 bytes.
    #[derive(Debug, Clone, PartialEq)]
    struct Caches(Vec<[[u8; 8]; N_BLOCKS]>);

    impl BlockBytes for Caches {
        fn n_layers(&self) -> usize {
            N_LAYERS
        }
        fn block(&self, layer: usize, block: usize) -> &[u8] {
            &self.0[layer][block]
        }
        fn block_mut(&mut self, layer: usize, block: usize) -> &mut [u8] {
            &mut self.0[layer][block]
        }
    }

    fn caches(with: u8) -> Caches {
        let block =
            |layer: usize| std::array::from_fn(|b| [with.wrapping_add((layer * 64 + b) as u8); 8]);
        Caches((0..N_LAYERS).map(block).collect())
    }

    fn shape() -> KeptShape {
        KeptShape {
            n_blocks: N_BLOCKS,
            block_len: BLOCK_LEN,
            block_bytes: N_LAYERS * 8,
            bytes_max: 1 << 20,
        }
    }

    fn file() -> tempfile::NamedTempFile {
        tempfile::NamedTempFile::new().unwrap()
    }

    /// A step that computes positions up to `end` of a sequence over the first blocks.
    fn step(first: usize, end: usize) -> StepPlan {
        let mut plan = StepPlan::default();
        let blocks: Vec<u32> = (0..end.div_ceil(BLOCK_LEN) as u32).collect();
        plan.push(1, first, &vec![7; end - first], &blocks, LogitRows::Last);
        plan
    }

    fn keys(n: u32) -> impl Iterator<Item = (u32, KeptKey)> {
        (0..n).map(|id| (id, [id as u8 + 1; KEY_LEN]))
    }

    fn open(path: &Path, identity: u8, caches: &mut Caches) -> (KeptBlocks, Vec<(u32, KeptKey)>) {
        open_beside(path, identity, &[], caches)
    }

    fn open_beside(
        path: &Path,
        identity: u8,
        others: &[PathBuf],
        caches: &mut Caches,
    ) -> (KeptBlocks, Vec<(u32, KeptKey)>) {
        let identity = [identity; IDENTITY_LEN];
        KeptBlocks::open(path, shape(), identity, Some(others), caches).unwrap()
    }

    #[test]
    fn blocks_count_that_every_rank_keeps() {
        let (file, other) = (file(), file());
        let mut mine = caches(1);
        let (mut kept, _) = open(file.path(), 5, &mut mine);
        let identity = [5; IDENTITY_LEN];
        let (mut follower, _) =
            KeptBlocks::open(other.path(), shape(), identity, None, &mut mine).unwrap();
        follower.touched_max = 4;
        for plan in [step(0, 600), step(600, 601)] {
            kept.before_step(&plan);
            kept.after_step(&plan, &mine);
            kept.note_keys(keys(18));
            follower.before_step(&plan);
            follower.after_step(&plan, &mine);
        }
        let others = [other.path().to_owned()];
        let found = open_beside(file.path(), 5, &others, &mut caches(0)).1;
        assert_eq!(found, keys(4).collect::<Vec<_>>());
        // One that had no memory any more has emptied its file.
        other.as_file().set_len(0).unwrap();
        let found = open_beside(file.path(), 5, &others, &mut caches(0)).1;
        assert_eq!(found, []);
    }

    #[test]
    fn full_blocks_of_long_sequences_come_back_with_their_bytes() {
        let file = file();
        let mut first = caches(1);
        let (mut kept, found) = open(file.path(), 5, &mut first);
        assert_eq!(found, []);
        for (from, to) in [(0, 600), (600, 601)] {
            let plan = step(from, to);
            kept.before_step(&plan);
            kept.after_step(&plan, &first);
            kept.note_keys(keys(18));
        }
        drop(kept);
        let mut next = caches(100);
        let (_, found) = open(file.path(), 5, &mut next);
        assert_eq!(found, keys(18).collect::<Vec<_>>());
        for layer in 0..N_LAYERS {
            assert_eq!(next.0[layer][..18], first.0[layer][..18]);
            assert_eq!(next.0[layer][18..], caches(100).0[layer][18..]);
        }
    }

    #[test]
    fn keys_come_a_step_later_and_go_before_a_block_is_written_anew() {
        let file = file();
        let mut mine = caches(1);
        let (mut kept, _) = open(file.path(), 5, &mut mine);
        let plan = step(0, 600);
        kept.before_step(&plan);
        kept.after_step(&plan, &mine);
        kept.note_keys(keys(18));
        // Other ranks may not have copied yet.
        assert_eq!(open(file.path(), 5, &mut caches(0)).1, []);
        let (mut kept, _) = open(file.path(), 5, &mut mine);
        for plan in [step(0, 600), step(600, 601)] {
            kept.before_step(&plan);
            kept.after_step(&plan, &mine);
            kept.note_keys(keys(18));
        }
        assert_eq!(open(file.path(), 5, &mut caches(0)).1.len(), 18);
        // Another sequence gets the third block.
        let mut plan = StepPlan::default();
        plan.push(2, 0, &[7; 5], &[2], LogitRows::Last);
        kept.before_step(&plan);
        let found = open(file.path(), 5, &mut caches(0)).1;
        assert_eq!(found.len(), 17);
        assert!(found.iter().all(|(id, _)| *id != 2));
    }

    #[test]
    fn short_sequences_other_weights_and_what_exceeds_the_room_are_not_kept() {
        let file = file();
        let mut mine = caches(1);
        let (mut kept, _) = open(file.path(), 5, &mut mine);
        for plan in [step(0, 250), step(250, 251), step(251, 252)] {
            kept.before_step(&plan);
            kept.after_step(&plan, &mine);
            kept.note_keys(keys(7));
        }
        assert_eq!(open(file.path(), 5, &mut caches(0)).1, []);
        kept.touched_max = 3;
        for plan in [step(252, 600), step(600, 601)] {
            kept.before_step(&plan);
            kept.after_step(&plan, &mine);
            kept.note_keys(keys(18));
        }
        assert_eq!(open(file.path(), 5, &mut caches(0)).1.len(), 3);
        assert_eq!(open(file.path(), 6, &mut caches(0)).1, []);
        assert_eq!(open(file.path(), 5, &mut caches(0)).1, [], "it was emptied");
    }
}
