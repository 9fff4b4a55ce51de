//! MMLU: 57 subjects in four fields, asked by letter after worked examples.

use relufy_data::Record;

use super::fields::{Malformed, index, text, texts};
use super::{Document, Group, Shots, Source, Task};
use crate::metrics::Metric;
use crate::python;

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// A subject, as `mmlu_SUBJECT`, on the test split.
pub struct Mmlu {
    name: String,
    subject: &'static str,
    shots: usize,
}

impl Mmlu {
    /// Every subject, field by field, with so many examples unless told otherwise.
    pub fn all(shots: usize) -> Vec<Mmlu> {
        let subjects = FIELDS.iter().flat_map(|field| field.subjects);
        subjects.map(|&subject| Mmlu { name: task(subject), subject, shots }).collect()
    }

    /// The four fields, and all of it. Parts stand before the whole.
    pub fn groups() -> Vec<Group> {
        let group = |name: &str, alias: Option<&str>, members: Vec<String>, tasks: Vec<String>| {
            let (name, alias) = (name.to_owned(), alias.map(str::to_owned));
            Group { name, alias, version: 2.0, members, tasks, metrics: &[Metric::Acc] }
        };
        let mut groups: Vec<Group> = FIELDS
            .iter()
            .map(|field| group(field.name, Some(field.alias), field.tasks(), field.tasks()))
            .collect();
        let names = FIELDS.iter().map(|field| field.name.to_owned()).collect();
        let tasks = FIELDS.iter().flat_map(Field::tasks).collect();
        groups.push(group("mmlu", None, names, tasks));
        groups
    }
}

fn task(subject: &str) -> String {
    format!("mmlu_{subject}")
}

impl Task for Mmlu {
    fn name(&self) -> &str {
        &self.name
    }

    fn alias(&self) -> Option<&str> {
        Some(self.subject)
    }

    fn source(&self) -> Source {
        Source::Split { repo: "cais/mmlu", config: self.subject, split: "test" }
    }

    fn shots(&self) -> Shots {
        Shots::First("dev")
    }

    fn shots_by_default(&self) -> usize {
        self.shots
    }

    fn description(&self) -> String {
        let subject = self.subject.replace('_', " ");
        format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let question = python::strip(text(record, "question")?);
        let choices = texts(record, "choices")?;
        let [a, b, c, d] = choices[..] else {
            let why = format!("field `choices`: expected 4 answers, found {}", choices.len());
            return Err(Malformed(why));
        };
        let gold = index(record, "answer", LETTERS.len())?;
        let context = format!("{question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:");
        Ok(Document::choice(context, &LETTERS, gold))
    }
}

/// A part of MMLU that has a mean of its own.
struct Field {
    name: &'static str,
    alias: &'static str,
    subjects: &'static [&'static str],
}

impl Field {
    fn tasks(&self) -> Vec<String> {
        self.subjects.iter().map(|subject| task(subject)).collect()
    }
}

const FIELDS: [Field; 4] = [
    Field {
        name: "mmlu_stem",
        alias: "stem",
        subjects: &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    },
    Field {
        name: "mmlu_other",
        alias: "other",
        subjects: &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    },
    Field {
        name: "mmlu_social_sciences",
        alias: "social sciences",
        subjects: &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    },
    Field {
        name: "mmlu_humanities",
        alias: "humanities",
        subjects: &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_asked_by_letter() {
        let subject = &Mmlu::all(0)[0];
        assert_eq!(
            (subject.name(), subject.alias()),
            ("mmlu_abstract_algebra", Some("abstract_algebra"))
        );
        assert!(subject.description().ends_with(" about abstract algebra.\n\n"));
        let document = |json: &str| subject.document(&serde_json::from_str(json).unwrap());
        let got =
            document(r#"{"question": " Q? \n", "choices": ["w", "x ", "y", "z"], "answer": 2}"#);
        let context = "Q?\nA. w\nB. x \nC. y\nD. z\nAnswer:".to_owned();
        assert_eq!(got, Ok(Document::choice(context, &["A", "B", "C", "D"], 2)));
        let three = document(r#"{"question": "Q?", "choices": ["w", "x", "y"], "answer": 2}"#);
        assert!(three.unwrap_err().0.contains("expected 4 answers, found 3"));
    }

    #[test]
    fn fields_hold_every_subject_once() {
        let groups = Mmlu::groups();
        let sizes: Vec<usize> = groups.iter().map(|group| group.tasks.len()).collect();
        assert_eq!(sizes, [19, 13, 12, 13, 57]);
        let names: std::collections::HashSet<String> =
            Mmlu::all(5).iter().map(|subject| subject.name.clone()).collect();
        assert_eq!(names.len(), 57);
    }
}
