//! `dsd pack`: a checkpoint into files that are mapped and used as they are.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
};

use anyhow::{Context, Result};
use clap::Args;
use dsd::{
    packing::{self, PackingProgress, PackingReport},
    runtime::clock,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

#[derive(Debug, Args)]
pub(crate) struct Pack {
    /// Checkpoint folder or GGUF file.
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Ranks of the group that will serve it.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=64))]
    tp: u16,
    /// Folder to make; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print the result as one JSON line.
    #[arg(long)]
    json: bool,
}

impl Pack {
    pub(crate) fn run(self) -> Result<()> {
        let started = clock::now();
        let mut bar = Bar::new();
        let report = packing::pack(
            &self.model,
            usize::from(self.tp),
            &self.out,
            &mut |progress| bar.update(progress),
        );
        bar.finish();
        let report = report.with_context(|| format!("cannot pack `{}`", self.model.display()))?;
        let seconds = started.elapsed().as_secs_f64();
        let line = match self.json {
            true => as_json(&report, seconds),
            false => format!(
                "{}: {} tensors for {} ranks, {} bytes in {seconds:.1} s",
                report.path.display(),
                report.n_pieces,
                report.n_ranks,
                report.bytes
            ),
        };
        writeln!(io::stdout(), "{line}").context("cannot write to standard output")
    }
}

fn as_json(report: &PackingReport, seconds: f64) -> String {
    json!({
        "path": report.path,
        "ranks": report.n_ranks,
        "tensors": report.n_pieces,
        "bytes": report.bytes,
        "source_bytes": report.source_bytes,
        "seconds": seconds,
    })
    .to_string()
}

/// Rate and remaining time on standard error, where that is a terminal.
struct Bar {
    bar: Option<ProgressBar>,
    stage: &'static str,
}

impl Bar {
    fn new() -> Self {
        let style = ProgressStyle::with_template(
            "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let shown = io::stderr().is_terminal();
        Self {
            bar: shown.then(|| ProgressBar::new(0).with_style(style.progress_chars("=> "))),
            stage: "",
        }
    }

    fn update(&mut self, progress: PackingProgress) {
        let Some(bar) = &self.bar else { return };
        if self.stage != progress.stage {
            self.stage = progress.stage;
            bar.reset();
            bar.set_message(progress.stage);
        }
        bar.set_length(progress.bytes);
        bar.set_position(progress.bytes_done.min(progress.bytes));
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
