//! Progress of a long call on stderr, when a person watches.

use std::io::{self, IsTerminal};

use dsd_proto::wire::admin::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar with rate and remaining time, or nothing where stderr is not a terminal.
pub(crate) struct Bar {
    bar: Option<ProgressBar>,
    phase: String,
}

impl Bar {
    /// A bar unless `is_quiet`.
    pub(crate) fn new(is_quiet: bool) -> Self {
        let is_shown = !is_quiet && io::stderr().is_terminal();
        Self {
            bar: is_shown.then(|| ProgressBar::new(0).with_style(style())),
            phase: String::new(),
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

fn style() -> ProgressStyle {
    let template =
        "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}
