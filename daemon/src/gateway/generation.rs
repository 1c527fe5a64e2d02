//! From tokenised prompts to a merged stream of text: the part of the gateway below HTTP, also used
//! by `admin`.
//!
//! Submits one engine request per choice, turns tokens into content and reasoning, cuts at stop
//! strings, keeps the deadline. Knows no JSON and no status codes.
//!
//! Invariant: dropping a [`Generation`] cancels every choice that has not ended; nothing of it runs
//! in a task of its own.

use std::{
    collections::VecDeque,
    future::poll_fn,
    hash::{BuildHasher, RandomState},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use tokio::time;

use crate::{
    catalog::ServedModel,
    flow::{
        self, Account, CacheOwner, Request, RequestId, SamplingParams, Siblings, StreamItem,
        TokenEvent, TokenLogprobs, TokenStream,
    },
    replica::SubmitError,
    runtime::clock,
    tenants::Lease,
    text::{OutputDelta, OutputForm, OutputParser},
};

/// How long after its deadline an engine that says nothing is given up on. A healthy one ends the
/// request itself, within a step.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// A prompt ready for the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedPrompt {
    /// Its tokens.
    pub ids: Vec<u32>,
    /// How what follows is to be read.
    pub form: OutputForm,
    /// What is shown of it before what follows; with log-probabilities where those are asked for.
    pub echo: Option<String>,
}

/// How to continue the prompts.
#[derive(Debug, Clone)]
pub struct GenerationParams {
    /// Choices per prompt.
    pub n: usize,
    /// Tokens per choice at most; `None`: as many as the context holds.
    pub max_tokens: Option<usize>,
    /// How tokens are chosen. `seed` is that of choice 0; choice `i` uses `seed + i`.
    pub sampling: SamplingParams,
    /// Texts that end a choice.
    pub stop: Vec<String>,
    /// Tokens that end a choice, besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// As in [`Request::grammar`].
    pub grammar: Option<Arc<str>>,
    /// Whether the model's own end tokens are ignored.
    pub ignore_eos: bool,
    /// As in [`Request::top_logprobs`].
    pub top_logprobs: Option<usize>,
    /// As in [`Request::cache_owner`].
    pub cache_owner: CacheOwner,
    /// As in [`Request::account`].
    pub account: Account,
    /// When the whole generation must be over.
    pub deadline: Option<Instant>,
}

/// What comes out, in order for each choice; choices are interleaved as they come.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// New text, or new tokens whose text is held back still.
    Delta {
        /// Prompt number times `n` plus the number among that prompt's choices.
        choice: usize,
        /// New text, reasoning before content. The first one of a choice whose prompt is shown is that.
        deltas: Vec<OutputDelta>,
        /// Tokens of that text, when log-probabilities were asked for. The first one of a prompt has no
        /// number: nothing comes before it.
        tokens: Vec<TokenChoice>,
        /// Tokens generated since the last event of this choice.
        n_tokens: usize,
    },
    /// The choice is complete.
    Finished {
        /// As above.
        choice: usize,
        /// Why.
        end: ChoiceEnd,
    },
}

/// A token of the output with its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenChoice {
    /// Vocabulary id.
    pub token: u32,
    /// Part of the thoughts, tags included.
    pub is_reasoning: bool,
    /// Its own and the likeliest ones'.
    pub logprobs: TokenLogprobs,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChoiceEnd {
    /// An end token, a stop token or a stop string.
    Stop,
    /// The same, behind calls of tools.
    ToolCalls,
    /// This stop string.
    StopString(String),
    /// `max_tokens` or the context length.
    Length,
    /// The deadline passed.
    DeadlinePassed,
    /// The model is being unloaded or the node is going down.
    Stopped,
    /// Its ranks were lost again and again while they computed it.
    Lost,
    /// A step failed; the cause is for the log.
    Failed(String),
}

impl ChoiceEnd {
    /// What a client is told of an answer that ended so after some of it came out; `None` where the
    /// answer is not worth anything.
    pub fn finish_reason(&self) -> Option<dsd_proto::openai::FinishReason> {
        use dsd_proto::openai::FinishReason;
        match self {
            Self::Stop | Self::StopString(_) => Some(FinishReason::Stop),
            Self::ToolCalls => Some(FinishReason::ToolCalls),
            Self::Length => Some(FinishReason::Length),
            Self::DeadlinePassed => Some(FinishReason::DeadlineExceeded),
            Self::Stopped | Self::Lost => Some(FinishReason::InsufficientSystemResource),
            Self::Failed(_) => None,
        }
    }

