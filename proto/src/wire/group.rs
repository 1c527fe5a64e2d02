//! A node's agent and the rank processes it supervises, over a Unix socket of their own.
//!
//! The agent says [`RankStart`] first; a rank answers [`RankReady`] or [`RankFailed`]. After that the
//! first rank of a group takes [`GroupSubmit`], [`GroupCancel`] and [`GroupStop`], and sends one
//! [`GroupEvents`] per step; any rank may end with a [`RankFault`]. The frames' epoch is the group's:
//! what belongs to an earlier one is dropped. Both sides send ticks, so that a frozen one is noticed.

use crate::wire::schema::{wire_enum, wire_messages, wire_struct};

wire_messages! {
    RankStart = 0x0301, 3, Control;
    RankReady = 0x0302, 2, Control;
    RankFailed = 0x0303, 1, Control;
    RankFault = 0x0304, 1, Control;
    GroupSubmit = 0x0311, 4, Request;
    GroupCancel = 0x0312, 1, Control;
    GroupStop = 0x0313, 1, Control;
    GroupEvents = 0x0314, 3, Request;
    GroupTick = 0x0315, 1, Control;
    AgentTick = 0x0316, 1, Control;
}

wire_struct! {
    /// What a rank is to be.
    pub struct RankStart {
        /// Its number.
        pub rank: u32,
        /// Ranks of the group.
        pub n_ranks: u32,
        /// The model's name, for logs and metrics.
        pub model: String,
        /// Checkpoint folder, GGUF file or pack.
        pub path: String,
        /// The group's shared memory; empty for a group of one.
        pub segment: String,
        /// Where keys and values are kept that outlive the rank; empty: nowhere.
        pub kept: String,
        /// Bytes of them at most.
        pub kept_bytes_max: u64,
        /// Of the first rank: where the others keep theirs.
        pub kept_of_others: Vec<String>,
        /// How long another rank may be late in a step at most.
        pub step_timeout_ms: u64,
        /// A rank ends when its agent was silent for so long.
        pub agent_timeout_ms: u64,
        /// Threads that compute at once.
        pub n_threads: u32,
        /// Instruction set, by its name.
        pub isa: String,
        /// Linear layers round activations to int8.
        pub int8_activations: bool,
        /// Stored type of keys and values, by its name.
        pub kv_type: String,
        /// Bytes of KV cache of all ranks together.
        pub kv_bytes_max: u64,
        /// Tokens of a step at most.
        pub step_tokens_max: u32,
        /// Sequences of a step at most.
        pub step_spans_max: u32,
        /// How long a step may take by prediction.
        pub step_target_us: u64,
        /// Parameters of the cost model of step times; empty where nothing is known of them.
        pub cost: Vec<f64>,
        /// Requests that wait at most.
        pub waiting_max: u32,
        /// Keep blocks for prompts that begin alike.
        pub prefix_cache: bool,
        /// Token ids from here on are never chosen.
        pub sampleable_len: u32,
        /// How long requests may go on after a stop.
        pub drain_limit_ms: u64,
        /// Cores to run on; empty for all.
        pub cpus: Vec<u32>,
    }
}

wire_struct! {
    /// The rank has all its memory; the first one has produced a token with all others.
    pub struct RankReady {
        /// From the start of its process.
        pub took_ms: u64,
        /// Bytes that its process read from disk.
        pub disk_bytes_read: u64,
        /// What the engine takes; on the first rank.
        pub limits: Option<EngineLimits>,
        /// Digest of the build and of the weight files that were loaded, hexadecimal.
        pub weights_digest: String,
        /// Digest of configuration and tokenizer, hexadecimal.
        pub text_digest: String,
    }
}

wire_struct! {
    /// What an engine takes.
    pub struct EngineLimits {
        /// Tokens of a sequence at most.
        pub context_len_max: u64,
        /// Width of a row of logits.
        pub vocab_len: u64,
        /// Chosen tokens are below it.
        pub sampleable_len: u64,
        /// Requests that wait at most.
        pub waiting_max: u64,
        /// Sequences that run at most.
        pub running_max: u64,
        /// KV blocks for requests.
        pub n_blocks: u64,
        /// Positions in a block.
        pub block_len: u64,
        /// The token that the first canary gave: the same model gives it always.
        pub canary_token: u32,
    }
}

