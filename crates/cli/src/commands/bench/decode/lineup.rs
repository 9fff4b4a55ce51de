//! Who decodes: a row for each format and engine.

use anyhow::{Context, bail};
use relufy_model::{Decoder, DensityTap, Tokens};
use relufy_sparse::bench::{DecoderTimer, Pace, RawRead, Text, Timed, Timer};
use relufy_sparse::{Engine, Format, Options, Session};
use relufy_spec::Site;
use relufy_spec::flops::SiteDensities;

use super::subject::Subject;
use super::zeros::Forced;
use super::{Choice, Decode};
use crate::commands::surgery::text;

/// Bytes of a plain read on the CPU: more than caches hold.
const READ: usize = 1 << 30;

/// Everybody who decodes, and a plain read of the memory that the weights lie in.
pub struct Lineup<'a> {
    pub rows: Vec<Row>,
    pub timed: Vec<Box<dyn Timed + 'a>>,
    pub read: Box<dyn FnMut() -> relufy_sparse::Result<f64>>,
    /// Tokens that each decodes: what was asked for, or what the text has.
    pub tokens: usize,
    /// Positions that are filled before; of a text, of each document.
    pub context: usize,
    pub threads: usize,
    /// What a model's matrices read in the text.
    pub densities: Option<SiteDensities>,
    /// Whether the text is not the model's own.
    pub foreign: bool,
}

/// What a row is.
pub struct Row {
    pub name: String,
    /// `dense`, `sparse` or `decoder`.
    pub engine: &'static str,
    pub format: Format,
    pub forced: Option<SiteDensities>,
    /// The dense row of the same format.
    pub beside: Option<usize>,
}

/// The engines of one format.
struct Pair {
    format: Format,
    dense: Option<Engine>,
    sparse: Option<Engine>,
}

impl<'a> Lineup<'a> {
    pub fn new(
        args: &Decode,
        subject: &'a Subject,
        formats: &[Format],
        zeros: bool,
        pace: &Pace,
    ) -> anyhow::Result<Lineup<'a>> {
        let forced = if zeros { args.forced(subject) } else { Vec::new() };
        let reads = matches!(subject, Subject::Model { .. }) && args.densities.is_empty();
        let context = args.context.unwrap_or(if reads { 0 } else { 16 });
        let most = subject.spec().max_positions;
        if context >= most {
            bail!(
                "--context {context}: {} has {most} positions, and one is decoded",
                subject.name()
            );
        }
        let pairs = pairs(args, subject, formats, zeros, if reads { 0 } else { context + 1 })?;
        let Some(engine) =
            pairs.iter().flat_map(|pair| [&pair.dense, &pair.sparse]).flatten().next()
        else {
            bail!("nothing to time");
        };
        let steps = pace.warmup + pace.tokens;
        let text = match reads {
            true => Some(args.read_text(subject, engine, context, steps)?),
            false => None,
        };
        let tokens = match &text {
            Some(text) => text.steps().saturating_sub(pace.warmup),
            None => pace.tokens,
        };
        if tokens == 0 {
            bail!("the text leaves nothing to time after {} tokens to warm up", pace.warmup);
        }
        let raw = RawRead::new(READ)?;
        let reader = engine.clone();
        let mut lineup = Lineup {
            rows: Vec::new(),
            timed: Vec::new(),
            read: Box::new(move || Ok(raw.bandwidth(&reader))),
            tokens,
            context: text.as_ref().map_or(context, Text::before),
            threads: engine.threads(),
            densities: None,
            foreign: args.corpus.is_some(),
        };
        if let (Some(text), true) = (&text, zeros) {
            let (_, decoder, _) = subject.real()?;
            lineup.densities = Some(densities(decoder, text)?);
        }
        if let (Some(text), true) = (&text, args.decoder) {
            let (_, decoder, _) = subject.real()?;
            let timer = Box::new(DecoderTimer::new(decoder, text.clone())?);
            lineup.add("decoder", Format::F32, None, timer);
        }
        for pair in &pairs {
            lineup.add_pair(pair, &forced, text.as_ref())?;
        }
        Ok(lineup)
    }

    /// The rows of one format.
    fn add_pair(
        &mut self,
        pair: &Pair,
        forced: &[Forced],
        text: Option<&Text>,
    ) -> anyhow::Result<()> {
        let (format, context) = (pair.format, self.context);
        let timer = |engine: &Engine, forced: Option<&Forced>| match text {
            Some(text) => Timer::reading(engine, text.clone()),
            None => Timer::new(engine, forced.map(|forced| forced.densities), context),
        };
        if let Some(engine) = &pair.dense {
            self.add("dense", format, None, Box::new(timer(engine, None)?));
        }
        let Some(engine) = &pair.sparse else { return Ok(()) };
        let forced: Vec<Option<&Forced>> =
            if forced.is_empty() { vec![None] } else { forced.iter().map(Some).collect() };
        for forced in forced {
            self.add("sparse", format, forced, Box::new(timer(engine, forced)?));
        }
        Ok(())
    }

    fn add(
        &mut self,
        engine: &'static str,
        format: Format,
        forced: Option<&Forced>,
        timed: Box<dyn Timed + 'a>,
    ) {
        let name = match forced {
            Some(forced) => format!("{format} {}", forced.name),
            None => format!("{format} {engine}"),
        };
        let dense = |row: &Row| row.engine == "dense" && row.format == format;
        let beside = match engine {
            "sparse" => self.rows.iter().position(dense),
            _ => None,
        };
        let forced = forced.map(|forced| forced.densities);
        self.rows.push(Row { name, engine, format, forced, beside });
        self.timed.push(timed);
    }
}