    /// True when nothing is missing.
    pub fn is_whole(&self) -> bool {
        matches!(
            self,
            Self::Stop | Self::StopString(_) | Self::ToolCalls | Self::Length
        )
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Stop | Self::StopString(_) => "stop",
            Self::ToolCalls => "tool_calls",
            Self::Length => "length",
            Self::DeadlinePassed => "deadline",
            Self::Stopped => "stopped",
            Self::Lost => "lost",
            Self::Failed(_) => "failed",
        }
    }
}

/// Token counts so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenCounts {
    /// Of all prompts.
    pub n_prompt: usize,
    /// Of them found in the cache.
    pub n_cached: usize,
    /// Of all choices, end tokens included.
    pub n_output: usize,
    /// Of them inside the thoughts.
    pub n_reasoning: usize,
}

/// A running generation of all choices of a request.
#[derive(Debug)]
pub struct Generation {
    model: Arc<ServedModel>,
    choices: Vec<Choice>,
    counts: TokenCounts,
    /// Choices of each prompt.
    n_per_prompt: usize,
    /// By prompt.
    echoes: Vec<Option<Echo>>,
    deadline: Option<Instant>,
    started: Instant,
    admitted_at: Option<Instant>,
    /// Choice polled first, so that a fast one does not hide the others.
    first: usize,
    ready: VecDeque<GenerationEvent>,
    /// What the tenant's caps hold for it until every choice has ended.
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Choice {
    /// `None` once it has ended.
    stream: Option<TokenStream>,
    n_output: usize,
    parser: OutputParser,
    stop_tokens: Arc<[u32]>,
    /// Tokens whose text is held back.
    held: Vec<TokenChoice>,
    /// Of all tokens that came, the last one included, where they were asked for.
    logprob_sum: f64,
}

/// A prompt whose tokens are being scored, to be shown before what follows.
#[derive(Debug)]
struct Echo {
    text: String,
    ids: Vec<u32>,
    /// Of its tokens, without the first.
    scores: Vec<TokenLogprobs>,
}

impl Echo {
    fn is_scored(&self) -> bool {
        self.ids.len() <= self.scores.len() + 1
    }

    /// Its tokens, as those of an output.
    fn tokens(&self) -> Vec<TokenChoice> {
        let nothing = TokenLogprobs {
            chosen: f32::NAN,
            top: Vec::new(),
        };
        let all = std::iter::once(&nothing).chain(&self.scores);
        let token = |(token, logprobs): (&u32, &TokenLogprobs)| TokenChoice {
            token: *token,
            is_reasoning: false,
            logprobs: logprobs.clone(),
        };
        self.ids.iter().zip(all).map(token).collect()
    }
}

impl Generation {
    /// Submits all choices, or none.
    ///
    /// # Errors
    /// [`SubmitError`]; choices taken already are cancelled.
    pub fn start(
        model: &Arc<ServedModel>,
        prompts: &[PreparedPrompt],
        params: &GenerationParams,
    ) -> Result<Self, SubmitError> {
        let mut stop_tokens = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_tokens.extend_from_slice(&model.stop_token_ids);
        }
        let stop_tokens: Arc<[u32]> = stop_tokens.into();
        let mut generation = Self {
            model: Arc::clone(model),
            choices: Vec::with_capacity(prompts.len() * params.n),
            counts: TokenCounts::default(),
            n_per_prompt: params.n,
            echoes: Vec::with_capacity(prompts.len()),
            deadline: params.deadline,
            started: clock::now(),
            admitted_at: None,
            first: 0,
            ready: VecDeque::new(),
            lease: None,
        };
        let n_choices = prompts.len() * params.n;
        let siblings = Siblings {
            request: match n_choices {
                1 => 0,
                _ => next_request_id().0,
            },
            n: params.n as u32,
        };
        let mut requests = Vec::with_capacity(n_choices);
        for (i, prompt) in prompts.iter().enumerate() {
            generation.counts.n_prompt += prompt.ids.len();
            // Choices of one prompt wait for the first of them.
            let siblings = Siblings {
                request: siblings
                    .request
                    .wrapping_mul(1 << 16)
                    .wrapping_add(i as u64),
                ..siblings
            };
            let idx = generation.choices.len();
            for _ in 0..params.n {
                let (choice, request) =
                    generation.prepare(prompt, params, &stop_tokens, siblings)?;
                generation.choices.push(choice);
                requests.push(request);
            }
            generation.echo(prompt, params, &mut requests[idx..]);
        }
        model.replica.submit_all(requests)?;
        let name = &model.name;
        for _ in prompts {
            metrics::histogram!("dsd_request_choices", "model" => name.clone())
                .record(params.n as f64);
            if let Some(max_tokens) = params.max_tokens {
                metrics::histogram!("dsd_request_max_tokens", "model" => name.clone())
                    .record(max_tokens as f64);
            }
        }
        Ok(generation)
    }

