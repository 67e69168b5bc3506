//! Finding all that a VM needs from nothing but its journal: its process, its userfaultfd, its image.
//!
//! Every check comes before any change: what is refused is left as it was, byte for byte.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;
use std::{ffi::OsStr, io};

use crate::body::{Body, ImageId};
use crate::core::{Parts, Seam};
use crate::journal::Journal;
use crate::vm::Process;
use crate::{host, journal};

/// A VMM without descriptors is one that was killed and has not quite ended.
const DYING: Duration = Duration::from_secs(1);

/// What an adopted VM is served with.
pub struct Found {
    pub body: Body,
    pub journal: File,
    pub image: OwnedFd,
    pub pidfd: OwnedFd,
    /// None: the VMM has exited meanwhile.
    pub uffd: Option<OwnedFd>,
}

impl Found {
    /// To serve it; None when the VMM has exited. From here on the journal changes.
    pub fn into_parts(self, seam: Seam) -> io::Result<Option<Parts>> {
        let Some(uffd) = self.uffd else { return Ok(None) };
        let journal = Journal::open(self.journal, &self.body)?;
        let (pidfd, image) = (Some(self.pidfd), self.image);
        Ok(Some(Parts { uffd, pidfd, image, journal, body: self.body, taken_over: true, name: None, seam }))
    }
}

/// Why a VM is not adopted.
pub struct Refused {
    pub why: String,
    /// Another page server is alive on it.
    pub served: bool,
    /// A VMM that is frozen, and that nobody can serve.
    frozen: Option<Box<Frozen>>,
}

struct Frozen {
    body: Body,
    journal: File,
    pidfd: OwnedFd,
}

impl Refused {
    /// Give the VM up, if it is one that would hang for ever: the reason into its journal, SIGKILL to its VMM.
    /// Whether it was.
    pub fn give_up(self) -> bool {
        let Some(frozen) = self.frozen else { return false };
        let Frozen { body, journal, pidfd } = *frozen;
        if let Ok(journal) = Journal::open(journal, &body) {
            journal.give_up(&self.why);
        }
        Process { pidfd: Some(pidfd), pid: body.vmm_pid }.kill();
        true
    }
}

impl From<String> for Refused {
    fn from(why: String) -> Self {
        Self { why, served: false, frozen: None }
    }
}

/// Look for everything. `pid`: the VMM that the caller means; None takes the journal's word.
pub fn find(path: &Path, pid: Option<u32>) -> Result<Found, Refused> {
    let refused = |why: String| format!("journal {}: {why}", path.display());
    let file = open_journal(path).map_err(|error| refused(words(&error)))?;
    if !host::lock(&file).map_err(|error| refused(words(&error)))? {
        let why = refused("locked: another page server is alive on it".into());
        return Err(Refused { why, served: true, frozen: None });
    }
    let body = journal::read(&file).map_err(|refusal| refused(refusal.0))?;
    let pidfd = find_process(&body, pid).map_err(refused)?;
    let rest = find_image(&body.image).and_then(|image| Ok((image, find_uffd(body.vmm_pid, &pidfd)?)));
    let (image, uffd) = match rest {
        Ok(rest) => rest,
        Err(why) => {
            return Err(Refused { why, served: false, frozen: Some(Box::new(Frozen { body, journal: file, pidfd })) });
        }
    };
    Ok(Found { body, journal: file, image, pidfd, uffd })
}

/// Never waits, as it would for a FIFO's writer, and follows no link at its end.
fn open_journal(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("not a regular file")),
    }
}

fn find_process(body: &Body, pid: Option<u32>) -> Result<OwnedFd, String> {
    if let Some(pid) = pid.filter(|&pid| pid != body.vmm_pid) {
        return Err(format!("its VMM is process {}, not {pid}", body.vmm_pid));
    }
    if host::boot_id().map_err(|error| words(&error))? != body.boot_id {
        return Err("of another boot".into());
    }
    let gone = |_| format!("its VMM, process {}, does not run", body.vmm_pid);
    let pidfd = host::pidfd_open(body.vmm_pid).map_err(gone)?;
    let started = host::start_ticks(body.vmm_pid).map_err(gone)?;
    if started != body.vmm_start {
        let expected = body.vmm_start;
        return Err(format!("process {} is not its VMM: expected start time {expected}, got {started}", body.vmm_pid));
    }
    let process = Process { pidfd: Some(pidfd), pid: body.vmm_pid };
    if process.has_exited() {
        return Err(gone(io::Error::other("zombie")));
    }
    Ok(process.pidfd.expect("put there above"))
}

fn find_image(wanted: &ImageId) -> Result<OwnedFd, String> {
    let path = Path::new(OsStr::from_bytes(&wanted.path));
    let refused = |why: String| format!("memory {}: {why}", path.display());
    let flags = libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| refused(words(&error)))?;
    let found = image_id(&file, &wanted.path).map_err(|error| refused(words(&error)))?;
    match found == *wanted {
        true => Ok(file.into()),
        false => Err(refused("not the image of the journal: another file, or changed since".into())),
    }
}

/// What tells an image from every other file of this boot.
pub fn image_id(file: &File, path: &[u8]) -> io::Result<ImageId> {
    let status = file.metadata()?;
    Ok(ImageId {
        device: status.dev(),
        inode: status.ino(),
        size: status.size(),
        mtime_ns: status.mtime() * 1_000_000_000 + status.mtime_nsec(),
        path: path.to_vec(),
    })
}

fn find_uffd(pid: u32, pidfd: &OwnedFd) -> Result<Option<OwnedFd>, String> {
    let process = Process { pidfd: pidfd.try_clone().ok(), pid };
    let copy = || {
        let numbers = host::userfaultfds(pid)?;
        let [number] = numbers[..] else { return Ok(Err(numbers.len())) };
        host::pidfd_getfd(pidfd, number).map(Ok)
    };
    match copy() {
        Ok(Ok(uffd)) => Ok(Some(uffd)),
        Ok(Err(0)) if process.exits_within(DYING) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) && process.exits_within(DYING) => Ok(None),
        _ if process.has_exited() => Ok(None),
        Ok(Err(count)) => Err(format!("vmm {pid}: expected one userfaultfd, it holds {count}")),
        Err(error) => Err(format!("vmm {pid}: its userfaultfd: {} (ptrace permission is needed)", words(&error))),
    }
}

/// The kernel's words without Rust's "(os error N)".
pub fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.clone(), |(words, _)| words.to_string())
}
