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
    /// `exp(-mean log-likelihood)`, over targets (a lambada word) or tokens (a corpus).
    Perplexity,
    /// `-log2` likelihood of a corpus over its UTF-8 bytes.
    BitsPerByte,
}

impl Metric {
    /// The name in results and tables.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
            Metric::Perplexity => "perplexity",
            Metric::BitsPerByte => "bits_per_byte",
        }
    }

    /// Whether it is a share of documents, which a table prints in per cent and averages.
    pub fn is_accuracy(self) -> bool {
        matches!(self, Metric::Acc | Metric::AccNorm)
    }

    /// The metric over all documents, from each document's value (for perplexity: its
    /// log-likelihood). `None` without documents.
    pub fn aggregate(self, values: &[f64]) -> Option<Estimate> {
        if values.is_empty() {
            return None;
        }
        Some(match self {
            Metric::Perplexity => Estimate {
                value: (-mean(values)).exp(),
                stderr: bootstrap::perplexity_stderr(values, bootstrap::REPLICATES),
            },
            _ => Estimate { value: mean(values), stderr: mean_stderr(values) },
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
        let got = Metric::Acc.aggregate(&[1.0, 0.0, 1.0, 1.0]).unwrap();
        assert_eq!(got.value, 0.75);
        // sqrt((3 * 0.0625 + 0.5625) / 3) / 2
        assert!((got.stderr.unwrap() - 0.25).abs() < 1e-15);
    }

    #[test]
    fn one_document_has_no_stderr_and_none_has_no_estimate() {
        assert_eq!(Metric::Acc.aggregate(&[1.0]).unwrap().stderr, None);
        assert_eq!(Metric::Acc.aggregate(&[]), None);
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
