//! Where a command's result goes: tables for eyes, JSON for programs.
//!
//! Invariant: text that came from elsewhere reaches a terminal without control characters, so that
//! no model or node can move the cursor or set a title.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use serde::Serialize;

use crate::failure::Failure;

/// The result's way out.
pub(crate) struct Output<'w> {
    writer: Box<dyn Write + 'w>,
    is_json: bool,
    is_terminal: bool,
}

impl<'w> Output<'w> {
    /// Writes to `writer`.
    pub(crate) fn new(writer: Box<dyn Write + 'w>, is_json: bool, is_terminal: bool) -> Self {
        Self {
            writer,
            is_json,
            is_terminal,
        }
    }

    /// Whether programs read.
    pub(crate) fn is_json(&self) -> bool {
        self.is_json
    }

    /// One JSON object on a line of its own.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(io::Error::from);
        line.and_then(|line| writeln!(self.writer, "{line}"))
            .and_then(|()| self.writer.flush())
            .map_err(|e| Failure::of_output(&e))
    }

    /// One line of text.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        writeln!(self.writer, "{}", printable(text)).map_err(|e| Failure::of_output(&e))
    }

    /// Text as it comes, at once.
    pub(crate) fn text(&mut self, text: &str) -> Result<(), Failure> {
        let text = if self.is_terminal {
            printable(text)
        } else {
            Cow::Borrowed(text)
        };
        self.raw(&text)
    }

    /// Text that is not the answer itself; only terminals show it.
    pub(crate) fn dimmed(&mut self, text: &str) -> Result<(), Failure> {
        if !self.is_terminal || text.is_empty() {
            return Ok(());
        }
        self.raw(&format!("\x1b[2m{}\x1b[0m", printable(text)))
    }

    /// Rows under a header, columns as wide as their widest cell.
    pub(crate) fn table(&mut self, header: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
        let text = table(header, rows);
        self.raw(&text)
    }

    /// Bytes of our own making.
    pub(crate) fn raw(&mut self, text: &str) -> Result<(), Failure> {
        self.writer
            .write_all(text.as_bytes())
            .and_then(|()| self.writer.flush())
            .map_err(|e| Failure::of_output(&e))
    }
}

/// `text` with control characters other than line feed and tab replaced.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_bad = |c: char| c.is_control() && c != '\n' && c != '\t';
    if !text.contains(is_bad) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(
        text.chars()
            .map(|c| if is_bad(c) { '\u{fffd}' } else { c })
            .collect(),
    )
}

fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |text: &str| printable(text).replace(['\n', '\t'], " ");
    let mut lines = vec![
        header
            .iter()
            .map(|text| (*text).to_owned())
            .collect::<Vec<_>>(),
    ];
    lines.extend(
        rows.iter()
            .map(|row| row.iter().map(|text| cell(text)).collect()),
    );
    let widths: Vec<usize> = (0..header.len())
        .map(|i| {
            lines
                .iter()
                .filter_map(|l| l.get(i))
                .map(|c| c.chars().count())
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for line in lines {
        let mut padded = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            padded.push_str(&format!("{cell:<width$}  "));
        }
        text.push_str(padded.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes in the largest binary unit that leaves at least one.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while 1024.0 <= value && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A span of time in its two largest units.
pub(crate) fn seconds(n: u64) -> String {
    let (days, hours, minutes, seconds) = (n / 86_400, n / 3600 % 24, n / 60 % 60, n % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {seconds}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(
            printable("a\x1b[31mb\n\tc\u{9b}d"),
            "a\u{fffd}[31mb\n\tc\u{fffd}d"
        );
        assert!(matches!(printable("plain é"), Cow::Borrowed(_)));
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["tiny".to_owned(), "1".to_owned()],
            vec!["é\x07".to_owned(), "22".to_owned()],
        ];
        assert_eq!(
            table(&["NAME", "N"], &rows),
            "NAME  N\ntiny  1\né\u{fffd}    22\n"
        );
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(5 << 40)],
            ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
        );
        assert_eq!(
            [seconds(59), seconds(61), seconds(3661), seconds(90_000)],
            ["59s", "1m 1s", "1h 1m", "1d 1h"]
        );
    }
}
