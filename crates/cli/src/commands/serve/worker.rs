//! One worker, which owns the model: it gives each text a place of the engine, in the order in which
//! requests came, and takes all texts a token further at a time.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use relufy_data::Tokenizer;

use super::job::{Event, Job};
use super::lane::{Ending, Lane};
use super::queue::Queue;
use super::refusal::Refusal;
use crate::engine::Engine;

/// How long a text may go on once the server was asked to end.
pub const GRACE: Duration = Duration::from_secs(5);

/// What the worker has beside the model.
pub struct Worker {
    pub tokenizer: Arc<Tokenizer>,
    pub queue: Arc<Queue<Job>>,
    /// When the server was asked to end.
    pub stopping: Arc<OnceLock<Instant>>,
}

impl Worker {
    /// Works until the queue is closed and what was begun has ended.
    pub fn run(&self, engine: &mut dyn Engine) {
        let lanes = (0..engine.places()).map(|_| None).collect();
        let mut work = Work { worker: self, engine, lanes, prompts: VecDeque::new() };
        while work.fill() {
            work.advance();
        }
    }

    /// Whether a job is still worth the work.
    fn keep_on(&self, job: &Job) -> Result<(), Ending> {
        let now = Instant::now();
        if job.given_up() {
            return Err(Ending::Unread);
        }
        if self.stopping.get().is_some_and(|since| now.duration_since(*since) > GRACE) {
            return Err(Ending::Cut(Refusal::stopping()));
        }
        if now > job.deadline {
            return Err(Ending::Cut(Refusal::late()));
        }
        Ok(())
    }
}

/// What the worker is at.
struct Work<'a> {
    worker: &'a Worker,
    engine: &'a mut dyn Engine,
    /// The text at each place of the engine.
    lanes: Vec<Option<Lane<'a>>>,
    /// Prompts of jobs that were begun, without a place yet.
    prompts: VecDeque<(Arc<Job>, usize)>,
}

impl Work<'_> {
    /// Gives free places to who waits, and waits for somebody where all are free; false once nobody
    /// comes any more and nothing is left to do.
    fn fill(&mut self) -> bool {
        while let Some(place) = self.lanes.iter().position(Option::is_none) {
            if let Some((job, index)) = self.prompts.pop_front() {
                self.begin(place, job, index);
                continue;
            }
            self.tell_free();
            let idle = self.lanes.iter().all(Option::is_none);
            let queue = &self.worker.queue;
            let Some(job) = (if idle { queue.wait() } else { queue.pop() }) else { return !idle };
            let job = Arc::new(job);
            self.prompts.extend((0..job.prompts.len()).map(|index| (job.clone(), index)));
            self.tell_free();
        }
        true
    }

    /// Begins a prompt's text at a place.
    fn begin(&mut self, place: usize, job: Arc<Job>, index: usize) {
        if let Err(ending) = self.worker.keep_on(&job) {
            return self.abandon(&job, ending);
        }
        let prompt = &job.prompts[index];
        let cleared = self.engine.clear(place, prompt.ids.len() + prompt.max_new);
        let lane = cleared.and_then(|()| Lane::new(&self.worker.tokenizer, job.clone(), index));
        match lane {
            Ok(lane) => self.lanes[place] = Some(lane),
            Err(error) => self.abandon(&job, fault(&error)),
        }
    }

    /// A piece of each prompt that is not taken yet, and a token for each other text.
    fn advance(&mut self) {
        let mut tokens = Vec::with_capacity(self.lanes.len());
        for place in 0..self.lanes.len() {
            match self.next(place) {
                Ok(Some(token)) => tokens.push((place, token)),
                Ok(None) => {}
                Err(ending) => self.end(place, ending),
            }
        }
        // A text may have ended with another of the same request.
        tokens.retain(|(place, _)| self.lanes[*place].is_some());
        if tokens.is_empty() {
            return;
        }
        if let Err(error) = self.engine.step(&tokens) {
            for (place, _) in tokens {
                self.end(place, fault(&error));
            }
        }
    }

    /// The next token of the text at a place; `None` while its prompt is not taken, or if there is none.
    fn next(&mut self, place: usize) -> Result<Option<u32>, Ending> {
        let Some(lane) = &mut self.lanes[place] else { return Ok(None) };
        if !lane.rest().is_empty() {
            let taken = self.engine.prefill(place, lane.rest()).map_err(|error| fault(&error))?;
            lane.took(taken);
            if !lane.rest().is_empty() {
                return self.worker.keep_on(lane.job()).map(|()| None);
            }
        }
        let next = lane.next(self.engine.logits(place), |job| self.worker.keep_on(job));
        next.map_err(|error| fault(&error))?.map(Some)
    }

    /// Ends the text at a place; with one that is not complete, its request ends.
    fn end(&mut self, place: usize, ending: Ending) {
        let Some(lane) = self.lanes[place].take() else { return };
        let job = lane.job().clone();
        match lane.end(ending) {
            Ok(Some(done @ Event::Done(..))) => {
                // First, so that whoever asks again at once finds a free place.
                self.tell_free();
                // Who has gone needs no answer.
                let _gone = job.events.send(done);
            }
            Ok(Some(Event::Failed(refusal))) => self.abandon(&job, Ending::Cut(refusal)),
            Ok(_) => self.abandon(&job, Ending::Unread),
            Err(error) => self.abandon(&job, fault(&error)),
        }
    }

    /// Forgets a job and says why, if anybody listens.
    fn abandon(&mut self, job: &Arc<Job>, ending: Ending) {
        let others = |other: &Arc<Job>| !Arc::ptr_eq(other, job);
        self.prompts.retain(|(other, _)| others(other));
        for lane in &mut self.lanes {
            lane.take_if(|lane| !others(lane.job()));
        }
        self.tell_free();
        if let Ending::Cut(refusal) = ending {
            let _gone = job.events.send(Event::Failed(refusal));
        }
    }

    /// Tells the queue how many would not have to wait.
    fn tell_free(&self) {
        let free = self.lanes.iter().filter(|lane| lane.is_none()).count();
        self.worker.queue.free(free.saturating_sub(self.prompts.len()));
    }
}

/// What a client is told of the server's own fault, which the log has too.
fn fault(error: &anyhow::Error) -> Ending {
    tracing::error!(target: "relufy::serve", "{error:#}");
    Ending::Cut(Refusal::fault(format!("{error:#}")))
}
