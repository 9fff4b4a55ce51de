//! Weights that were packed before: the same numbers from the file as without it, and never any from a
//! file that is damaged, cut short or another's.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use std::fs;
use std::path::Path;

use common::{configs, decoder, prompt};
use relufy_data::Silent;
use relufy_model::Checkpoint;
use relufy_model::checkpoint::{StoredDtype, save_weights, write_config};
use relufy_sparse::{
    Calibrated, Format, Opened, Options, PackedCache, PackedState, Session, SiteThresholds,
    Thresholds,
};
use relufy_spec::flops::{Densities, SiteDensities};
use relufy_spec::{ReluPlan, Stage, family};
use serde_json::Value;

fn options(format: Format) -> Options {
    Options { format, threads: 2, ..Options::default() }
}

/// A model folder with random weights.
fn save(config: &Value, to: &Path) -> Checkpoint {
    let parsed = family::parse(config).unwrap();
    let decoder = decoder(parsed.spec.clone());
    fs::create_dir_all(to).unwrap();
    write_config(to, config.as_object().unwrap()).unwrap();
    save_weights(to, &parsed.spec, decoder.params(), &parsed.weights, StoredDtype::F32).unwrap();
    Checkpoint::open(to).unwrap()
}

/// A small Llama and an empty cache.
struct Lab {
    folder: tempfile::TempDir,
    checkpoint: Checkpoint,
    cache: PackedCache,
}

impl Lab {
    fn new() -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let checkpoint = save(&configs()[0].1, &folder.path().join("llama"));
        let cache = PackedCache::new(folder.path().join("packed"));
        Lab { folder, checkpoint, cache }
    }

    fn open_as(&self, stage: Stage, format: Format, calibrated: &Calibrated) -> Opened {
        let plan = ReluPlan::stage(stage);
        self.cache.open(&self.checkpoint, &plan, &options(format), calibrated, &Silent).unwrap()
    }

    fn open(&self) -> Opened {
        self.open_as(Stage::Two, Format::Int8, &Calibrated::default())
    }
}

/// The bits of all logits of a prompt, and the work it was.
fn answers(opened: &Opened) -> (Vec<u32>, relufy_sparse::Counts) {
    let mut session = Session::new(&opened.engine).unwrap();
    let mut bits = Vec::new();
    for id in prompt() {
        bits.extend(session.step(id).unwrap().iter().map(|x| x.to_bits()));
    }
    bits.extend(session.prefill(&prompt()).unwrap().iter().map(|x| x.to_bits()));
    (bits, session.total_counts())
}

fn calm(opened: &Opened, was_there: bool) {
    assert_eq!((opened.was_there, &opened.notes[..]), (was_there, &[][..]));
}

#[test]
fn a_file_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let cache = PackedCache::new(folder.path().join("deep/packed"));
    for (name, config) in configs() {
        let checkpoint = save(&config, &folder.path().join(name));
        for stage in [Stage::Dense, Stage::Two] {
            for format in Format::ALL {
                let open = || {
                    let (plan, options) = (ReluPlan::stage(stage), options(format));
                    let none = Calibrated::default();
                    cache.open(&checkpoint, &plan, &options, &none, &Silent).unwrap()
                };
                let (first, second) = (open(), open());
                calm(&first, false);
                calm(&second, true);
                assert_eq!(answers(&first), answers(&second), "{name} {stage:?} {format}");
                assert_eq!(first.engine.bytes(), second.engine.bytes());
                assert_eq!(first.path, second.path);
            }
        }
    }
    // Nothing but the files themselves is left.
    let names = fs::read_dir(cache.dir()).unwrap().map(|entry| entry.unwrap().file_name());
    let names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    assert_eq!(names.len(), configs().len() * 2 * 4);
    assert!(names.iter().all(|name| name.ends_with(".packed")), "{names:?}");
}

