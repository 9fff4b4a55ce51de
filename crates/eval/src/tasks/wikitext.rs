//! WikiText-2, page by page: how likely the whole text is, per word and per byte.

use relufy_data::Record;

use super::fields::{Malformed, text};
use super::{Document, Shots, Source, Task};
use crate::metrics::Metric;
use crate::python;

/// `wikitext`, on the test split.
pub struct WikiText;

impl Task for WikiText {
    fn name(&self) -> &str {
        "wikitext"
    }

    fn version(&self) -> f64 {
        2.0
    }

    fn source(&self) -> Source {
        let (repo, config) = ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1");
        Source::Split { repo, config, split: "test" }
    }

    /// Nothing stands in front of a page: the harness drops its examples.
    fn shots(&self) -> Shots {
        Shots::None
    }

    fn metrics(&self) -> &'static [Metric] {
        &[Metric::WordPerplexity, Metric::BytePerplexity, Metric::BitsPerByte]
    }

    fn document(&self, record: &Record) -> Result<Document, Malformed> {
        let page = text(record, "page")?;
        Ok(Document::text(detokenized(page), page))
    }
}

/// Undoes WikiText's spacing of punctuation, rule by rule in the harness's order. Its rule
/// for quotes pairs apostrophes too, whatever stands between them.
fn detokenized(page: &str) -> String {
    let mut text = quoted_digits(&page.replace("s '", "s'"));
    for (from, to) in [
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        (" : ", ": "),
        (" ; ", "; "),
        (" . ", ". "),
        (" ! ", "! "),
        (" ? ", "? "),
        (" , ", ", "),
    ] {
        text = text.replace(from, to);
    }
    for (open, close) in [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')] {
        text = tightened(&text, open, close);
    }
    for (from, to) in [
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \u{b0} ", "\u{b0}"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// White space just inside each pair of brackets goes. A pair is an `open` and the first
/// `close` after it.
fn tightened(text: &str, open: char, close: char) -> String {
    let mut tight = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(open) {
        let Some((inner, behind)) = after.split_once(close) else { break };
        tight.push_str(before);
        tight.push(open);
        tight.push_str(python::strip(inner));
        tight.push(close);
        rest = behind;
    }
    tight + rest
}

/// The harness's rule for digits between slashes, which writes its own pattern into the
/// text: `/' 7/` becomes `/'[0-9]/`.
fn quoted_digits(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("/' ") {
        match rest.as_bytes()[at + 3..] {
            [digit, b'/', ..] if digit.is_ascii_digit() => {
                written.push_str(&rest[..at]);
                written.push_str("/'[0-9]/");
                rest = &rest[at + 5..];
            }
            _ => {
                written.push_str(&rest[..=at]);
                rest = &rest[at + 1..];
            }
        }
    }
    written + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;

    #[test]
    fn spacing_is_undone() {
        for (spaced, plain) in [
            (
                " = Robert <unk> = \n \n He was 25 @.@ 5 , not 1 @,@ 000 . \n",
                " = Robert <unk> =\n\nHe was 25.5, not 1,000.\n",
            ),
            ("= = Life = =", "== Life =="),
            ("( a ( b ) c )", "(a ( b) c )"),
            ("( \u{1c} ) [ a\n] { b }", "() [a] {b}"),
            ("said \" no way \" and \" yes", "said \"no way\" and \" yes"),
            ("its boys ' club 's own", "its boys'club's own"),
            ("20 ° C , N = 3 : N ", "20°C, 1 = 3: 1 "),
            ("/' 7/ /' 77/ /' 1/' 2/", "/'[0-9]/ /' 77/ /'[0-9]/' 2/"),
            ("a ( b", "a ( b"),
        ] {
            assert_eq!(detokenized(spaced), plain, "{spaced:?}");
        }
    }

    #[test]
    fn words_and_bytes_are_the_page_s_own() {
        let record = [("page".to_owned(), " a , b \n".into())].into_iter().collect();
        let document = WikiText.document(&record).unwrap();
        assert_eq!(document, Document::text(" a, b\n".into(), " a , b \n"));
        assert_eq!(document.requests(), [Request::Rolling { text: " a, b\n".into() }]);
    }
}
