//! Who computes what in a tensor-parallel group: heads, feed-forward widths and vocabulary rows,
//! dealt to ranks as Megatron-LM does (Shoeybi et al. 2019, section 3).
//!
//! A projection into heads or inner widths is cut by rows, the one out of them by columns, and the
//! ranks' outputs add up. What every rank needs whole, MLA's compressed query and latent and the
//! gate's logits, is cut by rows as well and gathered, so that no rank does the work of another. Key-value heads follow their query heads; where there are fewer of them
//! than ranks, ranks share one. MLA's latent and its cache are the same on every rank. Experts are
//! cut inside, so that every rank has an even part of any choice of them.
//!
//! Pure: knows sizes and formats, no bytes.
//!
//! Invariant: the pieces of all ranks cover every output once, and none begins inside a block.

use std::ops::Range;

use dsd_kernels::dtype::Format;

use super::spec::{AttentionSpec, DecoderSpec, FfnSpec};

/// Ranks of a group at most.
pub const RANKS_MAX: usize = 64;

/// One rank's place in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankOf {
    /// From 0.
    pub rank: usize,
    /// Ranks of the group.
    pub n_ranks: usize,
}

impl RankOf {
    /// The only rank of a group of one.
    pub const SOLO: Self = Self {
        rank: 0,
        n_ranks: 1,
    };

    /// This rank's run of `n` things, as even as it goes.
    fn share(self, n: usize) -> Range<usize> {
        n * self.rank / self.n_ranks..n * (self.rank + 1) / self.n_ranks
    }
}

/// One rank's part of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Split {
    /// Whose part.
    pub of: RankOf,
    /// The whole decoder.
    pub full: DecoderSpec,
    /// The part, as a narrower decoder: fewer heads, narrower layers, fewer rows of the vocabulary.
    pub local: DecoderSpec,
    /// Query heads.
    pub heads: Range<usize>,
    /// Key-value heads, where attention has them.
    pub kv_heads: Range<usize>,
    /// Rows of embedding and output layer.
    pub vocab: Range<usize>,
    /// The same of every rank.
    pub vocab_of_ranks: Vec<Range<usize>>,
    /// Inner widths of every layer.
    pub ffns: Vec<FfnSplit>,
}

/// One layer's inner widths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FfnSplit {
    /// Of the MLP, or of every routed expert.
    pub inter: Range<usize>,
    /// Of the shared expert.
    pub shared: Range<usize>,
}

/// Why a decoder cannot be dealt to so many ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SplitError {
    /// There is less to deal than there are ranks.
    #[error("{n_ranks} ranks cannot share {n} {what}: use at most {n} ranks (--tp, engine.tp)")]
    TooManyRanks {
        /// What is dealt.
        what: String,
        /// How many there are.
        n: usize,
        /// Ranks asked for.
        n_ranks: usize,
    },
    /// A group of none, or of more than any machine has.
    #[error("a group has 1 to {RANKS_MAX} ranks, {n_ranks} are asked for (--tp, engine.tp)")]
    RankCount {
        /// Ranks asked for.
        n_ranks: usize,
    },
}

impl Split {
    /// The whole decoder on one rank.
    pub fn solo(spec: &DecoderSpec) -> Self {
        let whole = |ffn: &FfnSpec| match ffn {
            FfnSpec::Mlp { inter, .. } => FfnSplit {
                inter: 0..*inter,
                shared: 0..0,
            },
            FfnSpec::Moe(moe) => FfnSplit {
                inter: 0..moe.inter,
                shared: 0..moe.shared_inter.unwrap_or(0),
            },
        };
        let (n_heads, n_kv_heads) = match &spec.attention {
            AttentionSpec::Gqa(gqa) => (gqa.n_heads, gqa.n_kv_heads),
            AttentionSpec::Mla(mla) => (mla.n_heads, 0),
        };
        Self {
            of: RankOf::SOLO,
            local: spec.clone(),
            heads: 0..n_heads,
            kv_heads: 0..n_kv_heads,
            vocab: 0..spec.vocab_len,
            vocab_of_ranks: std::iter::once(0..spec.vocab_len).collect(),
            ffns: spec.ffns.iter().map(whole).collect(),
            full: spec.clone(),
        }
    }

