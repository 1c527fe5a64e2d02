//! Handle to an engine that serves one full copy of a model.
//!
//! The engine runs in a group's first rank; tests have it as a thread of this process, and it looks
//! the same from here. Refuses what can be refused by looking at it; knows no text, HTTP or catalog.
//!
//! Invariant: a refused request has cost nothing; a taken one gets exactly one end, unless its
//! reader left or the engine broke down.
//!
//! Called by catalog, gateway and admin.

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use crate::{
    admission::{Admission, EngineState},
    cost::{CostModel, StepShape},
    engine::{self, EngineConfig, EngineHandle, EngineLimits, PostError, StartError, StepExecutor},
    flow::{FinishReason, Request, StreamItem},
    group::{self, GroupConfig, GroupError, GroupHandle, GroupState},
};

/// What a caller brings, and what it is told, so that it needs no arrow of its own.
pub use crate::admission::{AdmissionConfig, Refusal};

/// Rows of a prompt's chunks, and rows of the steps of decodes, where a request's work is told.
const TYPICAL_CHUNK_ROWS: usize = 128;
const TYPICAL_BATCH: usize = 8;

/// Why a request was not taken. Nothing was spent on it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// Not now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Prompt plus at least one new token does not fit the context or the KV pool.
    #[error("the prompt has {n_prompt} tokens, at most {max} fit")]
    PromptTooLong {
        /// Tokens of the prompt.
        n_prompt: usize,
        /// Longest prompt that leaves room for one new token.
        max: usize,
    },
    /// No prompt tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// A prompt token is not in the vocabulary.
    #[error("token id {token} is not below the vocabulary size {vocab_len}")]
    TokenOutOfRange {
        /// The offending id.
        token: u32,
        /// Rows of the embedding.
        vocab_len: usize,
    },
    /// The model is being unloaded or the node is going down.
    #[error("the model is stopping")]
    Stopping,
    /// The engine broke down; only a restart brings it back.
    #[error("the model's engine has broken down")]
    Dead,
}

/// What an engine is doing, as of its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadReport {
    /// Sequences in the running set.
    pub n_running: usize,
    /// Requests waiting for a place.
    pub n_waiting: usize,
    /// KV blocks in use.
    pub n_blocks_used: usize,
    /// KV blocks in the pool.
    pub n_blocks: usize,
    /// Steps since start.
    pub n_steps: u64,
    /// Prompt tokens computed since start.
    pub n_prompt_tokens: u64,
    /// Tokens generated since start.
    pub n_output_tokens: u64,
    /// Sequences preempted since start.
    pub n_preemptions: u64,
    /// Since the last generated token, canaries included; `None` before the first.
    pub last_token_age: Option<Duration>,
    /// True when the last canary produced another token than the first one did.
    pub canary_wrong: bool,
    /// True when the engine broke down: no token comes any more.
    pub is_dead: bool,
    /// True while the group's ranks are started again: requests wait.
    pub is_forming: bool,
    /// True while no step comes to its end that should have long ago, or a rank is silent.
    pub is_stalled: bool,
    /// The rank that is silent.
    pub silent_rank: Option<usize>,
}

/// A model that answers. Clones share the engine; when the last one goes, requests that were taken
/// may finish within the configured drain limit and the engine's thread is joined. Call
/// [`Replica::stop`] to choose another limit and to wait where blocking is allowed.
#[derive(Debug, Clone)]
pub struct Replica {
    engine: Engine,
    admission: Arc<Admission>,
}

#[derive(Debug, Clone)]
enum Engine {
    /// A thread of this process.
    Thread(Arc<EngineHandle>),
    /// In rank processes.
    Group(Arc<GroupHandle>),
}

impl Replica {
    /// Starts an engine on `executor` and returns after its first token. Requests are taken up to
    /// `cfg.waiting_max` whatever the prediction.
    ///
    /// # Errors
    /// [`StartError`] when configuration and executor do not fit or the executor does not work.
    pub fn start(
        executor: Box<dyn StepExecutor>,
        mut cfg: EngineConfig,
    ) -> Result<Self, StartError> {
        let limits = cfg.limits(&executor.limits())?;
        let admission = AdmissionConfig {
            ttft_target: None,
            waiting_max: cfg.waiting_max,
            batch_waiting_max: cfg.waiting_max,
            running_max: cfg.running_max,
            step_target: cfg.step_target,
            n_blocks: limits.n_blocks,
            block_len: limits.block_len,
        };
        cfg.waiting_max = admission.engine_capacity();
        let model = cfg.model.clone();
        let engine = Engine::Thread(Arc::new(engine::start(executor, cfg)?));
        let admission = Arc::new(Admission::new(model, admission));
        Ok(Self { engine, admission })
    }

