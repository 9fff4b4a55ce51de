//! Perplexity of a text corpus: how well does the model predict running text?
//!
//! Each document is tokenised without special tokens, led by the prefix token (BOS, else
//! EOS) and cut into disjoint windows of `sequence_length` predicted tokens; a window
//! sees the one token before it. So every token of the text is predicted exactly once, on
//! average with half a window of context, and bits per byte is well defined. (Without BOS
//! and EOS a document's first token is only context.)

use relufy_data::corpus::SourceConfig;
use relufy_data::{Hub, Progress};
use serde_json::{Map, Value, json};

use crate::activity::Activity;
use crate::metrics::{Estimate, Metric};
use crate::request::Scorable;
use crate::results::Spread;
use crate::session::Session;
use crate::{Error, Result};

/// Documents are tokenised and scored in groups of about this many bytes, so that a large
/// corpus is never held whole.
const GROUP_BYTES: usize = 1 << 20;

/// A text corpus whose perplexity is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    /// The name in results.
    pub name: String,
    /// Where the text is. Chat documents count in full, prompts included.
    pub source: SourceConfig,
    /// Predicted tokens of a window; `None`: the session's longest input.
    pub sequence_length: Option<usize>,
    /// Ends with the window that reaches so many predicted tokens.
    pub max_tokens: Option<u64>,
}

/// What a corpus says about a model.
#[derive(Clone, Debug, PartialEq)]
pub struct CorpusScore {
    /// Documents read.
    pub documents: usize,
    /// Windows scored.
    pub windows: usize,
    /// Tokens predicted.
    pub tokens: u64,
    /// UTF-8 bytes of the text predicted.
    pub bytes: u64,
    /// Natural logarithm of the text's probability.
    pub logprob: f64,
    /// Of all tokens that entered the model, document by document.
    pub(crate) spread: Spread,
}

impl CorpusScore {
    /// Of nothing, by a model of so many layers.
    fn empty(layers: usize) -> CorpusScore {
        let spread = Spread::new(layers);
        CorpusScore { documents: 0, windows: 0, tokens: 0, bytes: 0, logprob: 0.0, spread }
    }

    /// Perplexity a token, and bits a byte. Neighbouring tokens are not independent, so
    /// no standard error is claimed.
    pub fn metrics(&self) -> [(Metric, Estimate); 2] {
        let estimate = |value| Estimate { value, stderr: None };
        let perplexity = (-self.logprob / self.tokens as f64).exp();
        let bits = -self.logprob / std::f64::consts::LN_2 / self.bytes as f64;
        [(Metric::Perplexity, estimate(perplexity)), (Metric::BitsPerByte, estimate(bits))]
    }
}

impl Corpus {
    /// A corpus by name and source, in windows of the session's length.
    pub fn new(name: impl Into<String>, source: SourceConfig) -> Corpus {
        Corpus { name: name.into(), source, sequence_length: None, max_tokens: None }
    }

    /// The corpus in the words of the harness's task files.
    pub(crate) fn config(&self) -> Map<String, Value> {
        let config = json!({
            "task": self.name, "dataset_path": self.source.path,
            "output_type": "loglikelihood_rolling",
            "metric_list": [
                { "metric": "perplexity", "aggregation": "perplexity", "higher_is_better": false },
                { "metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": false },
            ],
            "metadata": { "sequence_length": self.sequence_length, "max_tokens": self.max_tokens },
        });
        config.as_object().cloned().unwrap_or_default()
    }

