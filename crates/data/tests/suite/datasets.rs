//! From files to batches: caches, packing, order, splits, mixtures.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use relufy_data::corpus::SourceConfig;
use relufy_data::{
    Batch, CorpusConfig, Dataset, Error, IGNORE, Packed, PackingConfig, Result, Silent, Tokenizer,
};

use crate::support::{no_hub, shared, word_tokenizer};

/// A folder with a corpus of one document a line, and what opens it.
struct Room {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
    corpus: CorpusConfig,
}

const BOS: u32 = 1;
const EOS: u32 = 2;

/// Documents as lists of words; words have the ids 3 and up.
fn room(files: &[Vec<Vec<u32>>], bos: bool) -> Room {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = word_tokenizer(folder.path(), bos);
    let mut corpus =
        CorpusConfig { cache_dir: Some(folder.path().join("cache")), ..CorpusConfig::default() };
    for (number, documents) in files.iter().enumerate() {
        let path = folder.path().join(format!("{number}.jsonl"));
        let line = |words: &Vec<u32>| {
            let text: Vec<String> = words.iter().map(|word| format!("w{}", word - 3)).collect();
            format!("{}\n", serde_json::json!({"text": text.join(" ")}))
        };
        std::fs::write(&path, documents.iter().map(line).collect::<String>()).unwrap();
        corpus.sources.push(SourceConfig::new(path.to_str().unwrap()));
    }
    Room { folder, tokenizer, corpus }
}

impl Room {
    fn open(
        &self,
        sequence_length: usize,
        document_boundaries: bool,
        seed: u64,
    ) -> Result<Dataset> {
        let packing = PackingConfig { sequence_length, document_boundaries };
        let hub = no_hub(self.folder.path());
        Dataset::open(&self.corpus, &packing, &self.tokenizer, &hub, seed, &Silent)
    }

    fn caches(&self) -> Vec<PathBuf> {
        let folder = std::fs::read_dir(self.folder.path().join("cache")).unwrap();
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn rows(batch: &Batch) -> impl Iterator<Item = (&[u32], &[i64])> {
    batch.ids.chunks(batch.seq_len).zip(batch.targets.chunks(batch.seq_len))
}

fn all(packed: &Packed) -> Batch {
    packed.batch_in_order(0, packed.sequences() as usize).unwrap()
}

#[test]
fn documents_are_packed_as_written() {
    let room = room(&[vec![vec![10, 11, 12], vec![20], vec![30, 31, 32, 33]]], true);
    // The stream: 1 10 11 12 2 | 1 20 2 | 1 30 31 32 33 2
    let apart = room.open(5, true, 0).unwrap().train;
    assert_eq!((apart.tokens(), apart.sequences()), (14, 3));
    let batch = all(&apart);
    assert_eq!(batch.ids, [1, 10, 11, 12, 2, 1, 20, 2, 1, 30, 31, 32, 33, 2, 2]);
    let x = IGNORE;
    assert_eq!(batch.targets, [10, 11, 12, 2, x, 20, 2, x, 30, 31, 32, 33, 2, x, x]);
    assert_eq!(batch.positions, [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]);
    assert_eq!(batch.segments, [(0, 5), (5, 3), (8, 2), (10, 3), (13, 2)]);
    assert_eq!((batch.rows, batch.seq_len, batch.targets_counted()), (3, 5, 11));

    let joined = all(&room.open(5, false, 0).unwrap().train);
    assert_eq!(joined.ids, batch.ids);
    assert_eq!(joined.targets, [10, 11, 12, 2, 1, 20, 2, 1, 30, 31, 32, 33, 2, x, x]);
    assert_eq!(joined.positions, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1]);
    assert_eq!(joined.segments, [(0, 5), (5, 5), (10, 3), (13, 2)]);
    assert_eq!(apart.batch_in_order(2, 9).unwrap().rows, 1);
    assert_eq!(apart.batch_in_order(3, 9).unwrap().rows, 0);
}

fn corpus() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(3u32..103, 1..12), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Every id is a target exactly once an epoch, in any order; no segment holds two
    /// documents.
    #[test]
    fn an_epoch_is_the_corpus(
        documents in corpus(), length in 1usize..9, bos: bool, apart: bool, seed: u64, epoch in 0u64..3,
    ) {
        let room = room(std::slice::from_ref(&documents), bos);
        let stream: Vec<u32> = documents
            .iter()
            .flat_map(|words| bos.then_some(BOS).into_iter().chain(words.iter().copied()).chain([EOS]))
            .collect();
        prop_assume!(stream.len() > length);
        let packed = room.open(length, apart, seed).unwrap().train;
        let rows_of_epoch = packed.sequences();
        let batch = packed.batch(epoch * rows_of_epoch, rows_of_epoch as usize).unwrap();

        // Each row is a window of the stream: find out which, by asking in order.
        let ordered = all(&packed);
        let sorted = |batch: &Batch| {
            let mut all: Vec<_> = rows(batch).map(|(i, t)| (i.to_vec(), t.to_vec())).collect();
            all.sort();
            all
        };
        prop_assert_eq!(sorted(&batch), sorted(&ordered));
        prop_assert_eq!(&ordered.ids[..stream.len() - 1], &stream[..stream.len() - 1]);
        for at in 0..ordered.ids.len() {
            let boundary = apart && stream.get(at) == Some(&EOS);
            let expected = match stream.get(at + 1) {
                Some(next) if !boundary => i64::from(*next),
                _ => IGNORE,
            };
            prop_assert_eq!(ordered.targets[at], expected);
        }

        let mut next = 0;
        for (start, len) in &batch.segments {
            prop_assert_eq!(*start, next);
            prop_assert!(*len > 0 && start / length == (start + len - 1) / length);
            prop_assert!((0..*len).all(|i| batch.positions[start + i] == i as u32));
            let padding = batch.targets[*start..start + len].iter().all(|t| *t == IGNORE);
            if apart && !padding {
                let inside = &batch.ids[*start..start + len - 1];
                prop_assert!(!inside.contains(&EOS));
            }
            next = start + len;
        }
        prop_assert_eq!(next, batch.ids.len());
    }

