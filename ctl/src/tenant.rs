//! `dsctl tenant`: list, show, add, set, rotate-key, remove.

use dsd_proto::{
    quic::{Call, Client},
    wire::admin::{
        CapChange, ModelsChange, TenantAddRequest, TenantCap, TenantClass, TenantKeyReply,
        TenantListReply, TenantListRequest, TenantPatch, TenantRemoveRequest,
        TenantRotateKeyRequest, TenantSetRequest, TenantShowReply, TenantShowRequest,
    },
};
use serde::Serialize;

use crate::{
    cli::{Cap, Global, TenantClassArg, TenantCommand, TenantSettings},
    failure::{Exit, Failure},
    output::Output,
    session,
};

/// What `--model` takes for no limit.
const ALL_MODELS: &str = "all";

/// Runs one verb.
pub(crate) async fn run(
    global: &Global,
    verb: TenantCommand,
    out: &mut Output<'_>,
) -> Result<Exit, Failure> {
    let client = session::connect(global).await?;
    // No failure leaves before the close: the node would wait for a client that is gone.
    let done = match verb {
        TenantCommand::List => {
            let reply = call(global, &client, &TenantListRequest {}).await;
            reply.and_then(|reply| print(&reply, out, print_list))
        }
        TenantCommand::Show { name } => {
            let reply = call(global, &client, &TenantShowRequest { name }).await;
            reply.and_then(|reply| print(&reply, out, print_tenant))
        }
        TenantCommand::Add { name, settings } => {
            let patch = patch(settings);
            let reply = call(global, &client, &TenantAddRequest { name, patch }).await;
            reply.and_then(|reply| print(&reply, out, print_key))
        }
        TenantCommand::Set { name, settings } => {
            let patch = patch(settings);
            let reply = call(global, &client, &TenantSetRequest { name, patch }).await;
            reply.and_then(|reply| print(&reply, out, print_tenant))
        }
        TenantCommand::RotateKey { name, grace } => {
            let request = TenantRotateKeyRequest {
                name,
                grace_s: grace,
            };
            let reply = call(global, &client, &request).await;
            reply.and_then(|reply| print(&reply, out, print_key))
        }
        TenantCommand::Remove { name } => {
            let reply = call(global, &client, &TenantRemoveRequest { name }).await;
            reply.and_then(|reply| {
                print(&reply, out, |reply, out| {
                    let (name, n) = (&reply.name, reply.n_open);
                    out.line(&format!("removed {name}, {n} of its requests were open"))
                })
            })
        }
    };
    client.close().await;
    done.map(|()| Exit::Done)
}

async fn call<C: Call>(global: &Global, client: &Client, request: &C) -> Result<C::Reply, Failure> {
    let reply = client.call(request, session::call_timeout(global)).await;
    reply.map_err(|e| Failure::of_call(&e))
}

fn print<R: Serialize>(
    reply: &R,
    out: &mut Output<'_>,
    text: impl FnOnce(&R, &mut Output<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    if out.is_json() {
        out.json(reply)
    } else {
        text(reply, out)
    }
}

fn patch(settings: TenantSettings) -> TenantPatch {
    let cap = |cap: Option<Cap>| match cap {
        None => CapChange::Keep,
        Some(Cap(None)) => CapChange::Clear,
        Some(Cap(Some(max))) => CapChange::To(max),
    };
    TenantPatch {
        weight: settings.weight,
        class: settings.class.map(|class| match class {
            TenantClassArg::Interactive => TenantClass::Interactive,
            TenantClassArg::Batch => TenantClass::Batch,
        }),
        concurrency: cap(settings.concurrency),
        requests_per_minute: cap(settings.requests_per_minute),
        tokens_per_minute: cap(settings.tokens_per_minute),
        models: match settings.models.as_slice() {
            [] => ModelsChange::Keep,
            [all] if all == ALL_MODELS => ModelsChange::All,
            _ => ModelsChange::To(settings.models),
        },
    }
}

fn class_word(class: &TenantClass) -> &'static str {
    match class {
        TenantClass::Interactive => "interactive",
        TenantClass::Batch => "batch",
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn print_list(reply: &TenantListReply, out: &mut Output<'_>) -> Result<(), Failure> {
    let header = [
        "TENANT", "WEIGHT", "CLASS", "KEYS", "RUNNING", "WAITING", "REQUESTS", "REFUSED", "SHARE",
    ];
    let rows: Vec<Vec<String>> = reply
        .tenants
        .iter()
        .map(|tenant| {
            vec![
                tenant.name.clone(),
                tenant.weight.to_string(),
                class_word(&tenant.class).to_owned(),
                tenant.n_keys.to_string(),
                tenant.n_running.to_string(),
                tenant.n_waiting.to_string(),
                tenant.n_requests.to_string(),
                tenant.n_refused.to_string(),
                percent(tenant.work_share),
            ]
        })
        .collect();
    out.table(&header, &rows)
}

fn print_tenant(reply: &TenantShowReply, out: &mut Output<'_>) -> Result<(), Failure> {
    let entry = &reply.entry;
    let models = match &reply.models {
        None => "all".to_owned(),
        Some(models) => models.join(", "),
    };
    let millis = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
    let cap = |cap: &TenantCap| match (cap.max, cap.left) {
        (Some(max), Some(left)) => format!("{max}, {left} left"),
        (Some(max), None) => max.to_string(),
        (None, _) => "none".to_owned(),
    };
    let refusals: Vec<String> = reply
        .refusals
        .iter()
        .map(|refusals| format!("{} {}", refusals.reason, refusals.n))
        .collect();
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let rows = [
        row("weight", entry.weight.to_string()),
        row("class", class_word(&entry.class).to_owned()),
        row("models", models),
        row("keys", entry.n_keys.to_string()),
        row("concurrency", cap(&reply.concurrency)),
        row("requests a minute", cap(&reply.requests_per_minute)),
        row("tokens a minute", cap(&reply.tokens_per_minute)),
        row("running", entry.n_running.to_string()),
        row("waiting", entry.n_waiting.to_string()),
        row("requests", entry.n_requests.to_string()),
        row("tokens in", reply.n_prompt_tokens.to_string()),
        row("tokens in, cached", reply.n_cached_tokens.to_string()),
        row("tokens out", reply.n_output_tokens.to_string()),
        row("refused", refusals.join(", ")),
        row("queue time p50", millis(reply.queue_ms_p50)),
        row("queue time p95", millis(reply.queue_ms_p95)),
        row("share of work, last minute", percent(entry.work_share)),
    ];
    out.table(&["TENANT", &entry.name], &rows)
}

/// The key alone on its line, ready to be piped; nobody can show it again.
fn print_key(reply: &TenantKeyReply, out: &mut Output<'_>) -> Result<(), Failure> {
    out.line(&reply.key)
}
