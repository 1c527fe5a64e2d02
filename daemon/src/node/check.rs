//! What a start would refuse on this machine, and what its operator should know, all at once: the node
//! without its sockets, processes or weights in memory. Changes nothing.
//!
//! Called by `dsd check-config`.

use std::{
    io,
    net::{TcpListener, UdpSocket},
};

use dsd_proto::quic::{PkiError, Role, pki};

use super::{
    descriptors, explain,
    explain::{ExplainedModel, NoPlan},
    source_of, state_folder,
};
use crate::{
    config::{Config, Origin},
    runtime::clock,
    telemetry::{self, LOG_FILTER_ENV, TelemetryError, chain},
    tenants::{Now, Tenants},
};

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A start would be refused; otherwise it is odd.
    pub is_error: bool,
    /// Where to change something.
    pub origin: Option<Origin>,
    /// What is wrong.
    pub message: String,
    /// What to do, where the message does not say it.
    pub suggestion: Option<String>,
}

impl Finding {
    fn error(origin: Option<&Origin>, message: impl Into<String>) -> Self {
        Self {
            is_error: true,
            origin: origin.cloned(),
            message: message.into(),
            suggestion: None,
        }
    }

    fn warning(origin: Option<&Origin>, message: impl Into<String>) -> Self {
        Self {
            is_error: false,
            ..Self::error(origin, message)
        }
    }

    fn hint(mut self, suggestion: impl Into<String>) -> Self {
        self.suggestion = Some(suggestion.into());
        self
    }
}

/// What is found for a configuration, and its models as they would run. With `is_whole` false, the
/// configuration lacks what was refused of it, and what only its defaults say is not looked at.
pub fn check(config: &Config, is_whole: bool) -> (Vec<Finding>, Vec<ExplainedModel>) {
    let mut check = Check {
        config,
        is_whole,
        findings: Vec::new(),
        is_running: false,
    };
    check.log_filter();
    check.state_folder();
    check.addresses();
    check.tenants();
    if let Err(e) = descriptors::connections(config) {
        check.findings.push(Finding::error(None, chain(&e)));
    }
    let models = explain::explain(config);
    for model in &models {
        check.model(model);
    }
    (check.findings, models)
}

struct Check<'a> {
    config: &'a Config,
    is_whole: bool,
    findings: Vec<Finding>,
    /// A node has the state folder: this one, most often, and what it holds is not free.
    is_running: bool,
}

impl Check<'_> {
    fn origin(&self, key: &str) -> Option<&Origin> {
        self.config.origins.of(key)
    }

    /// Whether the value of a key is what the operator meant.
    fn is_meant(&self, key: &str) -> bool {
        self.is_whole || self.origin(key).is_some()
    }

    fn log_filter(&mut self) {
        let (filter, is_of_env) = telemetry::log_filter(&self.config.log);
        let Err(e) = telemetry::read_filter(&filter) else {
            return;
        };
        let env = Origin::Env(LOG_FILTER_ENV.to_owned());
        let origin = match is_of_env {
            true => Some(&env),
            false => self.origin("log.filter"),
        };
        let mut finding = Finding::error(origin, chain(&e));
        if let TelemetryError::NoTarget { suggestion, .. } = e {
            finding.suggestion = suggestion.map(|word| format!("did you mean `{word}`?"));
        }
        self.findings.push(finding);
    }

    fn state_folder(&mut self) {
        let key = "node.state_dir";
        if !self.is_meant(key) {
            return;
        }
        let folder = &self.config.node.state_dir;
        let origin = self.origin(key).cloned();
        let origin = origin.as_ref();
        match state_folder::look(folder) {
            Ok(None) => {}
            Ok(Some(in_use)) => {
                self.is_running = true;
                let found = Finding::warning(origin, in_use.to_string());
                self.findings.push(found);
            }
            Err(e) => {
                self.findings.push(Finding::error(origin, chain(&e)));
                return;
            }
        }
        if let Some(exposure) = state_folder::exposure(folder) {
            self.findings.push(Finding::warning(origin, exposure));
        }
        // Others are made anew by a start.
        let identity = pki::load(&folder.join("pki"), Role::Node, clock::unix_seconds());
        if let Err(e @ (PkiError::KeyExposed { .. } | PkiError::Read { .. })) = identity {
            self.findings.push(Finding::error(origin, chain(&e)));
        }
    }

    fn addresses(&mut self) {
        let (http, quic) = (self.config.http.listen, self.config.quic.listen);
        for (key, protocol, address, outcome) in [
            (
                "http.listen",
                "HTTP",
                http,
                TcpListener::bind(http).map(drop),
            ),
            ("quic.listen", "QUIC", quic, UdpSocket::bind(quic).map(drop)),
        ] {
            let Err(e) = outcome else { continue };
            if !self.is_meant(key) {
                continue;
            }
            let message = format!("cannot listen on {protocol} {address}: {e}");
            let origin = self.origin(key);
            let finding = match e.kind() {
                io::ErrorKind::AddrInUse if self.is_running => {
                    Finding::warning(origin, message).hint("is it the node that runs?")
                }
                io::ErrorKind::AddrInUse => {
                    let hint = format!("stop what listens there, or choose another with {key}");
                    Finding::error(origin, message).hint(hint)
                }
                io::ErrorKind::PermissionDenied => Finding::error(origin, message)
                    .hint(format!("choose a port from 1024 on with {key}")),
                _ => Finding::error(origin, message)
                    .hint(format!("choose an address of this machine with {key}")),
            };
            self.findings.push(finding);
        }
    }

    fn tenants(&mut self) {
        let key = match self.config.service.tenants_file {
            Some(_) => "service.tenants_file",
            None => "http.api_keys_file",
        };
        if let Err(e) = Tenants::read(source_of(self.config), Now::read()) {
            // Of the file itself, where it can be read.
            let origin = e.origin().or_else(|| self.origin(key));
            let finding = Finding::error(origin, chain(&e));
            self.findings.push(finding);
        }
    }

    fn model(&mut self, explained: &ExplainedModel) {
        let models = &self.config.models;
        let Some(model) = models.iter().find(|model| model.name == explained.name) else {
            return;
        };
        let origin = model.origins.of("path");
        let Err(no_plan) = &explained.plan else {
            return;
        };
        let message = format!(
            "model `{}` at `{}`: {no_plan}",
            model.name,
            model.path.display()
        );
        let can_wait = !model.required || matches!(no_plan, NoPlan::NoRoom(_)) && self.is_running;
        let finding = match can_wait {
            true => Finding::warning(origin, message),
            false => Finding::error(origin, message),
        };
        self.findings.push(match no_plan {
            NoPlan::Unreadable(_) => {
                finding.hint("correct `path`, or let the node do without it: `required = false`")
            }
            NoPlan::NoRoom(_) => finding.hint("give it less with `kv_tokens`, or free memory"),
            NoPlan::Refused(_) => finding,
        });
    }
}
