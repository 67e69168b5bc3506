//! poll(2) over descriptors that are known by their place.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

#[derive(Default)]
pub struct Poll {
    entries: Vec<libc::pollfd>,
}

impl Poll {
    /// Watch for something to read, or the end. Returns the place.
    pub fn add(&mut self, fd: RawFd) -> usize {
        self.push(fd, libc::POLLIN)
    }

    pub fn add_if(&mut self, wanted: bool, fd: RawFd) -> Option<usize> {
        wanted.then(|| self.add(fd))
    }

    /// Watch for room to write as well.
    pub fn add_writing(&mut self, fd: RawFd) -> usize {
        self.push(fd, libc::POLLIN | libc::POLLOUT)
    }

    /// Wait, at most `most`. An interrupted wait finds nothing.
    pub fn wait(&mut self, most: Option<Duration>) -> io::Result<()> {
        let timeout = most.map_or(-1, |most| most.as_millis().min(i32::MAX as u128 - 1) as i32 + 1);
        // SAFETY: as many valid entries as it says.
        let count = unsafe { libc::poll(self.entries.as_mut_ptr(), self.entries.len() as libc::nfds_t, timeout) };
        if count >= 0 {
            return Ok(());
        }
        self.entries.iter_mut().for_each(|entry| entry.revents = 0);
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        }
    }

    /// Whether there is something to read at this place, or an end.
    pub fn ready(&self, place: usize) -> bool {
        self.entries[place].revents & !libc::POLLOUT != 0
    }

    fn push(&mut self, fd: RawFd, events: i16) -> usize {
        self.entries.push(libc::pollfd { fd, events, revents: 0 });
        self.entries.len() - 1
    }
}
