//! Who waits for the model: a few, in the order in which they came.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A queue with one worker at its end.
pub struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    limit: usize,
}

struct State<T> {
    waiting: VecDeque<T>,
    /// The worker is at something.
    busy: bool,
    closed: bool,
}

/// Why something was not taken into a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many as may wait do.
    Full,
    /// Nothing more is taken.
    Closed,
}

impl<T> Queue<T> {
    /// In which at most `limit` wait while the worker is at something.
    pub fn new(limit: usize) -> Queue<T> {
        let state = State { waiting: VecDeque::new(), busy: false, closed: false };
        Queue { state: Mutex::new(state), changed: Condvar::new(), limit }
    }

    /// How many may wait.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Takes one more, if there is room once those that were `given_up` are gone.
    ///
    /// # Errors
    /// There is none, or the queue is closed.
    pub fn push(&self, item: T, given_up: impl Fn(&T) -> bool) -> Result<(), Refused> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refused::Closed);
        }
        state.waiting.retain(|item| !given_up(item));
        if state.waiting.len() >= self.limit + usize::from(!state.busy) {
            return Err(Refused::Full);
        }
        state.waiting.push_back(item);
        self.changed.notify_one();
        Ok(())
    }

    /// The next, for which the worker waits; `None` once the queue is closed. The worker is
    /// busy until it says [`Queue::idle`].
    pub fn pop(&self) -> Option<T> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(item) = state.waiting.pop_front() {
                state.busy = true;
                return Some(item);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The worker has ended what it was at.
    pub fn idle(&self) {
        self.lock().busy = false;
    }

    /// Takes nothing more; those that waited.
    pub fn close(&self) -> VecDeque<T> {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        std::mem::take(&mut state.waiting)
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_wait_as_may() {
        let queue = Queue::new(1);
        let never = |_: &i32| false;
        // An idle worker will take the first at once.
        assert_eq!(queue.push(1, never), Ok(()));
        assert_eq!(queue.push(2, never), Ok(()));
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        assert_eq!(queue.pop(), Some(1));
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        queue.idle();
        assert_eq!(queue.push(3, never), Ok(()));
        // Who has given up makes room.
        assert_eq!(queue.push(4, |item| *item == 2), Ok(()));
        assert_eq!(queue.close(), [3, 4]);
        assert_eq!(queue.push(5, never), Err(Refused::Closed));
        assert_eq!(queue.pop(), None);
    }

    #[test]
    fn nobody_waits_where_none_may() {
        let queue = Queue::new(0);
        assert_eq!(queue.push(1, |_| false), Ok(()));
        assert_eq!(queue.pop(), Some(1));
        assert_eq!(queue.push(2, |_| false), Err(Refused::Full));
        queue.idle();
        assert_eq!(queue.push(2, |_| false), Ok(()));
    }
}