    /// Holds `lease` until every choice has ended.
    #[must_use]
    pub fn with_lease(mut self, lease: Lease) -> Self {
        self.lease = Some(lease);
        self
    }

    /// Shows a prompt before its choices, whose requests these are, where that is asked for: at once, or
    /// when the first of them has scored its tokens.
    fn echo(
        &mut self,
        prompt: &PreparedPrompt,
        params: &GenerationParams,
        requests: &mut [Request],
    ) {
        let echo = prompt.echo.clone().map(|text| Echo {
            text,
            ids: prompt.ids.clone(),
            scores: Vec::new(),
        });
        let is_scored = params.top_logprobs.is_some();
        let of_prompt = self.echoes.len();
        match (echo, requests.first_mut()) {
            (Some(echo), Some(first)) if is_scored && !echo.is_scored() => {
                first.scored_from = Some(1);
                self.echoes.push(Some(echo));
            }
            (Some(echo), _) => {
                self.echoes.push(None);
                self.show(of_prompt, &echo, is_scored);
            }
            (None, _) => self.echoes.push(None),
        }
    }

    /// Puts a prompt in front of each of its choices.
    fn show(&mut self, of_prompt: usize, echo: &Echo, with_tokens: bool) {
        let first = of_prompt * self.n_per_prompt;
        for choice in first..first + self.n_per_prompt {
            self.ready.push_back(GenerationEvent::Delta {
                choice,
                deltas: vec![OutputDelta::Content(echo.text.clone())],
                tokens: match with_tokens {
                    true => echo.tokens(),
                    false => Vec::new(),
                },
                n_tokens: 0,
            });
        }
    }

    /// A choice and the request for it.
    fn prepare(
        &self,
        prompt: &PreparedPrompt,
        params: &GenerationParams,
        stop_tokens: &Arc<[u32]>,
        siblings: Siblings,
    ) -> Result<(Choice, Request), SubmitError> {
        let n_prompt = prompt.ids.len();
        let room = self.model.context_len().saturating_sub(n_prompt);
        if room == 0 {
            return Err(SubmitError::PromptTooLong {
                n_prompt,
                max: self.model.context_len().saturating_sub(1),
            });
        }
        let max_tokens = params.max_tokens.unwrap_or(room).min(room);
        let n_scored = match (&prompt.echo, params.top_logprobs) {
            (Some(_), Some(_)) => n_prompt,
            _ => 0,
        };
        let (sink, stream) = flow::token_stream(max_tokens + n_scored);
        let idx = self.choices.len() as u64;
        let request = Request {
            id: next_request_id(),
            prompt: prompt.ids.clone(),
            output: Vec::new(),
            max_tokens,
            stop_tokens: Arc::clone(stop_tokens),
            sampling: SamplingParams {
                seed: params.sampling.seed.wrapping_add(idx),
                ..params.sampling.clone()
            },
            grammar: params.grammar.clone(),
            top_logprobs: params.top_logprobs,
            scored_from: None,
            deadline: params.deadline,
            cache_owner: params.cache_owner,
            account: params.account,
            siblings,
            sink,
        };
        let parser = OutputParser::new(
            Arc::clone(&self.model.text),
            &prompt.form,
            params.stop.clone(),
        );
        let choice = Choice {
            stream: Some(stream),
            n_output: 0,
            parser,
            stop_tokens: Arc::clone(stop_tokens),
            held: Vec::new(),
            logprob_sum: 0.0,
        };
        Ok((choice, request))
    }

