//! What the host knows: this boot, a process by its start time, the descriptors that it holds.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

/// What the link of a userfaultfd in /proc says.
pub const USERFAULTFD: &str = "anon_inode:[userfaultfd]";
/// A look takes microseconds, unless its process loses its CPU in the middle of it.
const LOOK: Duration = Duration::from_millis(1);
const LOOKS_MAX: u32 = 2000;
const START_TIME_FIELD: usize = 22; // proc(5), counted from 1

/// The random id of this boot: pids and start times of another one mean nothing.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let byte =
        |at: usize| std::str::from_utf8(&digits[at..at + 2]).ok().and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes: Option<Vec<u8>> = (digits.len() == 32).then(|| (0..32).step_by(2).map_while(byte).collect());
    bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(|| io::Error::other("boot_id: not a UUID"))
}

/// When a process was started, clock ticks since boot (proc(5)).
pub fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest); // begins with field 3
    let field = after_name.split_ascii_whitespace().nth(START_TIME_FIELD - 3);
    field.and_then(|ticks| ticks.parse().ok()).ok_or_else(|| io::Error::other("no start time in its stat"))
}

/// pidfd_open(2).
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the new descriptor is owned here and nowhere else.
    unsafe { owned(libc::syscall(libc::SYS_pidfd_open, pid, 0)) }
}

/// The numbers of all userfaultfds that a process holds.
pub fn userfaultfds(pid: u32) -> io::Result<Vec<RawFd>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        match fs::read_link(entry.path()) {
            Ok(target) if target.as_os_str() == USERFAULTFD => {
                found.extend(entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()));
            }
            // Closed meanwhile; but one that may not be looked at may be the one that is looked for.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(found)
}

/// The link in /proc of one of our own descriptors.
pub fn own_fd(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Whose pidfd this is; None when it is none, or its process has been reaped.
pub fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
}

/// pidfd_getfd(2): a copy of another process's descriptor. Needs ptrace permission.
pub fn pidfd_getfd(pidfd: &OwnedFd, fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; the new descriptor is owned here and nowhere else.
    unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0)) }
}

/// flock(2), exclusive: false where somebody else has it.
///
/// Who looks whether it is locked has it himself for a moment, shared (`vmd.pager.look`). Only for him this waits.
pub fn lock(file: &fs::File) -> io::Result<bool> {
    for _ in 0..LOOKS_MAX {
        if flock(file, libc::LOCK_EX)? {
            return Ok(true);
        }
        if !flock(file, libc::LOCK_SH)? {
            return Ok(false);
        }
        unlock(file);
        std::thread::sleep(LOOK);
    }
    Ok(false)
}

fn flock(file: &fs::File, kind: libc::c_int) -> io::Result<bool> {
    // SAFETY: no memory is passed.
    match unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
            error => Err(error),
        },
    }
}

/// Open a lock file and lock it. None: somebody else has it, or has just removed it.
pub fn lock_file(path: &Path) -> io::Result<Option<fs::File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let ours = lock(&file)? && file.metadata()?.nlink() > 0;
    Ok(ours.then_some(file))
}

/// Give up the lock, for all who share this open file.
pub fn unlock(file: &fs::File) {
    // SAFETY: no memory is passed; it cannot fail on an open file.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
}

/// # Safety
/// `result` must be a system call's: a new descriptor that nobody else owns, or negative.
unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: by this function's own contract.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found() {
        let pid = std::process::id();
        assert_ne!(boot_id().unwrap(), [0; 16]);
        assert!(start_ticks(pid).unwrap() > 0);
        assert!(userfaultfds(pid).unwrap().is_empty());
        assert!(pidfd_open(pid).is_ok());
    }

    #[test]
    fn a_look_at_a_lock_does_not_keep_it_from_being_taken() {
        let path = std::env::temp_dir().join(format!("vmd-lock-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        let other = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(flock(&other, libc::LOCK_SH).unwrap());
        let look = std::thread::spawn(move || {
            std::thread::sleep(20 * LOOK);
            drop(other);
        });
        assert!(lock(&file).unwrap());
        look.join().unwrap();
    }

    #[test]
    fn a_lock_that_somebody_has_is_not_waited_for() {
        let path = std::env::temp_dir().join(format!("vmd-locked-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        let other = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(lock(&other).unwrap());
        let began = std::time::Instant::now();
        assert!(!lock(&file).unwrap());
        assert!(began.elapsed() < LOOK * LOOKS_MAX);
    }
}
