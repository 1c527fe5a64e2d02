//! `dsd check-config`: everything that `serve` would refuse, and with `--explain` what the configuration
//! means.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Args;
use dsd::{
    config::{self, ConfigError, Origin},
    node::{self, ExplainedModel, ExplainedPlan, ExplainedValue, Finding},
    telemetry::chain,
};
use serde_json::{Value, json};

use super::serve::ConfigArgs;

#[derive(Debug, Args)]
pub(crate) struct CheckConfig {
    #[command(flatten)]
    file: ConfigArgs,
    /// Print what each model will run with, where each value comes from, and its memory plan.
    #[arg(long)]
    explain: bool,
    /// Print all that was found, and what `--explain` says, as one JSON document.
    #[arg(long)]
    json: bool,
}

impl CheckConfig {
    /// Fails when a start would be refused, or would go on without a model that is required.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let (config, problems) = config::problems(self.file.path(), env::vars());
        let (found, models) = node::check(&config, problems.is_empty());
        let mut findings: Vec<Finding> = problems.iter().map(finding_of).collect();
        findings.extend(found);
        findings.extend(
            config::unread_variables(env::vars())
                .into_iter()
                .map(unread),
        );
        let (errors, warnings): (Vec<_>, Vec<_>) = findings.iter().partition(|f| f.is_error);
        // Models of half a configuration would be explained wrongly.
        let explained = (self.explain && problems.is_empty()).then_some(models);
        let text = match (self.json, &explained) {
            (true, _) => {
                let list =
                    |findings: &[&Finding]| findings.iter().map(|f| finding_json(f)).collect();
                let (errors, warnings): (Vec<Value>, Vec<Value>) = (list(&errors), list(&warnings));
                let mut document = json!({ "errors": errors, "warnings": warnings });
                if let Some(models) = &explained {
                    document["models"] = models.iter().map(as_json).collect();
                }
                format!("{document}\n")
            }
            (false, None) => String::new(),
            (false, Some(models)) if models.is_empty() => {
                "the configuration names no models\n".to_owned()
            }
            (false, Some(models)) => models.iter().map(as_table).collect::<Vec<_>>().join("\n"),
        };
        io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write to standard output")?;
        if !self.json {
            let warnings = warnings
                .iter()
                .map(|f| format!("dsd: warning: {}\n", line(f)));
            let errors = errors.iter().map(|f| format!("dsd: {}\n", line(f)));
            // A closed standard error hears nothing.
            let _ = io::stderr().write_all(warnings.chain(errors).collect::<String>().as_bytes());
        }
        Ok(match errors.is_empty() {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }
}

fn finding_of(problem: &ConfigError) -> Finding {
    Finding {
        is_error: true,
        origin: problem.origin().cloned(),
        message: without_place(chain(problem), problem.origin()),
        suggestion: problem.suggestion(),
    }
}

/// A message without the place that it begins with.
fn without_place(message: String, origin: Option<&Origin>) -> String {
    let place = origin.map(|origin| format!("{origin}: "));
    let inside = place.and_then(|place| message.strip_prefix(&place).map(str::to_owned));
    inside.unwrap_or(message)
}

fn unread(name: String) -> Finding {
    Finding {
        is_error: false,
        message: format!("nothing reads the environment variable {name}"),
        origin: Some(Origin::Env(name)),
        suggestion: None,
    }
}

/// A finding as a person reads it: with its place and what to do, which most messages say themselves.
fn line(finding: &Finding) -> String {
    let Finding {
        origin,
        message,
        suggestion,
        ..
    } = finding;
    let place = origin.as_ref().map(|origin| format!("{origin}: "));
    let place = place.filter(|place| !message.starts_with(place.as_str()));
    let place = place.unwrap_or_default();
    let suggestion = suggestion
        .as_ref()
        .filter(|s| !message.contains(s.as_str()));
    let suggestion = suggestion.map_or_else(String::new, |s| format!("; {s}"));
    format!("{place}{message}{suggestion}")
}

fn finding_json(finding: &Finding) -> Value {
    let (file, line, variable) = match &finding.origin {
        Some(Origin::Line { file, line }) => (Some(file), Some(*line), None),
        Some(Origin::File(file)) => (Some(file), None, None),
        Some(Origin::Env(name) | Origin::Flag(name)) => (None, None, Some(name)),
        None => (None, None, None),
    };
    json!({
        "file": file,
        "line": line,
        "variable": variable,
        "message": finding.message,
        "suggestion": finding.suggestion,
    })
}

fn origin(value: &ExplainedValue) -> String {
    let origin = value.origin.as_ref();
    origin.map_or_else(|| "default".to_owned(), ToString::to_string)
}

fn as_table(model: &ExplainedModel) -> String {
    let mut text = format!("{} ({})\n", model.name, model.path.display());
    let rows: Vec<[String; 3]> = model
        .values
        .iter()
        .map(|value| {
            let shown = match (&*value.value, &value.comes_to) {
                (plain, None) => plain.to_owned(),
                ("", Some(comes_to)) => comes_to.clone(),
                (plain, Some(comes_to)) => format!("{plain}, here {comes_to}"),
            };
            let shown = if shown.is_empty() {
                "-".to_owned()
            } else {
                shown
            };
            [value.key.to_owned(), shown, origin(value)]
        })
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (keys, values) = (width(0), width(1));
    for [key, value, origin] in &rows {
        text.push_str(&format!("  {key:keys$}  {value:values$}  {origin}\n"));
    }
    match &model.plan {
        Ok(plan) => text.push_str(&plan_table(plan)),
        Err(reason) => text.push_str(&format!("  {reason}\n")),
    }
    text
}

fn plan_table(plan: &ExplainedPlan) -> String {
    let mut text = format!(
        "  architecture {}, context of {} tokens, KV cache of {}\n",
        plan.architecture, plan.context_len, plan.kv_tokens
    );
    for (rank, memory) in plan.ranks.iter().enumerate() {
        for line in memory.to_string().lines() {
            let rank = match plan.ranks.len() {
                1 => String::new(),
                _ => format!("rank {rank}: "),
            };
            text.push_str(&format!("  {rank}{line}\n"));
        }
    }
    text.push_str(&format!(
        "  {} bytes beside the mapped weights",
        plan.own_bytes()
    ));
    match &plan.available {
        Some(available) => text.push_str(&format!("; {available}\n")),
        None => text.push('\n'),
    }
    text
}

fn as_json(model: &ExplainedModel) -> Value {
    let values = model.values.iter().map(|value| {
        json!({
            "key": value.key,
            "value": value.value,
            "comes_to": value.comes_to,
            "from": origin(value),
        })
    });
    let (plan, error) = match &model.plan {
        Ok(plan) => (plan_json(plan), Value::Null),
        Err(reason) => (Value::Null, json!(reason.to_string())),
    };
    json!({
        "name": model.name,
        "path": model.path,
        "settings": values.collect::<Vec<_>>(),
        "plan": plan,
        "error": error,
    })
}

fn plan_json(plan: &ExplainedPlan) -> Value {
    let ranks = plan.ranks.iter().map(|memory| {
        json!({
            "mapped_bytes": memory.mapped_bytes,
            "panels_bytes": memory.panels_bytes,
            "kv_bytes": memory.kv_bytes,
            "workspace_bytes": memory.workspace_bytes,
        })
    });
    json!({
        "architecture": plan.architecture,
        "context_len": plan.context_len,
        "kv_tokens": plan.kv_tokens,
        "ranks": ranks.collect::<Vec<_>>(),
        "own_bytes": plan.own_bytes(),
        "available_bytes": plan.available.as_ref().map(|available| available.bytes),
        "available": plan.available.as_ref().map(ToString::to_string),
    })
}
