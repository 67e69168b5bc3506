//! What the fault thread sleeps on.
//!
//! epoll rather than poll: with four descriptors, poll puts the thread on four wait queues and
//! takes it off again for each fault.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// What there is to do beside reading messages, which each turn does.
#[derive(Clone, Copy, Default)]
pub struct Ready {
    /// Something has happened.
    pub any: bool,
    /// epoll's word for a userfaultfd in blocking mode.
    pub blocking: bool,
    pub stop: bool,
    pub exit: bool,
    pub storage: bool,
}

/// Which descriptor an event is of.
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Source {
    Uffd,
    Stop,
    Process,
    Storage,
}

const SOURCES: usize = 4;

pub struct Waiter(OwnedFd);

impl Waiter {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed; the new descriptor is owned here and nowhere else.
        unsafe {
            match libc::epoll_create1(libc::EPOLL_CLOEXEC) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Watch `fd` for as long as it is open.
    pub fn add(&self, fd: RawFd, source: Source) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: source as u64 };
        // SAFETY: the kernel reads one event through a valid pointer.
        match unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Sleep until there is something to do, at most `most`. An interrupted sleep finds nothing.
    pub fn wait(&self, most: Option<Duration>) -> Ready {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; SOURCES];
        let timeout = most
            .map(|most| libc::timespec { tv_sec: most.as_secs() as libc::time_t, tv_nsec: most.subsec_nanos().into() });
        let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: room for as many events as it says, a null or valid timeout, no signal mask.
        let count = unsafe {
            libc::syscall(
                libc::SYS_epoll_pwait2,
                self.0.as_raw_fd(),
                events.as_mut_ptr(),
                SOURCES,
                timeout,
                std::ptr::null::<libc::sigset_t>(),
                0,
            )
        };
        let mut ready = Ready { any: count > 0, ..Ready::default() };
        for event in &events[..count.max(0) as usize] {
            let (bits, source) = (event.events, event.u64);
            match source {
                uffd if uffd == Source::Uffd as u64 => ready.blocking = bits & libc::EPOLLERR as u32 != 0,
                stop if stop == Source::Stop as u64 => ready.stop = true,
                process if process == Source::Process as u64 => ready.exit = true,
                _ => ready.storage = true,
            }
        }
        ready
    }
}
