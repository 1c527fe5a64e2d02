//! Rules of the source tree that a program can check: arrows between modules and packages, file
//! headers, leftovers, commands that the documents name.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use dsd_tests::data;

/// Files below a folder with this extension, without built ones.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|ext| ext == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Words and punctuation of Rust source; comments, strings and characters are left out. `::` is one
/// token.
fn tokens(source: &str) -> Vec<String> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                while i < chars.len() && !(at(i) == '*' && at(i + 1) == '/') {
                    i += 1;
                }
                i += 2;
            }
            '"' => i = end_of_string(&chars, i),
            // A lifetime has no closing quote within the next two characters.
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            'r' if at(i + 1) == '"' || (at(i + 1) == '#' && matches!(at(i + 2), '"' | '#')) => {
                let n_hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
                let end: String = std::iter::once('"')
                    .chain(std::iter::repeat_n('#', n_hashes))
                    .collect();
                let rest: String = chars[i + n_hashes + 2..].iter().collect();
                let n_chars = rest.split(&end).next().unwrap().chars().count();
                i += n_hashes + 2 + n_chars + end.len();
            }
            c if c.is_alphanumeric() || c == '_' => {
                let start = i;
                while at(i).is_alphanumeric() || at(i) == '_' {
                    i += 1;
                }
                tokens.push(chars[start..i].iter().collect());
            }
            ':' if at(i + 1) == ':' => {
                tokens.push("::".to_owned());
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push(c.to_string());
                }
                i += 1;
            }
        }
    }
    tokens
}

fn end_of_string(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Top-level modules that a source file at `path` (module names below the crate's root) names
/// through `crate::`, `super::` or `root::`. Modules under `#[cfg(test)]` are left out.
fn named_modules(source: &str, path: &[&str], root: &str) -> BTreeSet<String> {
    let tokens = tokens(source);
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    let mut named = BTreeSet::new();
    // Depth of braces at which each inline module was opened.
    let mut inline: Vec<usize> = Vec::new();
    let mut depth = 0;
    let mut i = 0;
    while i < tokens.len() {
        match at(i) {
            "#" if (1..7)
                .map(|n| at(i + n))
                .eq(["[", "cfg", "(", "test", ")", "]"])
                && at(i + 7) == "mod"
                && at(i + 9) == "{" =>
            {
                let mut level = 0;
                i += 9;
                loop {
                    level += usize::from(at(i) == "{");
                    level -= usize::from(at(i) == "}");
                    i += 1;
                    if level == 0 {
                        break;
                    }
                }
                continue;
            }
            "mod" if at(i + 2) == "{" => inline.push(depth + 1),
            "{" => depth += 1,
            "}" => {
                if inline.last() == Some(&depth) {
                    inline.pop();
                }
                depth -= 1;
            }
            word @ ("crate" | "super") | word
                if at(i + 1) == "::" && at(i.wrapping_sub(1)) != "::" =>
            {
                let n_supers = (0..)
                    .step_by(2)
                    .take_while(|n| at(i + n) == "super")
                    .count();
                let is_root = match word {
                    "crate" => true,
                    "super" => n_supers == path.len() + inline.len(),
                    word => word == root,
                };
                if is_root {
                    named_after(&tokens, i + 2 * n_supers.max(1), &mut named);
                }
                i += 2 * n_supers.max(1);
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    named
}

/// The first names of `a::b` or `{a, b::{..}}` at token `i`.
fn named_after(tokens: &[String], mut i: usize, named: &mut BTreeSet<String>) {
    if tokens[i] != "{" {
        named.insert(tokens[i].clone());
        return;
    }
    let mut depth = 0;
    let mut is_first = true;
    loop {
        match tokens[i].as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," if depth == 1 => is_first = true,
            word if depth == 1 && is_first => {
                named.insert(word.to_owned());
                is_first = false;
            }
            _ => {}
        }
        if depth == 0 {
            return;
        }
        i += 1;
    }
}

/// The table of docs/ARCHITECTURE.md: module and what it may name.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let text = read(&data::repository().join("docs/ARCHITECTURE.md"));
    let (_, section) = text.split_once("## Modules of the daemon").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let named = cells[3]
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty());
        (
            cells[1].trim_matches('`').to_owned(),
            named.map(str::to_owned).collect(),
        )
    })
    .collect()
}

