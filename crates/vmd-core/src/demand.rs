//! Installing the page of a demand fault: what each outcome of the kernel means for it.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::death::Point;
use crate::live::DEMAND;
use crate::states::State;
use crate::stats::{Kind, add};
use crate::uffd::Outcome;
use crate::vm::Vm;

/// Why serving ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The VMM has exited.
    Gone,
    /// The owner asked for it.
    Stopped,
    /// The VM cannot be served; the text says what and why.
    Failed(String),
    /// By a test's order, as if by SIGKILL.
    Died,
}

impl Ended {
    /// As the journal has it; 0 is for a VM that is served, or whose page server was killed.
    pub fn number(&self) -> u64 {
        match self {
            Self::Died => 0,
            Self::Gone => 1,
            Self::Stopped => 2,
            Self::Failed(_) => 3,
        }
    }
}

/// What became of an attempt to serve a page.
#[derive(Clone, Copy)]
pub enum Progress {
    /// It is in, and its waiters are awake.
    Served,
    /// The kernel refuses it for now: park it.
    Refused,
    /// Its bytes have to be waited for.
    Reading,
}

impl Vm {
    pub fn needs_image(&self, page: usize) -> bool {
        self.states().get(page) == State::Absent && !self.is_hole(page)
    }

    /// Zeros for a page that is a hole of the image, or was removed; nothing for a poisoned one.
    pub fn install_known(&self, page: usize) -> Result<Progress, Ended> {
        if self.states().get(page) == State::Poisoned {
            return Ok(self.let_go(page)); // its touch is a SIGBUS now
        }
        self.install_demand(page, Kind::Zero, || self.zero(page, 1))
    }

    /// Nothing to install: who still waits for the page touches it again.
    fn let_go(&self, page: usize) -> Progress {
        self.uffd.wake(self.regions.address(page), self.regions.page_size);
        Progress::Served
    }

    pub fn copy_in(&self, page: usize, bytes: &[u8]) -> Result<Progress, Ended> {
        self.install_demand(page, Kind::Demand, || self.uffd.copy(self.regions.address(page), bytes))
    }

    fn install_demand(&self, page: usize, kind: Kind, install: impl FnOnce() -> Outcome) -> Result<Progress, Ended> {
        let points = [Point::Intend, Point::Install, Point::Note];
        let outcome = self.install(DEMAND, page..page + 1, kind, points, || {
            let outcome = install();
            (usize::from(outcome == Outcome::Done), outcome)
        });
        self.conclude(page, outcome)
    }

    /// A page that cannot be read is made to fail loudly at its first touch: never wrong bytes.
    pub fn poison(&self, page: usize, cause: &io::Error) -> Result<Progress, Ended> {
        let (address, offset) = (self.regions.address(page), self.regions.offset(page));
        let lost = format!("page at {address:#x} (memory offset {offset}) cannot be read: {cause}");
        let outcome = self.uffd.poison(address, self.regions.page_size);
        if let Outcome::Fatal(errno) = outcome {
            let why = io::Error::from_raw_os_error(errno);
            return Err(Ended::Failed(format!("{lost}; poisoning it: {why}")));
        }
        if outcome == Outcome::Done {
            self.states().set(page, State::Poisoned);
            self.outside.journal.note_incident(&lost);
            if self.counters().poisoned.fetch_add(1, Ordering::Relaxed) < self.limits.poison_lines_max {
                self.outside.warn(lost);
            }
        }
        self.conclude(page, outcome)
    }

    fn conclude(&self, page: usize, outcome: Outcome) -> Result<Progress, Ended> {
        let address = self.regions.address(page);
        match outcome {
            Outcome::Done => {}
            Outcome::Present => {
                self.states().set(page, State::Installed);
                add(&self.counters().present, 1);
                self.uffd.wake(address, self.regions.page_size);
            }
            Outcome::Later | Outcome::Partial(_) => return Ok(Progress::Refused),
            // Unmapped since: the filler had served the fault while it was parked here.
            Outcome::Edge if self.states().get(page) == State::Removed => return Ok(self.let_go(page)),
            Outcome::Edge if !self.process.has_exited() => {
                return Err(Ended::Failed(format!("fault at {address:#x}: no userfaultfd memory is registered there")));
            }
            Outcome::Edge | Outcome::Gone => {
                return Err(self.gone(&io::Error::from_raw_os_error(libc::ESRCH)));
            }
            Outcome::Fatal(errno) => {
                let why = io::Error::from_raw_os_error(errno);
                return Err(failed(&format!("install at {address:#x}"), &why));
            }
        }
        Ok(Progress::Served)
    }

    /// The address space is gone. So the process must go: else it is no VMM that we can serve.
    pub fn gone(&self, cause: &io::Error) -> Ended {
        let deadline = Instant::now() + self.limits.exit_wait;
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        while Instant::now() < deadline && !self.process.has_exited() {
            let mut fds = [self.process.raw(), self.outside.stop.raw()].map(entry);
            let left = deadline.saturating_duration_since(Instant::now()).as_millis() as i32;
            // SAFETY: two valid pollfds.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, left + 1) };
            if fds[1].revents != 0 {
                return Ended::Stopped;
            }
        }
        match self.process.has_exited() {
            true => Ended::Gone,
            false => failed("the VMM lives on without the memory that it registered", cause),
        }
    }
}

pub fn failed(what: &str, why: &io::Error) -> Ended {
    Ended::Failed(format!("{what}: {why}"))
}
