//! One value of every message, with every optional part present somewhere; for tests only.

use crate::{
    code::Code,
    wire::{
        admin::{
            ErrorReply, Finding, ModelEntry, ModelListReply, ModelListRequest, ModelLoadReply,
            ModelLoadRequest, ModelState, ModelStatus, ModelUnloadReply, ModelUnloadRequest,
            ModelVerifyReply, ModelVerifyRequest, Progress, StatusReply, StatusRequest,
        },
        generate::{
            ChatMessage, Finish, GenerateDelta, GenerateDone, GenerateRequest, Input, Role,
            Sampling,
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
