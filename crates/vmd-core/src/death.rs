//! A test's order to die at a named instant, as if by SIGKILL.
//!
//! Real, the process is killed. Else only the threads of the VM stop dead: what they leave in the
//! journal and in the kernel is what a killed process leaves, and a runner that goes through a
//! million of them has no million processes to start.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU32, Ordering};

/// The instants at which a death leaves something else behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// Messages are in the ring, none applied.
    Read,
    /// Each REMOVE is applied, the ring not cleared.
    Apply,
    /// The ring is cleared, no fault served.
    Clear,
    /// A demand page is about to be installed, and the intent noted.
    Intend,
    /// It is in, not noted.
    Install,
    /// It is noted, not counted.
    Note,
    /// The same three for the filler.
    FillIntend,
    FillInstall,
    FillNote,
    /// A take-over begins; the ring is applied; all waiters are woken.
    AdoptApply,
    AdoptWake,
    Adopted,
}

impl Point {
    pub const ALL: [(&'static str, Self); 12] = [
        ("read", Self::Read),
        ("apply", Self::Apply),
        ("clear", Self::Clear),
        ("intend", Self::Intend),
        ("install", Self::Install),
        ("note", Self::Note),
        ("fill-intend", Self::FillIntend),
        ("fill-install", Self::FillInstall),
        ("fill-note", Self::FillNote),
        ("adopt-apply", Self::AdoptApply),
        ("adopt-wake", Self::AdoptWake),
        ("adopted", Self::Adopted),
    ];
}

/// Where, after how many passings, and how.
#[derive(Debug)]
pub struct Death {
    pub point: Point,
    pub after: AtomicU32,
    pub real: bool,
}

impl Death {
    /// Whether this passing of `point` is the one.
    pub fn strikes(&self, point: Point) -> bool {
        self.point == point && self.after.fetch_sub(1, Ordering::Relaxed) == 0
    }
}

/// A test's eye on each passing of a point; it may take its time there.
pub type Watch = Box<dyn Fn(Point) + Send + Sync>;

/// What a thread unwinds with that stops dead.
pub struct Died;

/// Stop this thread dead, without the words of a panic.
pub fn stop_dead() -> ! {
    resume_unwind(Box::new(Died))
}

/// SIGKILL to this process. Does not return.
pub fn kill_process() -> ! {
    // SAFETY: no memory is passed; nothing runs on in this process after it.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}