/// Modules that all may name, and that name only each other.
const BASE: [&str; 5] = ["flow", "cost", "config", "telemetry", "runtime"];

#[test]
fn modules_name_only_what_the_table_allows() {
    let root = data::repository().join("daemon/src");
    let arrows = arrows();
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut offences = Vec::new();
    for file in files(&root, "rs") {
        let relative = file.strip_prefix(&root).unwrap().with_extension("");
        let mut path: Vec<&str> = relative.iter().map(|part| part.to_str().unwrap()).collect();
        if path == ["lib"] || path.contains(&"tests") {
            continue;
        }
        // The command is a crate of its own over the library.
        let root_name = if matches!(path[0], "main" | "commands") {
            "dsd"
        } else {
            ""
        };
        if path == ["main"] {
            path = vec!["commands"];
        }
        if path.last() == Some(&"mod") {
            path.pop();
        }
        let module = path[0];
        let Some(allowed) = arrows.get(module) else {
            offences.push(format!("{module} is not in the table"));
            continue;
        };
        for name in named_modules(&read(&file), &path, root_name) {
            let is_allowed =
                name == module || allowed.contains(&name) || BASE.contains(&name.as_str());
            if !is_allowed {
                offences.push(format!("{} names {name}", relative.display()));
            }
            used.entry(module.to_owned()).or_default().insert(name);
        }
    }
    for (module, allowed) in &arrows {
        for name in allowed {
            if !used.get(module).is_some_and(|used| used.contains(name)) {
                offences.push(format!("{module} may name {name} and does not"));
            }
        }
    }
    assert!(
        offences.is_empty(),
        "docs/ARCHITECTURE.md and the code differ:\n{}",
        offences.join("\n")
    );
}

#[test]
fn arrows_point_down_the_list_of_modules() {
    let lib = read(&data::repository().join("daemon/src/lib.rs"));
    let mut order = vec!["commands".to_owned()];
    order.extend(lib.lines().filter_map(|line| {
        Some(
            line.strip_prefix("pub mod ")?
                .trim_end_matches(';')
                .to_owned(),
        )
    }));
    let place = |name: &String| order.iter().position(|known| known == name);
    for (module, named) in arrows() {
        let from = place(&module).unwrap_or_else(|| panic!("{module} is not in lib.rs"));
        for name in named {
            let to = place(&name).unwrap_or_else(|| panic!("{name} is not in lib.rs"));
            assert!(from < to, "{module} may name {name}, which stands above it");
        }
    }
    let listed: BTreeSet<String> = arrows().into_keys().collect();
    assert_eq!(
        listed,
        order.into_iter().collect(),
        "modules of lib.rs and of the table"
    );
}

#[test]
fn references_are_found_in_all_their_forms() {
    #[track_caller]
    fn check(source: &str, path: &[&str], expected: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(named_modules(source, path, "dsd"), expected, "{source}");
    }
    check("use crate::a::B;", &["m"], &["a"]);
    check(
        "use crate::{a::{self, b}, c, d::e::{f, g}};",
        &["m"],
        &["a", "c", "d"],
    );
    check("fn f() { crate::a::b() }", &["m"], &["a"]);
    check(
        "// crate::a\nlet x = \"crate::b\"; /* crate::c */",
        &["m"],
        &[],
    );
    check(
        "r#\"crate::a \"x\"\"#; 'c'; '\\''; crate::b::c",
        &["m"],
        &["b"],
    );
    check("fn f<'a>() { super::a::b() }", &["m"], &["a"]);
    check("use super::a; use super::super::b;", &["m", "n"], &["b"]);
    check("mod i { use super::super::b; }", &["m"], &["b"]);
    check(
        "#[cfg(test)] mod t { use crate::a; { } } use crate::b;",
        &["m"],
        &["b"],
    );
    check("use dsd::{a, b::c}; other::dsd::x;", &["m"], &["a", "b"]);
}

