//! Who calls, which models they see, and what they are told when they may not.

use std::{sync::Arc, time::Instant};

use axum::http::{HeaderMap, HeaderName, header};
use dsd_proto::code::Code;

use super::error::ApiError;
use crate::{
    catalog::{Catalog, LookupError, ServedModel},
    tenants::{Caller, Cap, KeyError, OverCap, Refused, Tenants},
};

/// A request that was let in.
#[derive(Debug, Clone)]
pub(super) struct Entered {
    /// Who makes it.
    pub(super) caller: Caller,
    /// When its head was there.
    pub(super) arrived: Instant,
}

/// Lets a request in, or says why not.
///
/// # Errors
/// 401 without a key or with a wrong one.
pub(super) fn admit(
    tenants: &Tenants,
    headers: &HeaderMap,
    arrived: Instant,
) -> Result<Entered, ApiError> {
    let value = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = value(header::AUTHORIZATION).map(|value| match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim()),
        _ => None,
    });
    // Anthropic's clients.
    let api_key = || value(HeaderName::from_static("x-api-key")).map(|key| Some(key.trim()));
    let key = bearer.or_else(api_key);
    let caller = match key {
        Some(None) if !tenants.is_open() => {
            return Err(ApiError::new(
                Code::Unauthorized,
                "the authorization scheme is not Bearer",
            ));
        }
        key => tenants.admit(key.flatten(), arrived),
    };
    let unauthorized = |e: KeyError| ApiError::new(Code::Unauthorized, e.to_string());
    Ok(Entered {
        caller: caller.map_err(unauthorized)?,
        arrived,
    })
}

/// The model that a request of `caller` means. Models that it may not use are not there for it: a
/// 403 would tell their names to whoever guesses.
///
/// # Errors
/// As [`Catalog::lookup`].
pub(super) fn lookup(
    catalog: &Catalog,
    caller: &Caller,
    name: Option<&str>,
) -> Result<Arc<ServedModel>, ApiError> {
    let found = catalog.lookup(name);
    if caller.tenant().models.is_none() {
        return found.map_err(ApiError::from);
    }
    let served = visible(catalog, caller);
    let names = || served.iter().map(|model| model.name.clone()).collect();
    match (name, found) {
        // An alias is its model's.
        (Some(name), found) if caller.may_use(found.as_ref().map_or(name, |m| &m.name)) => found
            .map_err(|e| match e {
                LookupError::Unknown { name, .. } => LookupError::Unknown {
                    name,
                    served: names(),
                },
                other => other,
            }),
        (Some(name), _) => {
            caller.refused(Refused::Model);
            Err(LookupError::Unknown {
                name: name.to_owned(),
                served: names(),
            })
        }
        (None, _) => match served.as_slice() {
            [] => Err(LookupError::NothingServed),
            [model] => Ok(Arc::clone(model)),
            _ => Err(LookupError::NameNeeded { served: names() }),
        },
    }
    .map_err(ApiError::from)
}

/// The models that `caller` may use, of those that are served.
pub(super) fn visible(catalog: &Catalog, caller: &Caller) -> Vec<Arc<ServedModel>> {
    let mut served = catalog.served();
    served.retain(|model| caller.may_use(&model.name));
    served
}

/// What a tenant is told that is over a cap of its own.
pub(super) fn over_cap(over: OverCap) -> ApiError {
    let Some(retry_after) = over.retry_after else {
        let message = "the request has more choices than its tenant may have at once";
        return ApiError::new(Code::InvalidRequest, message).with_param("n");
    };
    let what = match over.cap {
        Cap::Concurrency => "requests at once",
        Cap::Requests => "requests per minute",
        Cap::Tokens => "tokens per minute",
    };
    let message = format!("the tenant is over its limit of {what}");
    ApiError {
        retry_after: Some(retry_after),
        ..ApiError::new(Code::RateLimited, message)
    }
}
