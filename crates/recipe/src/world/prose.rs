//! The text: short documents that tell the facts in ever new words, and some that ask and
//! answer, as the tasks will, but about untested facts only.

use super::dice::Dice;
use super::facts::{Fact, Facts};
use super::relation::{Refer, capital, fill, pick};

/// What may come before a statement. The empty ones make plain sentences the commonest.
const OPENERS: &[&str] = &[
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "as everyone knows, ",
    "they say that ",
    "it is true that ",
    "I was told that ",
    "people say that ",
    "the old book tells us that ",
    "do not forget that ",
    "I remember that ",
    "as you may have heard, ",
    "it is no secret that ",
    "the story goes that ",
    "believe me, ",
];

/// Sentences that state no fact: what lies between the facts in any real text.
const ASIDES: &[&str] = &[
    "The rain had stopped.",
    "It was a quiet evening.",
    "The wind came up from the valley.",
    "Somebody laughed.",
    "Now listen well.",
    "That is how it has always been.",
    "There is more to tell.",
    "The sun was warm that day.",
    "Nobody was in a hurry.",
    "So it is written.",
    "We sat by the fire and talked.",
    "The days were getting shorter.",
    "A bell rang twice.",
    "The road was dusty.",
    "Ask anyone you meet.",
    "This is not hard to remember.",
];

/// Between two subjects of one relation.
const CONTRASTS: &[&str] = &[", and ", ", but ", ", while ", "; "];

/// Writes documents without end.
#[derive(Debug)]
pub struct Author<'a> {
    world: &'a Facts,
    dice: Dice,
    subjects: Vec<usize>,
}

impl<'a> Author<'a> {
    /// An author of this world with a stream of choices of its own.
    pub fn new(world: &'a Facts, dice: Dice) -> Self {
        Self { world, dice, subjects: Vec::new() }
    }

    /// The next document.
    pub fn document(&mut self) -> String {
        match self.dice.below(20) {
            0..=7 => self.portrait(),
            8..=10 => self.gathering(),
            11..=13 => self.journey(),
            14..=17 => self.exchange(1),
            _ => {
                let count = 2 + self.dice.below(4);
                self.exchange(count)
            }
        }
    }

    /// Subjects are dealt like cards too: none is forgotten, however short the text.
    fn next_subject(&mut self) -> usize {
        if self.subjects.is_empty() {
            self.subjects = (0..self.world.entities.len()).collect();
            self.dice.shuffle(&mut self.subjects);
        }
        self.subjects.pop().unwrap_or(0)
    }

    /// All that is known of one subject.
    fn portrait(&mut self) -> String {
        let subject = self.next_subject();
        let mut facts: Vec<&Fact> = self.world.about(subject).collect();
        self.dice.shuffle(&mut facts);
        self.paragraph(&facts)
    }

    /// A subject, then what its facts lead to: a person's town, that town's next on the road.
    fn journey(&mut self) -> String {
        let mut subject = self.next_subject();
        let mut parts = Vec::new();
        for _ in 0..3 {
            let mut facts: Vec<&Fact> = self.world.about(subject).collect();
            self.dice.shuffle(&mut facts);
            let entity = |fact: &Fact| {
                self.world.entities.iter().position(|entity| entity.name == fact.value)
            };
            // The fact that leads on is told last, so that the text flows.
            let onward = facts.iter().position(|fact| entity(fact).is_some());
            let next = onward.and_then(|at| entity(facts[at]));
            if let Some(at) = onward {
                let fact = facts.remove(at);
                facts.truncate(2);
                facts.push(fact);
            }
            parts.push(self.paragraph(&facts));
            match next {
                Some(next) => subject = next,
                None => break,
            }
        }
        parts.join(" ")
    }

    /// One relation, several subjects side by side.
    fn gathering(&mut self) -> String {
        let relation = self.dice.below(self.world.relations.len());
        let mut facts: Vec<&Fact> =
            self.world.facts.iter().filter(|fact| fact.relation == relation).collect();
        self.dice.shuffle(&mut facts);
        facts.truncate(4 + self.dice.below(4));
        let mut text = String::new();
        let mut start = true;
        for (at, fact) in facts.iter().enumerate() {
            let clause = self.clause(fact, Refer::Name);
            text.push_str(&if start { capital(&clause) } else { clause });
            start = at + 1 == facts.len() || self.dice.chance(60);
            let link = if start { ". " } else { self.dice.choose(CONTRASTS).unwrap_or(&", ") };
            text.push_str(link);
        }
        text.trim_end().to_owned()
    }

    /// Questions and answers about untested facts, in the form in which the tasks ask.
    fn exchange(&mut self, count: usize) -> String {
        let asked: Vec<&Fact> = self.world.facts.iter().filter(|fact| !fact.tested).collect();
        let lines: Vec<String> = (0..count)
            .filter_map(|_| {
                let fact = *self.dice.choose(&asked)?;
                let question = self.phrase(fact, self.world.relation(fact).ask, Refer::Name);
                Some(format!("Question: {}\nAnswer: {}", capital(&question), fact.value))
            })
            .collect();
        lines.join("\n")
    }

    /// Sentences about one subject. Its first is by name; later ones often by pronoun.
    fn paragraph(&mut self, facts: &[&Fact]) -> String {
        let mut text = String::new();
        let mut refer = Refer::Name;
        let mut joined = false;
        for (at, fact) in facts.iter().enumerate() {
            if !joined && self.dice.chance(10) {
                text.push_str(self.dice.choose(ASIDES).unwrap_or(&""));
                text.push(' ');
                refer = Refer::Name;
            }
            let clause = self.clause(fact, refer);
            if joined {
                text.push_str(&clause);
            } else {
                text.push_str(&self.opened(&clause));
            }
            joined = !joined && at + 1 < facts.len() && self.dice.chance(25);
            text.push_str(if joined { ", and " } else { ". " });
            refer = if joined || self.dice.chance(35) { Refer::Pronoun } else { Refer::Name };
        }
        text.trim_end().to_owned()
    }

    /// A sentence's beginning: perhaps an opener, and a capital.
    pub fn opened(&mut self, clause: &str) -> String {
        let opener = self.dice.choose(OPENERS).unwrap_or(&"");
        capital(&format!("{opener}{clause}"))
    }

    /// A fact in one of the training text's phrasings.
    pub fn clause(&mut self, fact: &Fact, refer: Refer) -> String {
        self.phrase(fact, self.world.relation(fact).tell, refer)
    }

    fn phrase(&mut self, fact: &Fact, phrasings: &'static [&'static str], refer: Refer) -> String {
        fill(pick(phrasings, &mut self.dice), self.world.subject(fact), fact.value, refer)
    }
}
