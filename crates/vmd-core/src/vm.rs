//! One VM: what its threads share, and the gate between them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::death::{Death, Point, Watch, kill_process, stop_dead};
use crate::image::Image;
use crate::journal::Journal;
use crate::pager::log;
use crate::regions::Regions;
use crate::states::{State, States};
use crate::stats::{Counters, CpuMeter, Kind, monotonic};
use crate::uffd::{Outcome, Uffd};

/// The zero source of 2 MiB pages, which know no ZEROPAGE (EINVAL on hugetlbfs).
static ZEROS: [u8; HUGE_PAGE] = [0; HUGE_PAGE];
const HUGE_PAGE: usize = 2 << 20;

/// Bounds that Python decides (`vmd.limits`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// A fault that waits longer fails the VM.
    pub fault_unserved: Duration,
    /// An address space may go this long before its process: freeing large memory takes time.
    pub exit_wait: Duration,
    /// Reads of a page before it counts as lost.
    pub image_read_tries: u32,
    /// Lines that name single lost pages; beyond it they are only counted.
    pub poison_lines_max: u64,
    /// The sequential fallback ends below this share of available memory, percent.
    pub memory_floor_percent: u64,
}

/// What the threads of one VM share. Dropped, and with it the descriptors closed, when the last
/// of them has ended.
pub struct Vm {
    pub uffd: Uffd,
    pub image: Arc<Image>,
    pub regions: Regions,
    pub gate: Gate,
    pub process: Process,
    pub limits: Limits,
    pub ending: AtomicBool,
    pub death: Option<Death>,
    pub watch: Option<Watch>,
    /// Another page server has served it before.
    pub taken_over: bool,
    pub outside: Arc<Outside>,
}

/// The part of a VM that its owner reads, and that stays readable after the end.
pub struct Outside {
    pub journal: Journal,
    pub cpu: CpuMeter,
    pub touched: Mutex<Vec<u64>>,
    pub stop: EventFd,
    pub ended: EventFd,
    /// All of it is to stop dead (see `death`).
    pub dead: AtomicBool,
    /// Another process goes on when this one has ended.
    pub handing_over: AtomicBool,
    name: Option<String>,
    warnings: Mutex<Vec<String>>,
    cpu_before: AtomicU64, // ns, of the page servers before this one
    started: Instant,
    started_at: Duration, // the same instant on CLOCK_MONOTONIC
}

impl Outside {
    /// `name`: of a VM in a pager.
    pub fn new(journal: Journal, name: Option<String>) -> io::Result<Self> {
        Ok(Self {
            cpu: CpuMeter::default(),
            touched: Mutex::default(),
            stop: EventFd::new()?,
            ended: EventFd::new()?,
            dead: AtomicBool::new(false),
            warnings: Mutex::default(),
            cpu_before: AtomicU64::new(0),
            handing_over: AtomicBool::new(false),
            name,
            started: Instant::now(),
            started_at: monotonic(),
            journal,
        })
    }

    pub fn counters(&self) -> &Counters {
        &self.journal.live().counters
    }

    pub fn warn(&self, line: String) {
        match &self.name {
            Some(name) => log::line(&format!("{name}: {line}")),
            None => self.warnings.lock().unwrap().push(line),
        }
    }

    /// In a pager a VM's fault thread has the VM's name.
    pub fn thread_name(&self, otherwise: &str) -> String {
        self.name.clone().unwrap_or_else(|| otherwise.into())
    }

    /// What the page servers before this one have spent counts too.
    pub fn go_on(&self) {
        self.cpu_before.store(self.journal.live().cpu_ns.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.warnings.lock().unwrap())
    }

    /// Publish when the oldest fault that is not yet served was read.
    pub fn set_oldest(&self, read_at: Option<Instant>) {
        let ns = read_at.map_or(0, |at| (self.started_at + (at - self.started)).as_nanos() as u64);
        self.journal.live().oldest_ns.store(ns, Ordering::Relaxed);
    }

    /// CPU time spent on this VM, by page servers before this one too. Published in the journal.
    pub fn cpu(&self) -> Duration {
        let total = Duration::from_nanos(self.cpu_before.load(Ordering::Relaxed)) + self.cpu.total();
        self.journal.live().cpu_ns.store(total.as_nanos() as u64, Ordering::Relaxed);
        total
    }

    /// Stop all threads dead.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Release);
        self.stop.set();
    }
}

impl Vm {
    pub fn counters(&self) -> &Counters {
        self.outside.counters()
    }

