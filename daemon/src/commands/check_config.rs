//! `dsd check-config`: whether the configuration is good, and with `--explain` what it means.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::Args;
use dsd::node::{self, ExplainedModel, ExplainedPlan, ExplainedValue, NoPlan};
use serde_json::{Value, json};

use super::serve::ConfigArgs;

#[derive(Debug, Args)]
pub(crate) struct CheckConfig {
    #[command(flatten)]
    file: ConfigArgs,
    /// Print what each model will run with, where each value comes from, and its memory plan.
    #[arg(long)]
    explain: bool,
    /// Print that as one JSON document.
    #[arg(long, requires = "explain")]
    json: bool,
}

impl CheckConfig {
    /// Fails when the configuration is wrong, or when a model that can be read would not be loaded.
    pub(crate) fn run(&self) -> Result<ExitCode> {
        let config = self.file.read()?;
        for warning in node::warnings(&config) {
            // A closed standard error hears nothing.
            let _ = writeln!(io::stderr(), "dsd: warning: {warning}");
        }
        if !self.explain {
            return Ok(ExitCode::SUCCESS);
        }
        let models = node::explain(&config);
        let text = match self.json {
            true => format!(
                "{}\n",
                json!({ "models": models.iter().map(as_json).collect::<Vec<_>>() })
            ),
            false if models.is_empty() => "the configuration names no models\n".to_owned(),
            false => models.iter().map(as_table).collect::<Vec<_>>().join("\n"),
        };
        io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write to standard output")?;
        let refused = |model: &ExplainedModel| matches!(model.plan, Err(NoPlan::Refused(_)));
        Ok(match models.iter().any(refused) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        })
    }
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
