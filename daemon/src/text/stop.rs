//! Finds stop strings in text that comes in pieces.
//!
//! Pure. The output ends before the stop string that is complete first; of several complete at the
//! same character, the longest.
//!
//! Invariant: held back is exactly the longest end of the text that may begin a stop string.

/// The stop strings of one request.
#[derive(Debug)]
pub(super) struct StopMatcher {
    stops: Vec<String>,
    held: String,
    /// The one that was found.
    found: Option<usize>,
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub(super) fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|s| !s.is_empty());
        Self {
            stops,
            held: String::new(),
            found: None,
        }
    }

    /// True once a stop string was found; nothing comes out any more.
    pub(super) fn is_stopped(&self) -> bool {
        self.found.is_some()
    }

    /// The stop string that was found.
    pub(super) fn found(&self) -> Option<&str> {
        self.found.map(|idx| self.stops[idx].as_str())
    }

    /// Takes text and returns what can be shown.
    pub(super) fn push(&mut self, text: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        if self.stops.is_empty() {
            return text.to_owned();
        }
        let mut shown = String::new();
        for c in text.chars() {
            self.held.push(c);
            let found = (0..self.stops.len()).filter(|idx| self.held.ends_with(&self.stops[*idx]));
            if let Some(idx) = found.max_by_key(|idx| self.stops[*idx].len()) {
                self.found = Some(idx);
                let len = self.stops[idx].len();
                shown.push_str(&self.held[..self.held.len() - len]);
                self.held.clear();
                return shown;
            }
            let keep = self.longest_beginning();
            shown.extend(self.held.drain(..self.held.len() - keep));
        }
        shown
    }

    /// What was held back, when nothing more comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes of the longest end of `held` that begins a stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_str();
        let starts = held.char_indices().map(|(i, _)| &held[i..]);
        let mut beginnings =
            starts.filter(|end| self.stops.iter().any(|stop| stop.starts_with(end)));
        beginnings.next().map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StopMatcher;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut shown: Vec<String> = pieces.iter().map(|p| matcher.push(p)).collect();
        shown.push(matcher.finish());
        (shown, matcher.is_stopped())
    }

    #[test]
    fn a_stop_string_across_pieces_is_held_back_and_cut() {
        let shown = |s: &[&str]| s.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            run(&["STOP"], &["aS", "TO", "P b"]),
            (shown(&["a", "", "", ""]), true)
        );
        assert_eq!(
            run(&["STOP"], &["aS", "TO", "x"]),
            (shown(&["a", "", "STOx", ""]), false)
        );
        assert_eq!(run(&["STOP"], &["aST"]), (shown(&["a", "ST"]), false));
        assert_eq!(run(&["aab"], &["aaab"]), (shown(&["a", ""]), true));
        assert_eq!(run(&["b", "ab"], &["xab"]), (shown(&["x", ""]), true));
        assert_eq!(run(&["é\n"], &["xé", "\ny"]), (shown(&["x", "", ""]), true));
        assert_eq!(run(&[""], &["x"]), (shown(&["x", ""]), false));
    }

    proptest! {
        #[test]
        fn any_cut_shows_the_text_before_the_first_stop(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(1usize..4, 24),
        ) {
            // The naive reading: the first end at which some stop is complete.
            let ends = text.char_indices().map(|(i, c)| i + c.len_utf8());
            let expected = ends
                .filter_map(|end| {
                    let found = stops.iter().filter(|s| text[..end].ends_with(s.as_str()));
                    found.map(|s| end - s.len()).min()
                })
                .next();
            let mut matcher = StopMatcher::new(stops);
            let chars: Vec<char> = text.chars().collect();
            let mut rest = chars.as_slice();
            let mut shown = String::new();
            for cut in cuts {
                let (piece, left) = rest.split_at(cut.min(rest.len()));
                rest = left;
                shown += &matcher.push(&piece.iter().collect::<String>());
            }
            shown += &matcher.finish();
            prop_assert_eq!(matcher.is_stopped(), expected.is_some());
            prop_assert_eq!(shown, &text[..expected.unwrap_or(text.len())]);
        }
    }
}
