//! The journal: all that another process needs to go on serving a VM.
//!
//! A userfaultfd completes a REMOVE inside `read(2)`: a process that is killed between that read
//! and its own note of it has lost the event, and the next page server would put stale bytes into
//! a freed page, with return code 0. So messages are read straight into a ring inside this
//! mapping, and a slot is cleared only when its message has been applied. The mapping is that of a
//! file, best on a tmpfs, which outlives its process; without `--journal` it is private memory.
//!
//! Little-endian, version 1; the sizes are those of the constants below:
//!
//! ```text
//!      0  magic "vmdjrnl\0", version u32, 0 u32, checksum u64        never changed after it was made
//!     24  file bytes, boot id [16], VMM's pid and start time (clock ticks),
//!         page size, number of regions (0: no handshake yet), what goes on beside demand, number
//!         of planned offsets, bound of the prefetch, the image's device, inode, size and mtime (ns),
//!         length of its path; limits: unserved fault (ms), VMM's exit (ms), tries of a read,
//!         lines of lost pages, floor of free memory (percent)
//!   1024  live: takeovers, crashes, server's pid, end, clocks, counters, what each installer has
//!         installed and is about to install (u64 each)
//!   2048  ring: 64 slots of 32 bytes, each a `struct uffd_msg`; event 0 = clear
//!   4096  latency histogram
//!  12288  incident: length u64, text
//!  16384  path of the image; regions (base, size, offset); planned offsets; each 8-aligned
//!    ...  page states, two bits a page, on a boundary of 4096
//! ```
//!
//! The checksum (FNV-1a, 64 bits) covers what is never changed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::abi::Message;
use crate::body::{Body, FIXED_BYTES, Refusal};
use crate::demand::Ended;
use crate::host;
use crate::live::Live;
use crate::states::{self, States};
use crate::stats::{Histogram, monotonic};

pub const SLOTS: usize = 64;
const LIVE_AT: usize = 1024;
const RING_AT: usize = 2048;
const LATENCY_AT: usize = 4096;
const INCIDENT_AT: usize = 12288;
pub const TAIL_AT: usize = 16384;
const INCIDENT_BYTES: usize = TAIL_AT - INCIDENT_AT - 8;
const ALIGN: usize = 4096;

const _: () = assert!(FIXED_BYTES <= LIVE_AT && LIVE_AT + size_of::<Live>() <= RING_AT);
const _: () = assert!(RING_AT + SLOTS * size_of::<Message>() <= LATENCY_AT);
const _: () = assert!(LATENCY_AT + size_of::<Histogram>() <= INCIDENT_AT);

/// A mapped journal. Whoever has it shares the one mapping; dropped with the last of them.
pub struct Journal {
    start: *mut u8,
    len: usize,
    states_at: usize,
    incident: Mutex<()>,
    file: Mutex<Option<File>>, // keeps the lock
}

// SAFETY: what is shared is atomics, the ring, which only the fault thread touches, and the
// incident text behind its mutex.
unsafe impl Send for Journal {}
// SAFETY: as above.
unsafe impl Sync for Journal {}

/// Bytes of a journal for `body`, and where in it the page states begin.
pub fn layout(body: &Body) -> (usize, usize) {
    let states_at = (TAIL_AT + body.tail_bytes()).next_multiple_of(ALIGN);
    (states_at + states::bytes(body.pages()), states_at)
}

impl Journal {
    /// A journal of private memory, which nobody can adopt.
    pub fn private(body: &Body) -> std::io::Result<Self> {
        let (len, states_at) = layout(body);
        Self::map(None, len, states_at)
    }

    /// Write the journal of a VM into `file` and map it: locked in memory and faulted in, so that
    /// the kernel can put a message there at any moment.
    pub fn create(file: File, body: &Body) -> std::io::Result<Self> {
        write(&file, body)?;
        Self::open(file, body)
    }

    /// Map the journal in `file`, as `body` says that it is laid out.
    pub fn open(file: File, body: &Body) -> std::io::Result<Self> {
        let (len, states_at) = layout(body);
        Self::map(Some(file), len, states_at)
    }

    /// Map the journal in `file`, which may be open for reading only, to look at it.
    pub fn look(file: File, body: &Body) -> std::io::Result<Self> {
        let (len, states_at) = layout(body);
        Self::map_as(Some(file), len, states_at, libc::PROT_READ)
    }

    /// Let another page server lock the file. It stays mapped, which alone would keep the lock.
    pub fn unlock(&self) {
        if let Some(file) = self.file.lock().unwrap().take() {
            host::unlock(&file);
        }
    }

    pub fn live(&self) -> &Live {
        // SAFETY: inside the mapping, aligned, atomics only, any bits are valid.
        unsafe { &*self.start.add(LIVE_AT).cast() }
    }

    pub fn latency(&self) -> &Histogram {
        // SAFETY: as above.
        unsafe { &*self.start.add(LATENCY_AT).cast() }
    }

