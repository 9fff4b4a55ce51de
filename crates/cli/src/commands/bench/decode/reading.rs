//! The text that a model's rows read.

use anyhow::{Context, bail};
use relufy_model::{Decoder, DensityTap, Tokens};
use relufy_sparse::Sequence;
use relufy_sparse::bench::Text;
use relufy_spec::Site;
use relufy_spec::flops::SiteDensities;

use super::super::subject::{Real, Subject};
use super::Decode;
use super::machine::Machine;
use crate::commands::surgery::text;

/// How long documents are taken to be at most.
const LONGEST: usize = 1 << 14;

/// The tokens that all rows read: so many can be decoded, or as many as the text has. After
/// `--prompt` comes what `machine` makes of it.
pub fn read_text(
    args: &Decode,
    subject: &Subject,
    machine: &Machine,
    context: usize,
    steps: usize,
) -> anyhow::Result<Text> {
    let batch = usize::from(args.batch);
    if batch > 1 && (args.corpus.is_none() || args.decoder) {
        bail!(
            "one sequence continues a prompt, and --decoder is one: --batch needs --corpus or --densities"
        );
    }
    let Real { checkpoint, decoder } = subject.real()?;
    let Some(corpus) = &args.corpus else {
        let tokenizer = checkpoint.tokenizer()?;
        let mut prompt = tokenizer.encode(args.prompt.as_deref().unwrap_or(""), true)?;
        if prompt.is_empty() {
            // An empty prompt is the beginning of a text.
            prompt.extend(tokenizer.prefix_token());
        }
        let before = context.max(prompt.len());
        let most = decoder.spec().max_positions;
        let length = most.min(before + steps + 1);
        let document = continued(&mut *machine.sequence()?, prompt, length).context("--prompt")?;
        let text = Text::new(vec![document], before);
        return text.context("--prompt leaves no position to decode");
    };
    // A document of two tokens has one to decode; a long one is one sequence's all the same.
    let longest = decoder.spec().max_positions.min(LONGEST);
    let each = (2 * (context + steps + 1)).max(if batch > 1 { longest } else { 0 });
    let documents = text(checkpoint, corpus, (batch * each) as u64)?;
    let documents = cut(documents, context, steps, batch);
    let short = || format!("{corpus} has no document of more than {} tokens", context + 1);
    let text = Text::new(documents, context).with_context(short)?;
    let found = text.documents().len();
    if found < batch {
        bail!("{corpus} has {found} documents; each of {batch} sequences reads another one");
    }
    Ok(text)
}

/// The first documents that give each of `batch` sequences so many steps after `before` tokens of each:
/// none longer than that, the last one cut.
fn cut(documents: Vec<Vec<u32>>, before: usize, steps: usize, batch: usize) -> Vec<Vec<u32>> {
    let mut left = steps * batch;
    let mut kept = Vec::new();
    for mut document in documents {
        let Some(mine) = document.len().checked_sub(before + 1).filter(|mine| *mine > 0) else {
            continue;
        };
        let mine = mine.min(left).min(steps);
        document.truncate(before + 1 + mine);
        left -= mine;
        kept.push(document);
        if left == 0 {
            break;
        }
    }
    kept
}

/// A prompt with its greedy continuation, `length` tokens in all.
fn continued(
    sequence: &mut dyn Sequence,
    prompt: Vec<u32>,
    length: usize,
) -> relufy_sparse::Result<Vec<u32>> {
    let mut tokens = prompt;
    let mut next = likeliest(sequence.prefill(&tokens)?);
    tokens.push(next);
    while tokens.len() < length {
        next = likeliest(sequence.step(next)?);
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
pub fn densities(decoder: &Decoder, text: &Text) -> anyhow::Result<SiteDensities> {
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
        let several = |steps, batch| cut(documents.clone(), 0, steps, batch);
        assert_eq!(several(1, 3), [vec![1, 2], vec![6, 7], vec![8, 9]]);
        assert_eq!(several(2, 2), [vec![1, 2, 3], vec![6, 7], vec![8, 9]]);
        let cut = |before, steps| cut(documents.clone(), before, steps, 1);
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