/// Packs the weights, once for each format and engine.
fn pairs(
    args: &Decode,
    subject: &Subject,
    formats: &[Format],
    zeros: bool,
    context: usize,
) -> anyhow::Result<Vec<Pair>> {
    let threads = rayon::current_num_threads();
    let wanted = |choice| args.engine.is_none_or(|only| only == choice);
    let pair = |format: &Format| {
        let options = Options { format: *format, threads, context, ..Options::default() };
        let engine =
            |skip, wanted: bool| wanted.then(|| subject.engine(skip, &options)).transpose();
        Ok(Pair {
            format: *format,
            dense: engine(false, wanted(Choice::Dense))?,
            sparse: engine(true, zeros && wanted(Choice::Sparse))?,
        })
    };
    formats.iter().map(pair).collect()
}

impl Decode {
    /// The tokens that all rows read: so many can be decoded, or as many as the text has.
    fn read_text(
        &self,
        subject: &Subject,
        engine: &Engine,
        context: usize,
        steps: usize,
    ) -> anyhow::Result<Text> {
        let (checkpoint, _, tokenizer) = subject.real()?;
        let Some(corpus) = &self.corpus else {
            let mut prompt = tokenizer.encode(self.prompt.as_deref().unwrap_or(""), true)?;
            if prompt.is_empty() {
                // An empty prompt is the beginning of a text.
                prompt.extend(tokenizer.prefix_token());
            }
            let before = context.max(prompt.len());
            let document = continued(engine, prompt, before + steps + 1).context("--prompt")?;
            let text = Text::new(vec![document], before);
            return text.context("--prompt leaves no position to decode");
        };
        // Every step has a document's token before it, or lies in a document of at least three.
        let documents = text(checkpoint, corpus, 4 * (context + steps) as u64)?;
        let documents = cut(documents, context, steps);
        let short = || format!("{corpus} has no document of more than {} tokens", context + 1);
        let text = Text::new(documents, context).with_context(short)?;
        Ok(text)
    }
}

/// The first documents that give so many steps after `before` tokens each, the last one cut.
fn cut(documents: Vec<Vec<u32>>, before: usize, steps: usize) -> Vec<Vec<u32>> {
    let mut left = steps;
    let mut kept = Vec::new();
    for mut document in documents {
        let Some(mine) = document.len().checked_sub(before + 1).filter(|mine| *mine > 0) else {
            continue;
        };
        document.truncate(before + 1 + mine.min(left));
        left -= mine.min(left);
        kept.push(document);
        if left == 0 {
            break;
        }
    }
    kept
}

/// A prompt with its greedy continuation, `length` tokens in all or as many as there are positions.
fn continued(engine: &Engine, prompt: Vec<u32>, length: usize) -> anyhow::Result<Vec<u32>> {
    let mut session = Session::new(engine)?;
    let mut tokens = prompt;
    let mut next = likeliest(session.prefill(&tokens)?);
    tokens.push(next);
    while tokens.len() < length.min(engine.context()) {
        next = likeliest(session.step(next)?);
        tokens.push(next);
    }
    Ok(tokens)
}

/// The token of the largest logit, the first of several.
fn likeliest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}

/// What a model's matrices read in a text, over all layers.
fn densities(decoder: &Decoder, text: &Text) -> anyhow::Result<SiteDensities> {
    let mut tap = DensityTap::new(decoder.spec().layers.len());
    for document in text.documents() {
        let tokens = Tokens::rows(document.clone(), document.len());
        decoder.hidden(&tokens, &mut tap)?;
    }
    let mean = |site| tap.mean(site);
    Ok(SiteDensities {
        qkv: mean(Site::QkvIn),
        o: mean(Site::OIn),
        up: mean(Site::UpIn),
        down: mean(Site::DownIn),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_to_its_steps() {
        let documents = vec![vec![1, 2, 3, 4], vec![5], vec![6, 7], vec![8, 9, 10]];
        let cut = |before, steps| cut(documents.clone(), before, steps);
        assert_eq!(cut(0, 5), [vec![1, 2, 3, 4], vec![6, 7], vec![8, 9]]);
        assert_eq!(cut(1, 3), [vec![1, 2, 3, 4], vec![8, 9, 10]]);
        assert_eq!(cut(0, 2), [vec![1, 2, 3]]);
        assert!(cut(4, 2).is_empty());
        for steps in 1..7 {
            assert_eq!(Text::new(cut(0, steps), 0).unwrap().steps(), steps.min(6));
        }
    }

    #[test]
    fn the_first_of_equal_logits_wins() {
        assert_eq!(likeliest(&[0.0, 2.0, -1.0, 2.0]), 1);
        assert_eq!(likeliest(&[-1.0]), 0);
    }
}
