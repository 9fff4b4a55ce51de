//! The decoder that everything else uses, timed: what `--engine dense` runs.

use std::time::Instant;

use relufy_model::{Decoder, KvCache, NoTap};
use relufy_ops::{buffer, rows};
use relufy_spec::{DecoderSpec, MlpKind};

use super::Timed;
use super::text::{Cursor, Text, surprise};
use crate::counts::Work;
use crate::{Counts, Result};

/// A decoder that reads a text token by token.
pub struct DecoderTimer<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    cursor: Cursor,
    surprise: f64,
}

impl DecoderTimer<'_> {
    /// Reads a text.
    ///
    /// # Errors
    /// No memory for keys and values.
    pub fn new(decoder: &Decoder, text: Text) -> Result<DecoderTimer<'_>> {
        let longest = text.documents().iter().map(Vec::len).max().unwrap_or(0);
        let cache = KvCache::new(decoder, 1, longest)?;
        Ok(DecoderTimer { decoder, cache, cursor: Cursor::new(text), surprise: 0.0 })
    }
}

impl Timed for DecoderTimer<'_> {
    fn step(&mut self) -> Result<f64> {
        let next = self.cursor.advance();
        if let Some(first) = next.begin {
            self.cache.truncate(0, 0);
            if !first.is_empty() {
                let tokens = self.cache.extend(&[(0, first)])?;
                self.decoder.hidden_cached(&tokens, &mut self.cache, &mut NoTap)?;
            }
        }
        let start = Instant::now();
        let tokens = self.cache.extend(&[(0, &[next.token])])?;
        let hidden = self.decoder.hidden_cached(&tokens, &mut self.cache, &mut NoTap)?;
        let last = rows::gather(&hidden, &[0])?;
        let logits = buffer::to_host(&self.decoder.logits(&last)?)?;
        let seconds = start.elapsed().as_secs_f64();
        self.surprise = surprise(&logits, next.follows);
        Ok(seconds)
    }

    fn counts(&mut self) -> Result<Counts> {
        let params = self.decoder.params();
        let element = params.get(relufy_model::ParamId::Embed);
        let bytes = element.map_or(4, |tensor| tensor.dtype().size_in_bytes());
        Ok(dense(self.decoder.spec(), bytes as u64))
    }

    fn surprise(&self) -> Option<f64> {
        Some(self.surprise)
    }
}

/// Every multiply-add, with weights of so many bytes.
fn dense(spec: &DecoderSpec, bytes: u64) -> Counts {
    let work =
        |macs: usize| Work { needed: macs as u64, done: macs as u64, bytes: bytes * macs as u64 };
    let hidden = spec.hidden;
    let mut counts = Counts { head: work(hidden * spec.vocab), ..Counts::default() };
    for layer in &spec.layers {
        let (attention, mlp) = (&layer.attention, &layer.mlp);
        let ups = if mlp.kind == MlpKind::Gated { 2 } else { 1 };
        counts.qkv += work(hidden * attention.qkv_width());
        counts.o += work(hidden * attention.q_width());
        counts.up += work(ups * hidden * mlp.ffn);
        counts.down += work(hidden * mlp.ffn);
    }
    counts
}

#[cfg(test)]
mod tests {
    use relufy_spec::Stage;

    use super::*;
    use crate::bench::cpu::tests::{engine, small};
    use crate::bench::{Timer, nothing_skipped};
    use crate::{Engine, Format, Options};

    #[test]
    fn it_reads_what_the_engine_reads_without_zeros() {
        let spec = nothing_skipped(&small(Stage::Dense));
        let mut timer = Timer::new(&engine(&spec, Format::F32), None, 0).unwrap();
        timer.step().unwrap();
        assert_eq!(dense(&spec, 4), timer.counts().unwrap());
    }

    #[test]
    fn it_is_surprised_as_the_engine_is() {
        let spec = small(Stage::Two);
        let params = relufy_model::Params::random(
            &spec,
            &relufy_model::Init::default(),
            &candle_core::Device::Cpu,
        )
        .unwrap();
        let decoder = Decoder::new(spec, params).unwrap();
        let options = Options { format: Format::F32, threads: 2, ..Options::default() };
        let engine = Engine::new(&decoder, &options).unwrap();
        let text = Text::new(vec![vec![1, 2, 3, 4, 5], vec![6, 7, 8]], 1).unwrap();
        let mut ours = Timer::reading(&engine, &text, 1).unwrap();
        let mut timer = DecoderTimer::new(&decoder, text).unwrap();
        for _ in 0..8 {
            assert!(timer.step().unwrap() > 0.0);
            ours.step().unwrap();
            let (found, expected) = (ours.surprise().unwrap(), timer.surprise().unwrap());
            assert!((found - expected).abs() < 1e-4 && expected > 0.0, "{found} {expected}");
        }
    }
}