    /// The part of `of`; `format_of` tells how a matrix is stored.
    ///
    /// # Errors
    /// [`SplitError`] with the numbers.
    pub fn new(
        spec: &DecoderSpec,
        of: RankOf,
        format_of: &dyn Fn(&str) -> Option<Format>,
    ) -> Result<Self, SplitError> {
        let n_ranks = of.n_ranks;
        if !(1..=RANKS_MAX).contains(&n_ranks) || n_ranks <= of.rank {
            return Err(SplitError::RankCount { n_ranks });
        }
        if n_ranks == 1 {
            return Ok(Self::solo(spec));
        }
        let block_of = |name: &str| format_of(name).map_or(1, Format::block_len);
        let head_block = (0..spec.n_layers())
            .map(|i| block_of(&format!("model.layers.{i}.self_attn.o_proj.weight")))
            .fold(1, lcm);
        let mut split = Self {
            of,
            ..Self::solo(spec)
        };
        match &mut split.local.attention {
            AttentionSpec::Gqa(gqa) => {
                let unit = lcm(gqa.head_dim, head_block) / gqa.head_dim;
                let dealt = deal_grouped(of, gqa.n_heads, gqa.n_kv_heads, unit)?;
                (split.heads, split.kv_heads) = dealt;
                gqa.n_heads = split.heads.len();
                gqa.n_kv_heads = split.kv_heads.len();
                gqa.output_bias &= of.rank == 0;
            }
            AttentionSpec::Mla(mla) => {
                let unit = lcm(mla.v_head_dim, head_block) / mla.v_head_dim;
                split.heads = deal("attention heads", mla.n_heads, unit, of)?;
                mla.n_heads = split.heads.len();
            }
        }
        split.vocab_of_ranks = (0..n_ranks)
            .map(|rank| {
                let of = RankOf { rank, n_ranks };
                deal_width("rows of the vocabulary", spec.vocab_len, 1, of)
            })
            .collect::<Result<_, _>>()?;
        split.vocab = split.vocab_of_ranks[of.rank].clone();
        split.local.vocab_len = split.vocab.len();
        split.ffns.clear();
        for (index, ffn) in split.local.ffns.iter_mut().enumerate() {
            let mlp = format!("model.layers.{index}.mlp");
            let what = |part: &str| format!("pieces of whole blocks of {part} in layer {index}");
            split.ffns.push(match ffn {
                FfnSpec::Mlp { inter, .. } => {
                    let block = block_of(&format!("{mlp}.down_proj.weight"));
                    let range = deal_width(&what("down_proj"), *inter, block, of)?;
                    *inter = range.len();
                    FfnSplit {
                        inter: range,
                        shared: 0..0,
                    }
                }
                FfnSpec::Moe(moe) => {
                    let block = (0..moe.gate.n_experts)
                        .map(|e| block_of(&format!("{mlp}.experts.{e}.down_proj.weight")))
                        .fold(1, lcm);
                    let range = deal_width(&what("an expert's down_proj"), moe.inter, block, of)?;
                    moe.inter = range.len();
                    let mut shared = 0..0;
                    if let Some(inter) = &mut moe.shared_inter {
                        let block = block_of(&format!("{mlp}.shared_experts.down_proj.weight"));
                        let what = what("the shared expert's down_proj");
                        shared = deal_width(&what, *inter, block, of)?;
                        *inter = shared.len();
                    }
                    FfnSplit {
                        inter: range,
                        shared,
                    }
                }
            });
        }
        Ok(split)
    }

    /// The rows of every rank where all need the `n` outputs of a layer; `None` where each computes
    /// them all: alone, or where a rank's piece would not fit the buffer of a row of the residual
    /// stream.
    pub fn gathered(&self, n: usize) -> Option<Vec<Range<usize>>> {
        let n_ranks = self.of.n_ranks;
        if n_ranks == 1 {
            return None;
        }
        let rows = (0..n_ranks)
            .map(|rank| deal_width("rows", n, 1, RankOf { rank, n_ranks }).ok())
            .collect::<Option<Vec<_>>>()?;
        let fits = |rows: &Range<usize>| rows.len() <= self.full.hidden;
        rows.iter().all(fits).then_some(rows)
    }

    /// True for the rank whose outputs carry what is added once, such as biases.
    pub fn is_first(&self) -> bool {
        self.of.rank == 0
    }
}

/// Query heads and their key-value heads. `unit` query heads are whole blocks of the output
/// projection.
fn deal_grouped(
    of: RankOf,
    n_heads: usize,
    n_kv_heads: usize,
    unit: usize,
) -> Result<(Range<usize>, Range<usize>), SplitError> {
    let group = n_heads / n_kv_heads;
    let kv_unit = lcm(group, unit) / group;
    let n_units = n_kv_heads.div_ceil(kv_unit);
    if of.n_ranks <= n_units {
        let units = of.share(n_units);
        let kv = units.start * kv_unit..(units.end * kv_unit).min(n_kv_heads);
        return Ok((kv.start * group..kv.end * group, kv));
    }
    // Several ranks to a key-value head: each takes some of its query heads.
    let too_many = || SplitError::TooManyRanks {
        what: "attention heads, in whole blocks of the output projection".to_owned(),
        n: n_heads / unit,
        n_ranks: of.n_ranks,
    };
    if kv_unit != 1 {
        return Err(too_many());
    }
    let head_of = |rank: usize| rank * n_kv_heads / of.n_ranks;
    let kv = head_of(of.rank);
    let first = (0..of.rank).rev().take_while(|r| head_of(*r) == kv).count();
    let after = (of.rank..of.n_ranks)
        .take_while(|r| head_of(*r) == kv)
        .count();
    let among = RankOf {
        rank: first,
        n_ranks: first + after,
    };
    let heads = deal("query heads", group, unit, among).map_err(|_| too_many())?;
    let start = kv * group;
    Ok((start + heads.start..start + heads.end, kv..kv + 1))
}

