//! Packs of made and reference checkpoints: the same numbers, and every way to spoil a pack.

use std::{
    fs,
    ops::ControlFlow,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use dsd_kernels::{
    backend::{Activations, KvType},
    cpu::{CpuConfig, Isa},
    dtype::Format,
    matrix::{Layout, Matrix, TileScales},
    panel,
};
use tempfile::TempDir;

use super::{PackingError, PackingProgress, Place, RankOf, Split, TensorRequest, pack, requests};
use crate::{
    eval::{Ranks, Session},
    model,
    runner::{self, Budget, load_cpu, plan_cpu},
    runtime::clock,
    telemetry::chain,
    weights::{
        Checkpoint, KeeperConfig, PackHealth, PackKeeper, TensorSource,
        pack::manifest::{Manifest, Piece, PieceKind, digest},
        tests::{test_data, writer::tiny_llama_gguf},
        verify,
    },
};

const CPU: CpuConfig = CpuConfig {
    n_threads: 2,
    isa: Isa::Portable,
    activations: Activations::F32,
    kv_type: KvType::F32,
};

/// A checkpoint's pack in a folder of its own.
struct Packed {
    dir: TempDir,
    path: PathBuf,
    /// Its checkpoint, where that was made for it.
    _source: Option<TempDir>,
}

fn go_on(_: PackingProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn packed(model: &Path, n_ranks: usize) -> Packed {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("packed");
    pack(model, n_ranks, &path, &mut go_on).unwrap();
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        1,
        "only the pack"
    );
    Packed {
        dir,
        path,
        _source: None,
    }
}

/// A tiny GGUF file and its pack for two ranks.
fn tiny() -> (Packed, PathBuf) {
    let source = tempfile::tempdir().unwrap();
    let model = source.path().join("tiny.gguf");
    fs::write(&model, tiny_llama_gguf().bytes()).unwrap();
    let packed = Packed {
        _source: Some(source),
        ..packed(&model, 2)
    };
    (packed, model)
}

impl Packed {
    fn rank_file(&self, rank: usize) -> PathBuf {
        self.path
            .join(crate::weights::pack::manifest::rank_name(rank, 2))
    }

    /// Changes the manifest as somebody would who knows how to seal it.
    fn edit(&self, edit: impl FnOnce(&mut Manifest)) {
        let mut manifest = Manifest::read(&self.path).unwrap();
        edit(&mut manifest);
        fs::write(self.path.join("manifest.json"), manifest.seal().unwrap()).unwrap();
    }

    /// Opens and loads the pack with `n_ranks`, which must fail with all of `expected`.
    #[track_caller]
    fn check(&self, n_ranks: usize, expected: &[&str]) {
        let error = load(&self.path, n_ranks).expect_err("the pack was taken");
        for part in expected {
            assert!(error.contains(part), "no `{part}` in `{error}`");
        }
    }
}

fn load(path: &Path, n_ranks: usize) -> Result<(), String> {
    let checkpoint = Checkpoint::open(path).map_err(|e| chain(&e))?;
    let budget = Budget {
        kv_bytes_max: 64 << 20,
        step_tokens_max: 8,
        step_spans_max: 1,
    };
    let plan = plan_cpu(&checkpoint, CPU, n_ranks, budget, None).map_err(|e| chain(&e))?;
    for rank in &plan.ranks {
        // Built only: exchanges among ranks are not what is tested here.
        load_cpu(&checkpoint, CPU, rank).map_err(|e| chain(&e))?;
    }
    Ok(())
}

fn flip(file: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn logits(path: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let cpu = CpuConfig {
        isa: Isa::available()[0],
        ..CPU
    };
    let mut session = Session::open(&checkpoint, Ranks::solo(cpu), 64).unwrap();
    let tokens = (0..20)
        .map(|i| (i * i * 7 + 3) % session.vocab_len() as u32)
        .collect::<Vec<_>>();
    let mut all = Vec::new();
    session
        .logits(&tokens, |_, row| all.extend_from_slice(row))
        .unwrap();
    all
}

/// What a checkpoint would give a rank, laid out.
fn laid_out(matrix: &Matrix, role: crate::weights::Role) -> (Layout, Vec<u8>) {
    let (format, n_rows, n_cols) = (matrix.format(), matrix.n_rows(), matrix.n_cols());
    let bytes =
        panel::bytes(format, n_rows, n_cols).filter(|_| role == crate::weights::Role::Linear);
    let Some(len) = bytes else {
        return (Layout::Rows, matrix.data().to_vec());
    };
    let mut out = vec![0; len];
    let n_panels = n_rows.div_ceil(panel::PANEL_ROWS);
    for (index, out) in out.chunks_mut(len / n_panels).enumerate() {
        panel::pack(matrix, index, out);
    }
    (Layout::Panels, out)
}

#[test]
fn a_pack_gives_the_logits_of_its_checkpoint_bit_for_bit() {
    let models = [
        "reference/llama",
        "reference/qwen3_moe",
        "reference/deepseek_v2_lite",
        "reference/deepseek_v3_fp8",
        "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ];
    for model in models {
        let model = test_data().join(model);
        let packed = packed(&model, 1);
        assert!(
            logits(&model) == logits(&packed.path),
            "{}",
            model.display()
        );
    }
}

#[test]
fn every_rank_gets_its_pieces_laid_out_and_in_place() {
    for model in [
        "reference/qwen2",
        "reference/deepseek_v2",
        "reference/deepseek_v3_fp8",
        "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ] {
        let model = test_data().join(model);
        let checkpoint = Checkpoint::open(&model).unwrap();
        let packed = packed(&model, 2);
        let pack = Checkpoint::open(&packed.path).unwrap();
        for (rank, requests) in requests(&checkpoint, 2).unwrap().iter().enumerate() {
            let source = pack.of_rank(rank, 2).unwrap();
            let whole = checkpoint.of_rank(rank, 2).unwrap();
            for request in requests {
                match request {
                    TensorRequest::Matrix {
                        name,
                        shape,
                        cut,
                        role,
                    } => {
                        let found = source.matrix(name, *shape, cut, *role).unwrap();
                        let expected = whole.matrix(name, *shape, cut, *role).unwrap();
                        assert!(found.data().as_ptr().addr().is_multiple_of(64), "{name}");
                        assert_eq!(found.format(), expected.format(), "{name}");
                        let (layout, bytes) = laid_out(&expected, *role);
                        assert_eq!(found.layout(), layout, "{name}");
                        if layout == Layout::Rows {
                            assert_eq!(found.tile_scales(), expected.tile_scales(), "{name}");
                        }
                        assert!(found.data() == bytes, "{name} of rank {rank}");
                    }
                    TensorRequest::Vector { name, len, part } => {
                        assert_eq!(
                            source.vector(name, *len, part.clone()).unwrap(),
                            whole.vector(name, *len, part.clone()).unwrap()
                        );
                    }
                }
            }
            assert_eq!(source.unclaimed(), [""; 0]);
        }
        load(&packed.path, 2).unwrap();
    }
}

/// Whoever lists a pack with another program sees its tensors.
#[test]
fn files_of_ranks_are_safetensors() {
    let (packed, _) = tiny();
    let manifest = Manifest::read(&packed.path).unwrap();
    for (rank, file) in manifest.ranks.iter().enumerate() {
        let bytes = fs::read(packed.rank_file(rank)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.len(), file.pieces.len());
        for Piece { name, span, .. } in &file.pieces {
            let found = &tensors.tensor(name).unwrap().data()[..span.bytes as usize];
            let start = span.offset as usize;
            assert!(found == &bytes[start..start + found.len()], "{name}");
            assert_eq!(digest(found), span.blake3, "{name}");
        }
    }
}

#[test]
fn a_pack_for_another_group_is_refused() {
    let (packed, _) = tiny();
    packed.check(1, &["is packed for 2 ranks, 1 are asked for; use --tp 2"]);
    load(&packed.path, 2).unwrap();
}

#[test]
fn a_pack_of_other_kernels_or_versions_is_refused() {
    let (packed, _) = tiny();
    let good = Manifest::read(&packed.path).unwrap();
    packed.edit(|m| m.cpu_layout = "panels-8x64-3".to_owned());
    packed.check(
        2,
        &["is laid out for `panels-8x64-3`, the kernels of this build read `panels-16x32-1`"],
    );
    let other = Manifest {
        layout_version: 7,
        ..good
    };
    fs::write(packed.path.join("manifest.json"), other.seal().unwrap()).unwrap();
    packed.check(2, &["has layout version 7, this build reads 2"]);
}

#[test]
fn an_edited_manifest_is_refused() {
    let (packed, _) = tiny();
    let file = packed.path.join("manifest.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(
        &file,
        text.replace("\"hidden_size\":32", "\"hidden_size\":64"),
    )
    .unwrap();
    packed.check(
        2,
        &["manifest.json", "was edited or damaged: its blake3 is"],
    );
    fs::write(&file, &text[..text.len() / 2]).unwrap();
    packed.check(2, &["is not valid manifest of a pack"]);
}

#[test]
fn a_manifest_that_is_sealed_and_wrong_is_refused() {
    type Spoiled = (fn(&mut Manifest), &'static [&'static str]);
    let spoil: [Spoiled; 6] = [
        (
            |m| m.ranks[1].pieces[0].span.offset += 32,
            &[
                "the place of `model.embed_tokens.weight`",
                "expected a multiple of 64",
            ],
        ),
        (
            |m| m.ranks[0].pieces[0].span.bytes = u64::MAX,
            &["the place of `model.embed_tokens.weight` (18446744073709551615 bytes)"],
        ),
        (
            |m| m.ranks[0].header_bytes = u64::MAX,
            &["the header length", "is 18446744073709551615"],
        ),
        (
            |m| {
                m.ranks[1].pieces.pop();
            },
            &["tensor `", "is missing"],
        ),
        (
            |m| {
                let mut extra = m.ranks[0].pieces[1].clone();
                "extra.weight".clone_into(&mut extra.name);
                m.ranks[0].pieces.push(extra);
            },
            &["1 tensors do not belong to llama, the first is `extra.weight`"],
        ),
        (
            |m| {
                let PieceKind::Matrix { format, .. } = &mut m.ranks[0].pieces[0].what else {
                    panic!("a matrix")
                };
                "q9_9".clone_into(format);
            },
            &["a format is `q9_9`, expected one of f32, f16"],
        ),
    ];
    for (edit, expected) in spoil {
        let (packed, _) = tiny();
        packed.edit(edit);
        packed.check(2, expected);
    }
}

#[test]
fn damaged_files_are_refused_by_name() {
    let (packed, _) = tiny();
    let manifest = Manifest::read(&packed.path).unwrap();
    let file = packed.rank_file(1);
    let piece = &manifest.ranks[1].pieces[2];
    flip(&file, piece.span.offset + piece.span.bytes - 1);
    let tensor = format!("tensor `{}` is damaged: its blake3 is", piece.name);
    packed.check(2, &["rank-01-of-02.safetensors", &tensor]);
    flip(&file, piece.span.offset + piece.span.bytes - 1);
    load(&packed.path, 2).unwrap();

    flip(&file, 20);
    packed.check(2, &["the header is damaged"]);
    flip(&file, 20);

    let gguf = packed.path.join("metadata.gguf");
    flip(&gguf, 30);
    packed.check(2, &["metadata.gguf`: the file is damaged"]);
    flip(&gguf, 30);

    let len = fs::metadata(&file).unwrap().len();
    let open = fs::OpenOptions::new().write(true).open(&file).unwrap();
    open.set_len(len - 64).unwrap();
    let lengths = format!(
        "is {} bytes long, the manifest of its pack says {len}",
        len - 64
    );
    packed.check(2, &["rank-01-of-02.safetensors", &lengths]);
    fs::remove_file(&file).unwrap();
    packed.check(2, &["cannot read", "rank-01-of-02.safetensors"]);
}

#[test]
fn a_pack_of_a_checkpoint_that_changed_is_stale() {
    let (packed, model) = tiny();
    // Touched only: the contents decide.
    let later = fs::metadata(&model).unwrap().modified().unwrap() + Duration::from_secs(5);
    let touch = || {
        let file = fs::OpenOptions::new().write(true).open(&model).unwrap();
        file.set_modified(later).unwrap();
    };
    touch();
    load(&packed.path, 2).unwrap();
    let len = fs::metadata(&model).unwrap().len();
    flip(&model, len - 1);
    touch();
    packed.check(2, &["is stale: `", "tiny.gguf` has blake3 "]);
    fs::write(&model, b"short").unwrap();
    let lengths = format!("has length 5, it had {len} when it was packed");
    packed.check(2, &["is stale", &lengths]);
    Checkpoint::reopen(&packed.path).unwrap();
    fs::remove_file(&model).unwrap();
    load(&packed.path, 2).unwrap();
}

#[test]
fn verify_and_the_keeper_find_a_flipped_bit() {
    let (packed, _) = tiny();
    let good = verify(&packed.path, None, |_| {}).unwrap();
    assert!(good.is_good(), "{:?}", good.findings);
    let checkpoint = Checkpoint::open(&packed.path).unwrap();
    let config = KeeperConfig {
        scrub_interval: Duration::from_millis(1),
        scrub_bytes_per_s: 1 << 40,
    };
    let pack = checkpoint.pack().unwrap();
    let keeper = PackKeeper::start("tiny", std::sync::Arc::clone(pack), config).unwrap();
    let wait = |what: &dyn Fn() -> bool| {
        let deadline = clock::now() + Duration::from_secs(20);
        while !what() {
            assert!(clock::now() < deadline, "{:?}", keeper.health());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(&|| 2 <= keeper.health().n_scrubs);
    assert_eq!(keeper.health().damaged, []);
    let manifest = Manifest::read(&packed.path).unwrap();
    let piece = &manifest.ranks[1].pieces[3];
    flip(&packed.rank_file(1), piece.span.offset);
    wait(&|| !keeper.health().damaged.is_empty());
    let damaged = &keeper.health().damaged[0];
    assert_eq!(damaged.tensor, piece.name);
    assert_eq!(damaged.file, packed.rank_file(1));
    let report = verify(&packed.path, None, |_| {}).unwrap();
    let found = report.findings.iter().map(|f| f.tensor.as_str());
    assert_eq!(found.collect::<Vec<_>>(), [piece.name.as_str()]);
    drop(keeper);
}

/// Reading it through its mapping ended the process, in a scrub every time.
#[test]
fn a_pack_that_is_cut_off_meanwhile_is_a_finding() {
    let (packed, _) = tiny();
    let file = packed.rank_file(0);
    let whole = fs::read(&file).unwrap();
    let checkpoint = Checkpoint::open(&packed.path).unwrap();
    let pack = checkpoint.pack().unwrap();
    let config = KeeperConfig {
        scrub_interval: Duration::from_millis(1),
        scrub_bytes_per_s: u64::MAX,
    };
    let keeper = PackKeeper::start("tiny", std::sync::Arc::clone(pack), config).unwrap();
    let deadline = clock::now() + Duration::from_secs(20);
    let wait = |is_done: &dyn Fn(&PackHealth) -> bool| {
        while !is_done(&keeper.health()) {
            assert!(clock::now() < deadline, "{:?}", keeper.health());
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    for turn in 0..8 {
        let report = verify(&packed.path, None, |p| {
            if p.n_tensors_done == 1 + turn % 3 {
                let file = fs::OpenOptions::new().write(true).open(&file).unwrap();
                file.set_len(whole.len() as u64 / 9 * turn as u64).unwrap();
            }
        })
        .unwrap();
        assert!(!report.is_good());
        for finding in &report.findings {
            assert_eq!(finding.file, file);
            assert!(finding.found.ends_with("then the file ends"), "{finding:?}");
        }
        let last = &report.findings.last().unwrap().tensor;
        wait(&|health| {
            health
                .damaged
                .iter()
                .any(|d| d.file == file && d.tensor == *last)
        });
        fs::write(&file, &whole).unwrap();
        wait(&|health| health.damaged.is_empty());
    }
}

#[test]
fn nothing_is_written_over_or_left_behind() {
    let (packed, model) = tiny();
    let parent = packed.dir.path();
    let error = pack(&model, 2, &packed.path, &mut go_on).unwrap_err();
    assert!(matches!(error, PackingError::Exists { .. }), "{error}");

    // What a killed writer leaves is no pack, and goes away with the next writer.
    let out = parent.join("next");
    let left = parent.join(".next.packing");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("rank-00-of-02.safetensors"), b"half").unwrap();
    pack(&model, 2, &out, &mut go_on).unwrap();
    assert!(!left.exists());
    assert_eq!(fs::read_dir(&out).unwrap().count(), 4);

    let place = Place::take(&parent.join("third")).unwrap();
    let error = Place::take(&parent.join("third")).err().unwrap();
    assert!(matches!(error, PackingError::Busy { .. }), "{error}");
    let error = place.refuse_if_full(u64::MAX).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("the pack needs 18446744073709551615 bytes, `"),
        "{error}"
    );
    drop(place);
    assert!(!parent.join(".third.packing").exists());

    // Interrupted wherever somebody is told of progress.
    let mut n_told = 0;
    let mut count = |_| {
        n_told += 1;
        ControlFlow::Continue(())
    };
    pack(&model, 2, &parent.join("whole"), &mut count).unwrap();
    assert!(8 < n_told, "{n_told}");
    let n_files = fs::read_dir(parent).unwrap().count();
    for n in [1, 2, n_told / 2, n_told] {
        let mut n_left = n;
        let mut stop = |_| {
            n_left -= 1;
            match n_left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let error = pack(&model, 2, &parent.join("cut"), &mut stop).unwrap_err();
        assert!(matches!(error, PackingError::Interrupted), "{error}");
        assert_eq!(
            fs::read_dir(parent).unwrap().count(),
            n_files,
            "{n} of {n_told}"
        );
    }

    let error = pack(&packed.path, 2, &parent.join("fourth"), &mut go_on).unwrap_err();
    assert!(error.to_string().contains("is a pack already"), "{error}");
    let error = pack(&model, 3, &parent.join("fourth"), &mut go_on).unwrap_err();
    assert!(
        error.to_string().contains("3 ranks cannot share 2"),
        "{error}"
    );
    let error = pack(&model, 1, &parent.join("no/where"), &mut go_on).unwrap_err();
    assert!(error.to_string().starts_with("cannot write `"), "{error}");
}

/// Packs outlive the program: when this fails, panels changed, and `panel::LAYOUT_NAME` must too.
#[test]
fn the_layout_of_panels_is_the_one_its_name_stands_for() {
    let mut found = vec![panel::LAYOUT_NAME.to_owned()];
    for format in Format::ALL {
        let (n_rows, n_cols) = (19, 2 * format.block_len().max(32));
        let Some(len) = panel::bytes(format, n_rows, n_cols) else {
            continue;
        };
        let row_bytes = format.row_bytes(n_cols).unwrap();
        let bytes = (0..row_bytes * n_rows).map(|i| (i * 31 % 251) as u8);
        let scales = (format == Format::Int8).then(|| TileScales {
            tile_rows: 1,
            tile_cols: n_cols,
            values: (0..n_rows).map(|row| row as f32).collect(),
        });
        let bytes = Bytes::from(bytes.collect::<Vec<_>>());
        let matrix = Matrix::new(format, n_rows, n_cols, bytes, scales).unwrap();
        let mut out = vec![0; len];
        for (index, out) in out.chunks_mut(len / 2).enumerate() {
            panel::pack(&matrix, index, out);
        }
        found.push(format!("{format} {}", &digest(&out)[..16]));
    }
    assert_eq!(
        found,
        [
            "panels-16x32-1",
            "q4_0 baa75edee314469b",
            "q4_1 1b19009dcffb59b3",
            "q5_0 74f665a648ebfebf",
            "q5_1 ee755d52331fa6ef",
            "q8_0 8cdf5eed55c61906",
            "q4_k fe42e8347e9c47fa",
            "q5_k f03852e86c4f6cff",
            "q6_k 63a242366fa47618",
            "int8 dbfd666150fca18d",
            "int4 0ced2f19d3f5bb9c",
        ]
    );
}

/// Ranks of a decoder that was packed are those of the checkpoint.
#[test]
fn a_pack_says_of_its_model_what_the_checkpoint_says() {
    for model in [
        "reference/deepseek_v3",
        "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ] {
        let model = test_data().join(model);
        let packed = packed(&model, 2);
        let (a, b) = (
            Checkpoint::open(&model).unwrap(),
            Checkpoint::open(&packed.path).unwrap(),
        );
        assert_eq!(a.config(), b.config());
        assert_eq!(a.generation_config(), b.generation_config());
        assert_eq!(a.eos_token_ids(), b.eos_token_ids());
        assert_eq!(a.architecture(), b.architecture());
        let spec = model::spec_of(&a).unwrap();
        assert_eq!(spec, model::spec_of(&b).unwrap());
        let of = RankOf {
            rank: 1,
            n_ranks: 2,
        };
        let split = |c: &Checkpoint| Split::new(&spec, of, &|name| c.format(name)).unwrap();
        assert_eq!(split(&a), split(&b));
        let text = |c: &Checkpoint| crate::text::TextModel::from_checkpoint(c);
        match (text(&a), text(&b)) {
            (Ok(a), Ok(b)) => assert_eq!(
                a.encode("Hello, world", true).unwrap(),
                b.encode("Hello, world", true).unwrap()
            ),
            (Err(_), Err(_)) => {}
            (a, b) => panic!("{:?} and {:?}", a.err(), b.err()),
        }
    }
}

/// A plan counts a pack's bytes as mapped: nothing is copied.
#[test]
fn a_pack_is_planned_without_copies() {
    let (packed, _) = tiny();
    let checkpoint = Checkpoint::open(&packed.path).unwrap();
    let budget = Budget {
        kv_bytes_max: 1 << 20,
        step_tokens_max: 8,
        step_spans_max: 1,
    };
    let plan: runner::ReplicaPlan = plan_cpu(&checkpoint, CPU, 2, budget, None).unwrap();
    for (rank, plan) in plan.ranks.iter().enumerate() {
        assert_eq!(plan.memory.panels_bytes, 0);
        let file = fs::metadata(packed.rank_file(rank)).unwrap().len();
        assert!(0 < plan.memory.mapped_bytes && plan.memory.mapped_bytes < file);
    }
}
