//! Compiles and renders chat templates in the environment that transformers gives them.
//!
//! Knows Jinja, not tokens.
//!
//! Invariant: rendering ends; a template has so many instructions to spend and no more.

use std::{collections::BTreeMap, error::Error, fmt, path::Path};

use minijinja::{
    AutoEscape, Environment, ErrorKind, Value as JinjaValue, syntax::SyntaxConfig, value::Kwargs,
};
use serde_json::Value;

use super::{
    error::TextError,
    generation, jinja_value,
    pyjson::{self, Style},
    tools::ToolMarkup,
};
use crate::{runtime::clock, telemetry::chain};

/// Instructions of one rendering: thousands of messages take well under a million.
const FUEL: u64 = 20_000_000;

/// The template that conversations go through.
const DEFAULT: &str = "default";
/// The one that those with tools go through, where there is such.
const TOOL_USE: &str = "tool_use";

/// The chat templates of a model.
#[derive(Debug)]
pub(super) struct ChatTemplates {
    environment: Environment<'static>,
    /// By name, those that do not compile with the reason.
    names: BTreeMap<String, Result<(), String>>,
    wants_parsed_arguments: bool,
    knows_reasoning: bool,
    shows_tools: bool,
    tool_markup: Option<ToolMarkup>,
    sources: Vec<String>,
}

impl ChatTemplates {
    /// Compiles named templates; `None` when there are none. One that does not compile costs the
    /// conversations that would go through it, and nothing else of the model.
    pub(super) fn compile(file: &Path, templates: Vec<(String, String)>) -> Option<Self> {
        if templates.is_empty() {
            return None;
        }
        let mut environment = environment();
        let sources: Vec<String> = templates.iter().map(|(_, source)| source.clone()).collect();
        let mut names = BTreeMap::new();
        for (name, source) in templates {
            let source = generation::without_tags(source);
            let added = environment.add_template_owned(name.clone(), source);
            let compiled = added.map_err(|e| chain(&e));
            if let Err(reason) = &compiled {
                tracing::warn!(
                    file = %file.display(),
                    template = name,
                    reason,
                    "the chat template does not compile: no chat, completions alone"
                );
            }
            names.insert(name, compiled);
        }
        Some(Self {
            environment,
            names,
            wants_parsed_arguments: sources.iter().any(|s| serialises_arguments(s)),
            knows_reasoning: sources.iter().any(|s| s.contains("</think>")),
            shows_tools: sources.iter().any(|s| s.contains("tools")),
            tool_markup: sources.iter().find_map(|s| ToolMarkup::of_template(s)),
            sources,
        })
    }

    /// Renders with the variables in `context`, which is an object.
    pub(super) fn render(&self, context: &Value, with_tools: bool) -> Result<String, TextError> {
        let name = match with_tools && self.names.contains_key(TOOL_USE) {
            true => TOOL_USE,
            false => DEFAULT,
        };
        match self.names.get(name) {
            Some(Ok(())) => {}
            Some(Err(reason)) => {
                return Err(TextError::Template {
                    reason: reason.clone(),
                });
            }
            None => {
                let names: Vec<&str> = self.names.keys().map(String::as_str).collect();
                return Err(TextError::NoDefaultTemplate {
                    names: names.join(", "),
                });
            }
        }
        self.environment
            .get_template(name)
            .and_then(|template| template.render(jinja_value::from_json(context)))
            .map_err(|error| match refusal(&error) {
                Some(message) => TextError::Refused { message },
                None => TextError::Render { source: error },
            })
    }

    /// True when tool calls' arguments go through `tojson`, so that they must be values; else they
    /// are concatenated and must be strings.
    pub(super) fn wants_parsed_arguments(&self) -> bool {
        self.wants_parsed_arguments
    }

    /// True when the template speaks of reasoning tags.
    pub(super) fn knows_reasoning(&self) -> bool {
        self.knows_reasoning
    }

    /// True when the template writes the tools that it is given into the prompt.
    pub(super) fn shows_tools(&self) -> bool {
        self.shows_tools
    }

    /// How the template writes calls of tools; `None` where it knows none.
    pub(super) fn tool_markup(&self) -> Option<ToolMarkup> {
        self.tool_markup
    }

    /// The templates' text.
    pub(super) fn sources(&self) -> &[String] {
        &self.sources
    }
}

/// Looks for `arguments | tojson`.
fn serialises_arguments(source: &str) -> bool {
    source.split("arguments").skip(1).any(|rest| {
        let rest = rest.trim_start_matches(['\'', '"', ']', ' ']);
        rest.strip_prefix('|')
            .is_some_and(|r| r.trim_start().starts_with("tojson"))
    })
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the usual delimiters differ from each other"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
        Err::<(), _>(error.with_source(Refusal(message)))
    });
    environment.add_function("strftime_now", |format: String| {
        strftime(&format, clock::unix_seconds())
    });
    environment
}

/// What a template passed to `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Refusal {}

fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn to_json(value: &JinjaValue, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let json = jinja_value::to_json(value)?;
    let indent: Option<usize> = kwargs.get("indent")?;
    let mut style = Style {
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ..Style::default()
    };
    if indent.is_some() {
        // Python leaves no space before a line break.
        style.item_separator = ",".to_owned();
    }
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")?
        && let [item, key] = separators.as_slice()
    {
        (style.item_separator, style.key_separator) = (item.clone(), key.clone());
    }
    kwargs.assert_all_used()?;
    Ok(pyjson::dumps(&json, &style))
}

/// The date and time (UTC) in the conversions that templates use.
fn strftime(format: &str, unix_seconds: u64) -> Result<String, minijinja::Error> {
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (
        unix_seconds / 3600 % 24,
        unix_seconds / 60 % 60,
        unix_seconds % 60,
    );
    let (year, month, day) = civil_from_days(days);
    let weekday = DAYS[(days % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('H') => out.push_str(&format!("{hour:02}")),
            Some('I') => out.push_str(&format!("{:02}", (hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&format!("{minute:02}")),
            Some('S') => out.push_str(&format!("{second:02}")),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('%') => out.push('%'),
            other => {
                let detail = format!("strftime_now does not know %{}", other.unwrap_or(' '));
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, detail));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a day since 1970 (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days that are not negative).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::{serialises_arguments, strftime};

    #[test]
    fn dates_are_written_as_python_does() {
        let check = |seconds, expected: &str| {
            assert_eq!(
                strftime("%a %d %b %Y %H:%M:%S %I%p %A %B %m%%", seconds).unwrap(),
                expected
            );
        };
        check(0, "Thu 01 Jan 1970 00:00:00 12AM Thursday January 01%");
        check(
            951_827_696,
            "Tue 29 Feb 2000 12:34:56 12PM Tuesday February 02%",
        );
        check(
            1_735_689_599,
            "Tue 31 Dec 2024 23:59:59 11PM Tuesday December 12%",
        );
        assert!(strftime("%Q", 0).is_err());
    }

    #[test]
    fn templates_that_serialise_arguments_are_told_from_those_that_join_them() {
        assert!(serialises_arguments("{{ tool_call.arguments | tojson }}"));
        assert!(serialises_arguments("{{ tc['arguments']|tojson }}"));
        assert!(!serialises_arguments(
            "{{ 'x' + tool['function']['arguments'] + 'y' }}"
        ));
        assert!(!serialises_arguments("{{ tools | tojson }} arguments"));
    }
}
