//! What happened, in the order in which it did: guests and page servers note it in one log.

use std::sync::atomic::{AtomicU32, Ordering};

use vmd_core::internals::death::Point;

use crate::chance::Chance;

/// More than any interleaving has; what comes later is not told, but still has its place in the order.
const EVENTS_MAX: usize = 4096;
/// Who waits for others to go on gives up after so many looks, and lets others have the CPU now and then.
const YIELD_EVERY: u32 = 25;
const LOOKS_MAX: u32 = 100;

#[derive(Clone, Copy)]
pub enum Kind {
    BeginRead,
    EndRead,
    BeginWrite,
    EndWrite,
    BeginRemove,
    EndRemove,
    /// A page server starts (its number), is killed or asked to hand over from outside, has ended.
    Serve,
    Kill,
    HandOver,
    Dead,
    /// A page server passes a point (its number).
    Pass,
}

const WORDS: [&str; 11] = [
    "begins to read",
    "has read",
    "begins to write",
    "has written",
    "begins to remove",
    "has removed",
    "serves",
    "is killed",
    "is to hand over",
    "is dead",
    "passes",
];

/// The actor's number of a page server; guests are numbered from 0.
pub const SERVER: usize = 255;

pub struct Log {
    next: AtomicU32,
    codes: Vec<AtomicU32>,
}

impl Log {
    pub fn new() -> Self {
        Self { next: AtomicU32::new(0), codes: (0..EVENTS_MAX).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Forget all of it.
    pub fn clear(&self) {
        self.next.store(0, Ordering::SeqCst);
    }

    /// Note an event; returns its place in the order. `of`: a page, or what the kind says.
    pub fn note(&self, actor: usize, kind: Kind, of: usize) -> u32 {
        let at = self.next.fetch_add(1, Ordering::SeqCst);
        if let Some(code) = self.codes.get(at as usize) {
            code.store((kind as u32) << 24 | (actor as u32) << 16 | of as u32, Ordering::Relaxed);
        }
        at
    }

    /// One number for the whole order: who did what after whom, on whichever page.
    pub fn order(&self) -> u64 {
        let step = |hash: u64, code: u32| (hash ^ u64::from(code)).wrapping_mul(0x100_0000_01b3);
        let mut hash = self.codes().map(without_page).fold(0xcbf2_9ce4_8422_2325, step);
        hash ^= hash >> 32;
        hash.max(1)
    }

    /// In words, for who looks for the cause of a failure.
    pub fn tell(&self) -> String {
        let lines = self.codes().enumerate().map(|(at, code)| {
            let (kind, actor, of) = (code >> 24, (code >> 16) as usize & 255, code as usize & 0xffff);
            let who = if actor == SERVER { "server".to_string() } else { format!("guest {actor}") };
            let what = if kind == Kind::Pass as u32 { Point::ALL[of].0.to_string() } else { of.to_string() };
            format!("{at:5} {who} {} {what}\n", WORDS[kind as usize])
        });
        lines.collect()
    }

    fn codes(&self) -> impl Iterator<Item = u32> {
        let count = self.len().min(EVENTS_MAX);
        self.codes[..count].iter().map(|code| code.load(Ordering::Relaxed))
    }

    fn len(&self) -> usize {
        self.next.load(Ordering::Relaxed) as usize
    }
}

/// Which point or server it is stays; which page it is does not.
fn without_page(code: u32) -> u32 {
    if code >> 24 < Kind::Serve as u32 { code & 0xffff_0000 } else { code }
}

/// A wait where order matters.
#[derive(Clone, Copy, Debug)]
pub enum Stall {
    No,
    Yields(u32),
    Spins(u32),
    /// Until so many more events have been noted, or for a while.
    Until(u32),
}

impl Stall {
    pub fn draw(chance: &mut Chance) -> Self {
        match chance.below(20) {
            0..=11 => Self::No,
            12..=14 => Self::Yields(chance.between(1, 3) as u32),
            15..=17 => Self::Spins(chance.between(5, 200) as u32),
            _ => Self::long(chance),
        }
    }

    pub fn long(chance: &mut Chance) -> Self {
        Self::Until(chance.between(1, 10) as u32)
    }

    pub fn stand(self, log: &Log) {
        match self {
            Self::No => {}
            Self::Yields(count) => (0..count).for_each(|_| std::thread::yield_now()),
            Self::Spins(count) => (0..count).for_each(|_| std::hint::spin_loop()),
            Self::Until(events) => {
                let end = log.len() + events as usize;
                for look in 0..LOOKS_MAX {
                    if log.len() >= end {
                        break;
                    }
                    if look % YIELD_EVERY == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
                }
            }
        }
    }
}
