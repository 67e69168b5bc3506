//! The memory file. Read with pread only: a bad sector under a mapping would be a SIGBUS.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// From `<linux/magic.h>`.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// An open memory file and the byte ranges of it that hold data; the rest are holes: known zeros.
pub struct Image {
    file: File,
    size: u64,
    in_memory: bool, // tmpfs: a read never waits, and RWF_NOWAIT is not known there
    extents: Vec<(u64, u64)>,
}

impl Image {
    /// A file system that cannot tell holes from data has no holes.
    pub fn new(fd: OwnedFd) -> Self {
        let file = File::from(fd);
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        let extents = data_extents(&file, size).unwrap_or_else(|_| vec![(0, size)]);
        let in_memory = is_in_memory(&file);
        Self { file, size, in_memory, extents }
    }

    /// Fill `buffer` from `offset`. A file that ends inside is an error like a bad sector.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Fill `buffer` from `offset` if that needs no wait for storage. False: it does, or it fails.
    pub fn read_now(&self, buffer: &mut [u8], offset: u64) -> bool {
        if self.in_memory {
            return self.read(buffer, offset).is_ok();
        }
        let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: one iovec over a buffer that is valid, and borrowed mutably, for its whole length.
        let read = unsafe {
            libc::preadv2(self.file.as_raw_fd(), &raw const part, 1, offset as libc::off_t, libc::RWF_NOWAIT)
        };
        read == buffer.len() as isize
    }

    /// Whether no byte of the range is in a data extent. What is past the end is lost, not a hole.
    pub fn is_hole(&self, offset: u64, len: u64) -> bool {
        if offset + len > self.size {
            return false;
        }
        let next = self.extents.partition_point(|&(_, end)| end <= offset);
        self.extents.get(next).is_none_or(|&(start, _)| start >= offset + len)
    }
}

/// lseek(2) SEEK_DATA and SEEK_HOLE; a file system without holes reports one extent.
fn data_extents(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut extents = Vec::new();
    let mut position = 0;
    while position < size {
        let start = match seek(file, position, libc::SEEK_DATA) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break, // only a hole is left
            other => other?,
        };
        position = seek(file, start, libc::SEEK_HOLE)?;
        extents.push((start, position));
    }
    Ok(extents)
}

fn is_in_memory(file: &File) -> bool {
    // SAFETY: all zeros is a valid statfs; fstatfs writes one through a valid pointer.
    let kind = unsafe {
        let mut status: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &raw mut status) < 0 {
            return false;
        }
        status.f_type
    };
    kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC
}

fn seek(file: &File, position: u64, whence: i32) -> io::Result<u64> {
    // SAFETY: lseek touches no memory.
    let found = unsafe { libc::lseek(file.as_raw_fd(), position as libc::off_t, whence) };
    if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_what_no_extent_touches() {
        let file = File::open("/dev/null").unwrap();
        let image = Image { file, size: 1 << 20, in_memory: false, extents: vec![(4096, 8192), (16384, 20480)] };
        assert!(image.is_hole(0, 4096));
        assert!(!image.is_hole(0, 4097));
        assert!(!image.is_hole(4096, 4096));
        assert!(image.is_hole(8192, 8192));
        assert!(!image.is_hole(8192, 8193));
        assert!(image.is_hole(20480, (1 << 20) - 20480));
        assert!(!image.is_hole(20480, 1 << 20));
    }
}
