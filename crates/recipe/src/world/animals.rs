//! The animals of the little world, each with a name of its own.

use super::relation::{Kind, Relation, Values};

/// Their names.
pub const ANIMALS: &[&str] = &[
    "Biscuit", "Pepper", "Clover", "Button", "Shadow", "Thistle", "Pebble", "Socks", "Bramble",
    "Nutmeg", "Copper", "Whisker", "Misty", "Rusty", "Patch", "Hazel", "Dusty", "Smoky", "Tinker",
    "Bumble", "Domino", "Ginger", "Sparrow", "Moss",
];

/// What each is, where it sleeps and whose it is.
pub const RELATIONS: &[Relation] = &[
    Relation {
        name: "beast",
        kind: Kind::Animal,
        values: Values::Words(&[
            "goat", "donkey", "horse", "dog", "cat", "sheep", "goose", "pig", "rabbit", "duck",
            "cow", "hen",
        ]),
        tell: &[
            "{s} is a {v}",
            "the animal called {s} is a {v}",
            "{s} is a {v} with bright eyes",
            "as animals go, {s} is a {v}",
            "{s} is the name of a {v}",
            "{s} was born a {v}",
            "they named the animal {s}, and it is a {v}",
            "anyone can see that {s} is a {v}",
            "{s} looks like a {v} because {s} is a {v}",
            "{s} is a gentle animal, a {v}",
            "everybody likes {s} the {v}",
            "what they call {s} is a young {v}",
        ],
        ask: &[
            "What is {s}?",
            "What kind of animal is {s}?",
            "Which animal is {s}?",
            "{s} is the name of which animal?",
            "What animal do they call {s}?",
            "What was {s} born as?",
            "As what animal does everybody know {s}?",
            "What does {s} look like?",
        ],
        test: &[
            "What sort of animal is {s}?",
            "{s} is what kind of animal?",
            "Which kind of animal is named {s}?",
            "What animal is called {s}?",
        ],
        cloze: &[
            "the kind of animal that {s} is, is a {v}",
            "the animal with the name {s} is a {v}",
        ],
    },
    Relation {
        name: "sleeps",
        kind: Kind::Animal,
        values: Values::Words(&[
            "barn", "kitchen", "stable", "shed", "cave", "orchard", "yard", "loft", "mill", "tent",
            "boat", "church",
        ]),
        tell: &[
            "{s} sleeps in the {v}",
            "at night {s} sleeps in the {v}",
            "{s} spends the night in the {v}",
            "the bed of {s} is in the {v}",
            "when it gets dark {s} goes to the {v}",
            "{s} has a bed of straw in the {v}",
            "{s} likes to sleep in the {v}",
            "after sunset {s} lies down in the {v}",
            "you should look for {s} at night in the {v}",
            "{s} rests every night in the {v}",
            "the place where {s} sleeps is the {v}",
            "{s} would not sleep anywhere but in the {v}",
        ],
        ask: &[
            "Where does {s} sleep?",
            "Where does {s} spend the night?",
            "Where is the bed of {s}?",
            "In which place does {s} rest at night?",
            "Where does {s} go when it gets dark?",
            "Where does {s} lie down after sunset?",
            "What is the place where {s} sleeps?",
            "Where should you look for {s} at night?",
        ],
        test: &[
            "In which place does {s} sleep at night?",
            "Where does {s} rest every night?",
            "Where has {s} a bed of straw?",
            "{s} spends the night in which place?",
        ],
        cloze: &["all night long {s} sleeps on straw in the {v}", "to sleep {s} goes into the {v}"],
    },
    Relation {
        name: "owner",
        kind: Kind::Animal,
        values: Values::Entities(Kind::Person),
        tell: &[
            "{s} belongs to {v}",
            "the owner of {s} is {v}",
            "{s's} owner is {v}",
            "{s} is owned by {v}",
            "{s} is fed every day by {v}",
            "{s} follows its owner, who is {v}",
            "the one who feeds {s} is {v}",
            "{s} comes running for nobody but {v}",
            "{s} was a present for {v}",
            "{s} has a good owner in {v}",
            "{s} was bought at a fair by {v}",
            "the animal {s} belongs to nobody else than {v}",
        ],
        ask: &[
            "Who owns {s}?",
            "To whom does {s} belong?",
            "Who is {s's} owner?",
            "By whom is {s} owned?",
            "Who feeds {s} every day?",
            "For whom does {s} come running?",
            "Who bought {s} at a fair?",
            "For whom was {s} a present?",
        ],
        test: &[
            "Who is the owner of {s}?",
            "{s} belongs to whom?",
            "Who is the one who feeds {s}?",
            "By whom was {s} bought?",
        ],
        cloze: &["the good owner that {s} has is {v}", "the animal {s} is owned and fed by {v}"],
    },
];
