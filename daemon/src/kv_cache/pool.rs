//! The blocks of one KV memory.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    ops::Range,
};

use super::BlockKey;

/// No block, in the links of the idle list.
const NONE: u32 = u32::MAX;

/// The blocks of one KV memory: free, idle or used.
#[derive(Debug)]
pub struct BlockPool {
    first_id: u32,
    block_len: usize,
    /// Indices to hand out, the next one last.
    free: Vec<u32>,
    blocks: Vec<Block>,
    by_key: HashMap<BlockKey, u32>,
    /// Idle blocks, linked through [`Block::older`] and [`Block::newer`].
    oldest: u32,
    newest: u32,
    n_idle: usize,
    n_references: usize,
}

/// One block's state.
#[derive(Debug, Clone)]
struct Block {
    n_users: u32,
    /// Contents, once full and not held by another block.
    key: Option<BlockKey>,
    older: u32,
    newer: u32,
}

impl BlockPool {
    /// A pool of the blocks `ids`, each of `block_len` positions, all free.
    ///
    /// # Panics
    /// When `block_len` is 0.
    pub fn new(ids: Range<u32>, block_len: usize) -> Self {
        assert!(block_len > 0, "a block holds at least one position");
        let n_blocks = ids.end - ids.start;
        let empty = Block {
            n_users: 0,
            key: None,
            older: NONE,
            newer: NONE,
        };
        Self {
            first_id: ids.start,
            block_len,
            free: (0..n_blocks).rev().collect(),
            blocks: vec![empty; n_blocks as usize],
            by_key: HashMap::with_capacity(n_blocks as usize),
            oldest: NONE,
            newest: NONE,
            n_idle: 0,
            n_references: 0,
        }
    }

    /// Notes what free blocks hold, so that they are taken over and not handed out before others.
    ///
    /// # Panics
    /// When one is not free.
    pub fn seed(&mut self, contents: &[(u32, BlockKey)]) {
        let free: HashSet<u32> = self.free.iter().copied().collect();
        let mut taken = HashSet::with_capacity(contents.len());
        for (id, key) in contents {
            let index = self.index(*id);
            assert!(free.contains(&index), "block {id} is not free at the start");
            assert!(!taken.contains(&index), "block {id} is seeded twice");
            if let Entry::Vacant(entry) = self.by_key.entry(*key) {
                entry.insert(index);
                taken.insert(index);
                self.blocks[index as usize].key = Some(*key);
                self.link_newest(index);
            }
        }
        self.free.retain(|index| !taken.contains(index));
    }

    /// What a block holds; `None` where it is not known or another one has the same.
    pub fn key_of(&self, id: u32) -> Option<BlockKey> {
        self.blocks[self.index(id) as usize].key
    }

    /// Takes a block for new contents: a free one, else the idle one that was used longest ago.
    pub(super) fn take(&mut self) -> Option<u32> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => self.evict()?,
        };
        let block = &mut self.blocks[index as usize];
        assert!(
            block.n_users == 0 && block.key.is_none(),
            "block {index} was free and in use"
        );
        block.n_users = 1;
        self.n_references += 1;
        Some(self.first_id + index)
    }

    /// The block with these contents, now used by one more table.
    pub(super) fn share(&mut self, key: BlockKey) -> Option<u32> {
        let index = *self.by_key.get(&key)?;
        if self.blocks[index as usize].n_users == 0 {
            self.unlink(index);
        }
        self.blocks[index as usize].n_users += 1;
        self.n_references += 1;
        Some(self.first_id + index)
    }

    /// Notes what a used block holds, so that others may share it. When another block holds the
    /// same already, this one stays without label.
    pub(super) fn label(&mut self, id: u32, key: BlockKey) {
        let index = self.index(id);
        let block = &mut self.blocks[index as usize];
        assert!(
            block.n_users > 0 && block.key.is_none(),
            "block {id} gets one label, while used"
        );
        if let Entry::Vacant(entry) = self.by_key.entry(key) {
            entry.insert(index);
            block.key = Some(key);
        }
    }

    /// One table less uses the block.
    pub(super) fn give_back(&mut self, id: u32) {
        let index = self.index(id);
        let block = &mut self.blocks[index as usize];
        assert!(block.n_users > 0, "block {id} is given back twice");
        block.n_users -= 1;
        self.n_references -= 1;
        if block.n_users > 0 {
            return;
        }
        if block.key.is_some() {
            self.link_newest(index);
        } else {
            self.free.push(index);
        }
    }

    fn index(&self, id: u32) -> u32 {
        match id.checked_sub(self.first_id) {
            Some(index) if (index as usize) < self.blocks.len() => index,
            _ => unreachable!("block {id} is not of this pool"),
        }
    }

    /// Forgets the contents of the idle block that was used longest ago.
    fn evict(&mut self) -> Option<u32> {
        let index = self.oldest;
        if index == NONE {
            return None;
        }
        self.unlink(index);
        if let Some(key) = self.blocks[index as usize].key.take() {
            self.by_key.remove(&key);
        }
        Some(index)
    }

    fn link_newest(&mut self, index: u32) {
        let older = std::mem::replace(&mut self.newest, index);
        self.blocks[index as usize].older = older;
        self.blocks[index as usize].newer = NONE;
        match older {
            NONE => self.oldest = index,
            older => self.blocks[older as usize].newer = index,
        }
        self.n_idle += 1;
    }

    fn unlink(&mut self, index: u32) {
        let Block { older, newer, .. } = self.blocks[index as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.n_idle -= 1;
    }

    /// Positions in a block.
    pub fn block_len(&self) -> usize {
        self.block_len
    }

    /// Blocks in the pool, free or not.
    pub fn n_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be taken: free ones, and idle ones that lose their contents by it.
    pub fn n_free(&self) -> usize {
        self.free.len() + self.n_idle
    }

    /// Blocks that nobody uses and that still hold something.
    pub fn n_idle(&self) -> usize {
        self.n_idle
    }

    /// Blocks in at least one table.
    pub fn n_used(&self) -> usize {
        self.blocks.len() - self.n_free()
    }

    /// Places in tables that blocks take: a shared block counts once for each.
    pub fn n_references(&self) -> usize {
        self.n_references
    }

    /// Blocks that `n_positions` positions take.
    pub fn blocks_for(&self, n_positions: usize) -> usize {
        n_positions.div_ceil(self.block_len)
    }
}
