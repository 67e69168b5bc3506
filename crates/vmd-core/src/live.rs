//! What changes in a journal while its VM is served: counters, clocks, and the install that is under way.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::{Counters, Kind, add};

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
    pub counters: Counters,
    pub installers: [Installer; INSTALLERS],
}

/// Who installs: the fault thread, and two fillers.
pub const INSTALLERS: usize = 3;
pub const DEMAND: usize = 0;
pub const FILLERS: [usize; 2] = [1, 2];

/// What one thread has installed, and the install that it has under way. After a kill the pages of
/// that one alone may be in without being noted, or noted without being counted.
#[repr(C)]
#[derive(Default)]
pub struct Installer {
    /// Pages, by kind (`stats::Kind`).
    counts: [AtomicU64; Kind::COUNT],
    first: AtomicU64,
    pages: AtomicU64,
    /// What the count was before.
    before: AtomicU64,
    /// Which kind, counted from 1; 0 = nothing is under way.
    kind: AtomicU64,
    /// How many pages it has brought, counted from 1; 0 = not known yet.
    brought: AtomicU64,
}

/// An install that its page server did not live to finish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfinished {
    pub pages: std::ops::Range<usize>,
    pub before: u64,
    pub kind: Kind,
    /// The first so many; None: it may have brought any of them.
    pub brought: Option<usize>,
}

impl Live {
    /// Pages of one kind that have been installed, by all. A journal may say anything: no sum of it overflows.
    pub fn count(&self, kind: Kind) -> u64 {
        let counts = self.installers.iter().map(|installer| installer.counts[kind as usize].load(Ordering::Relaxed));
        counts.fold(0, u64::saturating_add)
    }

    /// All installs that were counted.
    pub fn installs(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self.count(kind)).fold(0, u64::saturating_add)
    }
}

impl Installer {
    /// Note which pages are about to be installed.
    pub fn intend(&self, pages: &Range<usize>, kind: Kind) {
        let before = self.counts[kind as usize].load(Ordering::Relaxed);
        self.first.store(pages.start as u64, Ordering::Relaxed);
        self.pages.store(pages.len() as u64, Ordering::Relaxed);
        self.before.store(before, Ordering::Relaxed);
        self.brought.store(0, Ordering::Relaxed);
        self.kind.store(kind as u64 + 1, Ordering::Release);
    }

    /// It has brought the first so many, which are about to be noted.
    pub fn brought(&self, pages: u64) {
        self.brought.store(pages + 1, Ordering::Release);
    }

    /// They are in, and noted.
    pub fn add(&self, kind: Kind, pages: u64) {
        add(&self.counts[kind as usize], pages);
    }

    /// They are counted.
    pub fn intend_nothing(&self) {
        self.kind.store(0, Ordering::Release);
    }

    /// What was under way when the last page server died. Believed only inside the VM's pages.
    pub fn unfinished(&self, pages: usize) -> Option<Unfinished> {
        let kind = *Kind::ALL.get((self.kind.load(Ordering::Acquire) as usize).checked_sub(1)?)?;
        let first = self.first.load(Ordering::Relaxed) as usize;
        let end = first.checked_add(self.pages.load(Ordering::Relaxed) as usize)?;
        let before = self.before.load(Ordering::Relaxed);
        let brought = self.brought.load(Ordering::Relaxed).checked_sub(1).map(|pages| pages as usize);
        let sound = end <= pages && brought.unwrap_or(0) <= end - first;
        sound.then_some(Unfinished { pages: first..end, before, kind, brought })
    }

    /// Count `pages` of it, unless they have been counted.
    pub fn settle(&self, unfinished: &Unfinished, pages: u64) {
        if self.counts[unfinished.kind as usize].load(Ordering::Relaxed) == unfinished.before {
            self.add(unfinished.kind, pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_stranger_do_not_overflow() {
        let live = Live::default();
        live.installers[DEMAND].add(Kind::Demand, u64::MAX);
        live.installers[FILLERS[0]].add(Kind::Demand, 1);
        live.installers[FILLERS[1]].add(Kind::Zero, 1);
        assert_eq!((live.count(Kind::Demand), live.installs()), (u64::MAX, u64::MAX));
    }
}