#[test]
fn other_weights_plans_formats_and_layouts_have_other_files() {
    let lab = Lab::new();
    let none = Calibrated::default();
    let layers = lab.checkpoint.config().spec.layers.len();
    let sparse_inputs = SiteDensities { qkv: 0.5, o: 1.0, up: 0.05, down: 0.9 };
    let by_input = Calibrated {
        densities: Some(Densities::uniform(layers, sparse_inputs)),
        ..Calibrated::default()
    };
    let dropped = SiteThresholds { qkv: 0.1, o: 0.1, up: 0.1, gate: 0.1 };
    let thresholds = Calibrated {
        thresholds: Some(Thresholds { layers: vec![dropped; layers] }),
        ..none.clone()
    };
    let mut paths = vec![lab.open().path];
    let mut other = |opened: Opened| {
        calm(&opened, false);
        assert!(!paths.contains(&opened.path));
        paths.push(opened.path);
    };
    other(lab.open_as(Stage::One, Format::Int8, &none));
    other(lab.open_as(Stage::Two, Format::F16, &none));
    other(lab.open_as(Stage::Two, Format::Int8, &by_input));
    other(lab.open_as(Stage::Two, Format::Int8, &thresholds));
    // The densities of the layout that there is anyway change nothing.
    let dense = Calibrated { densities: Some(Densities::dense(layers)), ..none };
    calm(&lab.open_as(Stage::Two, Format::Int8, &dense), true);
    // Same name, same size, another bit.
    let file = lab.folder.path().join("llama/model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    other(lab.open());
}

#[test]
fn what_is_not_whole_and_right_is_packed_again() {
    let lab = Lab::new();
    let first = lab.open();
    let expected = answers(&first);
    let good = fs::read(&first.path).unwrap();
    let json = 56 + u64::from_le_bytes(good[16..24].try_into().unwrap()) as usize;
    let start = json.next_multiple_of(4096);
    let flip = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let other = lab.open_as(Stage::One, Format::Int8, &Calibrated::default());
    let mut bad = vec![
        (Vec::new(), "shorter than its header"),
        (good[..55].to_vec(), "shorter than its header"),
        (good[..json - 1].to_vec(), "ends within its header"),
        (good[..start].to_vec(), "bytes, expected"),
        (good[..good.len() - 4096].to_vec(), "bytes, expected"),
        (good[..good.len() - 1].to_vec(), "bytes, expected"),
        ([&good[..], &[0]].concat(), "bytes, expected"),
        (vec![0; good.len()], "holds no packed weights"),
        (flip(0), "holds no packed weights"),
        (flip(8), "has version 18, expected 2"),
        (flip(12), "another byte order"),
        (flip(16), "header"),
        (flip(30), "checksum of its header"),
        (flip(60), "checksum of its header"),
        (flip(json - 1), "checksum of its header"),
        (flip(start), "is damaged: its checksum differs"),
        (fs::read(other.path).unwrap(), "belongs to other weights"),
    ];
    let more = (start..good.len()).step_by(997).map(|at| (flip(at), ""));
    bad.extend(more);
    for (n, (bytes, why)) in bad.into_iter().enumerate() {
        fs::write(&first.path, bytes).unwrap();
        let opened = lab.open();
        assert_eq!(answers(&opened), expected, "case {n}");
        if opened.was_there {
            // What was flipped fills a page and is never read.
            assert!(why.is_empty(), "case {n}: nobody noticed");
            continue;
        }
        let [note] = &opened.notes[..] else { panic!("case {n}: {:?}", opened.notes) };
        let named = note.contains(first.path.to_str().unwrap());
        assert!(named && note.contains(why) && note.ends_with("packing again"), "{note}");
        assert!(fs::read(&first.path).unwrap() == good);
        calm(&lab.open(), true);
    }
}

#[test]
fn a_file_that_lies_with_right_checksums_is_refused() {
    let lab = Lab::new();
    let first = lab.open();
    let expected = answers(&first);
    let good = fs::read(&first.path).unwrap();
    let json = 56 + u64::from_le_bytes(good[16..24].try_into().unwrap()) as usize;
    let data = &good[json.next_multiple_of(4096)..];
    let header: Value = serde_json::from_slice(&good[56..json]).unwrap();
    let forge = |change: &dyn Fn(&mut Value)| {
        let mut header = header.clone();
        change(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        let mut bytes = good[..16].to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        let checksum = *blake3::Hasher::new().update(&bytes).update(&header).finalize().as_bytes();
        bytes.extend(checksum);
        bytes.extend(header);
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        bytes.extend(data);
        fs::write(&first.path, bytes).unwrap();
    };
    type Change = (&'static str, fn(&mut Value));
    let changes: [Change; 10] = [
        ("has another format or shape", |h| h["matrices"][1]["shape"][0] = 3.into()),
        ("has another format or shape", |h| h["matrices"][1]["format"] = "f16".into()),
        ("has another format or shape", |h| h["matrices"][1]["scales"] = Value::Array(vec![])),
        ("is missing", |h| h["matrices"][1]["name"] = "another".into()),
        ("lies outside", |h| h["matrices"][1]["data"]["offset"] = u64::MAX.into()),
        ("has another length", |h| h["matrices"][1]["data"]["bytes"] = (1u64 << 40).into()),
        ("bytes, expected", |h| h["bytes"] = u64::MAX.into()),
        ("no parameter", |h| h["vectors"] = Value::Array(vec![])),
        ("header", |h| h["more"] = 1.into()),
        ("header", |h| h["origin"] = Value::Null),
    ];
    for (why, change) in changes {
        forge(&change);
        let opened = lab.open();
        assert_eq!(answers(&opened), expected);
        assert!(!opened.was_there && opened.notes[0].contains(why), "{why}: {:?}", opened.notes);
        calm(&lab.open(), true);
    }
    // The forger's own mistakes are not what is found: unchanged, the file is taken.
    forge(&|_| {});
    calm(&lab.open(), true);
}

/// The states of the cache's files, by name.
fn states(lab: &Lab) -> Vec<PackedState> {
    lab.cache.entries().unwrap().iter().map(|entry| entry.state).collect()
}

#[test]
fn entries_say_what_is_of_use() {
    let lab = Lab::new();
    assert_eq!(lab.cache.entries().unwrap(), []);
    let opened = lab.open();
    let [entry] = &lab.cache.entries().unwrap()[..] else { panic!("not one") };
    assert_eq!((&entry.path, entry.state), (&opened.path, PackedState::Current));
    assert_eq!((entry.model.as_deref(), entry.format), (Some("llama"), Some(Format::Int8)));
    assert_eq!(entry.bytes, fs::metadata(&opened.path).unwrap().len());
    let good = fs::read(&opened.path).unwrap();
    let changed = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    for (bytes, expected) in [
        (changed(8), PackedState::OtherVersion),
        (changed(12), PackedState::OtherVersion),
        (changed(16), PackedState::Damaged),
        (changed(30), PackedState::Damaged),
        (changed(60), PackedState::Damaged),
        (good[..9].to_vec(), PackedState::Damaged),
        (good[..100].to_vec(), PackedState::Damaged),
        (good[..good.len() - 1].to_vec(), PackedState::Damaged),
        (good.clone(), PackedState::Current),
    ] {
        fs::write(&opened.path, bytes).unwrap();
        assert_eq!(states(&lab), [expected]);
    }
    // What is no packed file is none of the cache's.
    for (name, bytes) in [("x.packed", &b"RELUPAC?"[..]), ("x.pack", &good), ("empty.packed", b"")]
    {
        fs::write(lab.cache.dir().join(name), bytes).unwrap();
    }
    fs::create_dir(lab.cache.dir().join(".relufy-partial-packed-folder")).unwrap();
    fs::create_dir(lab.cache.dir().join("folder.packed")).unwrap();
    assert_eq!(states(&lab), [PackedState::Current]);
    // Other weights in the same place.
    let file = lab.folder.path().join("llama/model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes).unwrap();
    assert_eq!(states(&lab), [PackedState::Current]);
    let last = bytes.len() - 4;
    bytes[last] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let old = lab.cache.entries().unwrap();
    assert_eq!(old[0].state, PackedState::Changed);
    let again = lab.open();
    assert_eq!(again.superseded, old);
    assert!(!again.was_there && opened.superseded.is_empty() && lab.open().superseded.is_empty());
    // Removed while somebody decodes with it, and by somebody else already.
    let expected = answers(&lab.open());
    for entry in lab.cache.entries().unwrap() {
        assert!(lab.cache.remove(&entry).unwrap() && !lab.cache.remove(&entry).unwrap());
    }
    assert_eq!(answers(&again), expected);
    assert_eq!(states(&lab), []);
    assert_eq!(fs::read_dir(lab.cache.dir()).unwrap().count(), 5);
    lab.open();
    fs::remove_dir_all(lab.folder.path().join("llama")).unwrap();
    assert_eq!(states(&lab), [PackedState::Gone]);
}

#[test]
fn processes_do_not_disturb_each_other() {
    let lab = Lab::new();
    let expected = answers(&lab.open());
    for round in 0..5 {
        match round % 2 {
            0 => fs::remove_dir_all(lab.cache.dir()).unwrap(),
            _ => fs::write(lab.open().path, b"damaged").unwrap(),
        }
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(answers(&lab.open()), expected));
            }
        });
        calm(&lab.open(), true);
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_a_note() {
    let lab = Lab::new();
    let expected = answers(&lab.open());
    let file = lab.folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    let plan = ReluPlan::stage(Stage::Two);
    let cache = PackedCache::new(&file);
    let opened = cache
        .open(&lab.checkpoint, &plan, &options(Format::Int8), &Calibrated::default(), &Silent)
        .unwrap();
    assert_eq!(answers(&opened), expected);
    let last = opened.notes.last().unwrap();
    assert!(!opened.was_there && last.ends_with("the packed weights are not kept"), "{last}");
}

#[test]
fn what_is_mapped_outlives_its_name() {
    let lab = Lab::new();
    let expected = answers(&lab.open());
    let opened = lab.open();
    calm(&opened, true);
    fs::remove_file(&opened.path).unwrap();
    assert_eq!(answers(&opened), expected);
}
