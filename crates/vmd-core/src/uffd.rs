//! One userfaultfd: each call is one system call, each result one named outcome.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::abi;

/// How an install ended. A fault is never dropped: each outcome says what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is in.
    Done,
    /// So many bytes are in; the rest met EAGAIN or EEXIST.
    Partial(u64),
    /// EEXIST: the first page is there already. Its waiters must still be woken.
    Present,
    /// EAGAIN: a REMOVE is queued or its madvise has not returned. Park and retry.
    Later,
    /// ENOENT: no registered range here. Clip, retry by page, ask the pidfd.
    Edge,
    /// ESRCH: the address space is gone.
    Gone,
    /// Anything else.
    Fatal(i32),
}

/// The installs that can be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Copy,
    Zero,
    Poison,
}

/// A test's order: after `after` installs by `op`, the next `count` end in `outcome`.
#[derive(Clone, Debug)]
pub struct Injection {
    pub op: Op,
    pub outcome: Outcome,
    pub count: u32,
    pub after: u32,
}

/// The owner of one userfaultfd.
pub struct Uffd {
    fd: OwnedFd,
    injecting: AtomicBool,
    injections: Mutex<VecDeque<Injection>>,
}

impl Uffd {
    /// `fd` must be a userfaultfd with a finished API handshake, non-blocking.
    pub fn new(fd: OwnedFd, injections: Vec<Injection>) -> Self {
        Self { fd, injecting: AtomicBool::new(!injections.is_empty()), injections: Mutex::new(injections.into()) }
    }

    pub fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Read queued messages to `to`; 0 when there is none. Fewer than asked means that the queue is empty.
    ///
    /// # Safety
    /// `to` must be valid for writes of `count` messages, and nobody else may use them meanwhile.
    pub unsafe fn read(&self, to: *mut abi::Message, count: usize) -> io::Result<usize> {
        // SAFETY: by this function's own contract; any bytes make valid messages.
        let bytes = unsafe { libc::read(self.raw(), to.cast(), count * size_of::<abi::Message>()) };
        if bytes >= 0 {
            return Ok(bytes as usize / size_of::<abi::Message>());
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(0),
            error => Err(error),
        }
    }

    /// Copy `source` to guest address `address` and wake who waits there.
    pub fn copy(&self, address: u64, source: &[u8]) -> Outcome {
        if let Some(outcome) = self.injected(Op::Copy) {
            return outcome;
        }
        let len = source.len() as u64;
        let mut arg = abi::Copy { dst: address, src: source.as_ptr() as u64, len, mode: 0, copy: 0 };
        // SAFETY: the kernel reads `len` bytes of `source`, which lives through the call, and
        // writes guest memory of another process (or memory this process registered itself).
        let errno = unsafe { self.ioctl(abi::UFFDIO_COPY, (&raw mut arg).cast()) };
        outcome(errno, arg.copy, len)
    }

    /// Fill `len` bytes at `address` with zeros (the shared zero page) and wake.
    pub fn zero(&self, address: u64, len: u64) -> Outcome {
        self.fill(Op::Zero, abi::UFFDIO_ZEROPAGE, address, len)
    }

    /// Make the next touch of the range a SIGBUS (Linux 6.6) and wake.
    pub fn poison(&self, address: u64, len: u64) -> Outcome {
        self.fill(Op::Poison, abi::UFFDIO_POISON, address, len)
    }

    /// Wake who waits in the range; they fault again where a page is still missing.
    pub fn wake(&self, address: u64, len: u64) {
        let mut arg = abi::Range { start: address, len };
        // SAFETY: WAKE reads only the range. Its one failure, a range that is not registered any
        // more, leaves nobody waiting there.
        let _ = unsafe { self.ioctl(abi::UFFDIO_WAKE, (&raw mut arg).cast()) };
    }

    fn fill(&self, op: Op, request: u64, address: u64, len: u64) -> Outcome {
        if let Some(outcome) = self.injected(op) {
            return outcome;
        }
        let mut arg = abi::Fill { range: abi::Range { start: address, len }, mode: 0, done: 0 };
        // SAFETY: the kernel touches only the registered range and this argument.
        let errno = unsafe { self.ioctl(request, (&raw mut arg).cast()) };
        outcome(errno, arg.done, len)
    }

    /// Returns 0 or the errno.
    ///
    /// # Safety
    /// `arg` must point to the argument that `request` takes.
    unsafe fn ioctl(&self, request: u64, arg: *mut libc::c_void) -> i32 {
        // SAFETY: by this function's own contract.
        if unsafe { libc::ioctl(self.raw(), request as _, arg) } == 0 {
            return 0;
        }
        io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
    }

    fn injected(&self, op: Op) -> Option<Outcome> {
        if !self.injecting.load(Ordering::Relaxed) {
            return None;
        }
        let mut injections = self.injections.lock().unwrap();
        let at = injections.iter().position(|injection| injection.op == op)?;
        let injection = &mut injections[at];
        if injection.after > 0 {
            injection.after -= 1;
            return None;
        }
        injection.count -= 1;
        let outcome = injection.outcome;
        if injection.count == 0 {
            injections.remove(at);
        }
        Some(outcome)
    }
}

/// `done` is signed: newer kernels repeat the errno in it, older ones leave 0 there.
fn outcome(errno: i32, done: i64, len: u64) -> Outcome {
    match errno {
        0 => Outcome::Done,
        libc::EAGAIN | libc::EEXIST if done > 0 && (done as u64) < len => Outcome::Partial(done as u64),
        libc::EEXIST => Outcome::Present,
        libc::EAGAIN => Outcome::Later,
        libc::ENOENT => Outcome::Edge,
        libc::ESRCH => Outcome::Gone,
        other => Outcome::Fatal(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_signed_and_named() {
        assert_eq!(outcome(0, 4096, 4096), Outcome::Done);
        assert_eq!(outcome(libc::EAGAIN, 8192, 16384), Outcome::Partial(8192));
        assert_eq!(outcome(libc::EAGAIN, -i64::from(libc::EAGAIN), 4096), Outcome::Later);
        assert_eq!(outcome(libc::EAGAIN, 0, 4096), Outcome::Later);
        assert_eq!(outcome(libc::EEXIST, -i64::from(libc::EEXIST), 4096), Outcome::Present);
        assert_eq!(outcome(libc::ENOENT, 0, 4096), Outcome::Edge);
        assert_eq!(outcome(libc::ESRCH, 0, 4096), Outcome::Gone);
        assert_eq!(outcome(libc::EFAULT, 0, 4096), Outcome::Fatal(libc::EFAULT));
    }
}
