//! The next token out of the logits: the most likely one, or one drawn.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0 takes the most likely token; 1 draws from the model's own distribution.
    pub temperature: f64,
    /// Only among so many of the most likely.
    pub top_k: Option<usize>,
    /// Only among the most likely that make up this probability.
    pub top_p: Option<f64>,
    /// Equal seeds draw equal tokens.
    pub seed: u64,
}

/// Draws token after token.
pub struct Sampler(LogitsProcessor);

impl Sampler {
    /// At temperature 0 nothing is drawn, whatever else is asked.
    pub fn new(draw: &Draw) -> Sampler {
        let Draw { temperature, top_k, top_p, seed } = *draw;
        let sampling = match (temperature, top_k, top_p) {
            (0.0, ..) => Sampling::ArgMax,
            (temperature, None, None) => Sampling::All { temperature },
            (temperature, Some(k), None) => Sampling::TopK { k, temperature },
            (temperature, None, Some(p)) => Sampling::TopP { p, temperature },
            (temperature, Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        Sampler(LogitsProcessor::from_sampling(seed, sampling))
    }

    /// The next token, from the logits of the whole vocabulary.
    ///
    /// # Errors
    /// Logits that are no numbers.
    pub fn pick(&mut self, logits: &[f32]) -> anyhow::Result<u32> {
        Ok(self.0.sample(&Tensor::from_slice(logits, logits.len(), &Device::Cpu)?)?)
    }
}
