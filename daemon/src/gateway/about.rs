//! What a node says of its models' tokenizers and of what a tenant has left; and which of others' routes
//! it does not have.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Extension,
    body::Body,
    extract::{Query, Request, State, rejection::QueryRejection},
    http::Response,
};
use dsd_proto::{
    code::Code,
    openai::{Balance, BalanceEntry, TokenizerDescription},
};

use super::{
    Gateway,
    auth::{self, Entered},
    body::{self, Announced},
    error::ApiError,
    routes,
};
use crate::{runtime::clock, text::TextModel};

/// `GET /tokenizer_info?model=NAME`, as vLLM has it: what a client needs that templates by itself.
pub(super) async fn tokenizer(
    State(gateway): State<Arc<Gateway>>,
    Extension(entered): Extension<Entered>,
    query: Result<Query<HashMap<String, String>>, QueryRejection>,
) -> Response<Body> {
    let Ok(Query(query)) = query else {
        let message = "the query is not read; write `?model=NAME`";
        return ApiError::new(Code::InvalidRequest, message).into_response();
    };
    let name = query.get("model").map(String::as_str);
    let model = match auth::lookup(&gateway.catalog, &entered.caller, name) {
        Ok(model) => model,
        Err(e) => return e.into_response(),
    };
    let text: &TextModel = &model.text;
    let token = |id: Option<u32>| id.map(|id| text.token_text(id));
    routes::json(&TokenizerDescription {
        model: model.name.clone(),
        bos_token: token(text.bos_id()),
        eos_token: token(text.eos_id()),
        add_bos_token: text.adds_bos(),
        vocab_size: text.vocab_len(),
        model_max_length: model.context_len(),
        chat_template: text.chat_template().map(str::to_owned),
    })
}

/// `GET /user/balance`, DeepSeek's, for a node that takes no money: tokens under the tenant's cap.
pub(super) async fn balance(Extension(entered): Extension<Entered>) -> Response<Body> {
    let left = entered.caller.left(clock::now());
    let has_some = |left: Option<u64>| left.is_none_or(|left| 0 < left);
    let entry = |tokens: u64| BalanceEntry {
        currency: "TOKENS".to_owned(),
        total_balance: tokens.to_string(),
        granted_balance: tokens.to_string(),
        topped_up_balance: "0".to_owned(),
    };
    routes::json(&Balance {
        is_available: has_some(left.tokens)
            && has_some(left.requests)
            && has_some(left.concurrency.map(u64::from)),
        balance_infos: left.tokens.map(entry).into_iter().collect(),
    })
}

/// `POST /v1/embeddings`.
pub(super) async fn no_embeddings(request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let message = "no model here makes embeddings: DeepSeek's models write text; ask a server of an \
                   embedding model";
    body::answer_then_drain(
        ApiError::new(Code::Unsupported, message).into_response(),
        Announced::by(&head.headers),
        body,
    )
}
