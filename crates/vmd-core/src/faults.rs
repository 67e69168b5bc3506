//! The fault thread of one VM.
//!
//! One turn: read all queued messages, apply every REMOVE to the page states, only then look at
//! the faults (`read` may return a fault before an earlier REMOVE). A fault that meets EAGAIN is
//! parked and retried by a timer; it is served in the end, or its VM is failed. None is dropped.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::abi::{self, Message};
use crate::states::State;
use crate::stats::add;
use crate::uffd::Outcome;
use crate::vm::Vm;

const MESSAGES_PER_READ: usize = 64;
const RETRY_FIRST: Duration = Duration::from_micros(100);
const RETRY_LAST: Duration = Duration::from_millis(2);
/// ESRCH comes when the address space goes, the pidfd's word when the last thread has gone.
const EXIT_WAIT: Duration = Duration::from_secs(1);

/// Why serving ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The VMM has exited.
    Gone,
    /// The owner asked for it.
    Stopped,
    /// The VM cannot be served; the text says what and why.
    Failed(String),
}

#[derive(Clone, Copy)]
struct Fault {
    page: usize,
    read_at: Instant,
}

struct FaultThread<'a> {
    vm: &'a Vm,
    buffer: Vec<u8>,
    messages: [Message; MESSAGES_PER_READ],
    faults: Vec<Fault>,
    parked: Vec<Fault>,
    retry_after: Duration,
    recorder: Option<Recorder>,
}

/// Serve until the VMM is gone, the owner stops it, or it cannot go on.
pub fn serve(vm: &Vm, record: bool) -> Ended {
    let mut thread = FaultThread {
        vm,
        buffer: vec![0; vm.regions.page_size as usize],
        messages: [Message::default(); MESSAGES_PER_READ],
        faults: Vec::with_capacity(MESSAGES_PER_READ),
        parked: Vec::new(),
        retry_after: RETRY_FIRST,
        recorder: record.then(|| Recorder::new(vm.regions.pages())),
    };
    loop {
        if let Err(ended) = thread.turn() {
            return ended;
        }
    }
}

