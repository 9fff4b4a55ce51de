//! The engine on the CPU, timed.

use std::time::Instant;

use relufy_spec::flops::SiteDensities;

use super::Timed;
use super::text::{Cursor, Text, mean_surprise};
use crate::force::Forced;
use crate::{Counts, Engine, Result, Sessions};

/// Sequences whose steps are timed.
pub struct Timer {
    sessions: Sessions,
    feed: Feed,
    surprise: Option<f64>,
}

/// Which tokens go in.
enum Feed {
    /// The same one, always after so many positions.
    Again(usize),
    /// A text, each sequence in another part of it.
    Text(Vec<Cursor>),
}

impl Timer {
    /// Decodes one token again and again, after `context` positions that it fills first. `densities`
    /// are forced, where some are given: at queries, keys and values, at up, and at the gate
    /// (`down`). The first two skip something only where the site has an operation; the density of
    /// `o` is not forced.
    ///
    /// # Errors
    /// A context without room for another token.
    pub fn new(engine: &Engine, densities: Option<SiteDensities>, context: usize) -> Result<Timer> {
        Timer::batched(engine, densities, context, 1)
    }

    /// The same with several sequences side by side; zeros are forced in each by itself.
    ///
    /// # Errors
    /// As [`Timer::new`].
    pub fn batched(
        engine: &Engine,
        densities: Option<SiteDensities>,
        context: usize,
        batch: usize,
    ) -> Result<Timer> {
        let mut sessions = Sessions::new(engine, batch)?;
        for (session, seed) in sessions.each.iter_mut().zip(1..) {
            session.forced = densities.map(|each| Forced::new(engine.spec(), each, seed));
        }
        if context > 0 {
            let prompt = vec![1; context];
            sessions.prefill(&vec![&prompt[..]; batch])?;
        }
        Ok(Timer { sessions, feed: Feed::Again(context), surprise: None })
    }

    /// Reads a text with the zeros that the model has, in several sequences side by side.
    ///
    /// # Errors
    /// No memory for keys and values.
    pub fn reading(engine: &Engine, text: &Text, batch: usize) -> Result<Timer> {
        let feed = Feed::Text(Cursor::side_by_side(text, batch));
        Ok(Timer { sessions: Sessions::new(engine, batch)?, feed, surprise: None })
    }
}

impl Timed for Timer {
    fn step(&mut self) -> Result<f64> {
        let sessions = &mut self.sessions;
        match &mut self.feed {
            Feed::Again(context) => {
                sessions.truncate(*context);
                sessions
                    .each
                    .iter_mut()
                    .filter_map(|each| each.forced.as_mut())
                    .for_each(Forced::draw);
                let tokens = vec![1; sessions.batch()];
                let start = Instant::now();
                sessions.step(&tokens)?;
                Ok(start.elapsed().as_secs_f64())
            }
            Feed::Text(cursors) => {
                let (mut tokens, mut follows) = (Vec::new(), Vec::new());
                for (cursor, session) in cursors.iter_mut().zip(&mut sessions.each) {
                    let next = cursor.advance();
                    if let Some(first) = next.begin {
                        session.truncate(0);
                        if !first.is_empty() {
                            session.prefill(first)?;
                        }
                    }
                    tokens.push(next.token);
                    follows.push(next.follows);
                }
                let start = Instant::now();
                sessions.step(&tokens)?;
                let seconds = start.elapsed().as_secs_f64();
                self.surprise = mean_surprise(sessions.logits(), &follows);
                Ok(seconds)
            }
        }
    }

    fn counts(&mut self) -> Result<Counts> {
        Ok(self.sessions.counts())
    }

    fn surprise(&self) -> Option<f64> {
        self.surprise
    }

    fn densities(&self) -> Option<SiteDensities> {
        Some(self.sessions.densities())
    }

