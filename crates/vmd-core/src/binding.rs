//! The Python class: configuration in, counters out. No page passes through here.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::adopt;
use crate::arguments::{PyLimits, PySeam, parse_beside};
use crate::body::Body;
use crate::core::{Core, Parts};
use crate::demand::Ended;
use crate::host;
use crate::journal::{self, Journal};
use crate::live::Live;
use crate::pager;
use crate::plan::Beside;
use crate::regions::Region;
use crate::stats::Kind;

/// See `vmd_core.pyi`, which is the manual.
#[pyclass(frozen, name = "Core", module = "vmd_core")]
struct PyCore {
    core: Core,
    vmm_pid: u32,
    page_size: u64,
    guest_bytes: u64,
    regions: usize,
}

#[pymethods]
impl PyCore {
    #[new]
    #[pyo3(signature = (*, uffd, pidfd, vmm_pid, image, image_path, journal, regions, page_size, beside, offsets,
                        prefetch_bytes_max, limits, seam))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python
    fn new(
        py: Python<'_>,
        uffd: RawFd,
        pidfd: RawFd,
        vmm_pid: u32,
        image: RawFd,
        image_path: OsString,
        journal: RawFd,
        regions: Vec<(u64, u64, u64)>,
        page_size: u64,
        beside: &str,
        offsets: &[u8],
        prefetch_bytes_max: u64,
        limits: PyLimits,
        seam: PySeam,
    ) -> PyResult<Self> {
        let (beside, seam) = (parse_beside(beside, offsets, prefetch_bytes_max)?, seam.parse()?);
        let image = File::from(copied(image)?);
        let body = body(vmm_pid, &image, &image_path, regions, page_size, beside, &limits)?;
        let journal = match journal {
            -1 => Journal::private(&body)?,
            fd => Journal::create(copied(fd)?.into(), &body)?,
        };
        let parts = Parts {
            uffd: copied(uffd)?,
            pidfd: (pidfd >= 0).then(|| copied(pidfd)).transpose()?,
            image: image.into(),
            journal,
            body,
            taken_over: false,
            name: None,
            seam,
        };
        Self::build(py, parts)
    }

    /// Go on with the VM of a journal.
    #[staticmethod]
    #[pyo3(signature = (*, journal, vmm_pid, seam))]
    fn adopt(py: Python<'_>, journal: PathBuf, vmm_pid: u32, seam: PySeam) -> PyResult<Option<Self>> {
        let found = py.detach(|| adopt::find(&journal, Some(vmm_pid)));
        let found = found.map_err(|refused| PyValueError::new_err(refused.why))?;
        let parts = found.into_parts(seam.parse()?)?;
        parts.map(|parts| Self::build(py, parts)).transpose()
    }

    fn start(&self) -> PyResult<()> {
        self.core.start().map_err(PyOSError::new_err)
    }

    fn stop(&self) {
        self.core.stop();
    }

    fn kill(&self) {
        self.core.kill();
    }

    fn join(&self, py: Python<'_>) -> (&'static str, Option<String>) {
        match py.detach(|| self.core.join()) {
            Ended::Gone => ("gone", None),
            Ended::Stopped => ("stopped", None),
            Ended::Failed(why) => ("failed", Some(why)),
            Ended::Died => ("died", None),
        }
    }

    #[getter]
    fn ended_fd(&self) -> RawFd {
        self.core.outside.ended.raw()
    }

    /// (VMM's pid, page size, bytes of the guest, number of regions)
    fn vm(&self) -> (u32, u64, u64, usize) {
        (self.vmm_pid, self.page_size, self.guest_bytes, self.regions)
    }

    /// A new pidfd of the VMM, which the caller closes; -1 when it had gone before there was one.
    fn pidfd(&self) -> RawFd {
        self.core.pidfd().map_or(-1, IntoRawFd::into_raw_fd)
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.core.outside.cpu();
        counters(py, &self.core.outside.journal)
    }

    fn touched<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let touched = self.core.outside.touched.lock().unwrap();
        let bytes: Vec<u8> = touched.iter().flat_map(|offset| offset.to_ne_bytes()).collect();
        PyBytes::new(py, &bytes)
    }

    fn warnings(&self) -> Vec<String> {
        self.core.outside.take_warnings()
    }
}

impl PyCore {
    /// A file of many holes, or storage that does not answer, must not hold up other Python threads.
    fn build(py: Python<'_>, parts: Parts) -> PyResult<Self> {
        let body = &parts.body;
        let (vmm_pid, page_size, guest_bytes) = (body.vmm_pid, body.page_size, body.guest_bytes());
        let regions = body.regions.len();
        let core = py.detach(|| Core::new(parts))?;
        Ok(Self { core, vmm_pid, page_size, guest_bytes, regions })
    }
}

fn body(
    vmm_pid: u32,
    image: &File,
    image_path: &OsStr,
    regions: Vec<(u64, u64, u64)>,
    page_size: u64,
    beside: Beside,
    limits: &PyLimits,
) -> PyResult<Body> {
    Ok(Body {
        boot_id: host::boot_id()?,
        vmm_pid,
        vmm_start: host::start_ticks(vmm_pid).unwrap_or(0), // 0: it has gone already
        page_size,
        regions: regions.into_iter().map(|(base, size, offset)| Region { base, size, offset }).collect(),
        beside,
        image: adopt::image_id(image, image_path.as_bytes())?,
        limits: limits.parse(),
    })
}