impl FaultThread<'_> {
    fn turn(&mut self) -> Result<(), Ended> {
        self.wait()?;
        self.drain()?;
        for at in 0..self.faults.len() {
            self.serve_fault(at)?;
        }
        if !self.parked.is_empty() {
            self.retry_parked()?;
        }
        self.faults.clear();
        self.vm.stats().set_oldest(self.parked.first().map(|fault| fault.read_at));
        self.vm.gate.demand_served();
        Ok(())
    }

    /// Sleep until there is something to do: a message, a parked fault's time, stop or exit.
    fn wait(&self) -> Result<(), Ended> {
        if self.vm.process.0.is_none() {
            return Err(Ended::Gone);
        }
        let entry = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [self.vm.uffd.raw(), self.vm.outside.stop.raw(), self.vm.process.raw()].map(entry);
        let nanos = self.retry_after.subsec_nanos() as libc::c_long;
        let timeout = libc::timespec { tv_sec: 0, tv_nsec: nanos };
        let timeout = if self.parked.is_empty() { std::ptr::null() } else { &raw const timeout };
        // SAFETY: three valid pollfds, a null or valid timeout, no signal mask. Whatever it
        // returns (a time-out and EINTR included), `revents` says what there is to do.
        unsafe { libc::ppoll(fds.as_mut_ptr(), 3, timeout, std::ptr::null()) };
        if fds[2].revents != 0 {
            return Err(Ended::Gone);
        }
        if fds[1].revents != 0 {
            return Err(Ended::Stopped);
        }
        if fds[0].revents & libc::POLLERR != 0 {
            // poll says so of a userfaultfd in blocking mode: the flag is shared with the VMM.
            return self.make_nonblocking();
        }
        Ok(())
    }

    fn make_nonblocking(&self) -> Result<(), Ended> {
        // SAFETY: fcntl with an integer argument touches no memory.
        match unsafe { libc::fcntl(self.vm.uffd.raw(), libc::F_SETFL, libc::O_NONBLOCK) } {
            0 => Ok(()),
            _ => Err(failed("userfaultfd: O_NONBLOCK", &io::Error::last_os_error())),
        }
    }

    /// Read the queue to its end: apply each REMOVE, gather the faults.
    fn drain(&mut self) -> Result<(), Ended> {
        let _gate = self.vm.gate.enter_for_demand();
        loop {
            let count = match self.vm.uffd.read(&mut self.messages) {
                Ok(count) => count,
                Err(error) if self.vm.process.exited_within(Duration::ZERO) => return self.gone(&error),
                Err(error) => return Err(failed("userfaultfd: read", &error)),
            };
            let read_at = Instant::now();
            for at in 0..count {
                self.take(self.messages[at], read_at)?;
            }
            if count < MESSAGES_PER_READ {
                break; // fewer than asked for: the queue is empty
            }
        }
        if let (Some(first), true) = (self.faults.first(), self.parked.is_empty()) {
            self.vm.stats().set_oldest(Some(first.read_at));
        }
        Ok(())
    }

    fn take(&mut self, message: Message, read_at: Instant) -> Result<(), Ended> {
        match message.event {
            abi::EVENT_PAGEFAULT => self.take_fault(message.second, read_at)?,
            abi::EVENT_REMOVE | abi::EVENT_UNMAP => self.remove(message.first, message.second),
            abi::EVENT_FORK => self.close_child(message.first as RawFd),
            other => self.vm.warn(format!("userfaultfd: an unknown event, {other:#x}, is ignored")),
        }
        Ok(())
    }

    /// The child's userfaultfd came with the message: nobody else knows of it.
    fn close_child(&self, fd: RawFd) {
        // SAFETY: the kernel made this descriptor for the reader of the message, which is us.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
        self.vm.warn("userfaultfd: a FORK event, which was not asked for, is ignored".into());
    }

    fn take_fault(&mut self, address: u64, read_at: Instant) -> Result<(), Ended> {
        add(&self.vm.stats().counters.faults, 1);
        let Some(page) = self.vm.regions.find(address) else {
            return Err(Ended::Failed(format!("fault at {address:#x} is outside all regions ({})", self.vm.regions)));
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.note(self.vm, page);
        }
        self.faults.push(Fault { page, read_at });
        Ok(())
    }

    fn remove(&self, start: u64, end: u64) {
        for page in self.vm.regions.pages_between(start, end).into_iter().flatten() {
            if self.vm.states.set(page, State::Removed) == State::Installed {
                add(&self.vm.stats().counters.removed, 1);
            }
        }
    }

    fn serve_fault(&mut self, at: usize) -> Result<(), Ended> {
        let fault = self.faults[at];
        let same = |other: &Fault| other.page == fault.page;
        if self.parked.iter().any(same) {
            add(&self.vm.stats().counters.parked, 1); // served, and woken, with the one that waits
            return Ok(());
        }
        // Faults of one batch on one page: the first install woke them all.
        if self.faults[..at].iter().any(same) || self.install(fault.page)? {
            self.vm.stats().latency.record(fault.read_at.elapsed());
            return Ok(());
        }
        add(&self.vm.stats().counters.parked, 1);
        self.retry_after = RETRY_FIRST;
        self.parked.push(fault);
        Ok(())
    }

    fn retry_parked(&mut self) -> Result<(), Ended> {
        self.retry_after = (self.retry_after * 2).min(RETRY_LAST);
        let mut waiting = Vec::new();
        for fault in std::mem::take(&mut self.parked) {
            let age = fault.read_at.elapsed();
            if self.install(fault.page)? {
                self.vm.stats().latency.record(age);
            } else if age > self.vm.limits.fault_unserved {
                return Err(self.overdue(fault, age));
            } else {
                waiting.push(fault);
            }
        }
        self.parked = waiting;
        Ok(())
    }

    fn overdue(&self, fault: Fault, age: Duration) -> Ended {
        let address = self.vm.regions.address(fault.page);
        let state = self.vm.states.get(fault.page);
        Ended::Failed(format!("fault at {address:#x} (page state {state:?}) not served for {} ms", age.as_millis()))
    }

    /// Install the page of a demand fault. False: it has to wait.
    fn install(&mut self, page: usize) -> Result<bool, Ended> {
        let state = self.vm.states.get(page);
        if state == State::Poisoned {
            self.vm.uffd.wake(self.vm.regions.address(page), self.vm.regions.page_size);
            return Ok(true); // its touch is a SIGBUS now
        }
        if state != State::Absent || self.vm.is_hole(page) {
            let outcome = self.vm.zero(page, 1);
            return self.conclude(page, outcome, State::Installed, |vm| add(&vm.stats().counters.zero, 1));
        }
        if let Err(error) = self.read_page(page) {
            return self.poison(page, &error);
        }
        let outcome = self.vm.uffd.copy(self.vm.regions.address(page), &self.buffer);
        self.conclude(page, outcome, State::Installed, |vm| add(&vm.stats().counters.demand, 1))
    }

    fn read_page(&mut self, page: usize) -> io::Result<()> {
        let offset = self.vm.regions.offset(page);
        let mut result = self.vm.image.read(&mut self.buffer, offset);
        for _ in 1..self.vm.limits.image_read_tries {
            if result.is_ok() {
                break;
            }
            result = self.vm.image.read(&mut self.buffer, offset);
        }
        result
    }

    /// A page that cannot be read is made to fail loudly at its first touch: never wrong bytes.
    fn poison(&mut self, page: usize, cause: &io::Error) -> Result<bool, Ended> {
        let (address, offset) = (self.vm.regions.address(page), self.vm.regions.offset(page));
        let lost = format!("page at {address:#x} (memory offset {offset}) cannot be read: {cause}");
        let outcome = self.vm.uffd.poison(address, self.vm.regions.page_size);
        if let Outcome::Fatal(errno) = outcome {
            let why = io::Error::from_raw_os_error(errno);
            return Err(Ended::Failed(format!("{lost}; poisoning it: {why}")));
        }
        self.conclude(page, outcome, State::Poisoned, |vm| {
            let before = vm.stats().counters.poisoned.fetch_add(1, Ordering::Relaxed);
            if before < vm.limits.poison_lines_max {
                vm.warn(lost);
            }
        })
    }

    fn conclude(&self, page: usize, outcome: Outcome, state: State, count: impl FnOnce(&Vm)) -> Result<bool, Ended> {
        let address = self.vm.regions.address(page);
        match outcome {
            Outcome::Done => {
                self.vm.states.set(page, state);
                count(self.vm);
            }
            Outcome::Present => {
                self.vm.states.set(page, State::Installed);
                add(&self.vm.stats().counters.present, 1);
                self.vm.uffd.wake(address, self.vm.regions.page_size);
            }
            Outcome::Later | Outcome::Partial(_) => return Ok(false),
            Outcome::Edge if !self.vm.process.exited_within(Duration::ZERO) => {
                return Err(Ended::Failed(format!("fault at {address:#x}: no userfaultfd memory is registered there")));
            }
            Outcome::Edge | Outcome::Gone => {
                return self.gone(&io::Error::from_raw_os_error(libc::ESRCH)).map(|()| true);
            }
            Outcome::Fatal(errno) => {
                let why = io::Error::from_raw_os_error(errno);
                return Err(failed(&format!("install at {address:#x}"), &why));
            }
        }
        Ok(true)
    }

    /// The address space is gone. So the process must go: else it is no VMM that we can serve.
    fn gone(&self, cause: &io::Error) -> Result<(), Ended> {
        match self.vm.process.exited_within(EXIT_WAIT) {
            true => Err(Ended::Gone),
            false => Err(failed("the VMM lives on without the memory that it registered", cause)),
        }
    }
}

fn failed(what: &str, why: &io::Error) -> Ended {
    Ended::Failed(format!("{what}: {why}"))
}

/// Notes the offsets of faulted pages, each once, in the order in which the faults were read.
struct Recorder {
    seen: Vec<bool>,
}

impl Recorder {
    fn new(pages: usize) -> Self {
        Self { seen: vec![false; pages] }
    }

    fn note(&mut self, vm: &Vm, page: usize) {
        if !std::mem::replace(&mut self.seen[page], true) {
            vm.outside.touched.lock().unwrap().push(vm.regions.offset(page));
        }
    }
}
