//! The fault thread of one VM.
//!
//! One turn: read all queued messages, apply every REMOVE to the page states, only then look at
//! the faults (`read` may return a fault before an earlier REMOVE). A fault that meets EAGAIN is
//! parked and retried by a timer; it is served in the end, or its VM is failed. None is dropped.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::abi::{self, Message};
use crate::cold::ColdReads;
use crate::death::Point;
use crate::demand::{Ended, Progress, failed};
use crate::journal::SLOTS;
use crate::stats::add;
use crate::vm::Vm;
use crate::wait::{Ready, Source, Waiter};

const RETRY_FIRST: Duration = Duration::from_micros(100);
const RETRY_LAST: Duration = Duration::from_millis(2);
/// To sleep and be woken takes about as long: who waits by looking for no longer loses at most as much.
const EAGER: Duration = Duration::from_micros(50);
/// How often faults that wait for storage are looked at while nothing else happens.
const COLD_LOOK: Duration = Duration::from_millis(500);

#[derive(Clone, Copy)]
struct Fault {
    page: usize,
    read_at: Instant,
    refused: bool, // at least once
}

struct FaultThread<'a> {
    vm: &'a Vm,
    waiter: Waiter,
    buffer: Vec<u8>,
    faults: Vec<Fault>,
    parked: Vec<Fault>,  // refused: a REMOVE is pending
    reading: Vec<Fault>, // their pages are being read from storage
    cold: Option<ColdReads>,
    retry_after: Duration,
    eager: bool,      // the last fault came soon after the one before it
    ignored: Vec<u8>, // kinds of events that have been warned of
    recorder: Option<Recorder>,
}

/// Serve until the VMM is gone, the owner stops it, or it cannot go on.
pub fn serve(vm: &Vm, record: bool) -> Ended {
    if vm.process.pidfd.is_none() {
        return Ended::Gone;
    }
    let waiter = match watch(vm) {
        Ok(waiter) => waiter,
        Err(error) => return failed("epoll", &error),
    };
    let mut thread = FaultThread {
        vm,
        waiter,
        buffer: vec![0; vm.regions.page_size as usize],
        faults: Vec::with_capacity(SLOTS),
        parked: Vec::new(),
        reading: Vec::new(),
        cold: None,
        retry_after: RETRY_FIRST,
        eager: false,
        ignored: Vec::new(),
        recorder: record.then(|| Recorder::new(vm.regions.pages())),
    };
    loop {
        if let Err(ended) = thread.turn() {
            return ended;
        }
    }
}

fn watch(vm: &Vm) -> io::Result<Waiter> {
    let waiter = Waiter::new()?;
    waiter.add(vm.uffd.raw(), Source::Uffd)?;
    waiter.add(vm.outside.stop.raw(), Source::Stop)?;
    waiter.add(vm.process.raw(), Source::Process)?;
    Ok(waiter)
}