    /// A batch depends on nothing but its place.
    #[test]
    fn batches_are_pure_functions(documents in corpus(), seed: u64, first in 0u64..50, rows in 0usize..7) {
        let room = room(&[documents.clone(), documents], true);
        let Ok(dataset) = room.open(3, true, seed) else { return Ok(()) };
        let whole = dataset.train.batch(first, rows).unwrap();
        let again = room.open(3, true, seed).unwrap();
        prop_assert_eq!(dataset.fingerprint(), again.fingerprint());
        let mut parts = Batch { seq_len: 3, ..Batch::default() };
        for row in (0..rows as u64).rev() {
            let one = again.train.batch(first + row, 1).unwrap();
            parts.ids.splice(0..0, one.ids);
            parts.targets.splice(0..0, one.targets);
        }
        prop_assert_eq!((parts.ids, parts.targets), (whole.ids, whole.targets));
    }
}

#[test]
fn seeds_and_epochs_change_the_order() {
    let documents: Vec<Vec<u32>> = (0..60).map(|i| vec![3 + i; 4]).collect();
    let room = room(&[documents], false);
    let order = |seed, epoch| {
        let packed = room.open(5, true, seed).unwrap().train;
        packed.batch(epoch * packed.sequences(), 60).unwrap().ids
    };
    assert_ne!(order(1, 0), order(2, 0));
    assert_ne!(order(1, 0), order(1, 1));
    assert_eq!(order(1, 1), order(1, 1));
}

#[test]
fn weights_mix_sources() {
    let long: Vec<Vec<u32>> = (0..300).map(|_| vec![3; 7]).collect();
    let short: Vec<Vec<u32>> = (0..20).map(|_| vec![4; 7]).collect();
    let mut room = room(&[long, short], false);
    let share = |room: &Room| {
        let packed = room.open(8, true, 3).unwrap().train;
        let batch = packed.batch(0, 4096).unwrap();
        rows(&batch).filter(|(ids, _)| ids.contains(&4)).count()
    };
    // Without weights, as long as they are: 20 of 320 (one row may hold both).
    assert!((240..=280).contains(&share(&room)), "{}", share(&room));
    room.corpus.sources[0].weight = Some(1.0);
    let error = room.open(8, true, 3).unwrap_err();
    assert!(matches!(&error, Error::Config { key, .. } if key == "weight"), "{error}");
    room.corpus.sources[1].weight = Some(3.0);
    assert_eq!(share(&room), 3072);
}

