//! One value of every message, with every optional part present somewhere; for tests only.

use crate::{
    code::Code,
    wire::{
        admin::{
            CapChange, ErrorReply, Finding, ModelEntry, ModelListReply, ModelListRequest,
            ModelLoadReply, ModelLoadRequest, ModelState, ModelStatus, ModelUnloadReply,
            ModelUnloadRequest, ModelVerifyReply, ModelVerifyRequest, ModelsChange, Progress,
            StatusReply, StatusRequest, TenantAddRequest, TenantCap, TenantClass, TenantEntry,
            TenantKeyReply, TenantListReply, TenantListRequest, TenantPatch, TenantRefusals,
            TenantRemoveReply, TenantRemoveRequest, TenantRotateKeyRequest, TenantSetRequest,
            TenantShowReply, TenantShowRequest,
        },
        generate::{
            ChatMessage, Finish, GenerateDelta, GenerateDone, GenerateRequest, Input, Role,
            Sampling,
        },
        group::{
            AgentTick, EngineLimits, GroupCancel, GroupEvent, GroupEventKind, GroupEvents,
            GroupLoad, GroupScore, GroupScores, GroupStart, GroupStop, GroupSubmit, GroupTick,
            GroupToken, MetricKind, MetricSeries, MetricUpdate, RankFailed, RankFault, RankReady,
            RankStart, TokenSampling, TokenValue,
        },
    },
};

pub(crate) fn error_reply() -> ErrorReply {
    ErrorReply {
        code_number: Code::QueueFull.number(),
        message: "64 requests wait already".into(),
        retry_after_ms: Some(1500),
    }
}

pub(crate) fn status_request() -> StatusRequest {
    StatusRequest {}
}

pub(crate) fn status_reply() -> StatusReply {
    StatusReply {
        node: "node-1".into(),
        cluster: "lab".into(),
        version: "0.1.0".into(),
        uptime_s: 3600,
        ready: true,
        ready_reason: "a token came out 120 ms ago".into(),
        http_address: "127.0.0.1:8000".into(),
        quic_address: "127.0.0.1:7600".into(),
        models: vec![ModelStatus {
            name: "tiny".into(),
            architecture: "deepseek_v3".into(),
            state: ModelState::Ready,
            context_len: 4096,
            n_running: 3,
            n_waiting: 1,
            n_blocks_used: 40,
            n_blocks: 512,
            n_steps: 9000,
            n_prompt_tokens: 123_456,
            n_output_tokens: 65_432,
            n_preemptions: 2,
            last_token_age_ms: Some(120),
            bytes_mapped: 1 << 30,
            kv_bytes: 1 << 28,
            workspace_bytes: 1 << 24,
        }],
    }
}

pub(crate) fn model_list_request() -> ModelListRequest {
    ModelListRequest {}
}

pub(crate) fn model_list_reply() -> ModelListReply {
    let loaded = ModelEntry {
        name: "tiny".into(),
        path: "/models/tiny".into(),
        state: Some(ModelState::Ready),
        architecture: "deepseek_v3".into(),
        format: "safetensors".into(),
        bytes: 1 << 30,
    };
    let lying = ModelEntry {
        name: "qwen-gguf".into(),
        path: "/models/qwen.gguf".into(),
        state: None,
        architecture: "qwen2".into(),
        format: "gguf".into(),
        bytes: 42,
    };
    ModelListReply {
        models: vec![loaded, lying],
    }
}

pub(crate) fn model_load_request() -> ModelLoadRequest {
    ModelLoadRequest {
        path_or_name: "tiny".into(),
    }
}

pub(crate) fn model_load_reply() -> ModelLoadReply {
    ModelLoadReply {
        name: "tiny".into(),
        architecture: "deepseek_v3".into(),
        context_len: 4096,
        n_blocks: 512,
        bytes_mapped: 1 << 30,
        kv_bytes: 1 << 28,
        workspace_bytes: 1 << 24,
        load_ms: 987,
    }
}

pub(crate) fn model_unload_request() -> ModelUnloadRequest {
    ModelUnloadRequest {
        name: "tiny".into(),
    }
}

pub(crate) fn model_unload_reply() -> ModelUnloadReply {
    ModelUnloadReply {
        name: "tiny".into(),
        n_requests_ended: 2,
    }
}

pub(crate) fn model_verify_request() -> ModelVerifyRequest {
    ModelVerifyRequest {
        name: "tiny".into(),
    }
}

