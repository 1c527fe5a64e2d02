//! What an operator asks a node: its state, its models and its tenants by name.
//!
//! Every call is one request frame and, in order, any number of [`Progress`] frames where the call
//! has them, then one reply: the call's own or an [`ErrorReply`].

use crate::{
    code::Code,
    wire::schema::{wire_enum, wire_messages, wire_struct},
};

wire_messages! {
    ErrorReply = 0x0001, 1, Control;
    StatusRequest = 0x0101, 1, Control;
    StatusReply = 0x0102, 1, Control;
    ModelListRequest = 0x0111, 1, Control;
    ModelListReply = 0x0112, 1, Control;
    ModelLoadRequest = 0x0113, 1, Control;
    ModelLoadReply = 0x0114, 1, Control;
    ModelUnloadRequest = 0x0115, 1, Control;
    ModelUnloadReply = 0x0116, 1, Control;
    ModelVerifyRequest = 0x0117, 1, Control;
    ModelVerifyReply = 0x0118, 1, Control;
    Progress = 0x0119, 1, Control;
    TenantListRequest = 0x0121, 1, Control;
    TenantListReply = 0x0122, 1, Control;
    TenantShowRequest = 0x0123, 1, Control;
    TenantShowReply = 0x0124, 1, Control;
    TenantAddRequest = 0x0125, 1, Control;
    TenantSetRequest = 0x0126, 1, Control;
    TenantRotateKeyRequest = 0x0127, 1, Control;
    TenantKeyReply = 0x0128, 1, Control;
    TenantRemoveRequest = 0x0129, 1, Control;
    TenantRemoveReply = 0x012a, 1, Control;
}

wire_struct! {
    /// The call failed; nothing follows.
    pub struct ErrorReply {
        /// Number of a [`Code`]; a newer node may send one that this build does not know.
        pub code_number: u16,
        /// For a person: what was refused, what was found, what to do.
        pub message: String,
        /// When to try again, where the node can tell.
        pub retry_after_ms: Option<u64>,
    }
}

impl ErrorReply {
    /// An error without a time to try again.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code_number: code.number(),
            message: message.into(),
            retry_after_ms: None,
        }
    }

    /// The code; [`Code::Internal`] for one that this build does not know.
    pub fn code(&self) -> Code {
        Code::from_number(self.code_number).unwrap_or(Code::Internal)
    }
}

wire_struct! {
    /// Asks for a [`StatusReply`].
    pub struct StatusRequest {}
}

wire_struct! {
    /// A node as it is now.
    pub struct StatusReply {
        /// Name of the node.
        pub node: String,
        /// Cluster it belongs to.
        pub cluster: String,
        /// Release of the daemon.
        pub version: String,
        /// Since the daemon started.
        pub uptime_s: u64,
        /// Whether `/ready` answers 200.
        pub ready: bool,
        /// Why it is or is not.
        pub ready_reason: String,
        /// Where HTTP is answered, `address:port`.
        pub http_address: String,
        /// Where QUIC is answered, `address:port`.
        pub quic_address: String,
        /// Models loaded, loading or stopping.
        pub models: Vec<ModelStatus>,
    }
}

wire_enum! {
    /// Where a model is in its life.
    pub enum ModelState {
        /// Files are being checked and mapped.
        Loading,
        /// Tokens come out.
        Ready,
        /// Loaded, but no token came out lately or the last canary was wrong.
        Stalled,
        /// Takes no more requests; running ones end.
        Stopping,
        /// Its engine is gone; the log has the cause.
        Failed,
    }
}

wire_struct! {
    /// One model of a node and what its engine is doing.
    pub struct ModelStatus {
        /// Name clients ask for.
        pub name: String,
        /// Model line, in the checkpoint's word.
        pub architecture: String,
        /// Where it is in its life.
        pub state: ModelState,
        /// Positions a sequence may have.
        pub context_len: u32,
        /// Sequences in the running set.
        pub n_running: u32,
        /// Requests waiting for a place.
        pub n_waiting: u32,
        /// KV blocks in use.
        pub n_blocks_used: u32,
        /// KV blocks in the pool.
        pub n_blocks: u32,
        /// Steps since load.
        pub n_steps: u64,
        /// Prompt tokens computed since load.
        pub n_prompt_tokens: u64,
        /// Tokens generated since load.
        pub n_output_tokens: u64,
        /// Sequences preempted since load.
        pub n_preemptions: u64,
        /// Since the last generated token, canaries included; `None` before the first.
        pub last_token_age_ms: Option<u64>,
        /// Weight bytes mapped.
        pub bytes_mapped: u64,
        /// Bytes of the KV pool.
        pub kv_bytes: u64,
        /// Bytes of all other buffers of the step.
        pub workspace_bytes: u64,
    }
}