    /// The next event; `None` when every choice has ended.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.choices.iter().all(|choice| choice.stream.is_none()) {
                return None;
            }
            match self.deadline {
                None => self.receive().await,
                Some(deadline) => {
                    let patience = time::Instant::from_std(deadline + DEADLINE_GRACE);
                    if time::timeout_at(patience, self.receive()).await.is_err() {
                        tracing::error!(
                            model = self.model.name,
                            "the engine did not end requests at their deadline"
                        );
                        self.give_up();
                    }
                }
            }
        }
    }

    /// Token counts of what was received so far.
    pub fn counts(&self) -> TokenCounts {
        self.counts
    }

    /// Mean log-probability of a choice's tokens so far, of its end too, where they were asked for; minus
    /// infinity without tokens.
    pub fn mean_logprob(&self, choice: usize) -> f64 {
        match &self.choices[choice] {
            Choice { n_output: 0, .. } => f64::NEG_INFINITY,
            choice => choice.logprob_sum / choice.n_output as f64,
        }
    }

    /// When the first step for a choice began; `None` while all wait.
    pub fn admitted_at(&self) -> Option<Instant> {
        self.admitted_at
    }

    /// Choices of the request, ended or not.
    pub fn n_choices(&self) -> usize {
        self.choices.len()
    }

    /// Waits for an item of any choice and turns it into events.
    async fn receive(&mut self) {
        let (idx, item) = poll_fn(|ctx| {
            let n = self.choices.len();
            for idx in (0..n).map(|offset| (self.first + offset) % n) {
                // What follows a prompt that is shown waits for it.
                let first = idx - idx % self.n_per_prompt;
                let waits = self.echoes[idx / self.n_per_prompt].is_some();
                if idx != first && waits && self.choices[first].stream.is_some() {
                    continue;
                }
                if let Some(stream) = &mut self.choices[idx].stream
                    && let Poll::Ready(item) = pin!(stream.next()).poll(ctx)
                {
                    return Poll::Ready((idx, item));
                }
            }
            Poll::Pending
        })
        .await;
        self.first = idx + 1;
        match item {
            // A prompt counts once: the other choices find what the first one computed.
            Some(StreamItem::Started { n_cached, at }) => {
                let admitted_at = *self.admitted_at.get_or_insert(at);
                if let Some(lease) = &mut self.lease {
                    lease.started(admitted_at);
                }
                let is_first = idx.is_multiple_of(self.n_per_prompt);
                self.counts.n_cached += if is_first { n_cached } else { 0 };
            }
            Some(StreamItem::Prefilled { .. }) => {}
            Some(StreamItem::Scored { scores, .. }) => self.scored(idx, scores),
            Some(StreamItem::Token(token)) => self.token(idx, token),
            Some(StreamItem::Finished(reason)) => {
                let end = match reason {
                    flow::FinishReason::Stop => ChoiceEnd::Stop,
                    flow::FinishReason::Length => ChoiceEnd::Length,
                    flow::FinishReason::DeadlinePassed => ChoiceEnd::DeadlinePassed,
                    flow::FinishReason::Stopped => ChoiceEnd::Stopped,
                    flow::FinishReason::InsufficientResources => ChoiceEnd::Lost,
                    flow::FinishReason::Failed(cause) => ChoiceEnd::Failed(cause),
                };
                self.finish(idx, end);
            }
            None => self.finish(idx, ChoiceEnd::Failed("the engine is gone".to_owned())),
        }
    }

    fn scored(&mut self, idx: usize, scores: Vec<TokenLogprobs>) {
        let of_prompt = idx / self.n_per_prompt;
        if let Some(mut echo) = self.echoes[of_prompt].take() {
            echo.scores.extend(scores);
            match echo.is_scored() {
                true => self.show(of_prompt, &echo, true),
                false => self.echoes[of_prompt] = Some(echo),
            }
        }
    }

    fn token(&mut self, idx: usize, event: TokenEvent) {
        let choice = &mut self.choices[idx];
        self.counts.n_output += 1;
        choice.n_output += 1;
        if let Some(logprobs) = &event.logprobs {
            choice.logprob_sum += f64::from(logprobs.chosen);
        }
        if choice.stop_tokens.contains(&event.token) {
            // The end follows; an end token is no text.
            self.ready.push_back(GenerationEvent::Delta {
                choice: idx,
                deltas: vec![],
                tokens: vec![],
                n_tokens: 1,
            });
            return;
        }
        let was_reasoning = choice.parser.in_reasoning();
        let output = choice.parser.push(event.token);
        self.counts.n_reasoning += usize::from(was_reasoning);
        let is_reasoning = was_reasoning || choice.parser.in_reasoning();
        choice
            .held
            .extend(event.logprobs.map(|logprobs| TokenChoice {
                token: event.token,
                is_reasoning,
                logprobs,
            }));
        let deltas = output.deltas;
        let tokens = if deltas.is_empty() {
            Vec::new()
        } else {
            std::mem::take(&mut choice.held)
        };
        self.ready.push_back(GenerationEvent::Delta {
            choice: idx,
            deltas,
            tokens,
            n_tokens: 1,
        });
        if output.stopped {
            // What is still held back belongs to the stop string.
            let stop = self.choices[idx].parser.stop_string().map(str::to_owned);
            self.end(idx, stop.map_or(ChoiceEnd::Stop, ChoiceEnd::StopString));
        }
    }

    fn finish(&mut self, idx: usize, end: ChoiceEnd) {
        let choice = &mut self.choices[idx];
        let deltas = choice.parser.finish();
        let tokens = std::mem::take(&mut choice.held);
        if !deltas.is_empty() || !tokens.is_empty() {
            self.ready.push_back(GenerationEvent::Delta {
                choice: idx,
                deltas,
                tokens,
                n_tokens: 0,
            });
        }
        self.end(idx, end);
    }

    /// Drops the choice's stream, which cancels it in the engine if it still runs.
    fn end(&mut self, idx: usize, end: ChoiceEnd) {
        let choice = &mut self.choices[idx];
        choice.stream = None;
        let has_called = 0 < choice.parser.n_tool_calls();
        let end = match end {
            ChoiceEnd::Stop if has_called => ChoiceEnd::ToolCalls,
            end => end,
        };
        if let ChoiceEnd::Failed(cause) = &end {
            tracing::error!(model = self.model.name, cause, "a generation failed");
        }
        self.count_end(end.label());
        self.ready
            .push_back(GenerationEvent::Finished { choice: idx, end });
        if self.choices.iter().all(|choice| choice.stream.is_none()) {
            self.count_longest();
            self.settle();
        }
    }

    /// Gives the lease back with what was used. Before the client learns of the end: its next request
    /// must find the room.
    fn settle(&mut self) {
        let counts = self.counts;
        if let Some(mut lease) = self.lease.take() {
            let TokenCounts {
                n_prompt,
                n_cached,
                n_output,
                ..
            } = counts;
            let replica = &self.model.replica;
            let seconds = match self.admitted_at {
                Some(_) => replica.seconds_of(n_cached, n_prompt, n_output),
                None => 0.0,
            };
            lease.used(n_prompt, n_cached, n_output, seconds);
        }
    }

    fn give_up(&mut self) {
        for idx in 0..self.choices.len() {
            if self.choices[idx].stream.is_some() {
                self.finish(idx, ChoiceEnd::DeadlinePassed);
            }
        }
    }

    /// Counts the longest choice of each prompt that got a token.
    fn count_longest(&self) {
        for choices in self.choices.chunks(self.n_per_prompt.max(1)) {
            let longest = choices.iter().map(|choice| choice.n_output).max();
            if let Some(n_tokens) = longest.filter(|n| 0 < *n) {
                let model = self.model.name.clone();
                metrics::histogram!("dsd_request_longest_tokens", "model" => model)
                    .record(n_tokens as f64);
            }
        }
    }

    fn count_end(&self, end: &'static str) {
        let model = self.model.name.clone();
        metrics::counter!("dsd_generations_total", "model" => model.clone(), "end" => end)
            .increment(1);
        let seconds = clock::now().duration_since(self.started);
        metrics::histogram!("dsd_generation_seconds", "model" => model).record(seconds);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let n_open = self.choices.iter().filter(|choice| choice.stream.is_some());
        let n_open = n_open.count();
        for _ in 0..n_open {
            self.count_end("cancelled");
        }
        if 0 < n_open {
            self.count_longest();
        }
        self.settle();
    }
}

/// A seed that nobody chose.
pub fn fresh_seed() -> u64 {
    // The standard library draws the keys of its hash maps from the system's generator.
    RandomState::new().hash_one(next_request_id().0)
}

fn next_request_id() -> RequestId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    RequestId(NEXT.fetch_add(1, Ordering::Relaxed))
}