impl FaultThread<'_> {
    fn turn(&mut self) -> Result<(), Ended> {
        let storage_answered = self.wait()?;
        let vm = self.vm;
        let _gate = vm.enter_for_demand();
        self.drain()?;
        for at in 0..self.faults.len() {
            self.serve_fault(at)?;
        }
        self.faults.clear();
        if !self.reading.is_empty() {
            self.release_known();
        }
        if storage_answered {
            self.take_cold()?;
        }
        if !self.parked.is_empty() {
            self.retry_parked()?;
        }
        self.watch_oldest()
    }

    /// Sleep until there is something to do: a message, a parked fault's time, stop or exit; or,
    /// then it is true, an answer of storage.
    fn wait(&mut self) -> Result<bool, Ended> {
        let ready = self.wait_eagerly(match (self.parked.is_empty(), self.reading.is_empty()) {
            (false, _) => Some(self.retry_after),
            (true, false) => Some(COLD_LOOK),
            (true, true) => None,
        });
        if ready.exit {
            return Err(Ended::Gone);
        }
        if ready.stop {
            return Err(Ended::Stopped);
        }
        if ready.blocking {
            self.make_nonblocking()?; // the flag is shared with the VMM
        }
        Ok(ready.storage)
    }

    /// In a burst of faults, look again and again for the next one, for no longer than a sleep would cost.
    fn wait_eagerly(&mut self, most: Option<Duration>) -> Ready {
        let began = Instant::now();
        let mut ready = None;
        while self.eager && ready.is_none() && began.elapsed() < EAGER {
            ready = Some(self.waiter.wait(Some(Duration::ZERO))).filter(|ready| ready.any);
        }
        let ready = ready.unwrap_or_else(|| self.waiter.wait(most));
        self.eager = began.elapsed() < EAGER;
        ready
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
        let journal = &self.vm.outside.journal;
        loop {
            let count = match self.read_into_ring() {
                Ok(count) => count,
                Err(_) if self.vm.process.has_exited() => return Err(Ended::Gone),
                Err(error) => return Err(failed("userfaultfd: read", &error)),
            };
            let read_at = Instant::now();
            for at in 0..count {
                self.take(journal.slot(at), read_at)?;
            }
            if count > 0 {
                self.vm.pass(Point::Apply);
                journal.clear(count);
                self.vm.pass(Point::Clear);
            }
            if count < SLOTS {
                break; // fewer than asked for: the queue is empty
            }
        }
        if let (Some(first), true) = (self.faults.first(), self.parked.is_empty()) {
            self.vm.outside.set_oldest(Some(first.read_at));
        }
        Ok(())
    }

    /// Read messages straight into the journal: with the read a REMOVE is over for the kernel.
    fn read_into_ring(&self) -> io::Result<usize> {
        // SAFETY: the ring has room for as many, and nobody but this thread uses it.
        let count = unsafe { self.vm.uffd.read(self.vm.outside.journal.ring(), SLOTS)? };
        if count > 0 {
            self.vm.pass(Point::Read);
        }
        Ok(count)
    }

    fn take(&mut self, message: Message, read_at: Instant) -> Result<(), Ended> {
        match message.event {
            abi::EVENT_PAGEFAULT => self.take_fault(message.second, read_at)?,
            abi::EVENT_REMOVE | abi::EVENT_UNMAP => self.vm.apply_remove(message.first, message.second),
            other => self.ignore(other, message.first as RawFd),
        }
        Ok(())
    }

    /// An event that was not asked for. Named once: the VMM can make any number of them.
    fn ignore(&mut self, event: u8, child: RawFd) {
        if event == abi::EVENT_FORK {
            // SAFETY: the child's userfaultfd came with the message; the kernel made this
            // descriptor for the reader of the message, which is us.
            drop(unsafe { OwnedFd::from_raw_fd(child) });
        }
        if !self.ignored.contains(&event) {
            self.ignored.push(event);
            self.vm.outside.warn(format!("userfaultfd: event {event:#x} is not known and ignored"));
        }
    }

    fn take_fault(&mut self, address: u64, read_at: Instant) -> Result<(), Ended> {
        add(&self.vm.counters().faults, 1);
        let Some(page) = self.vm.regions.find(address) else {
            return Err(Ended::Failed(format!("fault at {address:#x} is outside all regions ({})", self.vm.regions)));
        };
        if let Some(recorder) = &mut self.recorder {
            recorder.note(self.vm, page);
        }
        self.faults.push(Fault { page, read_at, refused: false });
        Ok(())
    }

    fn serve_fault(&mut self, at: usize) -> Result<(), Ended> {
        let fault = self.faults[at];
        let same = |other: &Fault| other.page == fault.page;
        let progress = if self.parked.iter().any(same) {
            Progress::Refused // served, and woken, with the one that waits
        } else if self.reading.iter().any(same) && self.vm.needs_image(fault.page) {
            Progress::Reading
        } else if self.faults[..at].iter().any(same) {
            Progress::Served // the first install of this batch woke them all
        } else {
            self.install(fault.page)?
        };
        self.note(fault, progress);
        Ok(())
    }

    fn note(&mut self, mut fault: Fault, progress: Progress) {
        match progress {
            Progress::Served => self.vm.outside.journal.latency().record(fault.read_at.elapsed()),
            Progress::Reading => self.reading.push(fault),
            Progress::Refused => {
                if !std::mem::replace(&mut fault.refused, true) {
                    add(&self.vm.counters().parked, 1);
                    self.retry_after = RETRY_FIRST;
                }
                self.parked.push(fault);
            }
        }
    }

    fn retry_parked(&mut self) -> Result<(), Ended> {
        self.retry_after = (self.retry_after * 2).min(RETRY_LAST);
        let mut parked = std::mem::take(&mut self.parked);
        while let Some(first) = parked.first().copied() {
            let progress = self.install(first.page)?;
            for fault in take_of_page(&mut parked, first.page) {
                self.note(fault, progress);
            }
        }
        Ok(())
    }

    /// Faults whose pages were removed, or installed, while storage was asked for their bytes:
    /// woken, who still misses the page faults again.
    fn release_known(&mut self) {
        let reading = std::mem::take(&mut self.reading);
        for fault in reading {
            if self.vm.needs_image(fault.page) {
                self.reading.push(fault);
            } else {
                self.vm.uffd.wake(self.vm.regions.address(fault.page), self.vm.regions.page_size);
                self.note(fault, Progress::Served);
            }
        }
    }

    /// Install what storage has given meanwhile.
    fn take_cold(&mut self) -> Result<(), Ended> {
        for read in self.cold.as_ref().map(ColdReads::take).unwrap_or_default() {
            if !self.vm.needs_image(read.page) {
                continue; // released
            }
            let progress = match read.bytes {
                Ok(bytes) => self.vm.copy_in(read.page, &bytes)?,
                Err(error) => self.vm.poison(read.page, &error)?,
            };
            for fault in take_of_page(&mut self.reading, read.page) {
                self.note(fault, progress);
            }
        }
        Ok(())
    }

    /// Publish the oldest fault that waits; past its limit the VM is as good as hung.
    fn watch_oldest(&self) -> Result<(), Ended> {
        let oldest = self.parked.iter().chain(&self.reading).min_by_key(|fault| fault.read_at);
        self.vm.outside.set_oldest(oldest.map(|fault| fault.read_at));
        match oldest {
            Some(fault) if fault.read_at.elapsed() > self.vm.limits.fault_unserved => Err(self.overdue(*fault)),
            _ => Ok(()),
        }
    }

    fn overdue(&self, fault: Fault) -> Ended {
        let age = fault.read_at.elapsed();
        let address = self.vm.regions.address(fault.page);
        let state = self.vm.states().get(fault.page);
        Ended::Failed(format!("fault at {address:#x} (page state {state:?}) not served for {} ms", age.as_millis()))
    }

    /// Install the page of a demand fault.
    fn install(&mut self, page: usize) -> Result<Progress, Ended> {
        if !self.vm.needs_image(page) {
            return self.vm.install_known(page);
        }
        let offset = self.vm.regions.offset(page);
        if self.vm.image.read_now(&mut self.buffer, offset) {
            return self.vm.copy_in(page, &self.buffer);
        }
        let asked = self.cold_reads().and_then(|cold| cold.ask(page, offset));
        asked.map(|()| Progress::Reading).map_err(|error| failed("a thread to read the memory file", &error))
    }

    fn cold_reads(&mut self) -> io::Result<&mut ColdReads> {
        if self.cold.is_none() {
            let (image, outside) = (Arc::clone(&self.vm.image), Arc::clone(&self.vm.outside));
            let (page_size, tries) = (self.vm.regions.page_size as usize, self.vm.limits.image_read_tries);
            let cold = ColdReads::new(image, outside, page_size, tries)?;
            self.waiter.add(cold.raw(), Source::Storage)?;
            self.cold = Some(cold);
        }
        Ok(self.cold.as_mut().expect("made above"))
    }
}

fn take_of_page(faults: &mut Vec<Fault>, page: usize) -> Vec<Fault> {
    let (taken, left) = std::mem::take(faults).into_iter().partition(|fault| fault.page == page);
    *faults = left;
    taken
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