    /// Scores the corpus. `progress` advances by one a window.
    ///
    /// # Errors
    /// The corpus, the tokenizer or the model; a corpus without text; a window longer
    /// than the model.
    pub fn score(
        &self,
        session: &Session<'_>,
        hub: &Hub,
        progress: &dyn Progress,
    ) -> Result<CorpusScore> {
        let window = self.sequence_length.unwrap_or(session.max_length());
        if !(1..=session.max_length()).contains(&window) {
            return Err(Error::Setting {
                what: "sequence_length",
                expected: format!("1 to {} (the longest input)", session.max_length()),
                found: window.to_string(),
            });
        }
        let mut score = CorpusScore::empty(session.decoder().spec().layers.len());
        let mut texts: Vec<String> = Vec::new();
        let mut bytes = 0;
        let mut documents = relufy_data::corpus::documents(&self.source, hub)?.fuse();
        loop {
            let document = documents.next().transpose()?;
            let ended = document.is_none();
            if let Some(document) = document {
                bytes += document.text.len();
                texts.push(document.text);
            }
            if ended || bytes >= GROUP_BYTES {
                let full = self.score_texts(session, window, &texts, &mut score, progress)?;
                if full || ended {
                    break;
                }
                texts.clear();
                bytes = 0;
            }
        }
        if score.tokens == 0 {
            return Err(Error::Empty {
                name: self.name.clone(),
                source_name: self.source.path.clone(),
                why: "the corpus holds no text to predict".into(),
            });
        }
        Ok(score)
    }

    /// Adds some documents to `score`; true once `max_tokens` is reached.
    fn score_texts(
        &self,
        session: &Session<'_>,
        window: usize,
        texts: &[String],
        score: &mut CorpusScore,
        progress: &dyn Progress,
    ) -> Result<bool> {
        let tokenizer = session.tokenizer();
        let documents: Vec<Vec<u32>> = tokenizer
            .encode_batch(texts, false)?
            .into_iter()
            .map(|ids| tokenizer.prefix_token().into_iter().chain(ids).collect())
            .collect();
        let full = |tokens: u64| self.max_tokens.is_some_and(|limit| tokens >= limit);
        let (mut scorables, mut owners): (Vec<Scorable>, Vec<usize>) = (Vec::new(), Vec::new());
        for (document, (ids, text)) in documents.iter().zip(texts).enumerate() {
            if full(score.tokens) {
                break;
            }
            score.documents += 1;
            let mut end = 1;
            for scorable in windows(ids, window) {
                if full(score.tokens) {
                    break;
                }
                end += scorable.continuation;
                score.tokens += scorable.continuation as u64;
                scorables.push(scorable);
                owners.push(document);
            }
            score.bytes += match ids.get(1..end) {
                // Cut short: the bytes of the tokens that were predicted.
                Some(predicted) if end < ids.len() => {
                    tokenizer.decode(predicted, false)?.len().min(text.len()) as u64
                }
                _ => text.len() as u64,
            };
        }
        score.windows += scorables.len();
        let spec = session.decoder().spec();
        let mut activities = vec![Activity::new(spec.layers.len()); documents.len()];
        session.score_windows(scorables, &mut |window, scored, activity| {
            score.logprob += scored.logprob;
            activities[owners[window]].add(activity);
            progress.advance(1);
        })?;
        let read = activities.iter().filter(|activity| activity.tokens > 0);
        read.for_each(|activity| score.spread.add(activity, spec));
        Ok(full(score.tokens))
    }
}

/// Windows of at most `window` predicted tokens, each led by the token before it.
fn windows(ids: &[u32], window: usize) -> impl Iterator<Item = Scorable> + '_ {
    (0..ids.len().saturating_sub(1)).step_by(window).map(move |start| {
        let end = (start + window + 1).min(ids.len());
        let continuation = end - start - 1;
        Scorable { ids: ids[start..end].to_vec(), continuation, context: 1, truncated: 0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_every_token_once() {
        for (length, window) in [(0, 4), (1, 4), (2, 4), (5, 4), (6, 4), (23, 4), (9, 1)] {
            let ids: Vec<u32> = (0..length).collect();
            let predicted: Vec<u32> = windows(&ids, window)
                .inspect(|scorable| assert!(scorable.continuation <= window))
                .flat_map(|scorable| scorable.targets().to_vec())
                .collect();
            assert_eq!(predicted, ids.get(1..).unwrap_or_default(), "{length} {window}");
        }
    }

    #[test]
    fn a_uniform_model_over_bytes_has_eight_bits() {
        let logprob = -100.0 * 256f64.ln();
        let score = CorpusScore { tokens: 100, bytes: 100, logprob, ..CorpusScore::empty(1) };
        let [(_, perplexity), (_, bits)] = score.metrics();
        assert!((perplexity.value - 256.0).abs() < 1e-9 && (bits.value - 8.0).abs() < 1e-12);
    }
}
