//! Everything that is wrong with a configuration at once, where a start says the first thing only.
//!
//! Reads as a start does, blanks what was refused, and reads again: there is one reader, and what it
//! refuses is what is found.
//!
//! Called by `dsd check-config`.

use std::path::{Path, PathBuf};

use super::{
    Config, ConfigError, Origin,
    load::{drop_ins, read},
};

/// Things that are looked for in one go; a file with more of them is something else.
const PROBLEMS_MAX: usize = 100;

/// What is read again and again.
struct Texts {
    files: Vec<(PathBuf, String)>,
    env: Vec<(String, String)>,
    is_versioned: bool,
}

/// The configuration with defaults in place of what is wrong, and all that is wrong, as it is found.
pub fn problems(
    path: &Path,
    env: impl IntoIterator<Item = (String, String)>,
) -> (Config, Vec<ConfigError>) {
    let mut problems = Vec::new();
    let drop_ins = drop_ins(path).unwrap_or_else(|e| {
        problems.push(e);
        Vec::new()
    });
    let mut texts = Texts {
        files: Vec::new(),
        env: env.into_iter().collect(),
        is_versioned: true,
    };
    for file in [path.to_owned()].into_iter().chain(drop_ins) {
        let text = read(&file).unwrap_or_else(|e| {
            texts.is_versioned &= file != path;
            problems.push(e);
            String::new()
        });
        texts.files.push((file, text));
    }
    while problems.len() < PROBLEMS_MAX {
        let env = texts.env.iter().cloned();
        match Config::of(&texts.files, texts.is_versioned, env) {
            Ok(config) => return (config, problems),
            Err(e) => {
                let is_gone = texts.blank(&e);
                problems.push(e);
                if !is_gone {
                    break;
                }
            }
        }
    }
    (Config::default(), problems)
}

impl Texts {
    /// Takes away what an error is about; false when that cannot be told.
    fn blank(&mut self, error: &ConfigError) -> bool {
        let (file, line) = match error.origin() {
            None | Some(Origin::Flag(_)) => return false,
            Some(Origin::Env(name)) => {
                let n = self.env.len();
                self.env.retain(|(variable, _)| variable != name);
                return self.env.len() < n;
            }
            Some(Origin::File(file)) => (file, None),
            Some(Origin::Line { file, line }) => (file, Some(*line)),
        };
        if let ConfigError::VersionMissing { .. } = error {
            return std::mem::take(&mut self.is_versioned);
        }
        let Some(idx) = self.files.iter().position(|(known, _)| known == file) else {
            return false;
        };
        let text = &mut self.files[idx].1;
        let found = line.and_then(|line| text.lines().nth(line.checked_sub(1)?));
        let is_version = found.is_some_and(|found| found.trim_start().starts_with("version"));
        let without = line.and_then(|line| without_line(text, line));
        // What cannot be read without its line cannot be read at all.
        let readable = without.filter(|text| text.parse::<toml::Table>().is_ok());
        if readable.is_none() && text.trim().is_empty() {
            return false;
        }
        *text = readable.unwrap_or_default();
        // A version that was blanked was found.
        self.is_versioned &= !(idx == 0 && (is_version || text.is_empty()));
        true
    }
}

