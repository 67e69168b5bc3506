//! One VM of a pager: the descriptors that it is served by, kept to be given to a standby.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use super::message::DESCRIPTORS;
use crate::adopt::{self, words};
use crate::body::Body;
use crate::core::{Core, Parts, Seam};
use crate::journal::Journal;
use crate::vm::Process;
use crate::{host, journal};

/// Page servers that may crash in a VM's threads before it is given up.
const CRASHES_MAX: u64 = 2;

pub struct Hold {
    pub name: String,
    pub body: Body,
    journal: File,
    uffd: OwnedFd,
    pidfd: OwnedFd,
    image: OwnedFd,
}

impl Hold {
    /// From what a client sent, which is checked, though he is one of us: he may be wrong.
    pub fn check(name: String, descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        let count = descriptors.len();
        let [journal, uffd, pidfd, image]: [OwnedFd; DESCRIPTORS] =
            descriptors.try_into().map_err(|_| format!("expected {DESCRIPTORS} descriptors, got {count}"))?;
        let journal = File::from(journal);
        let body = journal::read(&journal).map_err(|refusal| format!("journal: {}", refusal.0))?;
        if !fs::read_link(host::own_fd(&uffd)).is_ok_and(|target| target.as_os_str() == host::USERFAULTFD) {
            return Err("the second descriptor is not a userfaultfd".into());
        }
        if host::pid_of(&pidfd) != Some(body.vmm_pid) {
            return Err(format!("the third descriptor is not a pidfd of process {}", body.vmm_pid));
        }
        let image = File::from(image);
        match adopt::image_id(&image, &body.image.path) {
            Ok(found) if found == body.image => {}
            _ => return Err("the fourth descriptor is not the image of the journal".into()),
        }
        // Last: what is refused is left as it was.
        if !host::lock(&journal).map_err(|error| format!("journal: {}", words(&error)))? {
            return Err("journal: locked: another page server is alive on it".into());
        }
        Ok(Self { name, body, journal, uffd, pidfd, image: image.into() })
    }

    /// Whether the VMM of a SERVE has exited while it was on its way.
    pub fn is_over(descriptors: &[OwnedFd]) -> bool {
        let exited = |pidfd: &OwnedFd| Process { pidfd: pidfd.try_clone().ok(), pid: 0 }.has_exited();
        descriptors.get(2).is_some_and(exited)
    }

    /// From what was found by a journal alone. None: the VMM has exited.
    pub fn found(name: String, found: adopt::Found) -> Option<Self> {
        let (body, journal) = (found.body, found.journal);
        Some(Self { name, body, journal, uffd: found.uffd?, pidfd: found.pidfd, image: found.image })
    }

    /// As a SERVE has them.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; DESCRIPTORS] {
        [self.journal.as_fd(), self.uffd.as_fd(), self.pidfd.as_fd(), self.image.as_fd()]
    }

    /// What serves it, once it is started. `second`: another page server serves it until then.
    pub fn prepare(&self, second: bool) -> std::io::Result<Core> {
        let journal = Journal::open(self.journal.try_clone()?, &self.body)?;
        let taken_over = second || journal.live().server_pid.load(Ordering::Relaxed) != 0;
        Core::new(Parts {
            name: Some(self.name.clone()),
            uffd: self.uffd.try_clone()?,
            pidfd: Some(self.pidfd.try_clone()?),
            image: self.image.try_clone()?,
            journal,
            body: self.body.clone(),
            taken_over,
            seam: Seam::default(),
        })
    }

    /// Let `core` serve it, unless page servers crash on it. Says why it was given up; its VMM is killed then.
    pub fn start(&self, core: &Core) -> Result<(), String> {
        let crashes = core.outside.journal.live().crashes.load(Ordering::Relaxed);
        let started = match crashes {
            CRASHES_MAX.. => Err(format!("{crashes} page servers have crashed on it")),
            _ => core.start().map_err(|error| format!("a thread: {}", words(&error))),
        };
        if let Err(why) = &started {
            core.outside.journal.give_up(why);
            self.kill();
        }
        started
    }

    /// Whether it was given up before; then its VMM is killed again, should whoever gave it up have died too soon.
    pub fn is_given_up(&self) -> bool {
        let journal = self.journal.try_clone().and_then(|file| Journal::open(file, &self.body));
        let given_up = journal.is_ok_and(|journal| journal.is_given_up());
        if given_up {
            self.kill();
        }
        given_up
    }

    /// SIGKILL to the VMM: never left hanging.
    pub fn kill(&self) {
        Process { pidfd: self.pidfd.try_clone().ok(), pid: self.body.vmm_pid }.kill();
    }

    /// Whether `other` is of the same VMM, which has one userfaultfd, and that one reader.
    pub fn is_of_vmm(&self, other: &Self) -> bool {
        let of = |hold: &Self| (hold.body.vmm_pid, hold.body.vmm_start);
        of(self) == of(other)
    }

    /// Whether `other` is the same VM again: its name, and the journal that it is served from.
    pub fn is_same(&self, other: &Self) -> bool {
        let of = |hold: &Self| adopt::image_id(&hold.journal, b"").ok().map(|id| (id.device, id.inode));
        self.name == other.name && of(self).is_some() && of(self) == of(other)
    }
}
