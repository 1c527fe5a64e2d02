//! Blocks are handed out, shared and forgotten as documented.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[test]
fn a_fresh_pool_counts_up_and_a_returned_block_comes_back_first() {
    let mut pool = BlockPool::new(3..7, 4);
    let (mut a, mut b) = (
        BlockTable::new(BlockKey::root(b"")),
        BlockTable::new(BlockKey::root(b"")),
    );
    assert!(a.grow_to(9, &mut pool));
    assert_eq!(a.blocks(), [3, 4, 5]);
    assert!(b.grow_to(1, &mut pool));
    assert_eq!(b.blocks(), [6]);
    a.release(&mut pool);
    assert!(b.grow_to(8, &mut pool));
    assert_eq!(b.blocks(), [6, 3]);
}

#[test]
fn growing_beyond_the_pool_takes_nothing() {
    let mut pool = BlockPool::new(0..2, 4);
    let mut table = BlockTable::new(BlockKey::root(b""));
    assert!(!table.grow_to(9, &mut pool));
    assert_eq!(pool.n_free(), 2);
    assert!(table.grow_to(8, &mut pool));
    assert_eq!(pool.n_used(), 2);
}

#[test]
#[should_panic(expected = "given back twice")]
fn giving_a_block_back_twice_is_caught() {
    let mut pool = BlockPool::new(0..2, 4);
    let block = pool.take().unwrap();
    pool.give_back(block);
    pool.give_back(block);
}

#[test]
#[should_panic(expected = "not of this pool")]
fn giving_back_a_foreign_block_is_caught() {
    BlockPool::new(2..4, 4).give_back(1);
}

proptest! {
    #[test]
    fn no_block_is_ever_in_two_tables_and_none_is_lost(
        n_blocks in 1u32..20,
        block_len in 1usize..5,
        ops in prop::collection::vec((0usize..4, 0usize..40), 1..60),
    ) {
        let mut pool = BlockPool::new(10..10 + n_blocks, block_len);
        let mut tables: Vec<BlockTable> = (0..4).map(|_| BlockTable::new(BlockKey::root(b""))).collect();
        for (table, n_positions) in ops {
            let n_before = tables[table].blocks().len();
            if n_positions == 0 {
                tables[table].release(&mut pool);
            } else if tables[table].grow_to(n_positions, &mut pool) {
                let n_after = tables[table].blocks().len();
                prop_assert_eq!(n_after, n_before.max(n_positions.div_ceil(block_len)));
            } else {
                prop_assert_eq!(tables[table].blocks().len(), n_before);
            }
            let held: Vec<u32> = tables.iter().flat_map(|t| t.blocks().to_vec()).collect();
            let distinct: BTreeSet<u32> = held.iter().copied().collect();
            prop_assert_eq!(held.len(), distinct.len());
            prop_assert_eq!(held.len(), pool.n_used());
            prop_assert_eq!(pool.n_used() + pool.n_free(), n_blocks as usize);
            prop_assert!(distinct.iter().all(|b| (10..10 + n_blocks).contains(b)));
        }
        tables.iter_mut().for_each(|t| t.release(&mut pool));
        prop_assert_eq!(pool.n_used(), 0);
    }
}

/// A table that computed `tokens` and labelled them.
fn computed(tokens: &[u32], owner: &[u8], pool: &mut BlockPool) -> (BlockTable, usize) {
    let mut table = BlockTable::new(BlockKey::root(owner));
    let n_adopted = table.adopt(tokens, pool);
    assert!(table.grow_to(tokens.len(), pool));
    table.label(tokens, tokens.len(), pool);
    (table, n_adopted)
}

#[test]
fn a_beginning_is_shared_block_by_block_while_used_and_after() {
    let mut pool = BlockPool::new(0..8, 2);
    let (mut a, _) = computed(&[1, 2, 3, 4, 5], b"", &mut pool);
    let (mut b, n_adopted) = computed(&[1, 2, 3, 9, 9], b"", &mut pool);
    assert_eq!(n_adopted, 2);
    assert_eq!(a.blocks()[0], b.blocks()[0]);
    assert_ne!(a.blocks()[1], b.blocks()[1]);
    assert_eq!((pool.n_used(), pool.n_references()), (5, 6));
    a.release(&mut pool);
    b.release(&mut pool);
    assert_eq!((pool.n_used(), pool.n_idle(), pool.n_free()), (0, 3, 8));
    let (mut c, n_adopted) = computed(&[1, 2, 3, 4, 5, 6], b"", &mut pool);
    assert_eq!(n_adopted, 4);
    c.release(&mut pool);
}

#[test]
fn owners_do_not_see_each_others_blocks() {
    let mut pool = BlockPool::new(0..8, 2);
    let (mut a, _) = computed(&[1, 2, 3, 4], b"a", &mut pool);
    let (mut b, n_adopted) = computed(&[1, 2, 3, 4], b"b", &mut pool);
    assert_eq!(n_adopted, 0);
    a.release(&mut pool);
    b.release(&mut pool);
}

#[test]
fn the_end_of_what_was_used_longest_ago_is_forgotten_first() {
    let mut pool = BlockPool::new(0..4, 2);
    for tokens in [[1, 1, 1, 1], [2, 2, 2, 2]] {
        computed(&tokens, b"", &mut pool).0.release(&mut pool);
    }
    assert_eq!(pool.n_idle(), 4);
    computed(&[3, 3], b"", &mut pool).0.release(&mut pool);
    let mut again = BlockTable::new(BlockKey::root(b""));
    assert_eq!(again.adopt(&[2, 2, 2, 2], &mut pool), 4);
    again.release(&mut pool);
    assert_eq!(again.adopt(&[1, 1, 1, 1], &mut pool), 2);
    again.release(&mut pool);
}

#[test]
fn the_same_contents_computed_twice_are_labelled_once() {
    let mut pool = BlockPool::new(0..4, 2);
    let mut tables = [(); 2].map(|()| BlockTable::new(BlockKey::root(b"")));
    for table in &mut tables {
        assert_eq!(table.adopt(&[7, 7], &mut pool), 0);
        assert!(table.grow_to(2, &mut pool));
    }
    for table in &mut tables {
        table.label(&[7, 7], 2, &mut pool);
    }
    tables.iter_mut().for_each(|t| t.release(&mut pool));
    assert_eq!((pool.n_idle(), pool.n_free()), (1, 4));
}