wire_struct! {
    /// The rank cannot become what it was told to be, and ends.
    pub struct RankFailed {
        /// Why, with all causes.
        pub message: String,
    }
}

wire_struct! {
    /// The rank could not go on, and ends.
    pub struct RankFault {
        /// The rank to blame; `None` when it is this one itself.
        pub blamed: Option<u32>,
        /// What happened, with layer and operation.
        pub message: String,
    }
}

wire_struct! {
    /// A request for the engine.
    pub struct GroupSubmit {
        /// Its name; unique on the node.
        pub id: u64,
        /// Prompt tokens.
        pub prompt: Vec<u32>,
        /// Tokens that were generated before, by a group that was lost.
        pub output: Vec<u32>,
        /// Tokens to generate at most, those generated before included.
        pub n_output_max: u64,
        /// The generation ends after one of these.
        pub stop_tokens: Vec<u32>,
        /// How tokens are chosen.
        pub sampling: TokenSampling,
        /// What tokens may follow each other; absent: all.
        pub grammar: Option<String>,
        /// Log-probabilities of this many likeliest tokens.
        pub top_logprobs: Option<u32>,
        /// First token of the prompt whose log-probability is wanted, with those behind it.
        pub scored_from: Option<u64>,
        /// Time left.
        pub deadline_ms: Option<u64>,
        /// With whom beginnings of prompts are shared: 32 bytes.
        pub cache_owner: Vec<u8>,
        /// Digest of the tenant that its work is charged to.
        pub tenant: u64,
        /// Digest of the tenant's user.
        pub user: u64,
        /// The tenant's share against other tenants'.
        pub weight: u32,
        /// Nobody waits for its first token.
        pub is_batch: bool,
        /// Names the request that it is a choice of; 0 where there is one choice.
        pub siblings_request: u64,
        /// Choices of that request.
        pub n_siblings: u32,
    }
}

wire_struct! {
    /// How tokens are chosen, with everything decided.
    pub struct TokenSampling {
        /// Divides the logits; 0 takes the largest.
        pub temperature: f32,
        /// Keeps the smallest set of likeliest tokens with at least this mass.
        pub top_p: f32,
        /// Keeps this many likeliest tokens; 0 keeps all.
        pub top_k: u64,
        /// Drops tokens below this fraction of the likeliest one's probability.
        pub min_p: f32,
        /// Divides positive and multiplies negative logits of tokens seen.
        pub repetition_penalty: f32,
        /// Subtracted once per occurrence in the output.
        pub frequency_penalty: f32,
        /// Subtracted once if the token is in the output.
        pub presence_penalty: f32,
        /// Added to the logits of these tokens.
        pub logit_bias: Vec<TokenValue>,
        /// Key of the generator.
        pub seed: u64,
    }
}

wire_struct! {
    /// A number that belongs to a token.
    pub struct TokenValue {
        /// The token.
        pub token: u32,
        /// Its number.
        pub value: f32,
    }
}

wire_struct! {
    /// Nobody reads the request's tokens any more.
    pub struct GroupCancel {
        /// The request.
        pub id: u64,
    }
}

wire_struct! {
    /// Take nothing more and end.
    pub struct GroupStop {
        /// How long what was taken may go on.
        pub drain_ms: u64,
    }
}

wire_struct! {
    /// What came out of a step, or of a moment of idleness.
    pub struct GroupEvents {
        /// In the order in which they happened.
        pub events: Vec<GroupEvent>,
        /// The engine's counters after it.
        pub load: GroupLoad,
        /// Parameters of the cost model of step times; empty where they changed little since they
        /// were sent.
        pub cost: Vec<f64>,
        /// Metrics that were not named before.
        pub series: Vec<MetricSeries>,
        /// What was counted since the last frame.
        pub metrics: Vec<MetricUpdate>,
    }
}