/// A run of `n` things that stay together in units of `unit`.
fn deal(what: &str, n: usize, unit: usize, of: RankOf) -> Result<Range<usize>, SplitError> {
    let n_units = n.div_ceil(unit);
    if n_units < of.n_ranks {
        return Err(SplitError::TooManyRanks {
            what: what.to_owned(),
            n: n_units,
            n_ranks: of.n_ranks,
        });
    }
    let units = of.share(n_units);
    Ok(units.start * unit..(units.end * unit).min(n))
}

/// A run of a width whose pieces are whole blocks, if possible equal, and whole groups of rounded
/// activations and panels of rows (128 is a tile of FP8 scales).
fn deal_width(what: &str, n: usize, block: usize, of: RankOf) -> Result<Range<usize>, SplitError> {
    const PREFERRED: [usize; 8] = [128, 64, 32, 16, 8, 4, 2, 1];
    /// Units per rank from which uneven pieces differ by a quarter at most.
    const UNITS_EVEN_ENOUGH: usize = 4;
    let units = || PREFERRED.iter().map(|preferred| lcm(block, *preferred));
    let is_equal = |unit: &usize| n.is_multiple_of(unit * of.n_ranks);
    let is_fine = |unit: &usize| UNITS_EVEN_ENOUGH * of.n_ranks <= n / unit;
    let unit = units()
        .find(is_equal)
        .or_else(|| units().find(is_fine))
        .unwrap_or(block);
    deal(what, n, unit, of)
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranks(n_ranks: usize) -> impl Iterator<Item = RankOf> {
        (0..n_ranks).map(move |rank| RankOf { rank, n_ranks })
    }

    /// Every rank's part of `n`, which must be one after the other and none empty.
    fn check_cover(n: usize, parts: &[Range<usize>]) {
        let mut next = 0;
        for part in parts {
            assert_eq!(part.start, next, "{parts:?}");
            assert!(!part.is_empty(), "{parts:?}");
            next = part.end;
        }
        assert_eq!(next, n, "{parts:?}");
    }

    #[test]
    fn widths_are_covered_in_whole_blocks_and_equal_where_they_can_be() {
        for (n, block) in [
            (1536, 32),
            (512, 1),
            (2816, 32),
            (48, 32),
            (96, 32),
            (7, 1),
            (512, 256),
        ] {
            for n_ranks in [1, 2, 3, 4] {
                let parts: Result<Vec<_>, _> = ranks(n_ranks)
                    .map(|of| deal_width("x", n, block, of))
                    .collect();
                if n.div_ceil(block) < n_ranks {
                    assert!(parts.is_err(), "{n} {block} {n_ranks}");
                    continue;
                }
                let parts = parts.unwrap();
                check_cover(n, &parts);
                assert!(parts.iter().all(|p| p.start.is_multiple_of(block)));
                if n.is_multiple_of(block * n_ranks) {
                    assert!(parts.iter().all(|p| p.len() == n / n_ranks), "{parts:?}");
                }
            }
        }
    }

    #[test]
    fn heads_are_covered_and_each_finds_its_keys() {
        for (n_heads, n_kv, unit) in [
            (9, 3, 1),
            (8, 8, 1),
            (12, 3, 1),
            (8, 2, 1),
            (4, 1, 1),
            (32, 8, 4),
            (8, 2, 2),
        ] {
            let group = n_heads / n_kv;
            for n_ranks in 1..=8 {
                let dealt = ranks(n_ranks).map(|of| deal_grouped(of, n_heads, n_kv, unit));
                let Ok(dealt) = dealt.collect::<Result<Vec<_>, _>>() else {
                    assert!(
                        n_heads / unit.max(1) < n_ranks || unit > 1,
                        "{n_heads} {n_kv} {n_ranks}"
                    );
                    continue;
                };
                let heads = dealt.iter().map(|(h, _)| h.clone()).collect::<Vec<_>>();
                check_cover(n_heads, &heads);
                for (heads, kv) in dealt {
                    assert_eq!(heads.start / group, kv.start);
                    assert_eq!((heads.end - 1) / group, kv.end - 1);
                    assert!(
                        heads.len().is_multiple_of(kv.len()),
                        "{heads:?} share {kv:?} evenly"
                    );
                    assert!(heads.start.is_multiple_of(unit));
                }
            }
        }
    }

    #[test]
    fn more_ranks_than_heads_are_refused_with_the_numbers() {
        let error = deal(
            "attention heads",
            3,
            1,
            RankOf {
                rank: 0,
                n_ranks: 4,
            },
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "4 ranks cannot share 3 attention heads: use at most 3 ranks (--tp, engine.tp)"
        );
    }
}
