//! What makes the world fit to measure knowledge: fixed bytes, fair choices, and no phrasing of
//! a task in the text.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;

use tokenizers::Tokenizer;

use super::facts::Fact;
use super::relation::{Refer, Values, fill};
use super::{Sizes, World};
use crate::error::Error;

const SEED: u64 = 7;

/// Small enough for a test, large enough for the vocabulary.
fn sizes() -> Sizes {
    Sizes { train_bytes: 400_000, validation_bytes: 20_000, vocab_size: 1024, ..Sizes::default() }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for folder in [dir.to_owned(), dir.join("tokenizer")] {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                let name = entry.path().strip_prefix(dir).unwrap().display().to_string();
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    found
}

fn lower(documents: &[String]) -> String {
    documents.join("\n\n").to_lowercase()
}

/// A phrasing about a fact, as it would stand in lower-cased text.
fn filled(world: &World, fact: &Fact, template: &str, value: &str) -> String {
    fill(template, world.facts.subject(fact), value, Refer::Name).to_lowercase()
}

#[test]
fn the_same_seed_writes_the_same_bytes() {
    let [first, second, other] = [SEED, SEED, SEED + 1].map(|seed| {
        let dir = tempfile::tempdir().unwrap();
        World::new(seed).write(dir.path(), &sizes()).unwrap();
        files(dir.path())
    });
    let names = [
        "manifest.json",
        "passages.jsonl",
        "questions.jsonl",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "train.jsonl",
        "validation.jsonl",
    ];
    assert_eq!(first.keys().collect::<Vec<_>>(), names);
    assert!(first == second, "one seed, two worlds");
    assert_ne!(first["questions.jsonl"], other["questions.jsonl"]);
    assert_ne!(first["train.jsonl"], other["train.jsonl"]);
}

#[test]
fn a_longer_text_starts_as_the_shorter_and_moves_no_task() {
    let world = World::new(SEED);
    let (short, long) = (world.training_text(10_000), world.training_text(50_000));
    assert_eq!(short, long[..short.len()]);
    let (once, twice) = (world.questions(1), world.questions(2));
    assert_eq!(twice.len(), 2 * once.len());
}

#[test]
fn phrasings_are_well_formed() {
    let world = World::new(SEED);
    for relation in &world.facts.relations {
        let subject = |text: &str| ["{s}", "{s's}", "{o}"].iter().any(|mark| text.contains(mark));
        for &tell in relation.tell.iter().chain(relation.cloze) {
            assert!(subject(tell) && tell.contains("{v}") && !tell.ends_with('.'), "{tell}");
        }
        for &ask in relation.ask.iter().chain(relation.test) {
            assert!(subject(ask) && !ask.contains("{v}") && ask.ends_with('?'), "{ask}");
        }
        for cloze in relation.cloze {
            assert!(cloze.ends_with(" {v}"), "{cloze}");
        }
        assert!(relation.test.len() >= 4, "{}", relation.name);
        let values = world.facts.values(relation);
        assert!(values.len() > 4 && values.iter().all(|value| !value.contains(' ')));
        assert_eq!(values.iter().collect::<HashSet<_>>().len(), values.len());
    }
}

#[test]
fn no_phrasing_of_a_task_occurs_in_the_text() {
    let world = World::new(SEED);
    let mask = |text: &str| text.replace("{s}", "#").replace("{s's}", "#'s").replace("{o}", "#");
    let relations = &world.facts.relations;
    let trained: HashSet<String> =
        relations.iter().flat_map(|r| r.tell.iter().chain(r.ask)).map(|text| mask(text)).collect();
    for held in relations.iter().flat_map(|r| r.test.iter().chain(r.cloze)) {
        assert!(!trained.contains(&mask(held)), "{held}");
    }
    // The same of the written text, whoever it is about, tested or not.
    let text = lower(&world.training_text(400_000));
    for fact in &world.facts.facts {
        let relation = world.facts.relation(fact);
        for held in relation.test.iter().chain(relation.cloze) {
            let held = filled(&world, fact, held, "");
            assert!(!text.contains(held.trim_end()), "{held}");
        }
    }
}

#[test]
fn tested_facts_are_told_in_prose_and_never_asked() {
    let world = World::new(SEED);
    let text = lower(&world.training_text(1_500_000));
    let mut asked = 0;
    for fact in &world.facts.facts {
        let relation = world.facts.relation(fact);
        let told = relation.tell.iter().filter(|tell| {
            let statement = filled(&world, fact, tell, fact.value);
            text.contains(&statement)
        });
        let subject = world.facts.subject(fact).name;
        assert!(told.count() >= 3, "{} of {subject} is told too seldom", relation.name);
        let questions = relation.ask.iter().filter(|ask| {
            let question = filled(&world, fact, ask, "");
            text.contains(&question)
        });
        let questions = questions.count();
        assert!(!fact.tested || questions == 0, "{} of {subject} is asked", relation.name);
        asked += questions;
    }
    assert!(asked > 1000, "the text shows the form of a question only {asked} times");
}

#[test]
fn choices_are_four_of_a_type_and_one_is_right() {
    let world = World::new(SEED);
    let questions = world.questions(4);
    let tested: Vec<_> = world.facts.facts.iter().filter(|fact| fact.tested).collect();
    assert_eq!(questions.len(), 4 * tested.len());
    let mut labels = BTreeMap::<_, usize>::new();
    let mut ids = HashSet::new();
    for (question, fact) in questions.iter().zip(tested.iter().flat_map(|fact| [fact; 4])) {
        let values = world.facts.values(world.facts.relation(fact));
        let choices = &question.choices;
        assert!(choices.text.iter().all(|choice| values.contains(choice)), "{question:?}");
        assert_eq!(choices.text.iter().collect::<HashSet<_>>().len(), 4, "{question:?}");
        let right = choices.label.iter().position(|&label| label == question.answer_key).unwrap();
        assert_eq!(choices.text[right], fact.value, "{question:?}");
        assert!(ids.insert(&question.id), "{}", question.id);
        *labels.entry(question.answer_key).or_default() += 1;
    }
    let (least, most) = (labels.values().min().unwrap(), labels.values().max().unwrap());
    assert!(labels.len() == 4 && most - least <= 1, "{labels:?}");
}

#[test]
fn one_value_for_every_subject_of_a_relation() {
    let world = World::new(SEED);
    let mut seen = HashSet::new();
    for fact in &world.facts.facts {
        assert!(seen.insert((fact.relation, fact.subject)));
    }
    for (number, relation) in world.facts.relations.iter().enumerate() {
        let facts: Vec<_> = world.facts.facts.iter().filter(|f| f.relation == number).collect();
        let subjects = world.facts.entities.iter().filter(|e| e.kind == relation.kind).count();
        assert_eq!(facts.len(), subjects);
        // Dealt like cards: the commonest value is at most one ahead.
        let most = subjects.div_ceil(world.facts.values(relation).len());
        for value in world.facts.values(relation) {
            assert!(facts.iter().filter(|fact| fact.value == value).count() <= most);
        }
        let tested = facts.iter().filter(|fact| fact.tested).count();
        assert!(tested * 3 > subjects && tested * 2 < subjects, "{}", relation.name);
        if matches!(relation.values, Values::Successor) {
            let own = |fact: &&Fact| world.facts.subject(fact).name == fact.value;
            assert!(!facts.iter().any(own));
        }
    }
}

#[test]
fn passages_end_in_the_answer() {
    let world = World::new(SEED);
    let tested = world.facts.facts.iter().filter(|fact| fact.tested);
    let passages = world.passages();
    assert_eq!(passages.len(), tested.clone().count());
    for (passage, fact) in passages.iter().zip(tested) {
        let (context, last) = passage.text.rsplit_once(' ').unwrap();
        assert_eq!(last, fact.value);
        assert!(context.contains(". "), "{context}");
    }
}

#[test]
fn held_out_text_is_not_in_the_training_text() {
    let world = World::new(SEED);
    let training = world.training_text(200_000);
    let held = world.validation_text(20_000, &training);
    assert!(held.iter().map(String::len).sum::<usize>() >= 20_000);
    assert!(held.iter().all(|document| !training.contains(document)));
}

#[test]
fn the_tokenizer_puts_bos_first_and_gives_every_byte_back() {
    let dir = tempfile::tempdir().unwrap();
    World::new(SEED).write(dir.path(), &sizes()).unwrap();
    let tokenizer = Tokenizer::from_file(dir.path().join("tokenizer/tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 1024);
    for text in ["Mira lives in Dorn.", "Question: Who?\nAnswer:", "Ünseen \u{1F99A} bytes\t\u{7f}"]
    {
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids[0], tokenizer.token_to_id("<s>").unwrap());
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    // A choice's tokens must not depend on what stands before them.
    let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    let (context, choice) = ("Question: Where does Mira live?\nAnswer:", " Dorn");
    assert_eq!(ids(&format!("{context}{choice}")), [ids(context), ids(choice)].concat());
}

#[test]
fn what_cannot_be_written_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let short = Sizes { train_bytes: 1000, ..sizes() };
    let error = World::new(SEED).write(dir.path(), &short).unwrap_err();
    assert!(matches!(&error, Error::Tokenizer(why) if why.contains("1024")), "{error}");
    assert!(!dir.path().join("manifest.json").exists());
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = World::new(SEED).write(&file, &sizes()).unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
}
