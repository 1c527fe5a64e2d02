//! The blocks of one sequence.

use super::{BlockKey, BlockPool};

/// The blocks of one sequence, from position 0 on.
///
/// Does not give its blocks back by itself: the pool is not at hand in `drop`. The owner calls
/// [`BlockTable::release`], and [`BlockPool::n_used`] shows whoever forgot.
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<u32>,
    root: BlockKey,
    /// Leading blocks whose contents are known, shared or labelled here.
    n_known: usize,
    /// Names the contents of those.
    key: BlockKey,
}

impl BlockTable {
    /// An empty table; `root` says with whom its blocks may be shared.
    pub fn new(root: BlockKey) -> Self {
        Self {
            blocks: Vec::new(),
            root,
            n_known: 0,
            key: root,
        }
    }

    /// Makes room for `n_positions` positions without taking blocks, so that growing up to there
    /// allocates nothing.
    pub fn reserve(&mut self, n_positions: usize, pool: &BlockPool) {
        let n = pool.blocks_for(n_positions);
        self.blocks
            .reserve_exact(n.saturating_sub(self.blocks.len()));
    }

    /// Takes over blocks that hold the beginning of `tokens`, as many as there are, and returns
    /// the positions they cover.
    ///
    /// # Panics
    /// When the table is not empty.
    pub fn adopt(&mut self, tokens: &[u32], pool: &mut BlockPool) -> usize {
        assert!(
            self.blocks.is_empty(),
            "a beginning is taken over at the beginning"
        );
        for of_block in tokens.chunks_exact(pool.block_len()) {
            let key = self.key.then(of_block);
            let Some(block) = pool.share(key) else { break };
            self.blocks.push(block);
            self.n_known += 1;
            self.key = key;
        }
        self.n_positions(pool)
    }

    /// Labels the blocks that `n_computed` positions fill, so that others can take them over.
    /// `tokens` are the sequence's, from position 0 on.
    pub fn label(&mut self, tokens: &[u32], n_computed: usize, pool: &mut BlockPool) {
        let block_len = pool.block_len();
        while (self.n_known + 1) * block_len <= n_computed {
            self.key = self
                .key
                .then(&tokens[self.n_known * block_len..][..block_len]);
            pool.label(self.blocks[self.n_known], self.key);
            self.n_known += 1;
        }
    }

    /// Takes blocks until `n_positions` positions are covered. All or nothing: false, and nothing
    /// is taken, when the pool has too few.
    pub fn grow_to(&mut self, n_positions: usize, pool: &mut BlockPool) -> bool {
        let n_missing = pool
            .blocks_for(n_positions)
            .saturating_sub(self.blocks.len());
        if pool.n_free() < n_missing {
            return false;
        }
        self.blocks
            .extend((0..n_missing).map_while(|_| pool.take()));
        assert!(
            n_positions <= self.n_positions(pool),
            "the table covers what was asked"
        );
        true
    }

    /// Gives all blocks back, the last first: of a beginning that nobody uses, the end is forgotten
    /// first.
    pub fn release(&mut self, pool: &mut BlockPool) {
        for block in self.blocks.drain(..).rev() {
            pool.give_back(block);
        }
        self.n_known = 0;
        self.key = self.root;
    }

    /// Ids in position order.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Positions covered.
    pub fn n_positions(&self, pool: &BlockPool) -> usize {
        self.blocks.len() * pool.block_len()
    }
}