    pub fn states(&self) -> States<'_> {
        let words = (self.len - self.states_at) / size_of::<AtomicU64>();
        // SAFETY: as above; the words end with the mapping.
        States::new(unsafe { std::slice::from_raw_parts(self.start.add(self.states_at).cast(), words) })
    }

    /// Where the kernel puts messages. Only the fault thread may use it.
    pub fn ring(&self) -> *mut Message {
        // SAFETY: inside the mapping.
        unsafe { self.start.add(RING_AT).cast() }
    }

    /// The message in a slot; its event is 0 when the slot is clear.
    pub fn slot(&self, at: usize) -> Message {
        assert!(at < SLOTS);
        // SAFETY: inside the mapping; any bits are a valid message.
        unsafe { self.ring().add(at).read_volatile() }
    }

    /// Forget the first `count` messages: they have been applied.
    pub fn clear(&self, count: usize) {
        for at in 0..count.min(SLOTS) {
            // SAFETY: inside the mapping, 8-aligned; only this thread uses the ring.
            let head: &AtomicU64 = unsafe { &*self.ring().add(at).cast() };
            head.store(0, Ordering::Release);
        }
    }

    /// Age of the oldest fault not yet served.
    pub fn oldest_age(&self) -> Option<Duration> {
        match self.live().oldest_ns.load(Ordering::Relaxed) {
            0 => None,
            ns => Some(monotonic().saturating_sub(Duration::from_nanos(ns))),
        }
    }

    /// A page server begins to serve.
    pub fn begin(&self, taken_over: bool) {
        let live = self.live();
        live.server_pid.store(std::process::id().into(), Ordering::Relaxed);
        live.takeovers.fetch_add(taken_over.into(), Ordering::Relaxed);
        live.ended.store(0, Ordering::Relaxed);
    }

    /// It will not be served any more, and its VMM is to be killed.
    pub fn give_up(&self, why: &str) {
        self.note_incident(why);
        self.live().ended.store(Ended::Failed(String::new()).number(), Ordering::Release);
    }

    pub fn is_given_up(&self) -> bool {
        self.live().ended.load(Ordering::Acquire) == Ended::Failed(String::new()).number()
    }

    /// Keep the words of the last thing that went wrong, for whoever looks.
    pub fn note_incident(&self, text: &str) {
        let _guard = self.incident.lock().unwrap();
        let text = &text.as_bytes()[..text.len().min(INCIDENT_BYTES)];
        // SAFETY: inside the mapping; writers hold the mutex, readers are in other processes.
        unsafe {
            let at = self.start.add(INCIDENT_AT);
            (*at.cast::<AtomicU64>()).store(0, Ordering::Release);
            std::ptr::copy_nonoverlapping(text.as_ptr(), at.add(8), text.len());
            (*at.cast::<AtomicU64>()).store(text.len() as u64, Ordering::Release);
        }
    }

    pub fn incident(&self) -> String {
        let _guard = self.incident.lock().unwrap();
        // SAFETY: inside the mapping; the length is bounded here.
        unsafe {
            let at = self.start.add(INCIDENT_AT);
            let len = (*at.cast::<AtomicU64>()).load(Ordering::Acquire) as usize;
            String::from_utf8_lossy(std::slice::from_raw_parts(at.add(8), len.min(INCIDENT_BYTES))).into_owned()
        }
    }

    fn map(file: Option<File>, len: usize, states_at: usize) -> std::io::Result<Self> {
        let outlives = file.is_some();
        let journal = Self::map_as(file, len, states_at, libc::PROT_READ | libc::PROT_WRITE)?;
        if outlives {
            journal.pin();
        }
        Ok(journal)
    }

    fn map_as(file: Option<File>, len: usize, states_at: usize, protection: i32) -> std::io::Result<Self> {
        let (fd, flags) = match &file {
            Some(file) => (file.as_raw_fd(), libc::MAP_SHARED | libc::MAP_POPULATE),
            None => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len, states_at, incident: Mutex::default(), file: Mutex::new(file) })
    }

    /// Keep ring and states in memory. Without the right to it they stay for as long as there is room.
    fn pin(&self) {
        for (at, end) in [(0, TAIL_AT), (self.states_at, self.len)] {
            // SAFETY: a range of our own mapping.
            unsafe { libc::mlock(self.start.add(at).cast(), end - at) };
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // SAFETY: exactly what `map` mapped; nothing borrows it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Write a new journal. One of a body without regions waits for its VMM, and cannot be adopted.
pub fn write(file: &File, body: &Body) -> std::io::Result<()> {
    let (len, _) = layout(body);
    file.set_len(0)?;
    allocate(file, len)?;
    file.write_all_at(&body.tail(), TAIL_AT as u64)?;
    file.write_all_at(&body.fixed(len), 0)
}

/// Read and check what never changes. `Refusal` says what was expected and what came.
pub fn read(file: &File) -> Result<Body, Refusal> {
    let size = file.metadata().map_err(|error| Refusal(error.to_string()))?.len();
    let mut fixed = [0; FIXED_BYTES];
    file.read_exact_at(&mut fixed, 0).map_err(|_| Refusal(format!("truncated: {size} bytes")))?;
    let head = crate::body::Head::parse(&fixed, size)?;
    let mut tail = vec![0; head.tail_bytes()];
    file.read_exact_at(&mut tail, TAIL_AT as u64).map_err(|_| Refusal(format!("truncated: {size} bytes")))?;
    let body = head.with_tail(&fixed, &tail)?;
    match layout(&body).0 as u64 {
        len if len == size => Ok(body),
        len => Err(Refusal(format!("truncated: expected {len} bytes, got {size}"))),
    }
}

/// Room that is really there: a store to a page that a full file system cannot give is a SIGBUS.
fn allocate(file: &File, len: usize) -> std::io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len as libc::off_t) } {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::ImageId;
    use crate::live::{DEMAND, Unfinished};
    use crate::plan::Beside;
    use crate::regions::Region;
    use crate::states::State;
    use crate::stats::Kind;
    use crate::vm::Limits;

    const PAGE: u64 = 4096;

    fn body() -> Body {
        let regions = vec![
            Region { base: 0x9000, size: 40 * PAGE, offset: 0 },
            Region { base: 1 << 32, size: 24 * PAGE, offset: 40 * PAGE },
        ];
        let beside = Beside::Replay(vec![3 * PAGE, 0, 7 * PAGE]);
        let image = ImageId { device: 1, inode: 2, size: 64 * PAGE, mtime_ns: -3, path: b"/images/memory".to_vec() };
        let limits = Limits {
            fault_unserved: Duration::from_secs(10),
            exit_wait: Duration::from_secs(30),
            image_read_tries: 3,
            poison_lines_max: 4,
            memory_floor_percent: 5,
        };
        Body { boot_id: [7; 16], vmm_pid: 42, vmm_start: 4711, page_size: PAGE, regions, beside, image, limits }
    }

    fn file() -> File {
        // SAFETY: a valid name; the new descriptor is owned here and nowhere else.
        unsafe { std::os::fd::FromRawFd::from_raw_fd(libc::memfd_create(c"journal".as_ptr(), libc::MFD_CLOEXEC)) }
    }

    fn written() -> File {
        let file = file();
        write(&file, &body()).unwrap();
        file
    }

    fn refusal(file: &File) -> String {
        read(file).unwrap_err().0
    }

    #[test]
    fn what_is_written_is_read() {
        let file = written();
        let read = read(&file).unwrap();
        assert_eq!(read, body());
        let journal = Journal::open(file.try_clone().unwrap(), &read).unwrap();
        journal.states().set(63, State::Removed);
        journal.note_incident("page 3 is lost");
        let other = Journal::open(file, &read).unwrap();
        assert_eq!(other.states().get(63), State::Removed);
        assert_eq!(other.incident(), "page 3 is lost");
    }

    #[test]
    fn a_journal_without_a_vm_is_refused() {
        let file = file();
        write(&file, &Body::waiting([7; 16], body().image)).unwrap();
        assert_eq!(refusal(&file), "no VMM has connected to its page server yet");
    }

    #[test]
    fn what_was_changed_or_cut_off_is_refused() {
        let len = layout(&body()).0 as u64;
        for at in [0, 8, 16, 24, 40, 60, 100, 140, TAIL_AT as u64, TAIL_AT as u64 + 20] {
            let file = written();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
            assert!(read(&file).is_err(), "byte {at}");
        }
        for size in [0, 10, FIXED_BYTES as u64, TAIL_AT as u64 + 8, len - 1] {
            let file = written();
            file.set_len(size).unwrap();
            assert!(refusal(&file).starts_with("truncated"), "{size} bytes");
        }
    }

    #[test]
    fn an_intent_outside_the_vm_is_not_believed() {
        let journal = Journal::private(&body()).unwrap();
        let installer = &journal.live().installers[DEMAND];
        installer.intend(&(60..64), Kind::Zero);
        let unfinished = Unfinished { pages: 60..64, before: 0, kind: Kind::Zero, brought: None };
        assert_eq!(installer.unfinished(64), Some(unfinished.clone()));
        assert_eq!(installer.unfinished(63), None);
        installer.brought(4);
        assert_eq!(installer.unfinished(64), Some(Unfinished { brought: Some(4), ..unfinished.clone() }));
        installer.brought(5);
        assert_eq!(installer.unfinished(64), None);
        installer.settle(&unfinished, 3);
        installer.settle(&unfinished, 3);
        assert_eq!(journal.live().installs(), 3);
        installer.intend_nothing();
        assert_eq!(installer.unfinished(64), None);
    }
}
