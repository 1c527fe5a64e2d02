//! Decides at once whether a request is taken: by when its first token is predicted, not by how many
//! wait.
//!
//! Every request of a replica passes here and nowhere else. It is taken when its first token is
//! predicted within its target; else it is refused with a true time to come back, and with a place in
//! a line that it finds then ([`tickets`]). Batch requests wait instead, in a bounded line. Counts are
//! only a cap behind it. What becomes of a request is seen at its sink, so the books are right
//! whichever engine runs it.
//!
//! Under lasting overload the target would become everybody's wait. So the full target is for bursts
//! and for accounts with few requests in flight: once more work is offered than the engine does, or
//! somebody had to be refused, newcomers are taken only while next to nobody waits for a first token
//! before them. Whoever was told to come back has the full target again.
//!
//! Invariant: what has left is out of the books at that moment, whether it ended or its reader left.
//!
//! Called by replica.

mod ledger;
mod tickets;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    cost::CostModel,
    flow::{Account, Class, EventSink, FinishReason, Request, StreamItem, TokenSink},
    runtime::clock,
};
use ledger::{Ask, EngineView, Entry, Ledger, Prediction};
use tickets::{LineKey, Standing, TicketKey, Tickets};

/// A prompt that takes longer than the target by itself is taken while it takes no more than this
/// many times as long: else it would never be.
const LONG_PROMPT_FACTOR: f64 = 2.0;
/// An account with fewer requests in flight than this part of the engine's places, and fewer of them
/// without a first token than half of that, has the full target: that is how programs with a fixed
/// number of connections load an engine, and no overload.
const FREE_PLACES_DIVISOR: usize = 2;
/// Over how long the offered work is averaged.
const OFFERED_OVER: Duration = Duration::from_millis(300);
/// So long after the last refusal of an account's request, its requests may come in bursts again.
const CALM_AFTER: Duration = Duration::from_secs(2);
/// Requests that come so soon behind the first of a burst have the full target.
const BURST_WINDOW: Duration = Duration::from_millis(30);
/// Choices of one request are taken on an idle engine up to this many, whatever the cap.
const CHOICES_MAX: usize = 128;
/// Accounts whose offered work is remembered.
const OFFERED_MAX: usize = 4096;

/// Limits of a replica's admission.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdmissionConfig {
    /// By when the first token of an interactive request has to be predicted; `None`: only counts
    /// decide.
    pub ttft_target: Option<Duration>,
    /// Interactive requests of an account that wait at most, and what all accounts together may beyond.
    pub waiting_max: usize,
    /// Batch requests that wait at most.
    pub batch_waiting_max: usize,
    /// Sequences that run at once.
    pub running_max: usize,
    /// How long a step may take.
    pub step_target: Duration,
    /// KV blocks for requests.
    pub n_blocks: usize,
    /// Positions in a block.
    pub block_len: usize,
}

impl AdmissionConfig {
    /// Requests that the engine must have room for: all that may wait, as many that left since its
    /// last step, and the choices of a request that came to an idle engine.
    pub fn engine_capacity(&self) -> usize {
        let waiting = self.waiting_max.saturating_mul(2).max(CHOICES_MAX);
        2 * (waiting.saturating_add(self.batch_waiting_max)) + self.running_max
    }
}

/// Why a request is not taken now.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// Its first token would come too late.
    #[error(
        "the first token is predicted in {:.1} s, taken are requests below {:.1} s",
        predicted.as_secs_f64(), limit.as_secs_f64()
    )]
    Busy {
        /// When it would come.
        predicted: Duration,
        /// When it would have to.
        limit: Duration,
        /// When there is a place.
        retry_after: Duration,
    },
    /// As many wait as may.
    #[error("{waiting} requests wait already, the limit is {max}")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
        /// The limit.
        max: usize,
        /// When there is a place.
        retry_after: Duration,
    },
    /// Its first token would come after its own deadline.
    #[error(
        "the first token is predicted in {:.1} s, the request's deadline is in {:.1} s",
        predicted.as_secs_f64(), deadline.as_secs_f64()
    )]
    TooLate {
        /// When it would come.
        predicted: Duration,
        /// What is left.
        deadline: Duration,
    },
}

/// What admission knows of the engine when it decides.
#[derive(Debug)]
pub struct EngineState {
    /// What is known of step times.
    pub cost: CostModel,
    /// KV blocks in use.
    pub n_blocks_used: usize,
    /// Until steps run, where none does now.
    pub forming: Duration,
}

/// See the module. Share it by `Arc`.
#[derive(Debug)]
pub struct Admission {
    cfg: AdmissionConfig,
    model: String,
    /// Held for a decision or an event: a few microseconds.
    books: Mutex<Books>,
}

#[derive(Debug)]
struct Books {
    /// Numbers what is taken.
    serial: u64,
    ledger: Ledger,
    tickets: Tickets,
    /// Of each account, the work it offered lately and when one was refused.
    offered: std::collections::HashMap<LineKey, Offered>,
}

