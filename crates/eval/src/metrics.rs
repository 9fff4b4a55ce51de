//! From log-likelihoods to numbers in a table: means, their standard errors, perplexity.

use serde::{Deserialize, Serialize};

use crate::bootstrap;

/// What a task measures. Names are lm-evaluation-harness's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Metric {
    /// The share of documents answered rightly.
    Acc,
    /// The same, with each choice's log-likelihood divided by its length in characters
    /// (Unicode code points, without the delimiter).
    AccNorm,
    /// The share of documents whose generated answer is one of the right ones.
    ExactMatch,
    /// `exp(-mean log-likelihood)`, over targets (a lambada word) or tokens (a corpus).
    Perplexity,
    /// `exp(-log-likelihood / words)`, over all documents.
    WordPerplexity,
    /// `exp(-log-likelihood / bytes)`, over all documents.
    BytePerplexity,
    /// `-log2` likelihood over UTF-8 bytes.
    BitsPerByte,
}

/// A document's part in a metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Right or wrong as 1 or 0; for perplexities the log-likelihood.
    pub value: f64,
    /// What it counts for: 1, or the words or bytes of a text.
    pub weight: f64,
}

impl Point {
    /// A value that counts once.
    pub fn of(value: f64) -> Point {
        Point { value, weight: 1.0 }
    }
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 7] = [
        Metric::Acc,
        Metric::AccNorm,
        Metric::ExactMatch,
        Metric::Perplexity,
        Metric::WordPerplexity,
        Metric::BytePerplexity,
        Metric::BitsPerByte,
    ];

    /// The name in results and tables.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::ExactMatch => "exact_match",
            Metric::Perplexity => "perplexity",
            Metric::WordPerplexity => "word_perplexity",
            Metric::BytePerplexity => "byte_perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether it is a share of documents, which a table prints in per cent and averages.
    pub fn is_accuracy(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm | Metric::ExactMatch)
    }

    /// Whether each document weighs as much as it has words or bytes.
    pub fn is_weighted(self) -> bool {
        matches!(self, Metric::WordPerplexity | Metric::BytePerplexity | Metric::BitsPerByte)
    }

    /// The metric over all documents. `replicates` are those of the bootstrap behind a
    /// perplexity's standard error; with none there is no standard error of anything.
    /// `None` without documents.
    ///
    /// Weighted perplexities have no standard error, as in the harness.
    pub fn aggregate(self, points: &[Point], replicates: u32) -> Option<Estimate> {
        if points.is_empty() {
            return None;
        }
        let values: Vec<f64> = points.iter().map(|point| point.value).collect();
        let mean_by_weight =
            || values.iter().sum::<f64>() / points.iter().map(|point| point.weight).sum::<f64>();
        Some(match self {
            Metric::Perplexity => Estimate {
                value: (-mean(&values)).exp(),
                stderr: bootstrap::perplexity_stderr(&values, replicates),
            },
            Metric::WordPerplexity | Metric::BytePerplexity => {
                Estimate { value: (-mean_by_weight()).exp(), stderr: None }
            }
            Metric::BitsPerByte => {
                Estimate { value: -mean_by_weight() / std::f64::consts::LN_2, stderr: None }
            }
            Metric::Acc | Metric::AccNorm | Metric::ExactMatch => {
                let stderr = (replicates > 0).then(|| mean_stderr(&values)).flatten();
                Estimate { value: mean(&values), stderr }
            }
        })
    }
}

/// A number with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Estimate {
    /// The number.
    #[serde(with = "float")]
    pub value: f64,
    /// Its standard error; `None` where there is none (a single document).
    #[serde(default, with = "optional_float", skip_serializing_if = "Option::is_none")]
    pub stderr: Option<f64>,
}

/// Mean; 0 of nothing.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Standard deviation with `n - 1` in the denominator; 0 of fewer than two values.
pub(crate) fn sample_deviation(values: &[f64]) -> f64 {
    let center = mean(values);
    let squares: f64 = values.iter().map(|x| (x - center) * (x - center)).sum();
    (squares / values.len().saturating_sub(1).max(1) as f64).sqrt()
}

/// Standard error of the mean: `sqrt(sum((x - mean)^2) / (n - 1)) / sqrt(n)`. `None` for
/// fewer than two values.
fn mean_stderr(values: &[f64]) -> Option<f64> {
    (values.len() > 1).then(|| sample_deviation(values) / (values.len() as f64).sqrt())
}

/// Index of the largest value, the first of equals; 0 of nothing.
pub(crate) fn first_argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let best =
        values.into_iter().enumerate().fold(None, |best: Option<(usize, f64)>, at| match best {
            Some(best) if at.1 > best.1 => Some(at),
            None => Some(at),
            best => best,
        });
    best.map_or(0, |(index, _)| index)
}

/// JSON has no infinity: a perplexity beyond f64 is written as the string `inf`.
mod float {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Float(f64),
        Text(String),
    }

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() {
            serializer.serialize_f64(*value)
        } else {
            serializer.serialize_str(&value.to_string())
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<f64, D::Error> {
        match Number::deserialize(input)? {
            Number::Float(value) => Ok(value),
            Number::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// [`float`], where there may be none.
mod optional_float {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Wrapped(#[serde(with = "super::float")] f64);

    pub(super) fn serialize<S: Serializer>(
        value: &Option<f64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(Wrapped).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        input: D,
    ) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Wrapped>::deserialize(input)?.map(|wrapped| wrapped.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_of_three_in_four() {
        let points = [1.0, 0.0, 1.0, 1.0].map(Point::of);
        let got = Metric::Acc.aggregate(&points, 1).unwrap();
        assert_eq!(got.value, 0.75);
        // sqrt((3 * 0.0625 + 0.5625) / 3) / 2
        assert!((got.stderr.unwrap() - 0.25).abs() < 1e-15);
        assert_eq!(Metric::Acc.aggregate(&points, 0).unwrap().stderr, None);
    }

    #[test]
    fn one_document_has_no_stderr_and_none_has_no_estimate() {
        assert_eq!(Metric::Acc.aggregate(&[Point::of(1.0)], 1).unwrap().stderr, None);
        assert_eq!(Metric::Acc.aggregate(&[], 1), None);
    }

    #[test]
    fn long_texts_weigh_more() {
        let points = [Point { value: -2.0, weight: 1.0 }, Point { value: -2.0, weight: 3.0 }];
        let value = |metric: Metric| metric.aggregate(&points, 0).unwrap().value;
        assert!((value(Metric::WordPerplexity) - 1f64.exp()).abs() < 1e-15);
        assert!((value(Metric::BitsPerByte) - std::f64::consts::LOG2_E).abs() < 1e-15);
    }

    #[test]
    fn ties_go_to_the_first() {
        assert_eq!(first_argmax([1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(first_argmax([f64::NEG_INFINITY, f64::NEG_INFINITY]), 0);
    }

    #[test]
    fn infinity_survives_json() {
        let given = Estimate { value: f64::INFINITY, stderr: Some(f64::NAN) };
        let read: Estimate = serde_json::from_str(&serde_json::to_string(&given).unwrap()).unwrap();
        assert_eq!(read.value, f64::INFINITY);
        assert!(read.stderr.unwrap().is_nan());
        let plain = Estimate { value: 0.1 + 0.2, stderr: None };
        let read: Estimate = serde_json::from_str(&serde_json::to_string(&plain).unwrap()).unwrap();
        assert_eq!(read, plain);
    }
}
