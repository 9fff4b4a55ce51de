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
    /// How many more the worker would take at once.
    free: usize,
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
    /// In which at most `limit` wait for a worker that is at `places` things at a time.
    pub fn new(limit: usize, places: usize) -> Queue<T> {
        let state = State { waiting: VecDeque::new(), free: places, closed: false };
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
        if state.waiting.len() >= self.limit + state.free {
            return Err(Refused::Full);
        }
        state.waiting.push_back(item);
        self.changed.notify_one();
        Ok(())
    }

    /// The next, for which the worker waits; `None` once the queue is closed.
    pub fn wait(&self) -> Option<T> {
        let idle = |state: &mut State<T>| !state.closed && state.waiting.is_empty();
        let state = self.changed.wait_while(self.lock(), idle);
        state.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The next, if one waits.
    pub fn pop(&self) -> Option<T> {
        self.lock().take()
    }

    /// The worker would take so many more at once.
    pub fn free(&self, places: usize) {
        self.lock().free = places;
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

impl<T> State<T> {
    /// The next, which takes a free place until the worker says otherwise.
    fn take(&mut self) -> Option<T> {
        let item = self.waiting.pop_front()?;
        self.free = self.free.saturating_sub(1);
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never(_: &i32) -> bool {
        false
    }

    #[test]
    fn as_many_wait_as_may() {
        let queue = Queue::new(1, 1);
        // An idle worker will take the first at once.
        assert_eq!(queue.push(1, never), Ok(()));
        assert_eq!(queue.push(2, never), Ok(()));
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        assert_eq!(queue.wait(), Some(1));
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        queue.free(1);
        assert_eq!(queue.push(3, never), Ok(()));
        // Who has given up makes room.
        assert_eq!(queue.push(4, |item| *item == 2), Ok(()));
        assert_eq!(queue.close(), [3, 4]);
        assert_eq!(queue.push(5, never), Err(Refused::Closed));
        assert_eq!(queue.wait(), None);
    }

    #[test]
    fn nobody_waits_where_none_may() {
        let queue = Queue::new(0, 2);
        for item in [1, 2] {
            assert_eq!(queue.push(item, never), Ok(()));
        }
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        assert_eq!((queue.wait(), queue.pop(), queue.pop()), (Some(1), Some(2), None));
        assert_eq!(queue.push(3, never), Err(Refused::Full));
        queue.free(1);
        assert_eq!(queue.push(3, never), Ok(()));
        assert_eq!(queue.push(4, never), Err(Refused::Full));
    }
}