#[derive(Debug, Clone, Copy)]
struct Offered {
    /// Seconds of work a second.
    rate: f64,
    at: Instant,
    refused_at: Option<Instant>,
}

impl Admission {
    /// Empty books.
    pub fn new(model: impl Into<String>, cfg: AdmissionConfig) -> Self {
        Self {
            model: model.into(),
            cfg,
            books: Mutex::new(Books {
                serial: 0,
                ledger: Ledger::new(cfg),
                tickets: Tickets::default(),
                offered: std::collections::HashMap::new(),
            }),
        }
    }

    /// Takes all of the requests, which belong together, or none. Those taken have a sink in between
    /// that keeps the books.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn admit(
        self: &Arc<Self>,
        requests: Vec<Request>,
        engine: &EngineState,
    ) -> Result<Vec<Request>, Refusal> {
        self.admit_at(clock::now(), requests, engine)
    }

    fn admit_at(
        self: &Arc<Self>,
        now: Instant,
        requests: Vec<Request>,
        engine: &EngineState,
    ) -> Result<Vec<Request>, Refusal> {
        let mut books = self.lock();
        let predicted = match books.decide(&self.cfg, now, &requests, engine) {
            Ok(predicted) => predicted,
            Err(refusal) => {
                drop(books);
                self.count(&refusal);
                return Err(refusal);
            }
        };
        let taken = requests.into_iter().map(|mut request| {
            books.serial += 1;
            let id = books.serial;
            let entry = Entry {
                account: request.account,
                n_prompt: request.prompt.len(),
                n_computed: 0,
                n_output: request.output.len(),
                n_output_max: request.max_tokens,
                has_started: false,
                taken_at: now,
                predicted,
            };
            books.ledger.take(id, entry);
            let admission = Arc::clone(self);
            request.sink = request.sink.through(|inner| {
                Arc::new(Watched {
                    admission,
                    id,
                    inner,
                })
            });
            request
        });
        Ok(taken.collect())
    }

    /// Requests taken and not ended.
    pub fn n_in_flight(&self) -> usize {
        self.lock().ledger.len()
    }

    fn count(&self, refusal: &Refusal) {
        let reason = match refusal {
            Refusal::Busy { .. } => "busy",
            Refusal::QueueFull { .. } => "queue_full",
            Refusal::TooLate { .. } => "too_late",
        };
        let model = self.model.clone();
        metrics::counter!("dsd_refusals_total", "model" => model, "reason" => reason).increment(1);
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, id: u64, item: &StreamItem, now: Instant) {
        let mut books = self.lock();
        match item {
            StreamItem::Started { n_cached, .. } => books.ledger.started(id, *n_cached),
            StreamItem::Prefilled { n_computed } => books.ledger.prefilled(id, *n_computed),
            // How far the prompt is comes by itself.
            StreamItem::Scored { .. } => {}
            StreamItem::Token(_) => {
                let first = books.ledger.token(id, now);
                drop(books);
                if let Some((seen, predicted)) = first.filter(|(_, p)| !p.is_zero()) {
                    let ratio = seen.as_secs_f64() / predicted.as_secs_f64();
                    let model = self.model.clone();
                    metrics::histogram!("dsd_ttft_seen_over_predicted_ratio", "model" => model)
                        .record(ratio);
                }
            }
            StreamItem::Finished(reason) => {
                let is_complete = matches!(reason, FinishReason::Stop | FinishReason::Length);
                books.ledger.end(id, is_complete);
            }
        }
    }
}

/// A request's sink, with the books in between.
struct Watched {
    admission: Arc<Admission>,
    id: u64,
    inner: TokenSink,
}

