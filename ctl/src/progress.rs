//! Progress of a long call on stderr, when a person watches.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use dsd_proto::wire::admin::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is drawn where nothing moves.
const TICK: Duration = Duration::from_millis(500);

/// A bar with rate and remaining time, or nothing where stderr is not a terminal.
pub(crate) struct Bar {
    bar: Option<ProgressBar>,
    phase: String,
}

impl Bar {
    /// A bar over the bytes of a call, unless `is_quiet`.
    pub(crate) fn new(is_quiet: bool) -> Self {
        let template =
            "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        Self::styled(is_quiet, 0, template)
    }

    /// A bar over `n` things called `what`, unless `is_quiet`.
    pub(crate) fn counting(is_quiet: bool, what: &'static str, n: u64) -> Self {
        let bar = Self::styled(
            is_quiet,
            n,
            "{msg} [{wide_bar}] {pos}/{len} {per_sec} {eta}",
        );
        if let Some(bar) = &bar.bar {
            bar.set_message(what);
            // The first of them may take long.
            bar.enable_steady_tick(TICK);
        }
        bar
    }

    fn styled(is_quiet: bool, n: u64, template: &str) -> Self {
        let is_shown = !is_quiet && io::stderr().is_terminal();
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        Self {
            bar: is_shown.then(|| ProgressBar::new(n).with_style(style)),
            phase: String::new(),
        }
    }

    /// Counts `n` more.
    pub(crate) fn advance(&self, n: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(n);
        }
    }

    /// Shows how far the call is. Each phase is a bar of its own.
    pub(crate) fn update(&mut self, progress: &Progress) {
        let Some(bar) = &self.bar else { return };
        if self.phase != progress.phase {
            self.phase.clone_from(&progress.phase);
            bar.reset();
            bar.set_message(crate::output::printable(&progress.phase).into_owned());
        }
        bar.set_length(progress.total);
        bar.set_position(progress.done.min(progress.total));
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
