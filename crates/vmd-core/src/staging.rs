//! Staging buffers: where the reader puts page contents and the installer takes them from.
//!
//! A fresh buffer costs a page fault for each page of it, 10-20 ms for 24 MiB; so they are
//! faulted in when made, and those of 4 KiB guests are kept for the next VM.

use std::sync::Mutex;

/// From here on larger reads do not get cheaper; a 2 MiB page has buffers of its own size.
const SIZE: usize = 1 << 20;
const KEPT_MAX: usize = 16;

static KEPT: Mutex<Vec<Buffer>> = Mutex::new(Vec::new());

/// Page-aligned, faulted-in memory.
pub struct Buffer {
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value alone, whichever thread has it.
unsafe impl Send for Buffer {}

impl Buffer {
    /// A kept buffer of `SIZE`, or a new one of at least `page_size`.
    pub fn take(page_size: usize) -> std::io::Result<Self> {
        if page_size <= SIZE {
            if let Some(buffer) = KEPT.lock().unwrap().pop() {
                return Ok(buffer);
            }
        }
        Self::map(page_size.max(SIZE))
    }

    /// Keep it for the next VM, within bounds.
    pub fn give_back(self) {
        let mut kept = KEPT.lock().unwrap();
        if self.len == SIZE && kept.len() < KEPT_MAX {
            kept.push(self);
        }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start` and `len` are those of a live private mapping; `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    fn map(len: usize) -> std::io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self { start: start.cast(), len })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; nothing borrows it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}
