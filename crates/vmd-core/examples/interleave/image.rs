//! The memory file of all interleavings: no two of its words are alike, some of its pages are holes.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use crate::chance::Chance;
use crate::plan::PAGE;

pub const PAGES: usize = 192;
pub const WORDS: usize = PAGE / 8;
const HOLES: [usize; 8] = [9, 10, 27, 28, 29, 46, 105, 106];

/// All words of all pages. None is zero but in a hole.
pub fn words() -> Vec<[u64; WORDS]> {
    let word = |page: usize, at: usize| Chance::new((page * WORDS + at) as u64).draw().max(1);
    let page = |page| std::array::from_fn(|at| if HOLES.contains(&page) { 0 } else { word(page, at) });
    (0..PAGES).map(page).collect()
}

/// An anonymous file of it.
pub fn file() -> io::Result<File> {
    let file = anonymous(c"memory")?;
    file.set_len((PAGES * PAGE) as u64)?;
    for (page, words) in words().iter().enumerate().filter(|(page, _)| !HOLES.contains(page)) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, (page * PAGE) as u64)?;
    }
    Ok(file)
}

pub fn anonymous(name: &std::ffi::CStr) -> io::Result<File> {
    // SAFETY: a valid name; the new descriptor is owned here and nowhere else.
    unsafe {
        match libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}