impl EventSink for Watched {
    fn send(&self, item: StreamItem) -> bool {
        self.admission.note(self.id, &item, clock::now());
        match item {
            // For the books only.
            StreamItem::Prefilled { .. } => !self.inner.is_cancelled(),
            item => self.inner.send(item),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.inner.is_cancelled()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Its reader left, or its engine; one that ended is out of the books already.
        self.admission.lock().ledger.end(self.id, false);
    }
}

impl Books {
    /// The predicted time to the first token, if the requests may be taken.
    fn decide(
        &mut self,
        cfg: &AdmissionConfig,
        now: Instant,
        requests: &[Request],
        engine: &EngineState,
    ) -> Result<Duration, Refusal> {
        let Some(first) = requests.first() else {
            return Ok(Duration::ZERO);
        };
        let account = first.account;
        self.tickets.tidy(now);
        let prompts: Vec<usize> = requests.iter().map(|r| r.prompt.len()).collect();
        let is_one_prompt = requests
            .iter()
            .all(|r| r.siblings.n as usize == requests.len());
        let ask = Ask {
            account,
            prompts: &prompts,
            is_one_prompt,
            n_output_max: first.max_tokens,
        };
        let view = EngineView {
            n_blocks_used: engine.n_blocks_used,
            forming: engine.forming,
        };
        let prediction = self.ledger.predict(now, &ask, &engine.cost, view);
        let key = key_of(requests);
        let standing = self.tickets.standing(now, &key);
        let line = line_of(account);
        let limit = self.limit(cfg, now, account, standing, &prediction);
        let seconds = |s: f64| Duration::try_from_secs_f64(s.max(0.0)).unwrap_or(Duration::MAX);
        let predicted = seconds(prediction.first_token);
        if let Some(at) = first.deadline
            && cfg.ttft_target.is_some()
            && at <= now + predicted
        {
            let deadline = at.saturating_duration_since(now);
            return Err(Refusal::TooLate {
                predicted,
                deadline,
            });
        }
        let (n_own, n_class, n_all) = self.ledger.n_waiting(account);
        let (waiting, max) = match account.class {
            Class::Batch => (n_class, cfg.batch_waiting_max),
            // One account alone may fill its cap; several leave as much as each of them has.
            Class::Interactive => {
                let rest = cfg.waiting_max.saturating_mul(2).saturating_sub(n_all);
                (n_own, cfg.waiting_max.min(rest))
            }
        };
        let is_idle = n_all == 0 && requests.len() <= CHOICES_MAX;
        let is_full = max < waiting + requests.len() && !is_idle;
        let is_late = account.class == Class::Interactive && limit < prediction.first_token;
        if standing == Standing::Due {
            let was_idle = prediction.first_token < prediction.unqueued + 0.5 * prediction.step;
            self.tickets
                .note_arrival(line, was_idle, is_late || is_full);
        }
        if !is_full && !is_late {
            if standing == Standing::Due {
                self.tickets.claim(&key);
            }
            // A batch request promises nothing.
            return Ok(match account.class {
                Class::Interactive => predicted,
                Class::Batch => Duration::ZERO,
            });
        }
        if let Some(offered) = self.offered.get_mut(&line) {
            offered.refused_at = Some(now);
        }
        let wait = match is_late {
            true => seconds(prediction.first_token - limit),
            false => seconds(prediction.work),
        };
        let part = self.ledger.part(account);
        let work = seconds(prediction.work);
        let retry_after = self.tickets.issue(now, key, line, wait, work, part);
        Err(match is_late {
            true => Refusal::Busy {
                predicted,
                limit: seconds(limit),
                retry_after,
            },
            false => Refusal::QueueFull {
                waiting,
                max,
                retry_after,
            },
        })
    }

    /// Seconds within which the first token has to be predicted.
    fn limit(
        &mut self,
        cfg: &AdmissionConfig,
        now: Instant,
        account: Account,
        standing: Standing,
        prediction: &Prediction,
    ) -> f64 {
        let line = line_of(account);
        let Some(target) = cfg.ttft_target else {
            return f64::INFINITY;
        };
        let full = target
            .as_secs_f64()
            .max(LONG_PROMPT_FACTOR * prediction.computing);
        if OFFERED_MAX < self.offered.len() {
            self.offered
                .retain(|_, o| now.saturating_duration_since(o.at) < CALM_AFTER);
        }
        let offered = self.offered.entry(line).or_insert(Offered {
            rate: 0.0,
            at: now,
            refused_at: None,
        });
        let elapsed = now.saturating_duration_since(offered.at).as_secs_f64();
        offered.rate *= (-elapsed / OFFERED_OVER.as_secs_f64()).exp();
        offered.at = now;
        let is_calm = offered
            .refused_at
            .is_none_or(|at| CALM_AFTER <= now.saturating_duration_since(at));
        let (is_below, refused_lately) = (offered.rate <= 1.0, !is_calm);
        if standing == Standing::New {
            offered.rate += prediction.work / OFFERED_OVER.as_secs_f64();
        }
        let in_burst = self
            .ledger
            .pending_since()
            .is_none_or(|since| now.saturating_duration_since(since) <= BURST_WINDOW);
        let n_free = cfg.running_max / FREE_PLACES_DIVISOR;
        let (n_own, n_pending) = self.ledger.n_own(account);
        let is_modest = n_own < n_free && n_pending < n_free / 2;
        let has_full_target =
            standing == Standing::Due || (!refused_lately && (is_modest || in_burst || is_below));
        if has_full_target {
            return full;
        }
        // One prompt like it, or what one step computes, may be before it: so that the next step has
        // prompts to compute.
        full.min(prediction.unqueued + prediction.computing.max(prediction.step))
    }
}

/// What a request is known by when it comes again.
fn key_of(requests: &[Request]) -> TicketKey {
    let mut hasher = blake3::Hasher::new_derive_key("dsd admission ticket");
    for request in requests {
        let Account { tenant, user, .. } = request.account;
        for word in [
            tenant,
            user,
            request.max_tokens as u64,
            request.prompt.len() as u64,
        ] {
            hasher.update(&word.to_le_bytes());
        }
        for token in &request.prompt {
            hasher.update(&token.to_le_bytes());
        }
    }
    let mut key = [0; 16];
    hasher.finalize_xof().fill(&mut key);
    key
}

fn line_of(account: Account) -> LineKey {
    let class = match account.class {
        Class::Interactive => 0,
        Class::Batch => 1,
    };
    (class, account.tenant, account.user)
}