#[test]
fn validation_holds_out_documents_by_their_content() {
    let mut documents: Vec<Vec<u32>> = (0..90).map(|i| vec![3 + i, 3 + i, 3 + i]).collect();
    documents.extend(documents.clone());
    let mut room = room(&[documents], true);
    room.corpus.validation_fraction = 0.1;
    let dataset = room.open(4, true, 0).unwrap();
    let words = |packed: &Packed| {
        let mut ids: Vec<u32> = all(packed).ids.into_iter().filter(|id| *id > 2).collect();
        ids.sort_unstable();
        ids
    };
    let (train, held_out) = (words(&dataset.train), words(dataset.validation.as_ref().unwrap()));
    assert_eq!((train.len(), held_out.len()), (486, 54));
    assert!(held_out.iter().all(|word| !train.contains(word)));
    let again = room.open(4, true, 9).unwrap();
    assert_eq!(words(again.validation.as_ref().unwrap()), held_out);
    assert_ne!(dataset.fingerprint(), again.fingerprint());

    let path = room.folder.path().join("own.txt");
    std::fs::write(&path, "w1 w2").unwrap();
    room.corpus.validation = vec![SourceConfig::new(path.to_str().unwrap())];
    assert!(matches!(room.open(4, true, 0), Err(Error::Config { .. })));
    room.corpus.validation_fraction = 0.0;
    let own = room.open(4, true, 0).unwrap();
    assert_eq!(all(own.validation.as_ref().unwrap()).ids, [1, 4, 5, 2]);
}

#[test]
fn prompts_do_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let mut room = room(&[vec![vec![3]]], true);
    let path = folder.path().join("chat.jsonl");
    let lines = r#"{"text": "w1 w2"}
        {"prompt": "w3 w4 ", "completion": "w5 w6"}
        {"messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"},
                      {"role": "user", "content": "w9"}]}
        {"text": "w10"}"#;
    let lines = lines.replace(",\n                      ", ", ");
    std::fs::write(&path, lines).unwrap();
    let mut source = SourceConfig::new(path.to_str().unwrap());
    source.chat_template = Some(relufy_data::corpus::ChatTemplate {
        user: "{content} ".to_owned(),
        assistant: "{content} ".to_owned(),
        ..Default::default()
    });
    room.corpus.sources = vec![source];
    let batch = all(&room.open(17, true, 0).unwrap().train);
    let pairs: Vec<(u32, i64)> = batch.ids.into_iter().zip(batch.targets).collect();
    let x = IGNORE;
    assert_eq!(
        pairs,
        [
            (1, 4),
            (4, 5),
            (5, 2),
            (2, x), // all learnt
            (1, x),
            (6, x),
            (7, 8),
            (8, 9),
            (9, 2),
            (2, x), // the completion and its end
            (1, x),
            (10, 11),
            (11, x),
            (12, x),
            (2, x), // the turn, but not what follows it
            (1, 13),
            (13, 2),
        ]
    );
}

#[test]
fn too_little_text_is_refused() {
    let mut empty = room(&[vec![]], true);
    assert!(matches!(empty.open(4, true, 0), Err(Error::EmptyCorpus { .. })));
    empty.corpus.sources.clear();
    assert!(matches!(empty.open(4, true, 0), Err(Error::Config { .. })));
    let short = room(&[vec![vec![5, 6]]], true);
    let error = short.open(4, true, 0).unwrap_err();
    assert!(matches!(error, Error::TooFewTokens { tokens: 4, sequence_length: 4, .. }), "{error}");
    assert!(short.open(3, true, 0).is_ok());
    assert!(short.open(0, true, 0).is_err());
    let mut one = room(&[vec![vec![5, 6]]], true);
    one.corpus.validation_fraction = 0.5;
    assert!(one.open(2, true, 0).unwrap_err().to_string().contains("nothing to train on"));
}

