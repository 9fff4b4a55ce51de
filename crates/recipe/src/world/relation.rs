//! One relation of the little world: what it connects, and every way of telling and asking it.
//!
//! A phrasing is a template. `{s}` is the subject as nominative, `{s's}` as possessive, `{o}`
//! as object, `{v}` the value; all in lower case, without the final stop.

use super::dice::Dice;

/// The kinds of thing that facts are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Somebody with a name; `he` or `she`.
    Person,
    /// A place with a name.
    Town,
    /// An animal with a name.
    Animal,
    /// A thing of which the world holds one, such as `the clock`.
    Thing,
}

/// Where the values of a relation come from.
#[derive(Debug, Clone, Copy)]
pub enum Values {
    /// Single words of one type; several subjects may share one.
    Words(&'static [&'static str]),
    /// The entities of another kind, by name.
    Entities(Kind),
    /// The towns in their order along the road: each has its own successor.
    Successor,
}

/// One relation with its phrasings.
#[derive(Debug)]
pub struct Relation {
    /// Short name, used in question ids.
    pub name: &'static str,
    /// What the subject is.
    pub kind: Kind,
    /// What the value may be.
    pub values: Values,
    /// Statements of the training text. Every one names subject and value.
    pub tell: &'static [&'static str],
    /// Questions of the training text, asked about untested facts only.
    pub ask: &'static [&'static str],
    /// Questions of the task: never in the training text, whatever the subject.
    pub test: &'static [&'static str],
    /// Statements of the cloze task ending in `{v}`: never in the training text.
    pub cloze: &'static [&'static str],
}

/// Something with a name that facts are about.
#[derive(Debug, Clone)]
pub struct Entity {
    /// What it is.
    pub kind: Kind,
    /// How text names it within a sentence: `Mira`, `the clock`.
    pub name: &'static str,
    /// Nominative, possessive and objective pronoun.
    pub pronoun: [&'static str; 3],
}

/// How a sentence refers to its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refer {
    /// By name.
    Name,
    /// By pronoun, because the sentence before it named the subject.
    Pronoun,
}

/// Fills a phrasing with a subject and a value.
pub fn fill(template: &str, subject: &Entity, value: &str, refer: Refer) -> String {
    let [nominative, possessive, objective] = subject.pronoun;
    let text = match refer {
        Refer::Name => template
            .replace("{s's}", &format!("{}'s", subject.name))
            .replace("{s}", subject.name)
            .replace("{o}", subject.name),
        Refer::Pronoun => template
            .replace("{s's}", possessive)
            .replace("{s}", nominative)
            .replace("{o}", objective),
    };
    text.replace("{v}", value)
}

/// Makes the first letter of a sentence a capital.
pub fn capital(text: &str) -> String {
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => String::new(),
    }
}

/// Picks one phrasing.
pub fn pick(phrasings: &'static [&'static str], dice: &mut Dice) -> &'static str {
    dice.choose(phrasings).copied().unwrap_or("")
}
