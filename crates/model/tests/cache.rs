//! Earlier tokens kept in a cache, in sequences or in a tree, change no hidden state.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test

mod common;

use proptest::prelude::*;
use relufy_model::{Decoder, Error, KvCache, KvTree, NoTap, RunId, Tokens};

use common::{KINDS, config, decoder, random, values};

/// A run of a tree, for the test to compare with.
#[derive(Clone)]
struct Known {
    id: RunId,
    /// All tokens of its sequence, to the run's end.
    ids: Vec<u32>,
    own: usize,
}

fn close(seen: &[f32], expected: &[f32]) -> bool {
    seen.len() == expected.len()
        && seen.iter().zip(expected).all(|(seen, expected)| (seen - expected).abs() < 1e-5)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    /// Tokens in pieces through the cache, several sequences side by side, see what they
    /// would see at once.
    #[test]
    fn a_cache_changes_no_hidden_state(
        kind in 0..KINDS, seed in any::<u64>(), cuts in prop::collection::vec(1usize..6, 1..5),
    ) {
        let config = config(kind, 2, 2, 8, 2);
        let decoder = Decoder::new(config.spec.clone(), random(&config, seed)).unwrap();
        let total: usize = cuts.iter().sum();
        let ids: Vec<u32> = (0..2 * total as u32).map(|i| (i * 7 + seed as u32 % 11) % 40).collect();
        let whole = values(&decoder.hidden(&Tokens::rows(ids.clone(), total), &mut NoTap).unwrap());

        let mut cache = KvCache::new(&decoder, 2, total).unwrap();
        let hidden = config.spec.hidden;
        let mut start = 0;
        for cut in cuts {
            let (a, b) = (&ids[start..start + cut], &ids[total + start..total + start + cut]);
            // A wrong guess first: truncating must forget it.
            let wrong = cache.extend(&[(0, &[1, 2][..cut.min(2)])]).unwrap();
            decoder.hidden_cached(&wrong, &mut cache, &mut NoTap).unwrap();
            cache.truncate(0, start);
            let tokens = cache.extend(&[(1, b), (0, a)]).unwrap();
            let seen = values(&decoder.hidden_cached(&tokens, &mut cache, &mut NoTap).unwrap());
            let expected = [total + start, start].map(|row| &whole[row * hidden..(row + cut) * hidden]).concat();
            for (seen, expected) in seen.iter().zip(&expected) {
                prop_assert!((seen - expected).abs() < 2e-5, "{} against {}", seen, expected);
            }
            start += cut;
        }
        prop_assert_eq!((cache.len(0), cache.len(1)), (total, total));
        prop_assert!(cache.extend(&[(0, &[1])]).is_err());
    }

    /// Random trees, grown over several passes with most of it forgotten between some of them.
    #[test]
    fn a_tree_changes_no_hidden_state(
        kind in 0..KINDS, seed in any::<u64>(),
        passes in prop::collection::vec(
            (
                prop::collection::vec((any::<prop::sample::Index>(), 1usize..7), 1..6),
                prop::option::of(any::<prop::sample::Index>()),
            ),
            1..5,
        ),
    ) {
        let decoder = decoder(kind, seed);
        let hidden = decoder.spec().hidden;
        let mut tree = KvTree::new(&decoder, 120).unwrap();
        let mut runs: Vec<Known> = Vec::new();
        let mut token = seed as u32 % 40;
        for (branches, keep) in passes {
            let known_before = runs.len();
            for (parent, len) in branches {
                // A run of this pass may be continued in the same pass.
                let parent = parent.index(runs.len() + 1).checked_sub(1).map(|at| runs[at].clone());
                let own: Vec<u32> = (0..len).map(|_| { token = (token * 7 + 3) % 40; token }).collect();
                let id = tree.branch(parent.as_ref().map(|parent| parent.id), &own).unwrap();
                let ids = [parent.map(|parent| parent.ids).unwrap_or_default(), own].concat();
                prop_assert_eq!(tree.len(id), ids.len());
                runs.push(Known { id, ids, own: len });
            }
            let tokens = tree.announced();
            let seen = values(&decoder.hidden_cached(&tokens, &mut tree, &mut NoTap).unwrap());
            let mut row = 0;
            for (run, segment) in runs[known_before..].iter().zip(&tokens.segments) {
                prop_assert_eq!((segment.q_start, segment.q_len), (row, run.own));
                let whole = Tokens::rows(run.ids.clone(), run.ids.len());
                let whole = values(&decoder.hidden(&whole, &mut NoTap).unwrap());
                let expected = &whole[(run.ids.len() - run.own) * hidden..];
                let seen = &seen[row * hidden..(row + run.own) * hidden];
                prop_assert!(close(seen, expected), "{:?} against {:?}", seen, expected);
                row += run.own;
            }
            prop_assert_eq!(row, tokens.len());
            if let Some(keep) = keep {
                let keep = keep.index(runs.len() + 1).checked_sub(1).map(|at| runs[at].clone());
                tree.retain(keep.as_ref().map(|run| run.id)).unwrap();
                prop_assert_eq!(tree.free(), 120 - keep.as_ref().map_or(0, |run| run.ids.len()));
                // What is left are the runs that made up its sequence.
                runs.retain(|run| tree.len(run.id) > 0);
                for run in &runs {
                    prop_assert!(keep.as_ref().is_some_and(|keep| keep.ids.starts_with(&run.ids)));
                }
                prop_assert_eq!(runs.is_empty(), keep.is_none());
            }
        }
    }
}