    /// Starts a group of rank processes and returns after its first token.
    ///
    /// # Errors
    /// [`GroupError`]; no process is left behind.
    pub fn start_group(cfg: GroupConfig, admission: AdmissionConfig) -> Result<Self, GroupError> {
        let model = cfg.model.clone();
        let group = GroupHandle::start(GroupConfig {
            waiting_max: admission.engine_capacity(),
            ..cfg
        })?;
        let limits = group.limits();
        let admission = AdmissionConfig {
            running_max: limits.running_max,
            n_blocks: limits.n_blocks,
            block_len: limits.block_len,
            ..admission
        };
        Ok(Self {
            engine: Engine::Group(Arc::new(group)),
            admission: Arc::new(Admission::new(model, admission)),
        })
    }

    /// Hands a request to the engine without blocking. A `max_tokens` beyond the context is cut to
    /// it.
    ///
    /// # Errors
    /// [`SubmitError`]; the request's stream then ends without an event.
    pub fn submit(&self, request: Request) -> Result<(), SubmitError> {
        self.submit_all(vec![request])
    }

    /// Hands requests that belong together to the engine, all or none.
    ///
    /// # Errors
    /// [`SubmitError`]; the requests' streams then end without an event.
    pub fn submit_all(&self, requests: Vec<Request>) -> Result<(), SubmitError> {
        for request in &requests {
            self.check_prompt(&request.prompt)?;
        }
        let has_work = |r: &Request| 0 < r.max_tokens || r.scored_from.is_some();
        let (some, none): (Vec<_>, Vec<_>) = requests.into_iter().partition(has_work);
        for request in none {
            // Nothing to compute: the end is all there is to say.
            request
                .sink
                .send(StreamItem::Finished(FinishReason::Length));
        }
        let n_blocks_used = self.load().n_blocks_used;
        let (cost, forming) = self.cost();
        let state = EngineState {
            cost,
            n_blocks_used,
            forming,
        };
        for request in self.admission.admit(some, &state)? {
            match &self.engine {
                Engine::Thread(engine) => engine.post(request).map_err(|e| match e {
                    // As much as admission takes at most has room.
                    PostError::QueueFull { .. } | PostError::Stopping => SubmitError::Stopping,
                    PostError::Dead => SubmitError::Dead,
                })?,
                Engine::Group(group) => group.post(request).map_err(|e| match e {
                    group::PostError::Stopping => SubmitError::Stopping,
                })?,
            }
        }
        Ok(())
    }

    /// Stops taking requests, waits for those taken for at most `drain`, ends the rest with
    /// [`FinishReason::Stopped`] and joins the engine. Blocks: call it where that is allowed.
    pub fn stop(&self, drain: Duration) {
        match &self.engine {
            Engine::Thread(engine) => engine.stop(drain),
            Engine::Group(group) => group.stop(drain),
        }
    }

    /// A snapshot.
    pub fn load(&self) -> LoadReport {
        let (load, group) = match &self.engine {
            Engine::Thread(engine) => (engine.load(), GroupState::Ready),
            Engine::Group(group) => group.load(),
        };
        LoadReport {
            n_running: load.n_running,
            n_waiting: load.n_waiting,
            n_blocks_used: load.n_blocks_used,
            n_blocks: load.n_blocks,
            n_steps: load.n_steps,
            n_prompt_tokens: load.n_prompt_tokens,
            n_output_tokens: load.n_output_tokens,
            n_preemptions: load.n_preemptions,
            last_token_age: load.last_token_age,
            canary_wrong: load.canary_wrong,
            is_dead: load.is_dead,
            is_forming: group == GroupState::Forming,
            is_stalled: matches!(group, GroupState::Stalled { .. }),
            silent_rank: match group {
                GroupState::Stalled { silent } => silent,
                GroupState::Forming | GroupState::Ready => None,
            },
        }
    }

    /// Seconds of the engine's time that a request takes by what is known of step times now.
    pub fn seconds_of(&self, n_cached: usize, n_prompt: usize, n_output: usize) -> f64 {
        let (cost, _) = self.cost();
        let prompt = cost.prefill_seconds(n_cached, n_prompt, TYPICAL_CHUNK_ROWS);
        let token = cost.share(StepShape::span(n_prompt, 1, 1), TYPICAL_BATCH);
        prompt + token * n_output as f64
    }

    fn cost(&self) -> (CostModel, Duration) {
        match &self.engine {
            Engine::Thread(engine) => (engine.cost(), Duration::ZERO),
            Engine::Group(group) => group.cost(),
        }
    }

    /// What fits.
    pub fn limits(&self) -> EngineLimits {
        match &self.engine {
            Engine::Thread(engine) => engine.limits(),
            Engine::Group(group) => group.limits(),
        }
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<(), SubmitError> {
        let limits = self.limits();
        let n_prompt = prompt.len();
        let max = limits.prompt_len_max();
        if n_prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if max < n_prompt {
            return Err(SubmitError::PromptTooLong { n_prompt, max });
        }
        let vocab_len = limits.vocab_len;
        match prompt.iter().find(|&&t| vocab_len <= t as usize) {
            Some(&token) => Err(SubmitError::TokenOutOfRange { token, vocab_len }),
            None => Ok(()),
        }
    }
}