#[test]
fn packages_name_only_those_below_them() {
    let check = |package: &str, expected: &[&str]| {
        let manifest = read(&data::repository().join(package).join("Cargo.toml"));
        let mut is_dependencies = false;
        let mut named = Vec::new();
        for line in manifest.lines() {
            if line.starts_with('[') {
                is_dependencies = line.contains("dependencies");
            }
            let name = line.split(['.', ' ', '=']).next().unwrap_or("");
            if is_dependencies && (name.starts_with("dsd") || name == "dsctl") {
                named.push(name);
            }
        }
        assert_eq!(named, expected, "{package}");
    };
    check("proto", &[]);
    check("kernels", &[]);
    check("ctl", &["dsd-proto"]);
    check("daemon", &["dsd-kernels", "dsd-proto"]);
}

#[test]
fn dependencies_are_used_and_have_a_line_that_says_why() {
    let root = data::repository();
    let decision = read(&root.join("docs/decisions/0001-dependencies.md"));
    let explained: BTreeSet<&str> = decision
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .flat_map(|names| names.split(", "))
        .collect();
    let mut wanted = BTreeSet::new();
    for package in ["proto", "kernels", "daemon", "ctl", "tests"] {
        let folder = root.join(package);
        let words: BTreeSet<String> = files(&folder, "rs")
            .iter()
            .flat_map(|path| tokens(&read(path)))
            .collect();
        let manifest = read(&folder.join("Cargo.toml"));
        let (_, sections) = manifest.split_once("dependencies]").unwrap();
        for line in sections.lines() {
            let Some(name) = line.strip_suffix(".workspace = true") else {
                continue;
            };
            let is_used = words.contains(&name.replace('-', "_"));
            assert!(is_used, "{package} does not use {name}");
            wanted.extend((!name.starts_with("dsd")).then(|| name.to_owned()));
        }
    }
    assert!(10 < wanted.len(), "the manifests are read: {wanted:?}");
    for name in &wanted {
        assert!(explained.contains(name.as_str()), "no line about {name}");
    }
    for name in explained.iter().filter(|name| **name != "crate") {
        assert!(wanted.contains(*name), "nothing uses {name}");
    }
}

#[test]
fn source_files_begin_with_what_they_are_for() {
    let headless: Vec<PathBuf> = files(&data::repository(), "rs")
        .into_iter()
        .filter(|file| !read(file).starts_with("//!"))
        .collect();
    assert!(headless.is_empty(), "no `//!` at the top: {headless:?}");
}

#[test]
fn nothing_is_left_to_be_done() {
    // In two halves, or this file would be found.
    let words = [
        ["TO", "DO"],
        ["FIX", "ME"],
        ["X", "XX:"],
        ["to", "do!("],
        ["unimple", "mented!("],
        ["#[ig", "nore"],
    ];
    let root = data::repository();
    let sources = ["rs", "py", "sh", "toml", "md"]
        .into_iter()
        .flat_map(|ext| files(&root, ext));
    for file in sources {
        let text = read(&file);
        for word in words.map(|halves| halves.concat()) {
            assert!(!text.contains(&word), "{} holds {word}", file.display());
        }
    }
}

#[test]
fn make_targets_that_the_documents_name_exist() {
    let root = data::repository();
    let makefile = read(&root.join("Makefile"));
    let has_target = |name: &str| {
        makefile
            .lines()
            .any(|line| line.starts_with(&format!("{name}:")))
    };
    for name in ["demo", "test"] {
        assert!(has_target(name), "the Makefile has no target {name}");
    }
    for file in files(&root, "md") {
        let text = read(&file);
        let shown = text
            .lines()
            .filter(|line| !line.starts_with("    ") || line.contains("make "));
        for line in shown {
            let commands = line.split('`').flat_map(|part| part.strip_prefix("make "));
            for command in commands.chain(line.trim().strip_prefix("make ")) {
                let name = command.split_whitespace().next().unwrap_or("");
                let is_target = name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
                assert!(
                    !is_target || has_target(name),
                    "{}: make {name}",
                    file.display()
                );
            }
        }
    }
}