#[test]
fn a_cache_refuses_what_it_cannot_hold() {
    let config = config(0, 2, 1, 8, 1);
    let decoder = Decoder::new(config.spec.clone(), random(&config, 1)).unwrap();
    assert!(KvCache::new(&decoder, 1, 65).is_err(), "more than the model's positions");
    let mut cache = KvCache::new(&decoder, 2, 4).unwrap();
    assert!(cache.extend(&[(2, &[1])]).is_err(), "no such sequence");
    assert!(cache.extend(&[(0, &[1]), (0, &[2])]).is_err(), "one sequence twice");
    assert!(cache.extend(&[(0, &[1, 2, 3, 4, 5])]).is_err(), "full");
    assert_eq!(cache.len(0), 0, "a refused extension leaves nothing behind");
    let tokens = cache.extend(&[(0, &[1, 2])]).unwrap();
    cache.extend(&[(0, &[3])]).unwrap();
    assert!(
        decoder.hidden_cached(&tokens, &mut cache, &mut NoTap).is_err(),
        "not what was announced"
    );
}

#[test]
fn a_tree_refuses_what_it_cannot_hold() {
    let decoder = decoder(0, 1);
    let mut tree = KvTree::new(&decoder, 100).unwrap();
    let root = tree.branch(None, &[1; 60]).unwrap();
    let branch = tree.branch(Some(root), &[2, 3]).unwrap();
    assert!(tree.branch(None, &[]).is_err(), "no tokens");
    let found = tree.branch(Some(branch), &[1; 3]);
    assert!(matches!(found, Err(Error::SequenceTooLong { len: 65, max: 64 })), "{found:?}");
    let found = tree.branch(None, &[1; 39]);
    assert!(
        matches!(found, Err(Error::CacheFull { wanted: 39, used: 62, rows: 100 })),
        "{found:?}"
    );
    assert_eq!((tree.free(), tree.len(root), tree.len(branch)), (38, 60, 62));

    let tokens = tree.announced();
    assert_eq!(tokens.len(), 62, "what was refused left nothing behind");
    // The root lies right in front of its first branch: one run of keys.
    assert!(tokens.segments[1].prefix.is_empty());
    assert_eq!((tokens.segments[1].kv_start, tokens.segments[1].kv_len), (0, 62));
    let other = tree.branch(Some(root), &[4]).unwrap();
    assert!(
        decoder.hidden_cached(&Tokens::rows(vec![1], 1), &mut tree, &mut NoTap).is_err(),
        "not what was announced"
    );
    decoder.hidden_cached(&tokens, &mut tree, &mut NoTap).unwrap();
    assert!(decoder.hidden_cached(&tokens, &mut tree, &mut NoTap).is_err(), "a second time");
    assert_eq!(tree.announced().ids, [4], "what was announced since");

    tree.retain(Some(branch)).unwrap();
    assert_eq!((tree.len(other), tree.free()), (0, 38));
    assert!(tree.announced().is_empty(), "forgotten before it went through a pass");
    assert!(tree.branch(Some(other), &[1]).is_err(), "a forgotten run");
    assert!(tree.retain(Some(other)).is_err());
    tree.retain(None).unwrap();
    assert!(tree.is_empty() && tree.free() == 100);
}

#[test]
fn a_run_that_waits_survives_what_is_forgotten_around_it() {
    let decoder = decoder(7, 5);
    let mut tree = KvTree::new(&decoder, 20).unwrap();
    tree.branch(None, &[9; 6]).unwrap();
    let kept = tree.branch(None, &[3, 4, 5, 6, 7, 8]).unwrap();
    let stale = tree.announced();
    tree.retain(Some(kept)).unwrap();
    assert!(decoder.hidden_cached(&stale, &mut tree, &mut NoTap).is_err(), "asked for before");
    let end = tree.branch(Some(kept), &[1, 2]).unwrap();
    let tokens = tree.announced();
    assert_eq!(tokens.ids, [3, 4, 5, 6, 7, 8, 1, 2]);
    let seen = values(&decoder.hidden_cached(&tokens, &mut tree, &mut NoTap).unwrap());
    let whole = Tokens::rows(tokens.ids.clone(), tree.len(end));
    assert!(close(&seen, &values(&decoder.hidden(&whole, &mut NoTap).unwrap())));
}
