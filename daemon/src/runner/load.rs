//! From an opened checkpoint to an executor on processor cores, in the order that keeps promises:
//! plan, refuse what does not fit, then take memory.

use dsd_kernels::cpu::{CpuBackend, CpuConfig, CpuError};

use super::{
    Budget, MemoryPlan, ModelExecutor, PlanError, StepExecutor, WeightBytes, available_bytes,
};
use crate::{
    model::{self, DecoderSpec, ModelError},
    weights::Checkpoint,
};

/// A model ready to run steps.
pub struct LoadedModel {
    /// Runs the steps.
    pub executor: Box<dyn StepExecutor>,
    /// The memory taken.
    pub plan: MemoryPlan,
    /// What the model is made of.
    pub spec: DecoderSpec,
}

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

/// Builds the model on the CPU backend within `budget`.
///
/// # Errors
/// [`LoadError`]; nothing is left allocated.
pub fn load_cpu(
    checkpoint: &Checkpoint,
    cpu: CpuConfig,
    budget: Budget,
) -> Result<LoadedModel, LoadError> {
    let backend = CpuBackend::new(cpu)?;
    let spec = model::spec_of(checkpoint).map_err(ModelError::from)?;
    let weights = checkpoint.block_tensors().map(|t| t.bytes).sum::<u64>();
    let weights = WeightBytes {
        mapped: checkpoint.bytes_mapped() - weights,
        panels: checkpoint.block_tensors().map(|t| t.panel_bytes).sum(),
    };
    let plan = MemoryPlan::new(&backend, &spec, weights, budget, available_bytes())?;
    let decoder = model::build(checkpoint, &backend)?;
    checkpoint.release_blocks();
    let executor = Box::new(ModelExecutor::new(backend, decoder, &plan));
    Ok(LoadedModel {
        executor,
        plan,
        spec,
    })
}