wire_struct! {
    /// Asks for a [`ModelListReply`].
    pub struct ModelListRequest {}
}

wire_struct! {
    /// Models loaded, and those in the model store that could be.
    pub struct ModelListReply {
        /// By name.
        pub models: Vec<ModelEntry>,
    }
}

wire_struct! {
    /// One model, loaded or not.
    pub struct ModelEntry {
        /// Name clients ask for, or would.
        pub name: String,
        /// Folder or file it lies in.
        pub path: String,
        /// Its life, when loaded.
        pub state: Option<ModelState>,
        /// Model line; empty when the files do not tell.
        pub architecture: String,
        /// "safetensors" or "gguf".
        pub format: String,
        /// Bytes of all weight files.
        pub bytes: u64,
    }
}

wire_struct! {
    /// Loads a model. Answered by [`Progress`] frames and a [`ModelLoadReply`].
    pub struct ModelLoadRequest {
        /// Name in the model store, or an absolute path on the node.
        pub path_or_name: String,
    }
}

wire_struct! {
    /// The model is loaded and answers.
    pub struct ModelLoadReply {
        /// Name clients ask for.
        pub name: String,
        /// Model line.
        pub architecture: String,
        /// Positions a sequence may have.
        pub context_len: u32,
        /// KV blocks in the pool.
        pub n_blocks: u32,
        /// Weight bytes mapped.
        pub bytes_mapped: u64,
        /// Bytes of the KV pool.
        pub kv_bytes: u64,
        /// Bytes of all other buffers of the step.
        pub workspace_bytes: u64,
        /// From the call to the first token.
        pub load_ms: u64,
    }
}

wire_struct! {
    /// Unloads a model; its running requests end. Answered by a [`ModelUnloadReply`].
    pub struct ModelUnloadRequest {
        /// Name clients ask for.
        pub name: String,
    }
}

wire_struct! {
    /// The model is gone and its memory free.
    pub struct ModelUnloadReply {
        /// Name it had.
        pub name: String,
        /// Requests that were running or waiting and were ended.
        pub n_requests_ended: u32,
    }
}

wire_struct! {
    /// Checks every byte of a model's files. Answered by [`Progress`] frames and a
    /// [`ModelVerifyReply`].
    pub struct ModelVerifyRequest {
        /// Name in the model store or of a loaded model.
        pub name: String,
    }
}

wire_struct! {
    /// What a check of a model's files found.
    pub struct ModelVerifyReply {
        /// Name of the model.
        pub name: String,
        /// Files read.
        pub n_files: u32,
        /// Tensors checked.
        pub n_tensors: u32,
        /// Bytes read.
        pub bytes: u64,
        /// Digest over files in order of name, hexadecimal.
        pub digest: String,
        /// What is wrong; empty when nothing is.
        pub findings: Vec<Finding>,
    }
}

wire_struct! {
    /// One thing wrong with a model's files.
    pub struct Finding {
        /// File name within the model.
        pub file: String,
        /// Tensor; empty when the file as a whole is meant.
        pub tensor: String,
        /// What should be there.
        pub expected: String,
        /// What is there.
        pub found: String,
    }
}

wire_struct! {
    /// How far a long call is.
    pub struct Progress {
        /// What is being done, a word or two.
        pub phase: String,
        /// Work done in this phase, in bytes.
        pub done: u64,
        /// Work of this phase in all, in bytes; 0 when unknown.
        pub total: u64,
    }
}

wire_struct! {
    /// Asks for a [`TenantListReply`].
    pub struct TenantListRequest {}
}

wire_struct! {
    /// The tenants of a node.
    pub struct TenantListReply {
        /// By name.
        pub tenants: Vec<TenantEntry>,
    }
}

wire_enum! {
    /// What a tenant's requests expect of the time to their first token.
    pub enum TenantClass {
        /// Soon, or a refusal.
        Interactive,
        /// Whenever there is room.
        Batch,
    }
}