/// The text with a line blanked, numbered from 1: with all that follows of its table, where it is a
/// heading or names a model. `None` when nothing would change.
fn without_line(text: &str, line: usize) -> Option<String> {
    let mut lines: Vec<&str> = text.split('\n').collect();
    let is_heading = |line: &str| line.trim_start().starts_with('[');
    let at = line.checked_sub(1)?;
    let found = *lines.get(at)?;
    let heading = (0..=at).rev().find(|idx| is_heading(lines[*idx]));
    let is_of_model = heading.is_some_and(|idx| lines[idx].trim_start().starts_with("[[models]]"));
    let key = found.split('=').next().map(str::trim);
    let is_whole = is_heading(found) || is_of_model && matches!(key, Some("name" | "path"));
    let (from, to) = match heading {
        Some(from) if is_whole => {
            let next = (from + 1..lines.len()).find(|idx| is_heading(lines[*idx]));
            (from, next.unwrap_or(lines.len()))
        }
        _ => (at, at + 1),
    };
    if lines[from..to].iter().all(|line| line.trim().is_empty()) {
        return None;
    }
    lines[from..to].fill("");
    Some(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(main: &str, drop_in: Option<&str>, env: &[(&str, &str)]) -> (Config, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dsd.toml");
        std::fs::write(&path, main).unwrap();
        if let Some(text) = drop_in {
            std::fs::create_dir(dir.path().join("dsd.toml.d")).unwrap();
            std::fs::write(dir.path().join("dsd.toml.d/a.toml"), text).unwrap();
        }
        let env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let (config, problems) = problems(&path, env);
        let folder = format!("{}/", dir.path().display());
        let texts = problems.iter().map(|e| e.to_string().replace(&folder, ""));
        (config, texts.collect())
    }

    #[test]
    fn all_that_is_wrong_is_found_and_the_rest_is_read() {
        let main = "version = 1\n\
            [http]\nlisen = \"x\"\nkeep_alive_s = 0\nbody_timeout_s = 7\n\
            [htpp]\na = 1\nb = 2\n\
            [engine]\nkv_tokens = 64\nkv_bytes = 1\nthreads = \"many\"\n\
            [[models]]\nname = \"a b\"\npath = \"/a\"\n\
            [[models]]\nname = \"b\"\n\
            [[models]]\nname = \"c\"\npath = \"/c\"\ntp = 0\naliases = [\"x\"]\n\
            [[models]]\nname = \"c\"\npath = \"/d\"\n";
        let env = [("DSD_HTTP_LISTEN", "x"), ("DSD_ENGINE__TP", "65")];
        let (config, mut found) = found(main, Some("[node]\nname = 3\n"), &env);
        found.sort();
        let starts = [
            "dsd.toml.d/a.toml:2: invalid type",
            "dsd.toml:11: `engine.kv_bytes` contradicts",
            "dsd.toml:12: invalid type",
            "dsd.toml:14: model name \"a b\"",
            "dsd.toml:16: missing field `path`",
            "dsd.toml:21: `models.tp` is 0",
            "dsd.toml:24: two models are called `c`",
            "dsd.toml:3: unknown key `lisen`",
            "dsd.toml:4: `http.keep_alive_s` is 0",
            "dsd.toml:6: unknown key `htpp`",
            "environment variable DSD_ENGINE__TP: ",
            "environment variable DSD_HTTP_LISTEN: ",
        ];
        assert_eq!(found.len(), starts.len(), "{found:#?}");
        for (found, start) in found.iter().zip(starts) {
            assert!(found.starts_with(start), "{found} is not {start}");
        }
        assert_eq!(config.http.body_timeout_s, 7);
        assert_eq!(config.engine.kv_tokens, Some(64));
        let names: Vec<&str> = config.models.iter().map(|m| &*m.name).collect();
        assert_eq!((names, config.models[0].aliases.len()), (vec!["c"], 1));
    }

    #[test]
    fn what_cannot_be_read_at_all_does_not_hide_the_rest() {
        let check = |main: &str, drop_in: &str, starts: &[&str]| {
            let (_, mut found) = found(main, Some(drop_in), &[]);
            found.sort();
            assert_eq!(found.len(), starts.len(), "{found:#?}");
            for (found, start) in found.iter().zip(starts) {
                assert!(found.starts_with(start), "{found} is not {start}");
            }
        };
        let wrong = "[http]\nlisen = 1\n";
        check("", wrong, &["dsd.toml.d/a.toml:2: ", "dsd.toml: `version"]);
        check(
            "version = 2\n[http]\nx = 1\n",
            wrong,
            &[
                "dsd.toml.d/a.toml:2: ",
                "dsd.toml:1: version 2",
                "dsd.toml:3: unknown key `x`",
            ],
        );
        check(
            "version = \n[http]\nx = 1\n",
            wrong,
            &[
                "dsd.toml.d/a.toml:2: ",
                "dsd.toml:1: ",
                "dsd.toml:3: unknown key `x`",
            ],
        );
        // Over several lines.
        check(
            "version = 1\n[[models]]\nname = \"a\"\npath = \"/a\"\naliases = [\n \"b\",\n 3]\n",
            wrong,
            &["dsd.toml.d/a.toml:2: ", "dsd.toml:7: invalid type"],
        );
        let (_, found) = found("version = 1\n", None, &[]);
        assert!(found.is_empty(), "{found:?}");
        let (_, problems) = problems(Path::new("/nonexistent/dsd.toml"), []);
        assert_eq!(problems.len(), 1, "{problems:?}");
    }
}
