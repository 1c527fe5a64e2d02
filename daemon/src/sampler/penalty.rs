//! What the tokens so far and the client's bias add to the logits.

use super::{SampleContext, Scratch};

/// Marks a token of the prompt in the occurrence counts, whose lower bits count the output. No
/// output has 2^31 tokens.
const IN_PROMPT: u32 = 1 << 31;

/// Repetition penalty, then frequency and presence penalties, then bias.
pub(super) fn apply(scratch: &mut Scratch, logits: &mut [f32], ctx: &SampleContext<'_>) {
    let params = ctx.params;
    let repetition = params.repetition_penalty;
    let is_repetition_on = repetition != 1.0 && 0.0 < repetition && repetition.is_finite();
    let is_additive_on = params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
    if is_repetition_on || is_additive_on {
        let prompt = if is_repetition_on { ctx.prompt } else { &[] };
        count(scratch, prompt, ctx.output);
        for id in scratch.seen.drain(..) {
            let n = std::mem::take(&mut scratch.occurrences[id as usize]) & !IN_PROMPT;
            let Some(logit) = logits.get_mut(id as usize) else {
                continue;
            };
            if is_repetition_on {
                let is_positive = 0.0 < *logit;
                *logit = if is_positive {
                    *logit / repetition
                } else {
                    *logit * repetition
                };
            }
            if 0 < n {
                *logit -= n as f32 * params.frequency_penalty + params.presence_penalty;
            }
            *logit = bounded(*logit);
        }
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = bounded(*logit + bias);
        }
    }
}

fn count(scratch: &mut Scratch, prompt: &[u32], output: &[u32]) {
    let marks = output
        .iter()
        .map(|&t| (t, 1))
        .chain(prompt.iter().map(|&t| (t, IN_PROMPT)));
    for (token, mark) in marks {
        let Some(entry) = scratch.occurrences.get_mut(token as usize) else {
            continue;
        };
        if *entry == 0 {
            scratch.seen.push(token);
        }
        // A count is added, the prompt's mark is set once.
        *entry = if mark == IN_PROMPT {
            *entry | mark
        } else {
            *entry + mark
        };
    }
}

/// An overflowing penalty or bias stays a number, so that a token is lost only to NaN from the
/// model.
fn bounded(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}
