//! Server-sent events out of bytes as they come (WHATWG HTML, section 9.2), `data` fields only.
//!
//! Invariant: holds at most one event of [`EVENT_LEN_MAX`] bytes.

/// Longest event; an OpenAI chunk with 20 log-probabilities has about 2 KiB.
pub(super) const EVENT_LEN_MAX: usize = 1 << 20;

/// The stream is no stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SseError {
    /// An event above [`EVENT_LEN_MAX`].
    TooLong,
    /// Not UTF-8.
    NotText,
}

/// Collects bytes and hands out events.
#[derive(Debug, Default)]
pub(super) struct SseReader {
    line: Vec<u8>,
    data: String,
    has_data: bool,
    was_cr: bool,
}

impl SseReader {
    /// Takes `bytes` and calls `on_event` with the data of each event they complete.
    pub(super) fn push(
        &mut self,
        bytes: &[u8],
        mut on_event: impl FnMut(&str),
    ) -> Result<(), SseError> {
        for &byte in bytes {
            let is_second_half = byte == b'\n' && self.was_cr;
            self.was_cr = byte == b'\r';
            match byte {
                b'\n' if is_second_half => {}
                b'\n' | b'\r' => self.end_line(&mut on_event)?,
                _ => {
                    if EVENT_LEN_MAX <= self.line.len() + self.data.len() {
                        return Err(SseError::TooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    fn end_line(&mut self, on_event: &mut impl FnMut(&str)) -> Result<(), SseError> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            if self.has_data {
                on_event(&self.data);
            }
            self.data.clear();
            self.has_data = false;
            return Ok(());
        }
        let line = std::str::from_utf8(&line).map_err(|_| SseError::NotText)?;
        // Comments begin with a colon and so have an empty field name.
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            if self.has_data {
                self.data.push('\n');
            }
            self.data.push_str(value.strip_prefix(' ').unwrap_or(value));
            self.has_data = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stream: &str, expected: &[&str]) {
        // Whole, and one byte at a time.
        for n in [stream.len().max(1), 1] {
            let mut reader = SseReader::default();
            let mut events = Vec::new();
            for piece in stream.as_bytes().chunks(n) {
                reader
                    .push(piece, |event| events.push(event.to_owned()))
                    .unwrap();
            }
            assert_eq!(events, expected, "{stream:?} by {n}");
        }
    }

    #[test]
    fn events_come_out_however_the_bytes_are_cut() {
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data:a\r\n\r\ndata: b\r\n\r\n", &["a", "b"]);
        check("data: a\r\rdata: é\r\r", &["a", "é"]);
        check(": keep-alive\n\ndata: a\n\n", &["a"]);
        check("event: x\ndata: a\ndata: b\nid: 3\n\n", &["a\nb"]);
        check("data: {\"a\": \"b:c\"}\n\n", &["{\"a\": \"b:c\"}"]);
        check("data\n\n", &[""]);
        check("data: not ended", &[]);
    }

    #[test]
    fn endless_lines_and_other_bytes_are_refused() {
        let mut reader = SseReader::default();
        let endless = vec![b'a'; EVENT_LEN_MAX + 1];
        assert_eq!(reader.push(&endless, |_| {}), Err(SseError::TooLong));
        let mut reader = SseReader::default();
        assert_eq!(
            reader.push(b"data: \xff\n\n", |_| {}),
            Err(SseError::NotText)
        );
    }
}