pub(crate) fn model_verify_reply() -> ModelVerifyReply {
    ModelVerifyReply {
        name: "tiny".into(),
        n_files: 2,
        n_tensors: 57,
        bytes: 1 << 20,
        digest: "9f86d081884c7d65".into(),
        findings: vec![Finding {
            file: "model-00002-of-00002.safetensors".into(),
            tensor: "model.layers.1.mlp.gate.weight".into(),
            expected: "[8, 64] BF16".into(),
            found: "[64, 8] BF16".into(),
        }],
    }
}

pub(crate) fn progress() -> Progress {
    Progress {
        phase: "checking".into(),
        done: 512,
        total: 1024,
    }
}

pub(crate) fn tenant_entry() -> TenantEntry {
    TenantEntry {
        name: "team-a".into(),
        weight: 3,
        class: TenantClass::Interactive,
        n_keys: 2,
        n_running: 4,
        n_waiting: 1,
        n_requests: 100,
        n_refused: 7,
        work_share: 0.75,
    }
}

pub(crate) fn tenant_patch() -> TenantPatch {
    TenantPatch {
        weight: Some(3),
        class: Some(TenantClass::Batch),
        concurrency: CapChange::To(8),
        requests_per_minute: CapChange::Clear,
        tokens_per_minute: CapChange::Keep,
        models: ModelsChange::To(vec!["tiny".into()]),
    }
}

pub(crate) fn tenant_list_request() -> TenantListRequest {
    TenantListRequest {}
}

pub(crate) fn tenant_list_reply() -> TenantListReply {
    TenantListReply {
        tenants: vec![tenant_entry()],
    }
}

pub(crate) fn tenant_show_request() -> TenantShowRequest {
    TenantShowRequest {
        name: "team-a".into(),
    }
}

pub(crate) fn tenant_show_reply() -> TenantShowReply {
    let cap = |max, left| TenantCap { max, left };
    TenantShowReply {
        entry: tenant_entry(),
        models: Some(vec!["tiny".into()]),
        concurrency: cap(Some(8), Some(3)),
        requests_per_minute: cap(None, None),
        tokens_per_minute: cap(Some(60_000), Some(59_000)),
        n_prompt_tokens: 1000,
        n_cached_tokens: 300,
        n_output_tokens: 500,
        refusals: vec![TenantRefusals {
            reason: "tokens".into(),
            n: 7,
        }],
        queue_ms_p50: Some(1),
        queue_ms_p95: Some(90),
    }
}

pub(crate) fn tenant_add_request() -> TenantAddRequest {
    TenantAddRequest {
        name: "team-a".into(),
        patch: tenant_patch(),
    }
}

pub(crate) fn tenant_set_request() -> TenantSetRequest {
    TenantSetRequest {
        name: "team-a".into(),
        patch: tenant_patch(),
    }
}

pub(crate) fn tenant_rotate_key_request() -> TenantRotateKeyRequest {
    TenantRotateKeyRequest {
        name: "team-a".into(),
        grace_s: 3600,
    }
}

pub(crate) fn tenant_key_reply() -> TenantKeyReply {
    TenantKeyReply {
        name: "team-a".into(),
        key: "sk-0123456789abcdef".into(),
    }
}

pub(crate) fn tenant_remove_request() -> TenantRemoveRequest {
    TenantRemoveRequest {
        name: "team-a".into(),
    }
}

pub(crate) fn tenant_remove_reply() -> TenantRemoveReply {
    TenantRemoveReply {
        name: "team-a".into(),
        n_open: 2,
    }
}

pub(crate) fn generate_request() -> GenerateRequest {
    let turn = |role, content: &str| ChatMessage {
        role,
        content: content.into(),
    };
    GenerateRequest {
        model: "tiny".into(),
        input: Input::Chat(vec![
            turn(Role::System, "Answer in one word."),
            turn(Role::User, "What is the capital of France?"),
        ]),
        max_tokens: Some(64),
        sampling: Sampling {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(40),
            min_p: Some(0.05),
            repetition_penalty: Some(1.1),
            frequency_penalty: Some(0.5),
            presence_penalty: Some(-0.5),
            seed: Some(42),
        },
        stop: vec!["\n\n".into(), "END".into()],
        thinking: Some(true),
    }
}

pub(crate) fn generate_delta() -> GenerateDelta {
    GenerateDelta {
        content: "Paris".into(),
        reasoning: "It is a city. ".into(),
        n_tokens: 5,
    }
}

pub(crate) fn generate_done() -> GenerateDone {
    GenerateDone {
        finish_reason: Finish::Stop,
        n_prompt_tokens: 21,
        n_completion_tokens: 5,
        queue_ms: 1,
        ttft_ms: 30,
    }
}

