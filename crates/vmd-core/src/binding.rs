//! The Python class: configuration in, counters out. No page passes through here.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::core::{Beside, Core};
use crate::demand::Ended;
use crate::image::Image;
use crate::regions::{Region, Regions};
use crate::states::States;
use crate::stats::Stats;
use crate::uffd::{Injection, Op, Outcome, Uffd};
use crate::vm::{EventFd, Gate, Limits, Outside, Process, Vm};

/// See `vmd_core.pyi`, which is the manual.
#[pyclass(frozen, name = "Core", module = "vmd_core")]
struct PyCore(Core);

#[pymethods]
impl PyCore {
    #[new]
    #[pyo3(signature = (*, uffd, pidfd, image, regions, page_size, beside, offsets, prefetch_bytes_max,
                        fault_unserved_seconds, exit_wait_seconds, image_read_tries, poison_lines_max, memory_floor_percent, injections))]
    #[allow(clippy::too_many_arguments)] // keyword-only in Python
    fn new(
        py: Python<'_>,
        uffd: RawFd,
        pidfd: RawFd,
        image: RawFd,
        regions: Vec<(u64, u64, u64)>,
        page_size: u64,
        beside: &str,
        offsets: &[u8],
        prefetch_bytes_max: u64,
        fault_unserved_seconds: f64,
        exit_wait_seconds: f64,
        image_read_tries: u32,
        poison_lines_max: u64,
        memory_floor_percent: u64,
        injections: Vec<(String, String, u32, u32, i32)>,
    ) -> PyResult<Self> {
        let beside = parse_beside(beside, offsets, prefetch_bytes_max)?;
        let injections = injections.into_iter().map(parse_injection).collect::<PyResult<_>>()?;
        let regions: Vec<_> = regions.into_iter().map(|(base, size, offset)| Region { base, size, offset }).collect();
        let regions = Regions::new(regions, page_size);
        let outside = Outside {
            stats: Stats::default(),
            warnings: Mutex::default(),
            touched: Mutex::default(),
            stop: EventFd::new()?,
            ended: EventFd::new()?,
        };
        let limits = Limits {
            fault_unserved: Duration::from_secs_f64(fault_unserved_seconds),
            exit_wait: Duration::from_secs_f64(exit_wait_seconds),
            image_read_tries,
            poison_lines_max,
            memory_floor_percent,
        };
        if uffd < 0 || image < 0 {
            return Err(PyValueError::new_err("uffd and image must be descriptors"));
        }
        // SAFETY: the caller gives these descriptors away; from here on nothing fails.
        let (uffd, image) = unsafe { (OwnedFd::from_raw_fd(uffd), OwnedFd::from_raw_fd(image)) };
        // SAFETY: as above.
        let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
        // A file of many holes, or storage that does not answer, must not hold up other threads.
        let (image, states) = py.detach(|| (Image::new(image), States::new(regions.pages())));
        let vm = Vm {
            uffd: Uffd::new(uffd, injections),
            image: Arc::new(image),
            states,
            regions,
            gate: Gate::default(),
            process: Process(pidfd),
            limits,
            ending: AtomicBool::new(false),
            outside: Arc::new(outside),
        };
        Ok(Self(Core::new(vm, beside)))
    }

    fn start(&self) -> PyResult<()> {
        self.0.start().map_err(PyOSError::new_err)
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn join(&self, py: Python<'_>) -> (&'static str, Option<String>) {
        match py.detach(|| self.0.join()) {
            Ended::Gone => ("gone", None),
            Ended::Stopped => ("stopped", None),
            Ended::Failed(why) => ("failed", Some(why)),
        }
    }

    #[getter]
    fn ended_fd(&self) -> RawFd {
        self.0.outside.ended.raw()
    }

    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = &self.0.outside.stats;
        let dict = PyDict::new(py);
        for (name, counter) in counters(stats) {
            dict.set_item(name, counter.load(Relaxed))?;
        }
        let (count, [p50, p99]) = stats.latency.read([0.5, 0.99]);
        let micros = |ns: f64| ns / 1000.0;
        dict.set_item("fault_count", count)?;
        dict.set_item("fault_p50_us", p50.map(micros))?;
        dict.set_item("fault_p99_us", p99.map(micros))?;
        dict.set_item("fault_max_us", (count > 0).then(|| micros(stats.latency.max_ns() as f64)))?;
        dict.set_item("oldest_unserved_us", stats.oldest_age().map(|age| age.as_micros() as u64))?;
        dict.set_item("replay_done", stats.replay_done.load(Relaxed))?;
        dict.set_item("cpu_us", stats.cpu.total().as_micros() as u64)?;
        Ok(dict)
    }

    fn touched<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let touched = self.0.outside.touched.lock().unwrap();
        let bytes: Vec<u8> = touched.iter().flat_map(|offset| offset.to_ne_bytes()).collect();
        PyBytes::new(py, &bytes)
    }

    fn warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.0.outside.warnings.lock().unwrap())
    }
}

fn counters(stats: &Stats) -> [(&'static str, &AtomicU64); 10] {
    let counters = &stats.counters;
    [
        ("faults", &counters.faults),
        ("demand", &counters.demand),
        ("replayed", &counters.replayed),
        ("prefetched", &counters.prefetched),
        ("zero", &counters.zero),
        ("removed", &counters.removed),
        ("poisoned", &counters.poisoned),
        ("present", &counters.present),
        ("parked", &counters.parked),
        ("replay_pages", &stats.replay_pages),
    ]
}

fn parse_beside(word: &str, offsets: &[u8], bytes_max: u64) -> PyResult<Beside> {
    let offsets = offsets.chunks_exact(size_of::<u64>());
    match word {
        "nothing" => Ok(Beside::Nothing),
        "record" => Ok(Beside::Record),
        "replay" => {
            let value = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
            Ok(Beside::Replay(offsets.map(value).collect()))
        }
        "sequential" => Ok(Beside::Sequential(bytes_max)),
        _ => Err(PyValueError::new_err(format!("beside: expected nothing, record, replay or sequential, got {word}"))),
    }
}

fn parse_injection((op, outcome, count, after, errno): (String, String, u32, u32, i32)) -> PyResult<Injection> {
    let op = match op.as_str() {
        "copy" => Op::Copy,
        "zero" => Op::Zero,
        "poison" => Op::Poison,
        _ => return Err(PyValueError::new_err(format!("injection: expected copy, zero or poison, got {op}"))),
    };
    let outcome = match outcome.as_str() {
        "present" => Outcome::Present,
        "later" => Outcome::Later,
        "edge" => Outcome::Edge,
        "gone" => Outcome::Gone,
        "fatal" => Outcome::Fatal(errno),
        _ => return Err(PyValueError::new_err(format!("injection: {outcome} cannot be injected"))),
    };
    if count == 0 {
        return Err(PyValueError::new_err("injection: count 0"));
    }
    Ok(Injection { op, outcome, count, after })
}

/// The native page server of vmd.
#[pymodule(gil_used = false)]
mod vmd_core {
    #[pymodule_export]
    use super::PyCore;

    /// The version of the core, which vmd-sandbox compares with its own.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// `release`, or `debug`, which no bench measures.
    #[pymodule_export]
    const PROFILE: &str = if cfg!(debug_assertions) { "debug" } else { "release" };
}
