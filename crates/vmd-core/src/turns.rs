//! Whose turn it is to fill: a few at once for the whole process, least work left first.
//!
//! Of many VMs that start together each would replay at a fraction of the speed, and all would be late; the
//! one with the shortest way to go goes first, and the others serve their guests on demand until
//! then. Turns are short: after some pieces who holds one lets a shorter one pass.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// As many install at once as there are CPUs.
pub static INSTALLERS: LazyLock<Turns> = LazyLock::new(|| Turns::new(cpus()));
/// Reads wait for storage rather than for a CPU.
pub static READERS: LazyLock<Turns> = LazyLock::new(|| Turns::new(2 * cpus()));

/// Whoever has waited for longer goes before all that have not, or long work would starve.
const PATIENCE: Duration = Duration::from_millis(200);
/// How often who waits looks whether his VM still needs him.
const LOOK: Duration = Duration::from_millis(20);

pub struct Turns {
    places: usize,
    queue: Mutex<Queue>,
    waiting: AtomicUsize,
}

#[derive(Default)]
struct Queue {
    taken: usize,
    waiting: Vec<Waiting>,
}

struct Waiting {
    left: usize,
    since: Instant,
    called: Arc<AtomicBool>,
    thread: Thread,
}

/// Held while working; dropped, the next one is called.
pub struct Turn<'a>(&'a Turns);

impl Turns {
    pub const fn new(places: usize) -> Self {
        let queue = Mutex::new(Queue { taken: 0, waiting: Vec::new() });
        Self { places, queue, waiting: AtomicUsize::new(0) }
    }

    /// Wait for a turn, with `left` pages of work. None: `over` has become true meanwhile.
    pub fn enter(&self, left: usize, over: impl Fn() -> bool) -> Option<Turn<'_>> {
        let called = {
            let mut queue = self.lock();
            if queue.taken < self.places {
                queue.taken += 1;
                return Some(Turn(self));
            }
            let (called, thread) = (Arc::new(AtomicBool::new(false)), std::thread::current());
            queue.waiting.push(Waiting { left, since: Instant::now(), called: Arc::clone(&called), thread });
            self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
            called
        };
        while !called.load(Ordering::Acquire) {
            if over() {
                return self.leave(&called);
            }
            std::thread::park_timeout(LOOK);
        }
        Some(Turn(self))
    }

    /// Whether somebody waits.
    pub fn are_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Wait no longer; who has been called at this very moment calls the next one.
    fn leave(&self, called: &Arc<AtomicBool>) -> Option<Turn<'_>> {
        let mut queue = self.lock();
        queue.waiting.retain(|waiting| !Arc::ptr_eq(&waiting.called, called));
        self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        drop(queue);
        if called.load(Ordering::Acquire) {
            drop(Turn(self));
        }
        None
    }

    fn call_next(&self) {
        let mut queue = self.lock();
        let late = |waiting: &Waiting| waiting.since.elapsed() > PATIENCE;
        let next = (0..queue.waiting.len()).min_by_key(|&at| match &queue.waiting[at] {
            waiting if late(waiting) => (0, Some(waiting.since), 0),
            waiting => (1, None, waiting.left),
        });
        let Some(next) = next else {
            queue.taken -= 1;
            return;
        };
        let next = queue.waiting.swap_remove(next); // the place goes from hand to hand
        self.waiting.store(queue.waiting.len(), Ordering::Relaxed);
        next.called.store(true, Ordering::Release);
        next.thread.unpark();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.call_next();
    }
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_for(turns: &Turns, waiting: usize) {
        while turns.lock().waiting.len() != waiting {
            std::thread::yield_now();
        }
    }

    #[test]
    fn least_work_goes_first() {
        let (turns, order) = (Turns::new(1), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let held = turns.enter(100, || false).unwrap();
            for (at, left) in [50, 10, 30].into_iter().enumerate() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.enter(left, || false).unwrap();
                    order.lock().unwrap().push(left);
                });
                wait_for(turns, at + 1);
            }
            assert!(turns.are_wanted());
            drop(held);
        });
        assert_eq!(*order.lock().unwrap(), [10, 30, 50]);
        assert_eq!(turns.lock().taken, 0);
    }

    #[test]
    fn who_has_waited_for_long_goes_before_shorter_work() {
        let (turns, order) = (Turns::new(1), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let held = turns.enter(1, || false).unwrap();
            for (at, left) in [50, 10].into_iter().enumerate() {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    let _turn = turns.enter(left, || false).unwrap();
                    order.lock().unwrap().push(left);
                });
                wait_for(turns, at + 1);
            }
            turns.lock().waiting[0].since = Instant::now() - 2 * PATIENCE;
            drop(held);
        });
        assert_eq!(*order.lock().unwrap(), [50, 10]);
    }

    #[test]
    fn who_is_not_needed_any_more_leaves() {
        let turns = Turns::new(1);
        let held = turns.enter(1, || false).unwrap();
        assert!(turns.enter(1, || true).is_none());
        drop(held);
        assert!(turns.enter(1, || true).is_some());
    }
}
