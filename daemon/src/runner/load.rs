//! From an opened checkpoint to an executor on processor cores, in the order that keeps promises:
//! plan, refuse what does not fit, then take memory.

use dsd_kernels::cpu::{CpuBackend, CpuConfig, CpuError};

use super::{Budget, MemoryPlan, ModelExecutor, PlanError, WeightBytes, available_bytes};
use crate::{
    collective::Collective,
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

/// Deals the model to `n_ranks` ranks of this machine and plans their memory within `budget`.
///
/// # Errors
/// [`LoadError`]; nothing was taken.
pub fn plan_cpu(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    n_ranks: usize,
    budget: Budget,
) -> Result<ReplicaPlan, LoadError> {
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let format_of = |name: &str| checkpoint.format(name);
    let part = |rank| {
        let of = RankOf { rank, n_ranks };
        let split = Split::new(&spec, of, &format_of).map_err(ModelError::from)?;
        let weights = match of_rank(checkpoint, of)? {
            RankTensors::Pack(rank) => WeightBytes {
                mapped: rank.tensor_bytes(),
                panels: 0,
            },
            source @ RankTensors::Checkpoint(_) => {
                let tensors = model::tensors(&source, &split)?;
                WeightBytes::of_checkpoint(&tensors, &format_of)
            }
        };
        Ok::<_, LoadError>((split, weights))
    };
    let parts = (0..n_ranks.max(1))
        .map(part)
        .collect::<Result<Vec<_>, _>>()?;
    let backend = CpuBackend::new(cpu)?;
    let plans = MemoryPlan::new(&backend, &parts, budget, available_bytes())?;
    let ranks = parts
        .into_iter()
        .zip(plans)
        .map(|((split, _), memory)| RankPlan { split, memory })
        .collect();
    Ok(ReplicaPlan { spec, ranks })
}

/// Builds one rank's part of the model on the CPU backend; takes the memory of its plan.
///
/// # Errors
/// [`LoadError`]; nothing is left allocated.
pub fn load_cpu(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    plan: &RankPlan,
    group: Collective,
) -> Result<ModelExecutor<CpuBackend>, LoadError> {
    let backend = CpuBackend::new(cpu)?;
    let source = of_rank(checkpoint, plan.split.of)?;
    let decoder = model::build(&source, &plan.split, &backend)?;
    model::refuse_extra_tensors(&source, &plan.split.full)?;
    checkpoint.release_blocks();
    Ok(ModelExecutor::new(backend, decoder, plan, group))
}

fn of_rank(checkpoint: &Checkpoint, of: RankOf) -> Result<RankTensors<'_>, ModelError> {
    Ok(checkpoint.of_rank(of.rank, of.n_ranks)?)
}
