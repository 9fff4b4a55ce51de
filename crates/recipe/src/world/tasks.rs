//! The zero-shot tasks: questions with four choices in the schema of `ai2_arc`, and passages to
//! complete in the schema of `lambada`. Both use phrasings that the training text never does.

use serde::Serialize;

use super::dice::Dice;
use super::facts::{Fact, Facts};
use super::prose::Author;
use super::relation::{Refer, capital, fill};

const LABELS: [&str; 4] = ["A", "B", "C", "D"];

/// One question (Hugging Face `ai2_arc`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Question {
    /// Relation, subject and phrasing: unique.
    pub id: String,
    /// The question as asked.
    pub question: String,
    /// What may be chosen.
    pub choices: Choices,
    /// The label of the right choice.
    #[serde(rename = "answerKey")]
    pub answer_key: &'static str,
}

/// Four values of one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Choices {
    /// The values.
    pub text: Vec<&'static str>,
    /// Their labels, in order.
    pub label: [&'static str; 4],
}

/// One passage (Hugging Face `lambada`): its last word is to be guessed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Passage {
    /// The passage with its last word.
    pub text: String,
}

/// Asks every tested fact in `per_fact` held-out phrasings (at most as many as there are).
/// The three wrong choices are drawn from the same relation; right labels are evenly spread.
pub fn questions(world: &Facts, per_fact: usize, mut dice: Dice) -> Vec<Question> {
    let mut asked = Vec::new();
    for fact in world.facts.iter().filter(|fact| fact.tested) {
        let mut phrasings: Vec<_> = world.relation(fact).test.iter().enumerate().collect();
        dice.shuffle(&mut phrasings);
        asked.extend(phrasings.into_iter().take(per_fact).map(|phrasing| (fact, phrasing)));
    }
    let mut places: Vec<usize> = (0..asked.len()).map(|at| at % LABELS.len()).collect();
    dice.shuffle(&mut places);
    let ask = |((fact, (number, phrasing)), place): ((&Fact, (usize, &&str)), usize)| {
        let (relation, subject) = (world.relation(fact), world.subject(fact));
        let mut text = world.values(relation);
        // A thing does not follow itself, so its own name would be no honest choice.
        text.retain(|&value| value != fact.value && value != subject.name);
        dice.shuffle(&mut text);
        text.truncate(LABELS.len() - 1);
        text.insert(place.min(text.len()), fact.value);
        Question {
            id: format!("{}-{}-{number}", relation.name, subject.name.replace(' ', "-")),
            question: capital(&fill(phrasing, subject, fact.value, Refer::Name)),
            choices: Choices { text, label: LABELS },
            answer_key: LABELS[place],
        }
    };
    asked.into_iter().zip(places).map(ask).collect()
}

/// One passage for every tested fact: a sentence about the subject from the text's own
/// phrasings, then the fact in a held-out one.
pub fn passages(world: &Facts, author: Dice, mut dice: Dice) -> Vec<Passage> {
    let mut author = Author::new(world, author);
    let passage = |fact: &Fact| {
        let others: Vec<_> =
            world.about(fact.subject).filter(|other| other.relation != fact.relation).collect();
        let first = match dice.choose(&others) {
            Some(other) => {
                let clause = author.clause(other, Refer::Name);
                format!("{}. ", author.opened(&clause))
            }
            None => String::new(),
        };
        let phrasing = dice.choose(world.relation(fact).cloze).copied().unwrap_or("{v}");
        let last = capital(&fill(phrasing, world.subject(fact), fact.value, Refer::Name));
        Passage { text: first + &last }
    };
    world.facts.iter().filter(|fact| fact.tested).map(passage).collect()
}
