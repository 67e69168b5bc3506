//! What makes this process a pager: its memory stays, its descriptors suffice, its signals wait.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::log;

/// Room for 6,000 VMs of eleven descriptors.
const DESCRIPTORS_MAX: libc::rlim_t = 1 << 16;

/// Do all of it; what this user may not do is said and done without.
pub fn prepare(name: &std::ffi::CStr) {
    rename(name);
    // SAFETY: a valid rlimit to write and to read; the others touch no memory of ours.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < DESCRIPTORS_MAX {
            limit.rlim_cur = limit.rlim_max.min(DESCRIPTORS_MAX);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
        // With a limit, MCL_FUTURE would make later allocations fail; the journals are locked in any case.
        if libc::geteuid() == 0 && libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) < 0 {
            log::line(&format!("memory is not locked: {}", io::Error::last_os_error()));
        }
    }
    // The last that the kernel should take when memory is short: every VM waits for us.
    let _ = fs::write("/proc/self/oom_score_adj", "-999");
}

/// What `ps` shows.
pub fn rename(name: &std::ffi::CStr) {
    // SAFETY: a valid string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Descriptors that we inherited are not for whom we start.
pub fn keep_from_children(fds: &[&OwnedFd]) -> io::Result<()> {
    for fd in fds {
        // SAFETY: no memory is passed.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// SIGTERM and SIGINT as a descriptor; for all threads that are started after this.
pub fn signals() -> io::Result<OwnedFd> {
    // SAFETY: a valid sigset; the new descriptor is owned here and nowhere else.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}
