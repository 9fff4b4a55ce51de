//! Threads that walk through one token together.
//!
//! All of them run the same function with their own index, each for its share of every product,
//! and meet at barriers. A token has a few dozen of these, some microseconds apart, so a thread
//! that waits spins for a while; between tokens it sleeps.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{Error, Result};

/// How often a thread looks before it lets others run, and before it sleeps.
const SPINS: usize = 4_000;
const YIELDS: usize = 200;

/// What the threads run; each gets its index.
type Job = dyn Fn(usize) + Sync;

pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One job at a time.
    running: Mutex<()>,
}

struct Shared {
    workers: usize,
    /// The job of the current epoch; written before the epoch is, while no worker runs.
    job: UnsafeCell<Option<*const Job>>,
    epoch: AtomicUsize,
    finished: AtomicUsize,
    stop: AtomicBool,
    arrived: AtomicUsize,
    generation: AtomicUsize,
}

// SAFETY: `job` is written by the thread that holds `running` while the workers wait for the next
// epoch, and read by them after they have seen it; the rest are atomics.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is only followed while `Pool::run`, which holds what it points to, waits.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of so many workers; the thread that runs a job is the first of them.
    pub fn new(workers: usize) -> Result<Pool> {
        let shared = Arc::new(Shared {
            workers: workers.max(1),
            job: UnsafeCell::new(None),
            epoch: AtomicUsize::new(0),
            finished: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
        });
        let mut pool = Pool { shared, threads: Vec::new(), running: Mutex::new(()) };
        for index in 1..pool.workers() {
            let shared = pool.shared.clone();
            let name = format!("decode-{index}");
            let thread = thread::Builder::new().name(name).spawn(move || shared.serve(index));
            let failed = |source| Error::System { what: "a thread for decoding", source };
            pool.threads.push(thread.map_err(failed)?);
        }
        Ok(pool)
    }

    /// How many threads run a job.
    pub fn workers(&self) -> usize {
        self.shared.workers
    }

    /// Runs `job(index)` on every worker and returns when all have finished. Jobs of several
    /// callers run one after the other.
    pub fn run(&self, job: impl Fn(usize) + Sync) {
        let _one = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let guard = AbortOnPanic;
        if !self.threads.is_empty() {
            let job: *const (dyn Fn(usize) + Sync + '_) = &job;
            // SAFETY: only the lifetime changes; this function does not return before every
            // worker is done with the job.
            let job = unsafe {
                std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Job>(job)
            };
            // SAFETY: all workers wait for the next epoch.
            unsafe { *self.shared.job.get() = Some(job) };
            self.shared.finished.store(0, Ordering::Relaxed);
            self.shared.epoch.fetch_add(1, Ordering::Release);
            self.threads.iter().for_each(|thread| thread.thread().unpark());
        }
        job(0);
        let others = self.threads.len();
        wait(|| self.shared.finished.load(Ordering::Acquire) == others);
        std::mem::forget(guard);
    }

    /// Inside a job: waits until every worker is here. What each wrote before, all may read after.
    pub fn meet(&self) {
        let shared = &*self.shared;
        if shared.workers == 1 {
            return;
        }
        let generation = shared.generation.load(Ordering::Acquire);
        if shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == shared.workers {
            shared.arrived.store(0, Ordering::Relaxed);
            shared.generation.fetch_add(1, Ordering::Release);
        } else {
            wait(|| shared.generation.load(Ordering::Acquire) != generation);
        }
    }
}

impl Shared {
    /// A worker's life.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            let next = || self.epoch.load(Ordering::Acquire) != seen;
            if !look(SPINS, next, std::hint::spin_loop) && !look(YIELDS, next, thread::yield_now) {
                while !next() {
                    thread::park();
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen = self.epoch.load(Ordering::Acquire);
            // SAFETY: the epoch has been announced, so the job is there, and it stays until this
            // worker has said that it finished.
            if let Some(job) = unsafe { *self.job.get() } {
                let guard = AbortOnPanic;
                // SAFETY: as above.
                unsafe { (*job)(index) };
                std::mem::forget(guard);
            }
            self.finished.fetch_add(1, Ordering::Release);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.epoch.fetch_add(1, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A worker that panicked has ended the process.
            let _ = thread.join();
        }
    }
}

/// Ends the process when a job panics: the other workers would wait at a barrier for ever, with
/// pointers to what unwinding frees.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// Waits until something is so.
fn wait(so: impl Fn() -> bool + Copy) {
    while !look(SPINS, so, std::hint::spin_loop) {
        // The other threads may be waiting for this processor.
        thread::yield_now();
    }
}

/// Whether something becomes so within a number of looks.
fn look(times: usize, so: impl Fn() -> bool, between: impl Fn()) -> bool {
    for _ in 0..times {
        if so() {
            return true;
        }
        between();
    }
    so()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_meet_and_finish() {
        for workers in [1, 2, 3, 5] {
            let pool = Pool::new(workers).unwrap();
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..20).map(|_| AtomicUsize::new(0)).collect();
                let late = AtomicUsize::new(0);
                pool.run(|_| {
                    for count in &counts {
                        count.fetch_add(1, Ordering::Relaxed);
                        pool.meet();
                        if count.load(Ordering::Relaxed) != workers {
                            late.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
                assert_eq!(late.load(Ordering::Relaxed), 0);
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == workers));
            }
        }
    }

    #[test]
    fn jobs_of_two_threads_take_turns() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(|index| {
                            sum.fetch_add(index + 1, Ordering::Relaxed);
                            pool.meet();
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 2 * 200 * 3);
    }
}