    fn batch(&self) -> usize {
        self.sessions.batch()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use relufy_spec::{DecoderSpec, ReluPlan, Stage, family};

    use super::super::text::surprise;
    use super::*;
    use crate::bench::nothing_skipped;
    use crate::{Format, Options, Session};

    /// A Llama of 2 layers, hidden size 256, 512 neurons, 64 tokens and 16 positions.
    pub fn small(stage: Stage) -> DecoderSpec {
        let config = serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
            "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        });
        ReluPlan::stage(stage).apply(&family::parse(&config).unwrap().spec).unwrap()
    }

    /// An engine of random weights.
    pub fn engine(spec: &DecoderSpec, format: Format) -> Engine {
        let options = Options { format, threads: 2, ..Options::default() };
        Engine::random(spec, &options, 1).unwrap()
    }

    #[test]
    fn forced_densities_are_what_is_counted() {
        let engine = engine(&small(Stage::Two), Format::Int8);
        let densities = SiteDensities { qkv: 0.5, o: 1.0, up: 0.25, down: 0.125 };
        let mut timer = Timer::new(&engine, Some(densities), 3).unwrap();
        for _ in 0..3 {
            assert!(timer.step().unwrap() > 0.0);
            let counts = timer.counts().unwrap();
            assert_eq!(counts.qkv.done, 2 * 128 * 768);
            assert_eq!(timer.densities(), Some(densities));
            assert_eq!(counts.up.done, 2 * (64 * 512 + 64 * 256));
            assert_eq!(counts.up.needed, 2 * (64 * 512 + 64 * 64));
            assert_eq!(counts.down.done, 2 * 64 * 256);
            // A byte a weight, and four for each row's scale in each worker's share.
            let gate = 64 * (512 + 2 * 4);
            assert_eq!(counts.up.bytes, 2 * (gate + 64 * (256 + 4)));
            assert_eq!(timer.surprise(), None);
        }
    }

    #[test]
    fn without_zeros_everything_is_read() {
        let spec = nothing_skipped(&small(Stage::Two));
        let mut timer = Timer::new(&engine(&spec, Format::F16), None, 0).unwrap();
        timer.step().unwrap();
        let weights = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 64 * 256;
        assert_eq!(timer.counts().unwrap().total().bytes, 2 * weights);
    }

    #[test]
    fn several_sequences_share_what_they_read() {
        let densities = SiteDensities { qkv: 0.5, o: 1.0, up: 0.25, down: 0.125 };
        let engine = engine(&small(Stage::Two), Format::F16);
        let counts = |batch| {
            let mut timer = Timer::batched(&engine, Some(densities), 3, batch).unwrap();
            timer.step().unwrap();
            assert_eq!(timer.batch(), batch);
            assert_eq!(timer.densities(), Some(densities));
            timer.counts().unwrap()
        };
        let (one, four) = (counts(1), counts(4));
        assert_eq!((four.total().done, four.head.bytes), (4 * one.total().done, one.head.bytes));
        // Of half of the inputs, drawn four times, nearly all are needed: 15 in 16.
        let share = four.qkv.bytes as f64 / one.qkv.bytes as f64;
        assert!(share > 1.75 && share < 2.0, "{share}");
    }

    #[test]
    fn a_text_is_read_from_each_documents_beginning() {
        let engine = engine(&small(Stage::Two), Format::F32);
        let documents = vec![vec![1, 2, 3, 4], vec![5, 6, 7]];
        let text = Text::new(documents.clone(), 1).unwrap();
        let mut timer = Timer::reading(&engine, &text, 1).unwrap();
        let mut session = Session::new(&engine).unwrap();
        for document in documents.iter().chain(&documents) {
            session.truncate(0);
            session.prefill(&document[..1]).unwrap();
            for pair in document[1..].windows(2) {
                timer.step().unwrap();
                let expected = surprise(session.step(pair[0]).unwrap(), pair[1]);
                assert_eq!(timer.surprise(), Some(expected));
            }
        }
    }

    #[test]
    fn sequences_read_documents_of_their_own() {
        let engine = engine(&small(Stage::Two), Format::F32);
        let documents = [vec![1, 2, 3, 4], vec![5, 6, 7, 8]];
        let alone = |document: &Vec<u32>| {
            let text = Text::new(vec![document.clone()], 1).unwrap();
            Timer::reading(&engine, &text, 1).unwrap()
        };
        let mut each = documents.each_ref().map(alone);
        let text = Text::new(documents.to_vec(), 1).unwrap();
        let mut both = Timer::reading(&engine, &text, 2).unwrap();
        // The second round reads the other document.
        for step in 0..4 {
            both.step().unwrap();
            each.iter_mut().for_each(|timer| assert!(timer.step().unwrap() > 0.0));
            let mean = each.iter().map(|timer| timer.surprise().unwrap()).sum::<f64>() / 2.0;
            let found = both.surprise().unwrap();
            assert!((found - mean).abs() < 1e-9, "step {step}: {found} {mean}");
        }
    }
}
