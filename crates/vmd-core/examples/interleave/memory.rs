//! The guest's memory: pages of this process, registered with a userfaultfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vmd_core::internals::regions::Region;

use crate::plan::{PAGE, PAGES_MAX, Span};

const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const API: u64 = 0xaa;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;
/// Faults of user mode only, which needs no privilege; the kernel does not touch the guests' memory here.
const USER_MODE_ONLY: i32 = 1;
/// Room for all spans, with an unregistered page behind each.
const ARENA_BYTES: usize = (PAGES_MAX + 4) * PAGE;

/// Addresses that all interleavings of a process use, one after the other.
pub struct Arena {
    start: *mut u8,
    pagemap: File,
}

impl Arena {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            start: map(std::ptr::null_mut(), ARENA_BYTES, libc::PROT_NONE, 0)?,
            pagemap: File::open("/proc/self/pagemap")?,
        })
    }

    /// Fresh memory and a fresh userfaultfd. Nobody may touch what was there before.
    pub fn fresh(&self, spans: &[Span]) -> io::Result<(OwnedFd, Vec<Region>)> {
        map(self.start, ARENA_BYTES, libc::PROT_NONE, libc::MAP_FIXED)?;
        let uffd = userfaultfd()?;
        let mut at = 0;
        let mut regions = Vec::new();
        for span in spans {
            let size = span.pages * PAGE;
            // SAFETY: inside the arena, which has room for all spans of a plan.
            let base = map(unsafe { self.start.add(at) }, size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED)?;
            register(&uffd, base as u64, size as u64)?;
            regions.push(Region { base: base as u64, size: size as u64, offset: (span.image * PAGE) as u64 });
            at += size + PAGE;
        }
        Ok((uffd, regions))
    }

    /// Whether each page of the regions is there.
    pub fn resident(&self, regions: &[Region]) -> io::Result<Vec<bool>> {
        let mut found = Vec::new();
        for region in regions {
            let mut entries = vec![0; region.size as usize / PAGE * 8];
            self.pagemap.read_exact_at(&mut entries, region.base / PAGE as u64 * 8)?;
            found.extend(entries.chunks_exact(8).map(|entry| entry[7] & 0xc0 != 0)); // present or swapped out
        }
        Ok(found)
    }
}

fn map(at: *mut u8, size: usize, protection: i32, flags: i32) -> io::Result<*mut u8> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping where the kernel likes, or in place of a part of the arena.
    match unsafe { libc::mmap(at.cast(), size, protection, flags, -1, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        start => Ok(start.cast()),
    }
}

/// A userfaultfd that tells of removals. The error is that of a host that does not let us have one.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the new descriptor is owned here and nowhere else.
    let uffd = unsafe {
        match libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) {
            -1 => return Err(io::Error::last_os_error()),
            fd => OwnedFd::from_raw_fd(fd as i32),
        }
    };
    control(&uffd, UFFDIO_API, &mut [API, FEATURE_EVENT_REMOVE, 0])?;
    Ok(uffd)
}

fn register(uffd: &OwnedFd, start: u64, len: u64) -> io::Result<()> {
    control(uffd, UFFDIO_REGISTER, &mut [start, len, MODE_MISSING, 0])
}

/// `words`: the argument of the request, all of whose fields are 64 bits.
fn control(uffd: &OwnedFd, request: u64, words: &mut [u64]) -> io::Result<()> {
    // SAFETY: both requests read and write as many words as are passed.
    match unsafe { libc::ioctl(uffd.as_raw_fd(), request as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
