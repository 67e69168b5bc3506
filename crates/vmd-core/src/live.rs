//! What changes in a journal while its VM is served: counters, clocks, and the install that is under way.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::Counters;

/// What changes while a VM is served, but for ring and page states.
#[repr(C)]
#[derive(Default)]
pub struct Live {
    /// How often another process went on with it.
    pub takeovers: AtomicU64,
    /// Page servers that crashed in a thread of this VM.
    pub crashes: AtomicU64,
    pub server_pid: AtomicU64,
    /// 0 while it is served; else `Ended` as a number.
    pub ended: AtomicU64,
    pub cpu_ns: AtomicU64,
    /// When the oldest unserved fault was read (CLOCK_MONOTONIC, ns); 0 = there is none.
    pub oldest_ns: AtomicU64,
    pub replay_pages: AtomicU64,
    pub replay_done: AtomicU64,
    pub intent: Intent,
    pub counters: Counters,
}

/// The install that is under way. After a kill the pages of this one alone may be in without
/// being noted, or noted without being counted. There is never more than one: who installs holds
/// the gate.
#[repr(C)]
#[derive(Default)]
pub struct Intent {
    first: AtomicU64,
    pages: AtomicU64,
    /// What the counter was before.
    before: AtomicU64,
    /// Which counter, counted from 1; 0 = nothing is under way.
    counter: AtomicU64,
}

/// An install that its page server did not live to finish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    pub pages: std::ops::Range<usize>,
    pub before: u64,
    pub counter: usize,
}

impl Intent {
    pub fn set(&self, pages: &Range<usize>, counter: usize, before: u64) {
        self.first.store(pages.start as u64, Ordering::Relaxed);
        self.pages.store(pages.len() as u64, Ordering::Relaxed);
        self.before.store(before, Ordering::Relaxed);
        self.counter.store(counter as u64 + 1, Ordering::Release);
    }

    pub fn clear(&self) {
        self.counter.store(0, Ordering::Release);
    }

    /// What was under way when the last page server died. Believed only inside the VM's pages.
    pub fn read(&self, pages: usize) -> Option<Unfinished> {
        let counter = (self.counter.load(Ordering::Acquire) as usize).checked_sub(1)?;
        let first = self.first.load(Ordering::Relaxed) as usize;
        let end = first.checked_add(self.pages.load(Ordering::Relaxed) as usize)?;
        let before = self.before.load(Ordering::Relaxed);
        (counter < Counters::COUNT && end <= pages).then_some(Unfinished { pages: first..end, before, counter })
    }
}
