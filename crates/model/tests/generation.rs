//! Many prompts side by side get what each gets alone.

#![allow(clippy::unwrap_used)] // a failed unwrap is the failed test
#![allow(clippy::result_large_err)] // the library's error as it is

mod common;

use proptest::prelude::*;
use relufy_model::{
    Decoder, Error, Listener, Point, Prompt, Room, Side, Tap, Want, generate, generate_batch,
};
use relufy_spec::Site;

use common::{KINDS, decoder};

/// Stops a prompt at a length of its own, and counts the tokens that each part of a pass shows.
struct Recorder {
    stop_at: Vec<usize>,
    done: Vec<Option<Vec<u32>>>,
    rows: Rows,
    slots: usize,
}

#[derive(Default)]
struct Rows {
    /// (prompt, number of its tokens) of the pass that runs.
    parts: Vec<(usize, usize)>,
    entered: Vec<usize>,
}

impl Recorder {
    fn new(stop_at: Vec<usize>, slots: usize) -> Recorder {
        let n = stop_at.len();
        let rows = Rows { entered: vec![0; n], ..Rows::default() };
        Recorder { stop_at, done: vec![None; n], rows, slots }
    }
}

impl Listener for Recorder {
    type Error = Error;

    fn pass(&mut self, parts: &[(usize, usize)]) {
        assert!(!parts.is_empty() && parts.len() <= self.slots);
        self.rows.parts = parts.to_vec();
    }

    fn tap(&mut self) -> &mut dyn Tap {
        &mut self.rows
    }

    fn stop(&mut self, prompt: usize, new: &[u32]) -> bool {
        assert!(!new.is_empty());
        new.len() >= self.stop_at[prompt]
    }

    fn done(&mut self, prompt: usize, new: Vec<u32>) -> Result<(), Error> {
        assert!(self.done[prompt].replace(new).is_none(), "done once");
        Ok(())
    }
}

impl Tap for Rows {
    fn want(&self, point: Point) -> Want {
        match point {
            Point { layer: 1, site: Site::DownIn, side: Side::At } => Want::NonzeroRows,
            _ => Want::Nothing,
        }
    }

    fn nonzero_rows(&mut self, _: Point, nonzero: &[u32], width: usize) {
        assert_eq!(nonzero.len(), self.parts.iter().map(|(_, tokens)| tokens).sum::<usize>());
        assert!(nonzero.iter().all(|count| *count as usize <= width && *count > 0));
        for (prompt, tokens) in &self.parts {
            self.entered[*prompt] += tokens;
        }
    }
}

fn argmax(logits: &[f32]) -> Result<u32, Error> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    Ok(logits.iter().position(|x| *x == max).unwrap() as u32)
}

fn run(
    decoder: &Decoder,
    prompts: &[(Vec<u32>, usize)],
    stop_tokens: &[u32],
    room: Room,
    recorder: &mut Recorder,
) -> Result<(), Error> {
    let prompts: Vec<Prompt<'_>> =
        prompts.iter().map(|(ids, max_new)| Prompt { ids, max_new: *max_new }).collect();
    generate_batch(decoder, &prompts, stop_tokens, room, recorder)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    #[test]
    fn a_batch_gives_what_each_prompt_gives(
        kind in 0..KINDS, seed in any::<u64>(),
        prompts in prop::collection::vec((prop::collection::vec(0u32..40, 1..12), 0usize..9, 1usize..9), 0..9),
        slots in 1usize..5, tokens in 1usize..40,
    ) {
        let decoder = decoder(kind, seed);
        let (prompts, stop_at): (Vec<_>, Vec<_>) =
            prompts.into_iter().map(|(ids, max_new, stop)| ((ids, max_new), stop)).unzip();
        let mut recorder = Recorder::new(stop_at.clone(), slots);
        let stop_tokens = [seed as u32 % 40, 7];
        run(&decoder, &prompts, &stop_tokens, Room { slots, tokens }, &mut recorder).unwrap();
        for (n, (ids, max_new)) in prompts.iter().enumerate() {
            let mut left = stop_at[n];
            let on_token = |_| { left -= 1; left > 0 };
            let alone = generate(&decoder, ids, *max_new, &stop_tokens, argmax, on_token).unwrap();
            let together = recorder.done[n].as_ref().unwrap();
            prop_assert_eq!(together, &alone);
            // A last token enters only if a stop token came after it.
            let ended = alone.len() == (*max_new).min(stop_at[n]);
            let entered = if *max_new == 0 { 0 } else { ids.len() + alone.len() - usize::from(ended) };
            prop_assert_eq!(recorder.rows.entered[n], entered);
        }
    }
}

#[test]
fn what_cannot_be_continued_is_refused_before_any_work() {
    let decoder = decoder(0, 3);
    let room = Room { slots: 2, tokens: 100 };
    for (prompt, room, why) in [
        ((vec![1; 60], 5), room, "no room for 5 more"),
        ((vec![1; 70], 0), room, "no room for 0 more"),
        ((vec![], 5), room, "empty"),
        ((vec![1], 5), Room { slots: 0, ..room }, "slots"),
    ] {
        let mut recorder = Recorder::new(vec![9; 2], 2);
        let found = run(&decoder, &[(vec![1], 3), prompt], &[], room, &mut recorder);
        let message = found.unwrap_err().to_string();
        assert!(message.contains(why), "{message}");
        assert!(recorder.done.iter().all(Option::is_none) && recorder.rows.entered == [0, 0]);
    }
    let mut recorder = Recorder::new(vec![9], 2);
    run(&decoder, &[(vec![1; 60], 4)], &[], room, &mut recorder).unwrap();
    assert_eq!(recorder.done[0].as_ref().unwrap().len(), 4);
}

/// Ends the generation with the first continuation.
struct Refuses(Rows);

impl Listener for Refuses {
    type Error = Error;

    fn tap(&mut self) -> &mut dyn Tap {
        &mut self.0
    }

    fn stop(&mut self, _: usize, _: &[u32]) -> bool {
        true
    }

    fn done(&mut self, prompt: usize, _: Vec<u32>) -> Result<(), Error> {
        Err(Error::Invalid(format!("{prompt} is not wanted")))
    }
}

impl Default for Refuses {
    fn default() -> Refuses {
        // Two prompts of one token in the only pass.
        Refuses(Rows { parts: vec![(0, 1), (1, 1)], entered: vec![0; 2] })
    }
}

#[test]
fn the_listeners_error_ends_the_generation() {
    let decoder = decoder(6, 3);
    let prompts = [Prompt { ids: &[1], max_new: 3 }, Prompt { ids: &[2], max_new: 3 }];
    let room = Room { slots: 2, tokens: 9 };
    let found = generate_batch(&decoder, &prompts, &[], room, &mut Refuses::default());
    assert_eq!(found.unwrap_err().to_string(), "0 is not wanted");
}
