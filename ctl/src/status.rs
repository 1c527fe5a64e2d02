//! `dsctl status`: a node, its models and what they are doing.

use dsd_proto::wire::admin::{ModelState, ModelStatus, StatusReply, StatusRequest};

use crate::{
    cli::Global,
    failure::{Exit, Failure},
    output::{self, Output},
    session,
};

/// Prints the status; a node that is not ready is [`Exit::Unhealthy`].
pub(crate) async fn run(global: &Global, out: &mut Output<'_>) -> Result<Exit, Failure> {
    let client = session::connect(global).await?;
    let reply = client
        .call(&StatusRequest {}, session::call_timeout(global))
        .await
        .map_err(|e| Failure::of_call(&e));
    client.close().await;
    let reply = reply?;
    if out.is_json() {
        out.json(&reply)?;
    } else {
        print(&reply, out)?;
    }
    Ok(if reply.ready {
        Exit::Done
    } else {
        Exit::Unhealthy
    })
}

fn print(reply: &StatusReply, out: &mut Output<'_>) -> Result<(), Failure> {
    let word = if reply.ready { "ready" } else { "NOT READY" };
    out.line(&format!(
        "node     {} of cluster {}, dsd {}",
        reply.node, reply.cluster, reply.version
    ))?;
    out.line(&format!("state    {word}: {}", reply.ready_reason))?;
    out.line(&format!("uptime   {}", output::seconds(reply.uptime_s)))?;
    out.line(&format!("http     {}", reply.http_address))?;
    out.line(&format!("quic     {}", reply.quic_address))?;
    if reply.models.is_empty() {
        return out.line("no model is loaded; load one with `dsctl model load`");
    }
    out.line("")?;
    let header = [
        "MODEL",
        "ARCHITECTURE",
        "STATE",
        "CONTEXT",
        "RUNNING",
        "WAITING",
        "KV BLOCKS",
        "STEPS",
        "PROMPT",
        "OUTPUT",
        "PREEMPTED",
        "LAST TOKEN",
        "WEIGHTS",
        "KV",
        "WORKSPACE",
    ];
    let rows: Vec<_> = reply.models.iter().map(row).collect();
    out.table(&header, &rows)
}

fn row(model: &ModelStatus) -> Vec<String> {
    let age = model.last_token_age_ms.map_or_else(
        || "never".to_owned(),
        |ms| match ms {
            0..10_000 => format!("{ms} ms ago"),
            _ => format!("{} ago", output::seconds(ms / 1000)),
        },
    );
    vec![
        model.name.clone(),
        model.architecture.clone(),
        state_word(&model.state).to_owned(),
        model.context_len.to_string(),
        model.n_running.to_string(),
        model.n_waiting.to_string(),
        format!("{}/{}", model.n_blocks_used, model.n_blocks),
        model.n_steps.to_string(),
        model.n_prompt_tokens.to_string(),
        model.n_output_tokens.to_string(),
        model.n_preemptions.to_string(),
        age,
        output::bytes(model.bytes_mapped),
        output::bytes(model.kv_bytes),
        output::bytes(model.workspace_bytes),
    ]
}

/// The word for a model's state.
pub(crate) fn state_word(state: &ModelState) -> &'static str {
    match state {
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
        ModelState::Stalled => "stalled",
        ModelState::Stopping => "stopping",
        ModelState::Failed => "failed",
    }
}
