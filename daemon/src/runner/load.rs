//! From an opened checkpoint to an executor on processor cores, in the order that keeps promises:
//! plan, refuse what does not fit, then take memory.

use dsd_kernels::cpu::{CpuBackend, CpuConfig, CpuError};

use super::{Available, Budget, MemoryPlan, ModelExecutor, PlanError, WeightBytes};
use crate::{
    model::{self, DecoderSpec, ModelError, RankOf, Split},
    weights::{Checkpoint, RankTensors},
};

/// Why a checkpoint cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint does not describe a model this code runs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// It does not fit.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The processor or the system refused.
    #[error(transparent)]
    Cpu(#[from] CpuError),
}

/// A replica on paper: who holds what, and how much memory that takes.
#[derive(Debug, Clone)]
pub struct ReplicaPlan {
    /// The whole model.
    pub spec: DecoderSpec,
    /// One entry per rank.
    pub ranks: Vec<RankPlan>,
}

/// One rank of a [`ReplicaPlan`].
#[derive(Debug, Clone)]
pub struct RankPlan {
    /// Its part of the model.
    pub split: Split,
    /// Its memory.
    pub memory: MemoryPlan,
}

/// Bytes of KV cache that one position takes on all ranks together: they deal key-value heads among
/// them, and each holds MLA's latent.
///
/// # Errors
/// [`LoadError`].
pub fn kv_bytes_per_token(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    n_ranks: usize,
) -> Result<u64, LoadError> {
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let bytes = splits(checkpoint, &spec, n_ranks)?
        .iter()
        .map(|split| split.local.cache_bytes_per_token(cpu.kv_type))
        .sum::<usize>();
    Ok(bytes as u64)
}

/// Bytes of the weights of all ranks together, mapped or in panels.
///
/// # Errors
/// [`LoadError`].
pub fn weight_bytes(checkpoint: &Checkpoint, n_ranks: usize) -> Result<u64, LoadError> {
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let mut bytes = 0;
    for split in splits(checkpoint, &spec, n_ranks)? {
        let weights = weights_of(checkpoint, &split)?;
        bytes += weights.mapped + weights.panels;
    }
    Ok(bytes)
}

fn weights_of(checkpoint: &Checkpoint, split: &Split) -> Result<WeightBytes, LoadError> {
    match of_rank(checkpoint, split.of)? {
        RankTensors::Pack(rank) => Ok(WeightBytes {
            mapped: rank.tensor_bytes(),
            panels: 0,
        }),
        source @ RankTensors::Checkpoint(_) => {
            let tensors = model::tensors(&source, split)?;
            let format_of = |name: &str| checkpoint.format(name);
            Ok(WeightBytes::of_checkpoint(&tensors, &format_of))
        }
    }
}

fn splits(
    checkpoint: &Checkpoint,
    spec: &DecoderSpec,
    n_ranks: usize,
) -> Result<Vec<Split>, ModelError> {
    let format_of = |name: &str| checkpoint.format(name);
    (0..n_ranks.max(1))
        .map(|rank| Ok(Split::new(spec, RankOf { rank, n_ranks }, &format_of)?))
        .collect()
}

/// Deals the model to `n_ranks` ranks of this machine and plans their memory within `budget` and, when
/// known, what is available.
///
/// # Errors
/// [`LoadError`]; nothing was taken.
pub fn plan_cpu(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    n_ranks: usize,
    budget: Budget,
    available: Option<Available>,
) -> Result<ReplicaPlan, LoadError> {
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let parts = splits(checkpoint, &spec, n_ranks)?
        .into_iter()
        .map(|split| weights_of(checkpoint, &split).map(|weights| (split, weights)))
        .collect::<Result<Vec<_>, _>>()?;
    let backend = CpuBackend::new(cpu)?;
    let plans = MemoryPlan::new(&backend, &parts, budget, available)?;
    let ranks = parts
        .into_iter()
        .zip(plans)
        .map(|((split, _), memory)| RankPlan { split, memory })
        .collect();
    Ok(ReplicaPlan { spec, ranks })
}

/// Builds one rank's part of the model on the CPU backend; takes the memory of its plan. A part of
/// several runs once it is [`ModelExecutor::in_group`].
///
/// # Errors
/// [`LoadError`]; nothing is left allocated.
pub fn load_cpu(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    plan: &RankPlan,
) -> Result<ModelExecutor<CpuBackend>, LoadError> {
    let backend = CpuBackend::new(cpu)?;
    let source = of_rank(checkpoint, plan.split.of)?;
    let decoder = model::build(&source, &plan.split, &backend)?;
    model::refuse_extra_tensors(&source, &plan.split.full)?;
    checkpoint.release_blocks();
    Ok(ModelExecutor::new(backend, decoder, plan))
}

fn of_rank(checkpoint: &Checkpoint, of: RankOf) -> Result<RankTensors<'_>, ModelError> {
    Ok(checkpoint.of_rank(of.rank, of.n_ranks)?)
}
