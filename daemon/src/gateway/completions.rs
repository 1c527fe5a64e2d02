//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::Response,
};
use dsd_proto::openai::{Completion, CompletionChoice, CompletionLogprobs, Usage};

use super::{
    Gateway,
    error::{ApiError, Dialect},
    generation::{ChoiceEnd, Generation, GenerationEvent, TokenCounts},
    logprobs::{self, Offset},
    prepare::{self, PreparedCompletion},
    routes,
    sse::{self, ChunkEncoder, Chunks, GenerationDelta},
};
use crate::{catalog::ServedModel, runtime::clock};

pub(super) async fn create(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Response<Body> {
    let prepared = match prepare::read_and(&gateway, request, prepare::completion).await {
        Ok(prepared) => prepared,
        Err(refusal) => return refusal,
    };
    let PreparedCompletion {
        mut prepared,
        n_returned,
        wants_logprobs,
        echo,
    } = prepared;
    let n_made = prepared.params.n;
    let generation = match prepare::start(&gateway, &mut prepared) {
        Ok(generation) => generation,
        Err(e) => return e.into_response(),
    };
    let model_text = Arc::clone(&prepared.model.text);
    let encoder = Encoder {
        id: routes::answer_id("cmpl"),
        created: clock::unix_seconds(),
        model: prepared.model,
        model_name: prepared.model_name,
        wants_logprobs,
        include_usage: prepared.include_usage,
        offsets: (0..generation.n_choices())
            .map(|_| Offset::new(&model_text))
            .collect(),
        is_prompt_due: vec![echo; generation.n_choices()],
    };
    if prepared.stream {
        let mut response = sse::response(generation, encoder, gateway.config.keep_alive);
        prepare::name_ignored(&mut response, &prepared.ignored);
        return response;
    }
    let answer = whole(generation, encoder, n_made, n_returned);
    let mut response = sse::whole(answer, Dialect::OpenAi, gateway.config.keep_alive).await;
    prepare::name_ignored(&mut response, &prepared.ignored);
    response
}

/// Collects a generation into one answer: of every `n_made` choices the `n_returned` likeliest.
async fn whole(
    mut generation: Generation,
    mut encoder: Encoder,
    n_made: usize,
    n_returned: usize,
) -> Result<Completion, ApiError> {
    let new = |index| CompletionChoice {
        index,
        text: String::new(),
        logprobs: encoder.wants_logprobs.then(CompletionLogprobs::default),
        finish_reason: None,
    };
    let mut choices: Vec<CompletionChoice> = (0..generation.n_choices()).map(new).collect();
    while let Some(event) = generation.next().await {
        match event {
            GenerationEvent::Delta {
                choice,
                deltas,
                tokens,
                ..
            } => {
                let (text, new) = encoder.text_and_logprobs(&GenerationDelta {
                    choice,
                    deltas,
                    tokens,
                });
                choices[choice].text.push_str(&text);
                if let (Some(all), Some(new)) = (&mut choices[choice].logprobs, new) {
                    all.tokens.extend(new.tokens);
                    all.token_logprobs.extend(new.token_logprobs);
                    all.top_logprobs.extend(new.top_logprobs);
                    all.text_offset.extend(new.text_offset);
                }
            }
            GenerationEvent::Finished { choice, end } => {
                let has_begun = end.is_whole() || 0 < generation.counts().n_output;
                let reason = end.finish_reason().filter(|_| has_begun);
                let reason = reason.ok_or_else(|| ApiError::of_end(&end))?;
                choices[choice].finish_reason = Some(reason);
            }
        }
    }
    if n_returned < n_made {
        choices = likeliest(choices, n_made, n_returned, |idx| {
            generation.mean_logprob(idx)
        });
    }
    let mut completion = encoder.chunk(choices, None);
    completion.usage = Some(Some(usage(generation.counts())));
    Ok(completion)
}

/// Of every `n_made` choices the `n_returned` of which the tokens are likeliest on average, the best
/// first; of equals the one that came first.
fn likeliest(
    mut choices: Vec<CompletionChoice>,
    n_made: usize,
    n_returned: usize,
    mean_logprob: impl Fn(usize) -> f64,
) -> Vec<CompletionChoice> {
    for of_prompt in choices.chunks_mut(n_made) {
        of_prompt.sort_by(|a, b| mean_logprob(b.index).total_cmp(&mean_logprob(a.index)));
    }
    let ranked = choices.into_iter().enumerate();
    let best = ranked.filter(|(rank, _)| rank % n_made < n_returned);
    best.enumerate()
        .map(|(index, (_, choice))| CompletionChoice { index, ..choice })
        .collect()
}

fn usage(counts: TokenCounts) -> Usage {
    Usage::new(counts.n_prompt, counts.n_cached, counts.n_output, None)
}

struct Encoder {
    id: String,
    created: u64,
    model: Arc<ServedModel>,
    model_name: String,
    wants_logprobs: bool,
    include_usage: bool,
    /// By choice.
    offsets: Vec<Offset>,
    /// By choice: what comes next is its prompt.
    is_prompt_due: Vec<bool>,
}

impl Encoder {
    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion".to_owned(),
            created: self.created,
            model: self.model_name.clone(),
            choices,
            usage: self.include_usage.then_some(usage),
        }
    }

    fn text_and_logprobs(
        &mut self,
        event: &GenerationDelta,
    ) -> (String, Option<CompletionLogprobs>) {
        let mut text = String::new();
        for delta in &event.deltas {
            text.push_str(delta.text());
        }
        let is_prompt = std::mem::take(&mut self.is_prompt_due[event.choice]);
        let prompt = is_prompt.then_some(&*text);
        let offset = &mut self.offsets[event.choice];
        let logprobs = (self.wants_logprobs && !event.tokens.is_empty())
            .then(|| logprobs::completion(&self.model.text, &event.tokens, prompt, offset));
        (text, logprobs)
    }
}

impl ChunkEncoder for Encoder {
    fn delta(&mut self, event: GenerationDelta, chunks: &mut Chunks) {
        let (text, logprobs) = self.text_and_logprobs(&event);
        if !text.is_empty() || logprobs.is_some() {
            let choice = CompletionChoice {
                index: event.choice,
                text,
                logprobs,
                finish_reason: None,
            };
            chunks.push(&self.chunk(vec![choice], None));
        }
    }

    fn finished(&mut self, index: usize, end: &ChoiceEnd, chunks: &mut Chunks) {
        let choice = CompletionChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: end.finish_reason(),
        };
        chunks.push(&self.chunk(vec![choice], None));
    }

    fn done(&mut self, counts: TokenCounts, chunks: &mut Chunks) {
        if self.include_usage {
            chunks.push(&self.chunk(Vec::new(), Some(usage(counts))));
        }
        chunks.push_done();
    }
}