wire_struct! {
    /// Sent by every rank twice a second, whatever it does; the first one's tells of its engine.
    pub struct GroupTick {
        /// How long the engine has been in the step that it is in.
        pub step_age_us: Option<u64>,
        /// How long that step was expected to take.
        pub expected_us: u64,
    }
}

wire_struct! {
    /// Sent by the agent twice a second.
    pub struct AgentTick {}
}

wire_struct! {
    /// Something that happened to a request.
    pub struct GroupEvent {
        /// The request.
        pub id: u64,
        /// What.
        pub what: GroupEventKind,
    }
}

wire_enum! {
    /// What happens to a request.
    pub enum GroupEventKind {
        /// It left the waiting line.
        Started(GroupStart),
        /// This many positions of its prompt are computed.
        Prefilled(u64),
        /// Log-probabilities of tokens of its prompt.
        Scored(GroupScores),
        /// The next token.
        Token(GroupToken),
        /// It is over: a stop token came out.
        Stop,
        /// It is over: the wanted length was reached.
        Length,
        /// It is over: its deadline passed.
        DeadlinePassed,
        /// It is over: the engine is stopping.
        Stopped,
        /// The engine had no room and did not take it.
        NoRoom,
        /// It is over: a step failed.
        Failed(String),
    }
}

wire_struct! {
    /// The beginning of a request's first step.
    pub struct GroupStart {
        /// Prompt positions found in the cache.
        pub n_cached: u64,
        /// Microseconds from then to the message.
        pub age_us: u64,
    }
}

wire_struct! {
    /// Log-probabilities of consecutive tokens of a prompt.
    pub struct GroupScores {
        /// Number of the first of them in the prompt.
        pub first: u64,
        /// In order.
        pub scores: Vec<GroupScore>,
    }
}

wire_struct! {
    /// A token of a prompt beside those that could have stood there.
    pub struct GroupScore {
        /// Its log-probability.
        pub logprob: f32,
        /// The likeliest tokens' log-probabilities, descending.
        pub top: Vec<TokenValue>,
    }
}

wire_struct! {
    /// One generated token.
    pub struct GroupToken {
        /// Number in the output, from 0.
        pub index: u64,
        /// Vocabulary id.
        pub token: u32,
        /// Log-probability of the token, where asked for.
        pub logprob: Option<f32>,
        /// The likeliest tokens' log-probabilities, descending.
        pub top: Vec<TokenValue>,
    }
}

wire_struct! {
    /// An engine's counters.
    pub struct GroupLoad {
        /// Sequences in the running set.
        pub n_running: u64,
        /// Requests waiting.
        pub n_waiting: u64,
        /// KV blocks in use.
        pub n_blocks_used: u64,
        /// KV blocks in the pool.
        pub n_blocks: u64,
        /// Steps since start.
        pub n_steps: u64,
        /// Prompt tokens computed since start.
        pub n_prompt_tokens: u64,
        /// Tokens generated since start.
        pub n_output_tokens: u64,
        /// Sequences preempted since start.
        pub n_preemptions: u64,
        /// Since the last token.
        pub last_token_age_us: Option<u64>,
        /// The last canary gave another token than the first.
        pub canary_wrong: bool,
    }
}

wire_enum! {
    /// What kind of metric.
    pub enum MetricKind {
        /// Updates are added.
        Counter,
        /// The last update counts.
        Gauge,
        /// Every update is a sample.
        Histogram,
    }
}

wire_struct! {
    /// Gives a metric the number that its updates carry.
    pub struct MetricSeries {
        /// The number.
        pub id: u32,
        /// The kind.
        pub kind: MetricKind,
        /// Its name.
        pub name: String,
        /// Names and values of its labels, in turn.
        pub labels: Vec<String>,
    }
}

wire_struct! {
    /// One update.
    pub struct MetricUpdate {
        /// Number of the series.
        pub id: u32,
        /// What to add, set or record.
        pub value: f64,
    }
}
