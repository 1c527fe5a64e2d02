//! Tenants for `dsctl`: the node's tenants in the wire's words.

use std::sync::Arc;

use dsd_proto::{
    code::Code,
    wire::admin::{
        CapChange, ErrorReply, ModelsChange, TenantAddRequest, TenantCap, TenantClass, TenantEntry,
        TenantKeyReply, TenantListReply, TenantPatch, TenantRefusals, TenantRemoveReply,
        TenantRemoveRequest, TenantRotateKeyRequest, TenantSetRequest, TenantShowReply,
    },
};
use tokio::task;

use super::{Admin, clamped, millis, not_found};
use crate::{
    flow::Class,
    runtime::clock,
    telemetry,
    tenants::{self, Change, EditError, Now, Patch, Refused, TenantReport, Tenants},
};

pub(super) fn list(admin: &Admin) -> TenantListReply {
    let reports = admin.tenants.reports(clock::now());
    TenantListReply {
        tenants: reports.iter().map(entry).collect(),
    }
}

pub(super) fn show(admin: &Admin, name: &str) -> Result<TenantShowReply, ErrorReply> {
    let report = admin.tenants.report(name, clock::now());
    let report = report.ok_or_else(|| not_found(format!("no tenant is called `{name}`")))?;
    let caps = &report.tenant.caps;
    let left = &report.left;
    let cap = |max: Option<u64>, left: Option<u64>| TenantCap { max, left };
    let refusals = Refused::ALL.iter().zip(report.usage.n_refused);
    Ok(TenantShowReply {
        entry: entry(&report),
        models: report
            .tenant
            .models
            .as_ref()
            .map(|models| models.iter().cloned().collect()),
        concurrency: cap(
            caps.concurrency.map(u64::from),
            left.concurrency.map(u64::from),
        ),
        requests_per_minute: cap(caps.requests_per_minute.map(u64::from), left.requests),
        tokens_per_minute: cap(caps.tokens_per_minute, left.tokens),
        n_prompt_tokens: report.usage.n_prompt_tokens,
        n_cached_tokens: report.usage.n_cached_tokens,
        n_output_tokens: report.usage.n_output_tokens,
        refusals: refusals
            .map(|(why, n)| TenantRefusals {
                reason: why.word().to_owned(),
                n,
            })
            .collect(),
        queue_ms_p50: report.usage.queue_time(50).map(millis),
        queue_ms_p95: report.usage.queue_time(95).map(millis),
    })
}

pub(super) async fn add(
    admin: &Admin,
    request: TenantAddRequest,
) -> Result<TenantKeyReply, ErrorReply> {
    let TenantAddRequest { name, patch } = request;
    let patch = patch_of(patch);
    edit(admin, name, move |tenants, name| {
        tenants.add(name, &patch, Now::read())
    })
    .await
    .map(|(name, key)| TenantKeyReply { name, key })
}

pub(super) async fn set(
    admin: &Admin,
    request: TenantSetRequest,
) -> Result<TenantShowReply, ErrorReply> {
    let TenantSetRequest { name, patch } = request;
    let patch = patch_of(patch);
    let (name, ()) = edit(admin, name, move |tenants, name| {
        tenants.set(name, &patch, Now::read())
    })
    .await?;
    show(admin, &name)
}

pub(super) async fn rotate_key(
    admin: &Admin,
    request: TenantRotateKeyRequest,
) -> Result<TenantKeyReply, ErrorReply> {
    let TenantRotateKeyRequest { name, grace_s } = request;
    let grace = tenants::grace(grace_s).ok_or_else(|| {
        let max = tenants::GRACE_MAX.as_secs();
        let message = format!("the grace is {grace_s} s, at most {max} s are allowed");
        ErrorReply::new(Code::InvalidRequest, message)
    })?;
    edit(admin, name, move |tenants, name| {
        tenants.rotate_key(name, grace, Now::read())
    })
    .await
    .map(|(name, key)| TenantKeyReply { name, key })
}

pub(super) async fn remove(
    admin: &Admin,
    request: TenantRemoveRequest,
) -> Result<TenantRemoveReply, ErrorReply> {
    let usage = admin.tenants.report(&request.name, clock::now());
    let n_open = usage.map_or(0, |report| report.usage.n_running + report.usage.n_waiting);
    let (name, ()) = edit(admin, request.name, move |tenants, name| {
        tenants.remove(name, Now::read())
    })
    .await?;
    Ok(TenantRemoveReply { name, n_open })
}

/// Changes the file on a thread that may wait for the disk. A caller that goes away stops nothing:
/// the file is changed or not.
async fn edit<T: Send + 'static>(
    admin: &Admin,
    name: String,
    change: impl FnOnce(&Tenants, &str) -> Result<T, EditError> + Send + 'static,
) -> Result<(String, T), ErrorReply> {
    let tenants = Arc::clone(&admin.tenants);
    let changed = task::spawn_blocking(move || {
        let changed = change(&tenants, &name);
        match &changed {
            Ok(_) => tracing::info!(tenant = name, "the tenants' file was changed"),
            Err(e) => tracing::info!(
                tenant = name,
                error = telemetry::chain(e),
                "a change of the tenants' file was refused"
            ),
        }
        changed.map(|changed| (name, changed))
    });
    match changed.await {
        Ok(changed) => changed.map_err(|e| refusal(&e)),
        Err(e) => {
            tracing::error!(error = %e, "changing the tenants' file broke off");
            let message = "the change broke off; the log of the node has the cause";
            Err(ErrorReply::new(Code::Internal, message))
        }
    }
}

fn refusal(error: &EditError) -> ErrorReply {
    let code = match error {
        EditError::Unknown { .. } => Code::NotFound,
        EditError::NoTenantsFile
        | EditError::Old(_)
        | EditError::New(_)
        | EditError::Exists { .. }
        | EditError::Form { .. }
        | EditError::Raced { .. } => Code::InvalidRequest,
        EditError::Write { .. } | EditError::Random(_) => Code::Internal,
    };
    ErrorReply::new(code, telemetry::chain(error))
}

fn entry(report: &TenantReport) -> TenantEntry {
    TenantEntry {
        name: report.tenant.name.to_string(),
        weight: report.tenant.weight,
        class: match report.tenant.class {
            Class::Interactive => TenantClass::Interactive,
            Class::Batch => TenantClass::Batch,
        },
        n_keys: clamped(report.n_keys),
        n_running: report.usage.n_running,
        n_waiting: report.usage.n_waiting,
        n_requests: report.usage.n_requests,
        n_refused: report.usage.n_refused.iter().sum(),
        work_share: report.share,
    }
}

fn patch_of(wire: TenantPatch) -> Patch {
    let cap = |change: CapChange| match change {
        CapChange::Keep => Change::Keep,
        CapChange::Clear => Change::Clear,
        CapChange::To(cap) => Change::To(cap),
    };
    Patch {
        weight: wire.weight,
        class: wire.class.map(|class| match class {
            TenantClass::Interactive => Class::Interactive,
            TenantClass::Batch => Class::Batch,
        }),
        concurrency: cap(wire.concurrency),
        requests_per_minute: cap(wire.requests_per_minute),
        tokens_per_minute: cap(wire.tokens_per_minute),
        models: match wire.models {
            ModelsChange::Keep => Change::Keep,
            ModelsChange::All => Change::Clear,
            ModelsChange::To(models) => Change::To(models),
        },
    }
}