/// Our own copy of a descriptor that the caller keeps.
fn copied(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("expected a descriptor, got {fd}")));
    }
    // SAFETY: the caller holds it open for as long as this call takes.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?)
}

fn counters<'py>(py: Python<'py>, journal: &Journal) -> PyResult<Bound<'py, PyDict>> {
    let live = journal.live();
    let dict = PyDict::new(py);
    for (name, count) in named(live) {
        dict.set_item(name, count)?;
    }
    let (count, [p50, p99]) = journal.latency().read([0.5, 0.99]);
    let micros = |ns: f64| ns / 1000.0;
    dict.set_item("fault_count", count)?;
    dict.set_item("fault_p50_us", p50.map(micros))?;
    dict.set_item("fault_p99_us", p99.map(micros))?;
    dict.set_item("fault_max_us", (count > 0).then(|| micros(journal.latency().max_ns() as f64)))?;
    dict.set_item("oldest_unserved_us", journal.oldest_age().map(|age| age.as_micros() as u64))?;
    dict.set_item("replay_pages", live.replay_pages.load(Relaxed))?;
    dict.set_item("replay_done", live.replay_done.load(Relaxed) != 0)?;
    dict.set_item("takeovers", live.takeovers.load(Relaxed))?;
    dict.set_item("cpu_us", live.cpu_ns.load(Relaxed) / 1000)?;
    Ok(dict)
}

fn named(live: &Live) -> [(&'static str, u64); 9] {
    let read = |counter: &AtomicU64| counter.load(Relaxed);
    [
        ("faults", read(&live.counters.faults)),
        ("demand", live.count(Kind::Demand)),
        ("replayed", live.count(Kind::Replayed)),
        ("prefetched", live.count(Kind::Prefetched)),
        ("zero", live.count(Kind::Zero)),
        ("removed", read(&live.counters.removed)),
        ("poisoned", read(&live.counters.poisoned)),
        ("present", read(&live.counters.present)),
        ("parked", read(&live.counters.parked)),
    ]
}

/// The native page server of vmd.
#[pymodule(gil_used = false)]
mod vmd_core {
    use super::*;

    #[pymodule_export]
    use super::PyCore;

    /// The version of the core, which vmd-sandbox compares with its own.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// `release`, or `debug`, which no bench measures.
    #[pymodule_export]
    const PROFILE: &str = if cfg!(debug_assertions) { "debug" } else { "release" };

    /// Be the pager, or a standby, to the end.
    #[pyfunction]
    fn pager_main(py: Python<'_>, arguments: Vec<String>) {
        py.detach(|| pager::main(arguments));
    }

    /// Write a journal that waits for its VMM.
    #[pyfunction]
    fn write_waiting_journal(journal: RawFd, image: RawFd, image_path: OsString) -> PyResult<()> {
        let (journal, image) = (File::from(copied(journal)?), File::from(copied(image)?));
        let image = adopt::image_id(&image, image_path.as_bytes())?;
        Ok(journal::write(&journal, &Body::waiting(host::boot_id()?, image))?)
    }

    /// Write the journal of a VM that a pager is to serve.
    #[pyfunction]
    #[pyo3(signature = (*, journal, image, image_path, vmm_pid, regions, page_size, beside, offsets,
                        prefetch_bytes_max, limits))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python
    fn write_journal(
        journal: RawFd,
        image: RawFd,
        image_path: OsString,
        vmm_pid: u32,
        regions: Vec<(u64, u64, u64)>,
        page_size: u64,
        beside: &str,
        offsets: &[u8],
        prefetch_bytes_max: u64,
        limits: PyLimits,
    ) -> PyResult<()> {
        let (journal, image) = (File::from(copied(journal)?), File::from(copied(image)?));
        let beside = parse_beside(beside, offsets, prefetch_bytes_max)?;
        let body = body(vmm_pid, &image, &image_path, regions, page_size, beside, &limits)?;
        Ok(journal::write(&journal, &body)?)
    }

    /// What a journal says, as `read_journal` of the stub has it.
    #[pyfunction]
    fn read_journal(py: Python<'_>, journal: RawFd) -> PyResult<Bound<'_, PyDict>> {
        let file = File::from(copied(journal)?);
        let body = journal::read(&file).map_err(|refusal| PyValueError::new_err(refusal.0))?;
        let journal = Journal::look(file, &body)?;
        let dict = counters(py, &journal)?;
        let live = journal.live();
        dict.set_item("vmm_pid", body.vmm_pid)?;
        dict.set_item("vmm_start", body.vmm_start)?;
        dict.set_item("page_size", body.page_size)?;
        dict.set_item("guest_bytes", body.guest_bytes())?;
        dict.set_item("regions", body.regions.len())?;
        dict.set_item("image", PyBytes::new(py, &body.image.path))?;
        dict.set_item("server_pid", live.server_pid.load(Relaxed))?;
        dict.set_item("ended", live.ended.load(Relaxed))?;
        dict.set_item("incident", Some(journal.incident()).filter(|text| !text.is_empty()))?;
        Ok(dict)
    }
}