    pub fn states(&self) -> States<'_> {
        self.outside.journal.states()
    }

    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed) || self.outside.dead.load(Ordering::Relaxed)
    }

    /// Fault thread: enter the gate as the next one.
    pub fn enter_for_demand(&self) -> RwLockWriteGuard<'_, ()> {
        let guard = self.gate.enter_for_demand();
        if self.outside.dead.load(Ordering::Acquire) {
            stop_dead();
        }
        guard
    }

    /// A place where a test may have ordered the page server to die.
    pub fn pass(&self, point: Point) {
        if let Some(watch) = &self.watch {
            watch(point);
        }
        let Some(death) = &self.death else { return };
        if death.strikes(point) {
            if death.real {
                kill_process();
            }
            self.outside.kill();
            stop_dead();
        }
    }

    /// Do one install between the note that it is intended and the note that it is done.
    ///
    /// `install` returns how many of `pages`, from the first on, it brought, beside its result.
    /// The caller, who is installer number `who`, holds the gate.
    pub fn install<T>(
        &self,
        who: usize,
        pages: std::ops::Range<usize>,
        kind: Kind,
        points: [Point; 3],
        install: impl FnOnce() -> (usize, T),
    ) -> T {
        let [intended, installed, noted] = points;
        let installer = &self.outside.journal.live().installers[who];
        installer.intend(&pages, kind);
        self.pass(intended);
        let (done, result) = install();
        self.pass(installed);
        installer.brought(done as u64);
        for page in pages.start..pages.start + done {
            self.states().set(page, State::Installed);
        }
        self.pass(noted);
        installer.add(kind, done as u64);
        installer.intend_nothing();
        result
    }

    pub fn is_hole(&self, page: usize) -> bool {
        self.image.is_hole(self.regions.offset(page), self.regions.page_size)
    }

    /// Fill a run of pages with zeros.
    pub fn zero(&self, page: usize, pages: usize) -> Outcome {
        let address = self.regions.address(page);
        if self.regions.page_size as usize == HUGE_PAGE {
            debug_assert_eq!(pages, 1);
            return self.uffd.copy(address, &ZEROS);
        }
        self.uffd.zero(address, pages as u64 * self.regions.page_size)
    }

    /// The most pages that one call of `zero` takes: larger runs hold the gate for too long.
    pub fn zero_run_max(&self) -> usize {
        if self.regions.page_size as usize == HUGE_PAGE { 1 } else { 512 }
    }
}

/// Keeps a filler's check of a page's state and its install in one piece against REMOVE.
///
/// The fault thread holds the gate alone, for a whole turn: read messages, apply them, serve the faults;
/// the fillers share it around check, install and note. So no REMOVE is *read* between a filler's check
/// and its note; and before it is read, the kernel answers installs with EAGAIN. Without this a
/// page could be removed and then filled with stale bytes, with return code 0.
///
/// Nobody waits for the kernel while holding it: installs fail rather than wait for a pending
/// REMOVE, and reads do not block.
#[derive(Default)]
pub struct Gate {
    lock: RwLock<()>,
    demand: AtomicBool,
}

impl Gate {
    /// Fault thread: enter as the next one. A lock alone is not fair: the fillers, which leave
    /// and enter again at once, would mostly win.
    pub fn enter_for_demand(&self) -> RwLockWriteGuard<'_, ()> {
        self.demand.store(true, Ordering::Release);
        let guard = self.lock.write().unwrap_or_else(PoisonError::into_inner); // see `enter_behind_demand`
        self.demand.store(false, Ordering::Release);
        guard
    }

    /// Filler: enter when the fault thread does not want to.
    ///
    /// A thread that stopped dead inside has left nothing half done that the lock guards.
    pub fn enter_behind_demand(&self) -> RwLockReadGuard<'_, ()> {
        while self.demand.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        self.lock.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The VMM's process, known by its pidfd. None: it had gone before a pidfd could be had.
pub struct Process {
    pub pidfd: Option<OwnedFd>,
    /// For /proc, and only for what does no harm should it be another's by now.
    pub pid: u32,
}

impl Process {
    pub fn raw(&self) -> RawFd {
        self.pidfd.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    pub fn has_exited(&self) -> bool {
        self.exits_within(Duration::ZERO)
    }

    pub fn exits_within(&self, most: Duration) -> bool {
        let mut fd = libc::pollfd { fd: self.raw(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd. An interrupted wait has seen no exit.
        self.pidfd.is_none() || unsafe { libc::poll(&raw mut fd, 1, most.as_millis() as i32) } == 1
    }

    /// SIGKILL; only SIGKILL ends a VMM that waits for a page.
    pub fn kill(&self) {
        // SAFETY: no memory is passed. A failure means that the process has gone already.
        unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.raw(), libc::SIGKILL, std::ptr::null::<libc::c_void>(), 0)
        };
    }
}

/// An eventfd that is clear or set, and closed by its owner when nobody waits for it any more.
pub struct EventFd(Mutex<Option<OwnedFd>>);

impl EventFd {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed; the new descriptor is owned here and nowhere else.
        unsafe {
            match libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(Mutex::new(Some(OwnedFd::from_raw_fd(fd))))),
            }
        }
    }

    /// The descriptor, to wait for; -1 after `close`.
    pub fn raw(&self) -> RawFd {
        self.0.lock().unwrap().as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    pub fn set(&self) {
        if let Some(fd) = &*self.0.lock().unwrap() {
            let one = 1u64;
            // SAFETY: writes eight bytes from a valid place. It can only fail when it is set already.
            unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    pub fn clear(&self) {
        if let Some(fd) = &*self.0.lock().unwrap() {
            let mut count = 0u64;
            // SAFETY: reads eight bytes into a valid place. It can only fail when it is clear already.
            unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
        }
    }

    pub fn close(&self) {
        self.0.lock().unwrap().take();
    }
}
