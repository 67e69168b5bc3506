//! A VM whose descriptors lead nowhere: for what is done without asking the kernel for memory.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmd_core::internals::image::Image;
use vmd_core::internals::journal::Journal;
use vmd_core::internals::regions::Regions;
use vmd_core::internals::uffd::Uffd;
use vmd_core::internals::vm::{Gate, Limits, Outside, Process, Vm};

pub fn serve(regions: Regions, image: File, journal: Journal, taken_over: bool) -> Vm {
    Vm {
        uffd: Uffd::new(File::open("/dev/null").unwrap().into(), Vec::new()),
        image: Arc::new(Image::new(image.into())),
        regions,
        gate: Gate::default(),
        process: Process { pidfd: None, pid: std::process::id() },
        limits: Limits::default(),
        ending: AtomicBool::new(false),
        death: None,
        watch: None,
        taken_over,
        outside: Arc::new(Outside::new(journal, None).unwrap()),
    }
}

/// An empty file in memory.
pub fn memory_file() -> File {
    // SAFETY: the name is a valid string; the new descriptor is owned here and nowhere else.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: as above.
    unsafe { OwnedFd::from_raw_fd(fd) }.into()
}
