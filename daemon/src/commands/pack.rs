//! `dsd pack`: a checkpoint into files that are mapped and used as they are.

use std::{
    io::{self, IsTerminal, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result};
use clap::Args;
use dsd::{
    packing::{self, PackingError, PackingProgress, PackingReport},
    runtime::clock,
    telemetry::chain,
};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

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
    /// Packs; a signal that would end the process ends the packing first, which leaves nothing behind.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let started = clock::now();
        let is_wanted = Arc::new(AtomicBool::new(true));
        let (model, out, n_ranks) = (self.model.clone(), self.out.clone(), usize::from(self.tp));
        let is_still_wanted = Arc::clone(&is_wanted);
        let work = move || {
            let mut bar = Bar::new();
            let report = packing::pack(&model, n_ranks, &out, &mut |progress| {
                bar.update(progress);
                match is_still_wanted.load(Ordering::Acquire) {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            });
            bar.finish();
            report
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot wait for signals")?;
        let (report, signalled) = runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt())?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut hangup = signal(SignalKind::hangup())?;
            let mut work = tokio::task::spawn_blocking(work);
            let mut signalled = None;
            loop {
                let kind = tokio::select! {
                    report = &mut work => return anyhow::Ok((report?, signalled)),
                    _ = interrupt.recv() => SignalKind::interrupt(),
                    _ = terminate.recv() => SignalKind::terminate(),
                    _ = hangup.recv() => SignalKind::hangup(),
                };
                signalled = Some(kind);
                is_wanted.store(false, Ordering::Release);
            }
        })?;
        let report = match (report, signalled) {
            (Err(e @ PackingError::Interrupted), Some(kind)) => {
                // Nothing is left to do when standard error is gone, too.
                let _ = writeln!(io::stderr(), "dsd: {}", chain(&e));
                // As shells number it.
                let code = 128 + kind.as_raw_value();
                return Ok(u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            (report, _) => report,
        };
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
        writeln!(io::stdout(), "{line}").context("cannot write to standard output")?;
        Ok(ExitCode::SUCCESS)
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