pub(crate) fn rank_start() -> RankStart {
    RankStart {
        rank: 1,
        n_ranks: 2,
        model: "tiny".into(),
        path: "/models/tiny".into(),
        segment: "/proc/1/fd/9".into(),
        kept: "/proc/1/fd/10".into(),
        kept_bytes_max: 1 << 33,
        kept_of_others: vec!["/proc/1/fd/11".into()],
        agent_timeout_ms: 30_000,
        step_timeout_ms: 10_000,
        n_threads: 1,
        isa: "avx512".into(),
        int8_activations: true,
        kv_type: "f32".into(),
        kv_bytes_max: 1 << 28,
        step_tokens_max: 512,
        step_spans_max: 32,
        step_target_us: 50_000,
        cost: vec![1.0, 0.5, 3e-4],
        waiting_max: 128,
        prefix_cache: true,
        sampleable_len: 1000,
        drain_limit_ms: 30_000,
        cpus: vec![1],
    }
}

pub(crate) fn rank_ready() -> RankReady {
    RankReady {
        took_ms: 230,
        disk_bytes_read: 4096,
        limits: Some(EngineLimits {
            context_len_max: 4096,
            vocab_len: 1024,
            sampleable_len: 1000,
            waiting_max: 128,
            running_max: 32,
            n_blocks: 127,
            block_len: 32,
            canary_token: 17,
        }),
        weights_digest: "00ff".into(),
        text_digest: "a1".into(),
    }
}

pub(crate) fn rank_failed() -> RankFailed {
    RankFailed {
        message: "cannot read `model.safetensors`".into(),
    }
}

pub(crate) fn rank_fault() -> RankFault {
    RankFault {
        blamed: Some(1),
        message: "rank 1 died at layer 3, attention output".into(),
    }
}

pub(crate) fn group_submit() -> GroupSubmit {
    GroupSubmit {
        id: 9,
        prompt: vec![1, 2, 3],
        output: vec![4],
        n_output_max: 16,
        stop_tokens: vec![2],
        sampling: TokenSampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 40,
            min_p: 0.1,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            presence_penalty: 0.3,
            logit_bias: vec![TokenValue {
                token: 5,
                value: -1.0,
            }],
            seed: 1 << 40,
        },
        grammar: Some("{}".to_owned()),
        top_logprobs: Some(2),
        scored_from: Some(1),
        deadline_ms: Some(60_000),
        cache_owner: vec![7; 32],
        tenant: 0x0123_4567_89ab_cdef,
        user: 9,
        weight: 3,
        is_batch: true,
        siblings_request: 17,
        n_siblings: 2,
    }
}

pub(crate) fn group_cancel() -> GroupCancel {
    GroupCancel { id: 9 }
}

pub(crate) fn group_stop() -> GroupStop {
    GroupStop { drain_ms: 500 }
}

pub(crate) fn group_tick() -> GroupTick {
    GroupTick {
        step_age_us: Some(1_200),
        expected_us: 50_000,
    }
}

pub(crate) fn agent_tick() -> AgentTick {
    AgentTick {}
}

pub(crate) fn group_events() -> GroupEvents {
    let event = |what| GroupEvent { id: 9, what };
    GroupEvents {
        events: vec![
            event(GroupEventKind::Started(GroupStart {
                n_cached: 32,
                age_us: 1500,
            })),
            event(GroupEventKind::Prefilled(96)),
            event(GroupEventKind::Scored(GroupScores {
                first: 1,
                scores: vec![GroupScore {
                    logprob: -2.5,
                    top: vec![TokenValue {
                        token: 3,
                        value: -1.5,
                    }],
                }],
            })),
            event(GroupEventKind::Token(GroupToken {
                index: 1,
                token: 77,
                logprob: Some(-0.5),
                top: vec![TokenValue {
                    token: 77,
                    value: -0.5,
                }],
            })),
            event(GroupEventKind::Stop),
            event(GroupEventKind::Length),
            event(GroupEventKind::DeadlinePassed),
            event(GroupEventKind::Stopped),
            event(GroupEventKind::NoRoom),
            event(GroupEventKind::Failed("logits row 0 is not finite".into())),
        ],
        load: GroupLoad {
            n_running: 1,
            n_waiting: 2,
            n_blocks_used: 3,
            n_blocks: 127,
            n_steps: 4,
            n_prompt_tokens: 5,
            n_output_tokens: 6,
            n_preemptions: 7,
            last_token_age_us: Some(8),
            canary_wrong: false,
        },
        cost: vec![0.25],
        series: vec![MetricSeries {
            id: 0,
            kind: MetricKind::Histogram,
            name: "dsd_engine_step_seconds".into(),
            labels: vec!["model".into(), "tiny".into()],
        }],
        metrics: vec![MetricUpdate { id: 0, value: 0.01 }],
    }
}
