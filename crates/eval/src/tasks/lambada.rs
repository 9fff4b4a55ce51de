//! LAMBADA (OpenAI's detokenised form): the last word of a passage; also the schema for
//! passages of one's own.

use std::path::PathBuf;

use relufy_data::Record;

use super::fields::{Malformed, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;

/// `lambada_openai`, or a file in its schema: passages in `text`.
pub struct Lambada {
    name: String,
    source: Source,
}

impl Lambada {
    /// `lambada_openai`, on the test split.
    pub fn openai() -> Lambada {
        let (repo, config) = ("EleutherAI/lambada_openai", "default");
        Lambada {
            name: "lambada_openai".into(),
            source: Source::Split { repo, config, split: "test" },
        }
    }

    /// Passages of one's own, as a task called `name`.
    pub fn file(name: impl Into<String>, path: impl Into<PathBuf>) -> Lambada {
        Lambada { name: name.into(), source: Source::File(path.into()) }
    }
}

impl Task for Lambada {
    fn name(&self) -> &str {
        &self.name
    }

    fn source(&self) -> Source {
        self.source.clone()
    }

    /// From the test split, the only one: an example may be the very passage that is asked.
    fn shots(&self) -> Shots {
        Shots::Drawn { split: "test", apart: matches!(self.source, Source::File(_)) }
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::Acc, Metric::Perplexity]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let text = text(record, "text")?;
        // Only blanks separate: a line break stays inside the last word.
        let (context, word) = text.rsplit_once(' ').unwrap_or(("", text));
        Ok(Document::target(context.to_owned(), format!(" {word}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_brings_its_blank() {
        let document = |text: &str| {
            Lambada::openai().document(&[("text".to_owned(), text.into())].into_iter().collect())
        };
        assert_eq!(document("a b c"), Ok(Document::target("a b".into(), " c".into())));
        assert_eq!(document("a b "), Ok(Document::target("a b".into(), " ".into())));
        assert_eq!(document("word"), Ok(Document::target(String::new(), " word".into())));
    }
}
