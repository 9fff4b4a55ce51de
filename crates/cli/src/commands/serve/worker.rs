//! One worker, which owns the model: takes who waits, one after the other, and sends text.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use relufy_data::Tokenizer;
use tokio::sync::mpsc::UnboundedSender;

use super::queue::Queue;
use super::refusal::Refusal;
use super::stops::Stops;
use crate::engine::Engine;
use crate::sampling::{Draw, Sampler};

/// How long a text may go on once the server was asked to end.
pub const GRACE: Duration = Duration::from_secs(5);

/// A request that can be worked at.
pub struct Job {
    pub prompts: Vec<Prompt>,
    pub draw: Draw,
    pub stop: Vec<String>,
    /// After this nobody waits for it.
    pub deadline: Instant,
    /// Whoever asked; closed when they have gone.
    pub events: UnboundedSender<Event>,
}

/// What to continue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub ids: Vec<u32>,
    pub max_new: usize,
    /// So many spaces at the start of the text belong to the prompt, which ends in front of
    /// them: a token's space stands before its word.
    pub spaces: usize,
}

/// What becomes of a job.
#[derive(Debug)]
pub enum Event {
    /// More text of a prompt: whole characters.
    Text(usize, String),
    /// A prompt's text is complete.
    Done(usize, Finish, usize),
    /// Nothing more comes.
    Failed(Refusal),
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At the model's end token, or a stop string.
    Stop,
    /// At so many tokens as were asked, or the model's last position.
    Length,
}

impl Finish {
    /// As OpenAI writes it.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

impl Job {
    /// Whether nobody waits for it any more.
    pub fn given_up(&self) -> bool {
        self.events.is_closed()
    }
}

/// What the worker has beside the model.
pub struct Worker {
    pub tokenizer: Arc<Tokenizer>,
    pub queue: Arc<Queue<Job>>,
    /// When the server was asked to end.
    pub stopping: Arc<OnceLock<Instant>>,
}

impl Worker {
    /// Works until the queue is closed.
    pub fn run(&self, engine: &mut dyn Engine) {
        while let Some(job) = self.queue.pop() {
            let last = self.answer(engine, &job);
            // First, so that whoever asks again at once finds nobody before them.
            self.queue.idle();
            if let Some(last) = last {
                // Who has gone needs no answer.
                let _gone = job.events.send(last);
            }
        }
    }

    /// Sends all that becomes of a job but the last, which it returns.
    fn answer(&self, engine: &mut dyn Engine, job: &Job) -> Option<Event> {
        let mut last = None;
        for (index, prompt) in job.prompts.iter().enumerate() {
            if let Some(done) = last.take() {
                job.events.send(done).ok()?;
            }
            if job.given_up() {
                return None;
            }
            if let Err(refusal) = self.keep_on(job) {
                return Some(Event::Failed(refusal));
            }
            last = match self.one(engine, job, index, prompt) {
                Ok(Ok((finish, new))) => Some(Event::Done(index, finish, new)),
                Ok(Err(refusal)) => return Some(Event::Failed(refusal)),
                Err(error) => {
                    tracing::error!(target: "relufy::serve", "{error:#}");
                    return Some(Event::Failed(Refusal::fault(format!("{error:#}"))));
                }
            };
        }
        last
    }

    /// Whether a job is still worth the work.
    fn keep_on(&self, job: &Job) -> Result<(), Refusal> {
        let now = Instant::now();
        if self.stopping.get().is_some_and(|since| now.duration_since(*since) > GRACE) {
            return Err(Refusal::stopping());
        }
        if now > job.deadline {
            return Err(Refusal::late());
        }
        Ok(())
    }

    /// Continues one prompt: why it ended and with how many tokens, or what cut it.
    fn one(
        &self,
        engine: &mut dyn Engine,
        job: &Job,
        index: usize,
        prompt: &Prompt,
    ) -> anyhow::Result<Result<(Finish, usize), Refusal>> {
        // Rows of the embedding past the last token stand for no text.
        let vocab = self.tokenizer.vocab_size();
        let seed = job.draw.seed.wrapping_add(index as u64);
        let mut sampler = Sampler::new(&Draw { seed, ..job.draw });
        let mut text =
            Text { job, index, stops: Stops::new(job.stop.clone()), spaces: prompt.spaces };
        let mut stream = self.tokenizer.stream_after(&prompt.ids, true)?;
        let (mut new, mut stopped, mut cut, mut broken) = (0, false, None, None);
        engine.generate(
            &prompt.ids,
            prompt.max_new,
            self.tokenizer.eos_ids(),
            &mut |logits| sampler.pick(&logits[..vocab.min(logits.len())]),
            &mut |token| {
                new += 1;
                match stream.push(token) {
                    Ok(piece) => stopped = text.push(&piece.unwrap_or_default()),
                    Err(error) => broken = Some(error),
                }
                cut = self.keep_on(job).err();
                !stopped && broken.is_none() && cut.is_none() && !job.given_up()
            },
        )?;
        if let Some(error) = broken {
            return Err(error.into());
        }
        if !stopped {
            // A text that is complete all the same is not cut.
            if let Some(refusal) = cut.filter(|_| new < prompt.max_new) {
                return Ok(Err(refusal));
            }
            stopped = text.push(&stream.finish()?.unwrap_or_default());
            if !stopped {
                text.finish();
                stopped = new < prompt.max_new;
            }
        }
        Ok(Ok((if stopped { Finish::Stop } else { Finish::Length }, new)))
    }
}

/// A prompt's text on its way out.
struct Text<'a> {
    job: &'a Job,
    index: usize,
    stops: Stops,
    /// As in [`Prompt`].
    spaces: usize,
}

impl Text<'_> {
    /// Sends what can be sent; whether a stop string ended the text.
    fn push(&mut self, piece: &str) -> bool {
        let leading = piece.bytes().take_while(|byte| *byte == b' ').count().min(self.spaces);
        let piece = &piece[leading..];
        self.spaces = if piece.is_empty() { self.spaces - leading } else { 0 };
        let (text, ended) = self.stops.push(piece);
        self.send(text);
        ended
    }

    /// Sends what was held back.
    fn finish(&mut self) {
        let rest = self.stops.finish();
        self.send(rest);
    }

    fn send(&self, text: String) {
        if !text.is_empty() {
            // Who has gone is noticed before the next token.
            let _gone = self.job.events.send(Event::Text(self.index, text));
        }
    }
}
