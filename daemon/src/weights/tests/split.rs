//! GGUF models in several files: opened by any part, and what is refused of wrong sets.

use std::{fs, path::Path};

use super::{
    super::{Checkpoint, gguf_split::PartName, verify},
    describe,
    writer::{GgufWriter, tiny_llama_gguf},
};

/// The tiny model in three parts, as gguf-split writes them: the keys in the first.
fn parts() -> [GgufWriter; 3] {
    let whole = tiny_llama_gguf();
    let n = whole.tensors.len();
    [0..1, 1..4, 4..n].map(|range| {
        let no = match range.start {
            0 => 0,
            1 => 1,
            _ => 2,
        };
        let mut part = match no {
            0 => whole.clone(),
            _ => GgufWriter::new(),
        };
        part.tensors = whole.tensors[range].to_vec();
        part.raw("split.no", 2, &[no, 0])
            .raw("split.count", 2, &[3, 0])
            .raw("split.tensors.count", 5, &(n as i32).to_le_bytes())
    })
}

fn name(number: usize) -> String {
    format!("m-{number:05}-of-00003.gguf")
}

fn write(folder: &Path, parts: &[GgufWriter]) {
    for (i, part) in parts.iter().enumerate() {
        fs::write(folder.join(name(i + 1)), part.bytes()).unwrap();
    }
}

#[test]
fn any_part_opens_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.gguf");
    fs::write(&whole, tiny_llama_gguf().bytes()).unwrap();
    let whole = Checkpoint::open(&whole).unwrap();
    let folder = dir.path().join("parts");
    fs::create_dir(&folder).unwrap();
    write(&folder, &parts());
    let given = [1, 2, 3].map(|number| folder.join(name(number)));
    for path in given.iter().chain([&folder]) {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.config(), whole.config());
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            whole.names().collect::<Vec<_>>()
        );
        assert_eq!(checkpoint.config_file(), given[0]);
        let files = checkpoint.files().iter().map(|f| &f.path);
        assert_eq!(files.collect::<Vec<_>>(), given.iter().collect::<Vec<_>>());
        let last = "model.layers.0.mlp.down_proj.weight";
        assert_eq!(
            checkpoint.matrix(last, 32, 64).unwrap().data(),
            whole.matrix(last, 32, 64).unwrap().data()
        );
        let report = verify(path, None, |_| {}).unwrap();
        assert_eq!(report.tensors.len(), tiny_llama_gguf().tensors.len());
    }
}

#[test]
fn sets_with_a_missing_foreign_or_doubled_part_are_refused() {
    let check = |edit: &dyn Fn(&Path, [GgufWriter; 3]), given: usize, expected: &str| {
        let dir = tempfile::tempdir().unwrap();
        edit(dir.path(), parts());
        let error = Checkpoint::open(&dir.path().join(name(given))).expect_err(expected);
        assert_eq!(describe(&error, dir.path()), expected);
    };
    let missing = |given: usize, absent: usize| {
        format!(
            "MissingPart: `@{}` is one of 3 parts, and `{}` is not beside it: put all parts into one \
             folder under the names they were published with",
            name(given),
            name(absent)
        )
    };
    for (given, absent) in [(2, 1), (1, 2), (1, 3), (3, 1)] {
        let without = |folder: &Path, parts: [GgufWriter; 3]| {
            write(folder, &parts);
            fs::remove_file(folder.join(name(absent))).unwrap();
        };
        check(&without, given, &missing(given, absent));
    }
    let alone = |folder: &Path, parts: [GgufWriter; 3]| {
        fs::write(folder.join(name(2)), parts[1].bytes()).unwrap();
    };
    check(&alone, 2, &missing(2, 1));
    let doubled = |folder: &Path, [a, _, c]: [GgufWriter; 3]| write(folder, &[a.clone(), a, c]);
    let of_another = "Field: `@m-00002-of-00003.gguf`: split.no is 0, expected 1, as its name says: it \
                      is another part, or one of another model";
    check(&doubled, 1, of_another);
    check(&doubled, 3, of_another);
    let whole = |folder: &Path, [a, _, c]: [GgufWriter; 3]| {
        write(folder, &[a, tiny_llama_gguf(), c]);
    };
    check(
        &whole,
        1,
        "Field: `@m-00002-of-00003.gguf`: split.count is missing, expected 3, as in \
         `@m-00001-of-00003.gguf`",
    );
    let counts = |folder: &Path, [a, b, c]: [GgufWriter; 3]| {
        write(folder, &[a, b.u32("split.tensors.count", 400), c]);
    };
    check(
        &counts,
        1,
        "Field: `@m-00002-of-00003.gguf`: split.tensors.count is 400, expected 11, as in \
         `@m-00001-of-00003.gguf`: the parts are of different models",
    );
    let short = |folder: &Path, [a, b, mut c]: [GgufWriter; 3]| {
        c.tensors.pop();
        write(folder, &[a, b, c]);
    };
    check(
        &short,
        2,
        "Field: `@m-00001-of-00003.gguf`: split.tensors.count is 11, expected 10, as many as all \
         parts hold",
    );
    let same = |folder: &Path, [a, b, mut c]: [GgufWriter; 3]| {
        c.tensors[0] = b.tensors[0].clone();
        write(folder, &[a, b, c]);
    };
    check(
        &same,
        1,
        "DuplicateTensor: `@m-00003-of-00003.gguf`: tensor `model.norm.weight` is there twice, first \
         in `@m-00002-of-00003.gguf`",
    );
    let wrong_type = |folder: &Path, [a, b, c]: [GgufWriter; 3]| {
        write(folder, &[a.string("split.count", "3"), b, c]);
    };
    check(
        &wrong_type,
        1,
        "Field: `@m-00001-of-00003.gguf`: split.count is `3`, expected a non-negative integer",
    );
}

#[test]
fn parts_under_other_names_are_refused_with_the_names_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let [first, ..] = parts();
    for file in ["m.gguf", "m-00001-of-00002.gguf"] {
        let path = dir.path().join(file);
        fs::write(&path, first.bytes()).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        assert_eq!(
            describe(&error, dir.path()),
            format!(
                "Field: `@{file}`: split.count is 3, expected the `N` of a file name \
                 `MODEL-00001-of-0000N.gguf`, at most 1000: parts are found by the names that \
                 gguf-split gives them"
            )
        );
    }
    let path = dir.path().join("m-00001-of-60000.gguf");
    fs::write(&path, first.u32("split.count", 60_000).bytes()).unwrap();
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(
        error.to_string().contains("split.count is 60000"),
        "{error}"
    );
    for not in [
        "m-0001-of-0003.gguf",
        "m-00000-of-00003.gguf",
        "m-00004-of-00003.gguf",
        "m-+0001-of-00003.gguf",
        "m-00001-of-00003",
        "-00001-of.gguf",
        "é.gguf",
    ] {
        assert_eq!(PartName::of(Path::new(not)), None, "{not}");
    }
}
