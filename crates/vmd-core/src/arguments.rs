//! What Python gives, as Rust wants it.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::core::Seam;
use crate::death::{Death, Point};
use crate::plan::Beside;
use crate::uffd::{Injection, Op, Outcome};
use crate::vm::Limits;

/// `vmd.limits`, by name.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct PyLimits {
    fault_unserved_seconds: f64,
    exit_wait_seconds: f64,
    image_read_tries: u32,
    poison_lines_max: u64,
    memory_floor_percent: u64,
}

impl PyLimits {
    pub fn parse(&self) -> Limits {
        Limits {
            fault_unserved: Duration::from_secs_f64(self.fault_unserved_seconds),
            exit_wait: Duration::from_secs_f64(self.exit_wait_seconds),
            image_read_tries: self.image_read_tries,
            poison_lines_max: self.poison_lines_max,
            memory_floor_percent: self.memory_floor_percent,
        }
    }
}

/// (op, outcome, count, after, errno)
type PyInjection = (String, String, u32, u32, i32);
/// (point, after, real)
type PyDeath = (String, u32, bool);

/// What only tests ask for: injected outcomes, and a death.
#[derive(FromPyObject)]
pub struct PySeam(Vec<PyInjection>, Option<PyDeath>);

impl PySeam {
    pub fn parse(self) -> PyResult<Seam> {
        let injections = self.0.into_iter().map(parse_injection).collect::<PyResult<_>>()?;
        Ok(Seam { injections, death: self.1.map(parse_death).transpose()?, watch: None })
    }
}

/// `offsets`: native unsigned 64-bit integers.
pub fn parse_beside(word: &str, offsets: &[u8], bytes_max: u64) -> PyResult<Beside> {
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

fn parse_injection((op, outcome, count, after, errno): PyInjection) -> PyResult<Injection> {
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

fn parse_death((word, after, real): PyDeath) -> PyResult<Death> {
    let point = Point::ALL.iter().find(|(name, _)| *name == word).map(|&(_, point)| point);
    let unknown = || PyValueError::new_err(format!("death: there is no point {word}"));
    Ok(Death { point: point.ok_or_else(unknown)?, after: AtomicU32::new(after), real })
}
