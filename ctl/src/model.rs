//! `dsctl model`: list, load, unload, verify.

use std::fs;

use dsd_proto::{
    quic::{Client, Event, StreamCall},
    wire::admin::{
        ModelListReply, ModelListRequest, ModelLoadReply, ModelLoadRequest, ModelUnloadRequest,
        ModelVerifyReply, ModelVerifyRequest, Progress,
    },
};
use serde_json::json;

use crate::{
    cli::{Global, ModelCommand},
    failure::{Exit, Failure},
    output::{self, Output},
    progress::Bar,
    session, status,
};

/// Runs one verb.
pub(crate) async fn run(
    global: &Global,
    verb: ModelCommand,
    out: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let client = session::connect(global).await?;
    // No failure leaves before the close: the node would wait for a client that is gone.
    let exit = match verb {
        ModelCommand::List => list(global, &client, out).await,
        ModelCommand::Load { path_or_name } => {
            let request = ModelLoadRequest {
                path_or_name: absolute(path_or_name),
            };
            let reply = watch(global, &client, &request, out).await;
            reply.and_then(|reply| print_loaded(&reply, out))
        }
        ModelCommand::Unload { name } => unload(global, &client, name, out).await,
        ModelCommand::Verify { name } => {
            let reply = watch(global, &client, &ModelVerifyRequest { name }, out).await;
            reply.and_then(|reply| print_verified(&reply, out))
        }
    };
    client.close().await;
    exit
}

/// The node has another working folder than this shell, so `./model` is spelled out. Anything that
/// does not begin with a dot is a name, or a path on the node.
fn absolute(path_or_name: String) -> String {
    if !path_or_name.starts_with("./") && !path_or_name.starts_with("../") {
        return path_or_name;
    }
    match fs::canonicalize(&path_or_name) {
        Ok(path) => path.into_os_string().into_string().unwrap_or(path_or_name),
        // The node says what is wrong with it.
        Err(_) => path_or_name,
    }
}

async fn list(global: &Global, client: &Client, out: &mut Output<'_>) -> Result<Exit, Failure> {
    let reply = client
        .call(&ModelListRequest {}, session::call_timeout(global))
        .await
        .map_err(|e| Failure::of_call(&e))?;
    if out.is_json() {
        out.json(&reply)?;
    } else {
        print_list(&reply, out)?;
    }
    Ok(Exit::Done)
}

fn print_list(reply: &ModelListReply, out: &mut Output<'_>) -> Result<(), Failure> {
    if reply.models.is_empty() {
        return out.line("no model is loaded and the model store is empty");
    }
    let row = |entry: &dsd_proto::wire::admin::ModelEntry| {
        vec![
            entry.name.clone(),
            entry
                .state
                .as_ref()
                .map_or("-", status::state_word)
                .to_owned(),
            entry.architecture.clone(),
            entry.format.clone(),
            output::bytes(entry.bytes),
            entry.path.clone(),
        ]
    };
    let rows: Vec<_> = reply.models.iter().map(row).collect();
    out.table(
        &["MODEL", "STATE", "ARCHITECTURE", "FORMAT", "SIZE", "PATH"],
        &rows,
    )
}

async fn unload(
    global: &Global,
    client: &Client,
    name: String,
    out: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let reply = client
        .call(&ModelUnloadRequest { name }, session::call_timeout(global))
        .await
        .map_err(|e| Failure::of_call(&e))?;
    if out.is_json() {
        out.json(&reply)?;
    } else {
        out.line(&format!(
            "unloaded {}, {} requests ended",
            reply.name, reply.n_requests_ended
        ))?;
    }
    Ok(Exit::Done)
}

/// Follows a long call to its reply.
async fn watch<C>(
    global: &Global,
    client: &Client,
    request: &C,
    out: &mut Output<'_>,
) -> Result<C::Reply, Failure>
where
    C: StreamCall<Item = Progress>,
{
    let mut bar = Bar::new(out.is_json());
    let mut interrupts = session::interrupts()?;
    let mut stream = client
        .stream(request, session::call_timeout(global))
        .await
        .map_err(|e| Failure::of_call(&e))?;
    let reply = loop {
        let event = tokio::select! {
            event = stream.next(session::piece_timeout(global)) => event,
            _ = interrupts.recv() => {
                stream.cancel();
                bar.finish();
                return Err(Failure::new(Exit::Interrupted, "interrupted", "interrupted"));
            }
        };
        match event {
            Ok(Some(Event::Item(progress))) => {
                bar.update(&progress);
                if out.is_json() {
                    out.json(&json!({"progress": progress}))?;
                }
            }
            Ok(Some(Event::Reply(reply))) => break Ok(reply),
            Ok(None) => break Err(Failure::new(Exit::Unreachable, "lost", "no reply")),
            Err(error) => break Err(Failure::of_call(&error)),
        }
    };
    bar.finish();
    reply
}

fn print_loaded(reply: &ModelLoadReply, out: &mut Output<'_>) -> Result<Exit, Failure> {
    if out.is_json() {
        out.json(&json!({"loaded": reply}))?;
        return Ok(Exit::Done);
    }
    out.line(&format!(
        "loaded {} ({}) in {:.1} s: context {}, weights {}, KV {} in {} blocks, workspace {}",
        reply.name,
        reply.architecture,
        reply.load_ms as f64 / 1000.0,
        reply.context_len,
        output::bytes(reply.bytes_mapped),
        output::bytes(reply.kv_bytes),
        reply.n_blocks,
        output::bytes(reply.workspace_bytes),
    ))?;
    Ok(Exit::Done)
}

fn print_verified(reply: &ModelVerifyReply, out: &mut Output<'_>) -> Result<Exit, Failure> {
    let exit = if reply.findings.is_empty() {
        Exit::Done
    } else {
        Exit::Unhealthy
    };
    if out.is_json() {
        out.json(&json!({"verified": reply}))?;
        return Ok(exit);
    }
    out.line(&format!(
        "{}: {} tensors in {} files, {}, digest {}",
        reply.name,
        reply.n_tensors,
        reply.n_files,
        output::bytes(reply.bytes),
        reply.digest,
    ))?;
    if reply.findings.is_empty() {
        out.line("nothing wrong was found")?;
        return Ok(exit);
    }
    let rows: Vec<_> = reply
        .findings
        .iter()
        .map(|f| {
            vec![
                f.file.clone(),
                f.tensor.clone(),
                f.expected.clone(),
                f.found.clone(),
            ]
        })
        .collect();
    out.table(&["FILE", "TENSOR", "EXPECTED", "FOUND"], &rows)?;
    Ok(exit)
}
