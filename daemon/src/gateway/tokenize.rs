//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::Response,
};
use dsd_proto::openai::{DetokenizeRequest, Detokenized, RequestError, TokenizeRequest, Tokenized};

use super::{
    Gateway, auth,
    error::ApiError,
    prepare::{self, Terms},
    routes,
};
use crate::{catalog::Catalog, text::PromptForm};

pub(super) async fn tokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    match prepare::read_and(&gateway, request, ids).await {
        Ok(tokenized) => routes::json(&tokenized),
        Err(refusal) => refusal,
    }
}

pub(super) async fn detokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    match prepare::read_and(&gateway, request, text).await {
        Ok(detokenized) => routes::json(&detokenized),
        Err(refusal) => refusal,
    }
}

/// Of a text, or of a conversation where there is one.
fn ids(catalog: &Catalog, body: &[u8], terms: Terms) -> Result<Tokenized, ApiError> {
    let request = TokenizeRequest::from_slice(body)?;
    let (model, tokens) = match request.text() {
        Ok(text) => {
            let model = auth::lookup(catalog, terms.caller(), request.model.as_deref())?;
            let form = PromptForm {
                add_special: request.add_special_tokens.unwrap_or(false),
                parse_special: request.parse_special.unwrap_or(true),
            };
            let tokens = model.text.encode_prompt(text, form, usize::MAX);
            let tokens = tokens.map_err(|e| ApiError::of_text(&e, "prompt"))?;
            (model, tokens)
        }
        Err(missing) if request.messages.is_none() => return Err(missing.into()),
        Err(_) => {
            let mut prepared = prepare::chat(catalog, body, terms)?;
            let prompt = prepared.prompts.pop();
            (prepared.model, prompt.map_or_else(Vec::new, |p| p.ids))
        }
    };
    let wants_texts = request.return_token_strs == Some(true);
    Ok(Tokenized {
        count: tokens.len(),
        max_model_len: model.context_len(),
        token_strs: wants_texts
            .then(|| tokens.iter().map(|id| model.text.token_text(*id)).collect()),
        tokens,
    })
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "as all preparations are called"
)]
fn text(catalog: &Catalog, body: &[u8], terms: Terms) -> Result<Detokenized, ApiError> {
    let request = DetokenizeRequest::from_slice(body)?;
    let model = auth::lookup(catalog, terms.caller(), request.model.as_deref())?;
    let tokens = request.tokens.unwrap_or_default();
    let unknown = |id: &&u32| model.text.token_bytes(**id).is_none();
    if let Some((idx, id)) = tokens.iter().enumerate().find(|(_, id)| unknown(id)) {
        return Err(RequestError::OutOfRange {
            param: format!("tokens[{idx}]"),
            found: id.to_string(),
            expected: "the id of a token".to_owned(),
        }
        .into());
    }
    Ok(Detokenized {
        prompt: model.text.decode(&tokens, false),
    })
}