wire_struct! {
    /// One tenant in a list.
    pub struct TenantEntry {
        /// As the operator calls it.
        pub name: String,
        /// Its share against others'.
        pub weight: u32,
        /// What its requests expect.
        pub class: TenantClass,
        /// Keys that are let in.
        pub n_keys: u32,
        /// Choices under way.
        pub n_running: u32,
        /// Choices that wait for their first step.
        pub n_waiting: u32,
        /// Requests taken since it came to be known.
        pub n_requests: u64,
        /// Requests refused since then.
        pub n_refused: u64,
        /// Its part of all work of the last minute, 0 to 1.
        pub work_share: f64,
    }
}

wire_struct! {
    /// Asks for a [`TenantShowReply`].
    pub struct TenantShowRequest {
        /// The tenant's name.
        pub name: String,
    }
}

wire_struct! {
    /// A tenant's settings and what it used since it came to be known.
    pub struct TenantShowReply {
        /// Name, weight, counts.
        pub entry: TenantEntry,
        /// Models it may use; `None` for all.
        pub models: Option<Vec<String>>,
        /// Choices at once.
        pub concurrency: TenantCap,
        /// Requests a minute.
        pub requests_per_minute: TenantCap,
        /// Tokens a minute.
        pub tokens_per_minute: TenantCap,
        /// Prompt tokens, cached ones included.
        pub n_prompt_tokens: u64,
        /// Of them found in the cache.
        pub n_cached_tokens: u64,
        /// Tokens generated.
        pub n_output_tokens: u64,
        /// Refusals by reason.
        pub refusals: Vec<TenantRefusals>,
        /// Half of the last requests waited no longer; `None` before the first.
        pub queue_ms_p50: Option<u64>,
        /// 95 of 100 of them waited no longer.
        pub queue_ms_p95: Option<u64>,
    }
}

wire_struct! {
    /// A cap and what is left under it.
    pub struct TenantCap {
        /// The cap; `None` for no limit.
        pub max: Option<u64>,
        /// What is left now.
        pub left: Option<u64>,
    }
}

wire_struct! {
    /// How often a tenant was refused for one reason.
    pub struct TenantRefusals {
        /// The reason, a word.
        pub reason: String,
        /// How often.
        pub n: u64,
    }
}

wire_enum! {
    /// What to do with a cap.
    pub enum CapChange {
        /// Leave it.
        Keep,
        /// No limit.
        Clear,
        /// This limit.
        To(u64),
    }
}

wire_enum! {
    /// What to do with the models that a tenant may use.
    pub enum ModelsChange {
        /// Leave them.
        Keep,
        /// All.
        All,
        /// These.
        To(Vec<String>),
    }
}

wire_struct! {
    /// Changes of a tenant's settings.
    pub struct TenantPatch {
        /// Its share; `None` leaves it.
        pub weight: Option<u32>,
        /// What its requests expect; `None` leaves it.
        pub class: Option<TenantClass>,
        /// Choices at once.
        pub concurrency: CapChange,
        /// Requests a minute.
        pub requests_per_minute: CapChange,
        /// Tokens a minute.
        pub tokens_per_minute: CapChange,
        /// Models it may use.
        pub models: ModelsChange,
    }
}

wire_struct! {
    /// Adds a tenant. Answered by a [`TenantKeyReply`].
    pub struct TenantAddRequest {
        /// Its name.
        pub name: String,
        /// Its settings.
        pub patch: TenantPatch,
    }
}

wire_struct! {
    /// Changes a tenant's settings. Answered by a [`TenantShowReply`].
    pub struct TenantSetRequest {
        /// Its name.
        pub name: String,
        /// What changes.
        pub patch: TenantPatch,
    }
}

wire_struct! {
    /// Gives a tenant a new key instead of those it has. Answered by a [`TenantKeyReply`].
    pub struct TenantRotateKeyRequest {
        /// Its name.
        pub name: String,
        /// How long the old keys stay valid.
        pub grace_s: u64,
    }
}

wire_struct! {
    /// A new key, which the node itself does not keep.
    pub struct TenantKeyReply {
        /// The tenant's name.
        pub name: String,
        /// The key.
        pub key: String,
    }
}

wire_struct! {
    /// Removes a tenant; its keys are refused at once and its requests end as they would. Answered by
    /// a [`TenantRemoveReply`].
    pub struct TenantRemoveRequest {
        /// Its name.
        pub name: String,
    }
}

wire_struct! {
    /// The tenant is gone.
    pub struct TenantRemoveReply {
        /// Name it had.
        pub name: String,
        /// Choices that are still under way or wait.
        pub n_open: u32,
    }
}
