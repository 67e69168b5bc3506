//! What the processes of the runner share: who is at which seed, what was counted, which orders were seen.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use vmd_core::internals::death::Point;

use crate::lives::number_of;
use crate::plan::{Act, End, GUESTS, Op};

pub const WORKERS_MAX: usize = 64;
const TEXT_BYTES: usize = 32 << 10;
const DEATHS: usize = Point::ALL.len() + 2;

/// All of it may be changed at any moment by any of the processes; any bits are valid.
#[repr(C)]
pub struct Board {
    /// The next block of seeds that nobody has taken.
    pub next: AtomicU64,
    pub orders: AtomicU64,
    pub removals: AtomicU64,
    pub faults: AtomicU64,
    pub parked: AtomicU64,
    pub present: AtomicU64,
    /// Installs of the first filler and of the second.
    pub fills: [AtomicU64; 2],
    deaths: [AtomicU64; DEATHS],
    slots: [Slot; WORKERS_MAX],
    seen_mask: u64,
}

/// Of one process.
#[repr(C)]
pub struct Slot {
    pub seed: AtomicU64,
    /// Interleavings that it has behind it.
    pub done: AtomicU64,
    doing: [AtomicU64; GUESTS],
    said: AtomicU64,
    text: [AtomicU64; TEXT_BYTES / 8],
}

impl Board {
    /// A shared mapping of zeros, with a table for the orders of so many interleavings behind it.
    pub fn new(count: u64) -> io::Result<&'static Self> {
        let entries = (count * 2).next_power_of_two().max(1 << 12);
        let len = size_of::<Self>() + entries as usize * 8;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice, never unmapped. Zeros are a valid
        // board, and nobody else has it yet.
        unsafe {
            match libc::mmap(std::ptr::null_mut(), len, protection, flags | libc::MAP_NORESERVE, -1, 0) {
                libc::MAP_FAILED => Err(io::Error::last_os_error()),
                start => {
                    (*start.cast::<Self>()).seen_mask = entries - 1;
                    Ok(&*start.cast())
                }
            }
        }
    }

    pub fn slot(&self, worker: usize) -> &Slot {
        &self.slots[worker]
    }

    pub fn done(&self) -> u64 {
        self.slots.iter().map(|slot| slot.done.load(Ordering::Relaxed)).sum()
    }

    /// Count an order of events (not 0) if it is a new one.
    pub fn see(&self, order: u64) {
        let mut at = order & self.seen_mask;
        loop {
            // SAFETY: the table behind the board has as many entries as the mask says.
            let entry = unsafe { &*std::ptr::from_ref(self).add(1).cast::<AtomicU64>().add(at as usize) };
            match entry.compare_exchange(0, order, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => {
                    self.orders.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(found) if found == order => return,
                Err(_) => at = (at + 1) & self.seen_mask,
            }
        }
    }

    pub fn count_death(&self, end: End) {
        let at = match end {
            End::At(point, _) => number_of(point),
            End::Kill => DEATHS - 2,
            End::HandOver => DEATHS - 1,
        };
        self.deaths[at].fetch_add(1, Ordering::Relaxed);
    }

    /// How many page servers ended before their VM, and where, in words.
    pub fn deaths(&self) -> (u64, String) {
        let names = Point::ALL.iter().map(|(name, _)| *name).chain(["any moment", "handed over"]);
        let counts: Vec<u64> = self.deaths.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let words: Vec<String> = names.zip(&counts).map(|(name, count)| format!("{name} {count}")).collect();
        (counts.iter().sum(), words.join(", "))
    }
}

impl Slot {
    /// Note what a guest is about to do.
    pub fn tell(&self, guest: usize, op: Op) {
        let code = 1 << 63 | (op.act as u64) << 32 | (op.pages as u64) << 16 | op.page as u64;
        self.doing[guest].store(code, Ordering::Relaxed);
    }

    pub fn tell_nothing(&self, guest: usize) {
        self.doing[guest].store(0, Ordering::Relaxed);
    }

    /// What the guests are doing, in words.
    pub fn doing(&self) -> String {
        let words = |(guest, code): (usize, &AtomicU64)| {
            let code = code.load(Ordering::Relaxed);
            let act = [Act::Read, Act::Write, Act::Remove][(code >> 32 & 3) as usize];
            (code != 0).then(|| format!("guest {guest}: {act:?} {} from page {}", code >> 16 & 0xffff, code & 0xffff))
        };
        let lines: Vec<String> = self.doing.iter().enumerate().filter_map(words).collect();
        if lines.is_empty() { "all guests are through".to_string() } else { lines.join("; ") }
    }

    /// Leave words for the parent.
    pub fn say(&self, words: &str) {
        for (at, bytes) in words.as_bytes().chunks(8).enumerate().take(self.text.len()) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.text[at].store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        self.said.store(words.len().min(TEXT_BYTES) as u64, Ordering::Release);
    }

    pub fn said(&self) -> String {
        let len = self.said.load(Ordering::Acquire) as usize;
        let bytes: Vec<u8> = self.text.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }
}