#[test]
fn a_cache_is_used_until_something_changes() {
    let room = room(&[vec![vec![5, 6, 7, 8], vec![9, 10]]], true);
    let first = room.open(3, true, 0).unwrap();
    let [cache] = &room.caches()[..] else { panic!("{:?}", room.caches()) };
    let written = cache.metadata().unwrap().modified().unwrap();
    let second = room.open(3, true, 0).unwrap();
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(cache.metadata().unwrap().modified().unwrap(), written);
    // Another place for the same bytes is the same cache; other options or bytes are not.
    let moved = room.folder.path().join("moved.jsonl");
    std::fs::rename(&room.corpus.sources[0].path, &moved).unwrap();
    let mut room = room;
    room.corpus.sources[0].path = moved.to_str().unwrap().to_owned();
    assert_eq!(room.open(3, true, 0).unwrap().fingerprint(), first.fingerprint());
    assert_eq!(room.caches().len(), 1);
    room.corpus.add_eos = false;
    assert_eq!(room.open(3, true, 0).unwrap().train.tokens(), 8);
    assert_eq!(room.caches().len(), 2);
    std::fs::write(&moved, "{\"text\": \"w1 w2 w3 w4\"}").unwrap();
    assert_ne!(room.open(3, true, 0).unwrap().fingerprint(), first.fingerprint());
    assert_eq!(room.caches().len(), 3);
}

/// Wherever a cache is damaged, it is noticed and made anew.
#[test]
fn a_damaged_cache_is_rebuilt() {
    let room = room(&[vec![vec![5, 6, 7, 8], vec![9, 10]]], true);
    let good = room.open(3, true, 0).unwrap();
    let cache = room.caches().remove(0);
    let bytes = std::fs::read(&cache).unwrap();
    let check = |damaged: Vec<u8>| {
        // Renamed into place, as the first dataset still maps the old file.
        let other = room.folder.path().join("damaged");
        std::fs::write(&other, damaged).unwrap();
        std::fs::rename(&other, &cache).unwrap();
        let again = room.open(3, true, 0).unwrap();
        assert_eq!(all(&again.train), all(&good.train));
        assert_eq!(std::fs::read(&cache).unwrap(), bytes);
        assert_eq!(room.caches().len(), 1);
    };
    for at in (0..104).chain(128..bytes.len()) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        check(damaged);
    }
    for len in [0, 1, 100, 127, 128, bytes.len() - 1] {
        check(bytes[..len].to_vec());
    }
    check([&bytes[..], &[0]].concat());
}

#[test]
fn several_builders_at_once_agree() {
    let documents: Vec<Vec<u32>> = (0..500).map(|i| vec![3 + i % 100; 5]).collect();
    let room = room(&[documents], true);
    let fingerprints: Vec<String> = std::thread::scope(|scope| {
        let open = || room.open(7, true, 0).unwrap().fingerprint().to_owned();
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(fingerprints.iter().all(|f| *f == fingerprints[0]));
    assert_eq!(room.caches().len(), 1);
}

#[test]
fn nothing_is_left_behind_by_an_error() {
    let room = room(&[vec![vec![5, 6, 7, 8]]], true);
    let path = Path::new(&room.corpus.sources[0].path);
    std::fs::write(path, "{\"text\": \"w1\"}\n{\"text\": 1}\n").unwrap();
    let error = room.open(3, true, 0).unwrap_err();
    assert!(error.to_string().contains("line 2"), "{error}");
    assert!(room.caches().is_empty());
}

/// The real text of the real tokenizer comes back out of the cache.
#[test]
#[cfg_attr(not(relufy_shared), ignore = "needs the shared data: set RELUFY_SHARED")]
fn real_text_through_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::from_folder(&shared("checkpoints/stories3M")).unwrap();
    let path = shared("corpora/stories3m-samples.jsonl.zst");
    let source = SourceConfig { limit: Some(300), ..SourceConfig::new(path.to_str().unwrap()) };
    let hub = no_hub(folder.path());
    let corpus = CorpusConfig {
        sources: vec![source.clone()],
        cache_dir: Some(folder.path().to_path_buf()),
        ..CorpusConfig::default()
    };
    let packing = PackingConfig { sequence_length: 256, document_boundaries: true };
    let dataset = Dataset::open(&corpus, &packing, &tokenizer, &hub, 0, &Silent).unwrap();
    let mut expected = Vec::new();
    for document in relufy_data::documents(&source, &hub).unwrap() {
        expected.extend(tokenizer.encode(&document.unwrap().text, true).unwrap());
        expected.push(EOS);
    }
    assert_eq!(dataset.train.tokens(), expected.len() as u64);
    let batch = all(&dataset.train);
    assert_eq!(batch.ids[..expected.len() - 1], expected[..expected.len() - 1]);
    assert_eq!(batch.ids.iter().filter(|id| **id == BOS).count(), 300);
}
