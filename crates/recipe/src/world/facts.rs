//! The facts: every entity gets one value in every relation of its kind, and of every relation
//! a fixed share of facts is set aside for the tasks.

use super::dice::Dice;
use super::relation::{Entity, Kind, Relation, Values};
use super::{animals, people, things, towns};

/// Of a hundred facts of a relation, so many are tested: told in prose, never asked in the text.
const TESTED_PERCENT: usize = 40;

/// One true statement of the world, as numbers into [`Facts`].
#[derive(Debug, Clone)]
pub struct Fact {
    /// Which relation.
    pub relation: usize,
    /// Which entity it is about.
    pub subject: usize,
    /// The one value that is right.
    pub value: &'static str,
    /// Set aside for the tasks.
    pub tested: bool,
}

/// Who and what there is, and what is true of it.
#[derive(Debug)]
pub struct Facts {
    /// Everything that has a name.
    pub entities: Vec<Entity>,
    /// Every relation of every kind.
    pub relations: Vec<&'static Relation>,
    /// All facts, by relation and then by entity.
    pub facts: Vec<Fact>,
}

impl Facts {
    /// Draws the world's facts.
    pub fn draw(mut dice: Dice) -> Self {
        let entities = entities();
        let relations: Vec<_> =
            [people::RELATIONS, towns::RELATIONS, animals::RELATIONS, things::RELATIONS]
                .into_iter()
                .flatten()
                .collect();
        let mut facts = Vec::new();
        for (number, relation) in relations.iter().enumerate() {
            let subjects: Vec<usize> =
                (0..entities.len()).filter(|&at| entities[at].kind == relation.kind).collect();
            let values = deal(relation, subjects.len(), &entities, &mut dice);
            let tested = (0..subjects.len()).map(|at| at * 100 < subjects.len() * TESTED_PERCENT);
            let mut tested: Vec<bool> = tested.collect();
            dice.shuffle(&mut tested);
            facts.extend(subjects.into_iter().zip(values).zip(tested).map(
                |((subject, value), tested)| Fact { relation: number, subject, value, tested },
            ));
        }
        Self { entities, relations, facts }
    }

    /// The facts about one entity.
    pub fn about(&self, subject: usize) -> impl Iterator<Item = &Fact> {
        self.facts.iter().filter(move |fact| fact.subject == subject)
    }

    /// The relation of a fact.
    pub fn relation(&self, fact: &Fact) -> &'static Relation {
        self.relations[fact.relation]
    }

    /// The subject of a fact.
    pub fn subject(&self, fact: &Fact) -> &Entity {
        &self.entities[fact.subject]
    }

    /// Every value that a relation can have.
    pub fn values(&self, relation: &Relation) -> Vec<&'static str> {
        values(relation, &self.entities)
    }
}

fn entities() -> Vec<Entity> {
    let of = |kind, names: &'static [&'static str], pronoun| {
        names.iter().map(move |name| Entity { kind, name, pronoun })
    };
    let mut all = Vec::new();
    all.extend(of(Kind::Person, people::WOMEN, ["she", "her", "her"]));
    all.extend(of(Kind::Person, people::MEN, ["he", "his", "him"]));
    all.extend(of(Kind::Town, towns::TOWNS, ["it", "its", "it"]));
    all.extend(of(Kind::Animal, animals::ANIMALS, ["it", "its", "it"]));
    all.extend(of(Kind::Thing, things::THINGS, ["it", "its", "it"]));
    all
}

fn values(relation: &Relation, entities: &[Entity]) -> Vec<&'static str> {
    let named = |kind| entities.iter().filter(move |e| e.kind == kind).map(|e| e.name).collect();
    match relation.values {
        Values::Words(words) => words.to_vec(),
        Values::Entities(kind) => named(kind),
        Values::Successor => named(relation.kind),
    }
}

/// One value for each of `count` subjects. Values are dealt like cards, so that each is about
/// equally frequent and guessing the commonest gains nothing.
fn deal(
    relation: &Relation,
    count: usize,
    entities: &[Entity],
    dice: &mut Dice,
) -> Vec<&'static str> {
    let mut values = values(relation, entities);
    if matches!(relation.values, Values::Successor) {
        values.rotate_left(1); // The road is a ring: the last town is followed by the first.
        return values;
    }
    dice.shuffle(&mut values);
    let mut dealt: Vec<_> = values.into_iter().cycle().take(count).collect();
    dice.shuffle(&mut dealt);
    dealt
}
