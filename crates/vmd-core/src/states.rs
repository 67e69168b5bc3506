//! Two bits a page.
//!
//! Absent -> Installed is noted after the install; anything -> Removed before anything relies on
//! it. Who writes: the fault thread always, the filler only behind the gate (see `vm`).

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Absent = 0,
    Installed = 1,
    Removed = 2,
    Poisoned = 3,
}

const PAGES_PER_WORD: usize = 32;
const LOW_BITS: u64 = 0x5555_5555_5555_5555;

/// Bytes that the states of so many pages take.
pub fn bytes(pages: usize) -> usize {
    pages.div_ceil(PAGES_PER_WORD) * size_of::<AtomicU64>()
}

/// The page states in a journal; all zeros means all absent.
#[derive(Clone, Copy)]
pub struct States<'a> {
    words: &'a [AtomicU64],
}

impl<'a> States<'a> {
    pub fn new(words: &'a [AtomicU64]) -> Self {
        Self { words }
    }

    pub fn get(self, page: usize) -> State {
        let word = self.words[page / PAGES_PER_WORD].load(Ordering::Acquire);
        Self::decode(word >> shift(page))
    }

    /// Set the state of a page; returns the one it had.
    pub fn set(self, page: usize, state: State) -> State {
        let shift = shift(page);
        let update = |word: u64| Some(word & !(3 << shift) | (state as u64) << shift);
        let word = &self.words[page / PAGES_PER_WORD];
        let old = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, update).unwrap_or_else(|word| word);
        Self::decode(old >> shift)
    }

    /// How many pages are installed.
    pub fn installed(self) -> u64 {
        let count = |word: &AtomicU64| {
            let word = word.load(Ordering::Acquire);
            u64::from((word & !(word >> 1) & LOW_BITS).count_ones())
        };
        self.words.iter().map(count).sum()
    }

    fn decode(bits: u64) -> State {
        match bits & 3 {
            0 => State::Absent,
            1 => State::Installed,
            2 => State::Removed,
            _ => State::Poisoned,
        }
    }
}

fn shift(page: usize) -> usize {
    page % PAGES_PER_WORD * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_disturb_each_other() {
        let words: Vec<_> = (0..3).map(|_| AtomicU64::new(0)).collect();
        let states = States::new(&words);
        assert_eq!(states.set(33, State::Removed), State::Absent);
        assert_eq!(states.set(32, State::Installed), State::Absent);
        assert_eq!(states.set(34, State::Poisoned), State::Absent);
        assert_eq!(states.set(33, State::Installed), State::Removed);
        let read = [31, 32, 33, 34, 35, 69].map(|page| states.get(page) as u8);
        assert_eq!(read, [0, 1, 1, 3, 0, 0]);
        states.set(69, State::Removed);
        assert_eq!(states.installed(), 2);
    }
}
