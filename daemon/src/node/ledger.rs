//! What loaded models were promised and have not taken yet: while one loads, and while its ranks are
//! lost and start again, memory looks free that is not.

use std::{
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::text::TextModel;

/// The plans of a node's models. A model counts as long as its text model lives, which whoever
/// serves or loads it holds.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Held while a plan is made, so that two plans do not count on the same memory.
    plans: Mutex<Vec<(Weak<TextModel>, u64)>>,
}

impl Ledger {
    /// Keeps others from planning until the result is dropped.
    pub(super) fn open(&self) -> OpenLedger<'_> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        plans.retain(|(text, _)| 0 < text.strong_count());
        OpenLedger { plans }
    }
}

/// The one place where a plan is being made.
pub(super) struct OpenLedger<'a> {
    plans: MutexGuard<'a, Vec<(Weak<TextModel>, u64)>>,
}

impl OpenLedger<'_> {
    /// Bytes that all plans here add up to, less those that rank processes hold already.
    pub(super) fn promised(&self) -> u64 {
        let planned = self.plans.iter().map(|(_, bytes)| bytes).sum::<u64>();
        match planned {
            0 => 0,
            planned => planned.saturating_sub(resident_of_children()),
        }
    }

    /// Notes a plan.
    pub(super) fn enter(&mut self, text: &Arc<TextModel>, bytes: u64) {
        self.plans.push((Arc::downgrade(text), bytes));
    }
}

/// Memory of their own that this process's children hold: its ranks.
fn resident_of_children() -> u64 {
    let own = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else {
        return 0;
    };
    processes
        .flatten()
        .filter_map(|process| fs::read_to_string(process.path().join("status")).ok())
        .filter_map(|status| resident_of_child(&status, own))
        .sum()
}

/// Anonymous and shared bytes of a process by its `status`, if it is a child of `parent`.
fn resident_of_child(status: &str, parent: u32) -> Option<u64> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    if field("PPid:") != Some(u64::from(parent)) {
        return None;
    }
    let kib = ["RssAnon:", "RssShmem:"]
        .iter()
        .filter_map(|name| field(name));
    Some(kib.sum::<u64>() * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tests::test_data;

    #[test]
    fn a_plan_counts_until_its_model_is_gone() {
        let ledger = Ledger::default();
        let text = Arc::new(TextModel::open(&test_data().join("reference/llama")).unwrap());
        ledger.open().enter(&text, 1 << 40);
        // Children of a test hold less than that.
        assert!((1 << 39) < ledger.open().promised());
        drop(text);
        assert_eq!(ledger.open().promised(), 0);
    }

    #[test]
    fn children_are_told_from_others_by_their_status() {
        let status = "Name:\tdsd\nPPid:\t7\nVmRSS:\t 99 kB\nRssAnon:\t   12 kB\nRssFile:\t 80 kB\nRssShmem:\t 4 kB\n";
        assert_eq!(resident_of_child(status, 7), Some(16 * 1024));
        assert_eq!(resident_of_child(status, 8), None);
    }
}
