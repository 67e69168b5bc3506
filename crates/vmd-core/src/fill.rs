//! The fillers: install a plan's runs beside the demand faults.
//!
//! A replay of what the page cache holds is read and installed by one thread: a second one would
//! only take a CPU from the guest. From the first run on that is not cached, and for a sequential
//! prefetch from the start, two do it, each with its own part of the plan: while one waits for a disk
//! the other installs. What is read goes into the guest while the CPU's cache still has it. Demand
//! goes first all the time: fillers enter the gate piece by piece, and stay out while a demand fault
//! is being served.

use std::io;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::crash;
use crate::death::Point;
use crate::live::FILLERS;
use crate::plan::Run;
use crate::staging::Buffer;
use crate::states::State;
use crate::stats::{Kind, add};
use crate::turns::{INSTALLERS, READERS, Turn};
use crate::uffd::Outcome;
use crate::vm::Vm;

const STACK_BYTES: usize = 64 << 10;
/// What a filler takes from the plan at once: what it reads must still be in the CPU's cache when it
/// is installed.
const CHUNK: usize = 256 << 10;
/// Holes fill no buffer, but must not wait for ever behind one read.
const CHUNK_RUNS_MAX: usize = 64;
/// Most bytes that one entry of the gate installs: what a demand fault may have to wait for.
const PIECE: usize = 64 << 10;
/// The same after so many pieces without any fault: the first fault after a calm may wait a
/// little longer, those that follow do not, and bulk installs cost less.
const CALM_PIECE: usize = 256 << 10;
const CALM_AFTER: u32 = 16;
/// After so many pieces the installer gives its CPU up for a moment. The VMM, which is loading
/// the snapshot meanwhile, waits for RCU grace periods; on a kernel without preemption a CPU that
/// is never rescheduled holds each of them up until the next tick.
const YIELD_EVERY: u32 = 32;
/// After so many pieces a filler lets one pass that has less to do.
const TURN_PIECES: u32 = 16;
/// A refused install (a REMOVE is pending) is retried this often, this far apart; then the page
/// is left to demand.
const REFUSED_TRIES: u32 = 50;
const REFUSED_WAIT: Duration = Duration::from_micros(200);

/// Install all runs; `kind` counts the pages of data. True when the plan came to its end.
///
/// Reads on this thread for as long as the page cache has what is needed.
pub fn fill_from_cache(
    vm: &Vm,
    mut runs: impl Iterator<Item = Run> + Send,
    pages: usize,
    kind: Kind,
) -> io::Result<bool> {
    let mut buffer = Buffer::take(vm.regions.page_size as usize)?;
    let mut pace = Pace::new(FILLERS[0], pages);
    if !pace.begin(vm) {
        return Ok(false);
    }
    let cold = loop {
        let Some(run) = runs.next() else { break None };
        pace.left = pace.left.saturating_sub(run.pages.len());
        if is_served(vm, &run) {
            continue;
        }
        let bytes = &mut buffer.bytes()[..data_bytes(vm, &run)];
        if !(run.hole || vm.image.read_now(bytes, vm.regions.offset(run.pages.start))) {
            break Some(run);
        }
        if !install_run(vm, run, bytes, kind, &mut pace) {
            return Ok(false);
        }
    };
    buffer.give_back();
    let left = pace.left;
    drop(pace);
    cold.map_or(Ok(true), |run| fill_by_two(vm, std::iter::once(run).chain(runs), left, kind))
}

/// The same by two threads.
pub fn fill_by_two(vm: &Vm, runs: impl Iterator<Item = Run> + Send, pages: usize, kind: Kind) -> io::Result<bool> {
    let plan = Mutex::new(Plan { runs: runs.peekable(), left: pages, over: false });
    let fill = |who| {
        let filled = fill_parts(vm, who, &plan, kind);
        if !matches!(filled, Ok(true)) {
            plan.lock().unwrap_or_else(PoisonError::into_inner).over = true; // what ends one ends both
        }
        filled
    };
    let crashes = &vm.outside.journal.live().crashes;
    std::thread::scope(|scope| {
        let second = std::thread::Builder::new().name("vmd-install-2".into()).stack_size(STACK_BYTES);
        let second =
            second.spawn_scoped(scope, || crash::attribute(crashes, || vm.outside.cpu.measure(|| fill(FILLERS[1]))));
        let first = fill(FILLERS[0]);
        match second.map(|second| second.join()) {
            Ok(Ok(second)) => Ok(first? & second?),
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => first, // no thread to be had: one has done it all
        }
    })
}

/// What is left to do, for whoever takes the next part.
struct Plan<I: Iterator<Item = Run>> {
    runs: std::iter::Peekable<I>,
    left: usize, // pages
    over: bool,
}

impl<I: Iterator<Item = Run>> Plan<I> {
    /// The next runs, so many that their bytes fit `room`; none at the end.
    fn take(&mut self, vm: &Vm, room: usize) -> Vec<Run> {
        let (mut part, mut bytes) = (Vec::new(), 0);
        while !self.over && part.len() < CHUNK_RUNS_MAX && bytes < CHUNK {
            let Some(run) = self.runs.next_if(|run| bytes + data_bytes(vm, run) <= room) else { break };
            bytes += data_bytes(vm, &run);
            self.left = self.left.saturating_sub(run.pages.len());
            part.push(run);
        }
        part
    }
}

/// Read and install part after part of the plan. True when it came to its end.
fn fill_parts(vm: &Vm, who: usize, plan: &Mutex<Plan<impl Iterator<Item = Run>>>, kind: Kind) -> io::Result<bool> {
    let mut buffer = Buffer::take(vm.regions.page_size as usize)?;
    let mut pace = Pace::new(who, 0);
    loop {
        let (part, left) = {
            let mut plan = plan.lock().unwrap_or_else(PoisonError::into_inner);
            (plan.take(vm, buffer.bytes().len()), plan.left)
        };
        if part.is_empty() {
            buffer.give_back();
            return Ok(true);
        }
        pace.left = left;
        let Some(read) = read(vm, part, left, buffer.bytes()) else { return Ok(false) };
        if !pace.begin(vm) {
            return Ok(false);
        }
        for (run, at) in read {
            if !install_run(vm, run, &buffer.bytes()[at..], kind, &mut pace) {
                return Ok(false);
            }
        }
        pace.turn = None; // not held while waiting for storage
    }
}

/// Whether demand was faster, for all of a run.
fn is_served(vm: &Vm, run: &Run) -> bool {
    run.pages.clone().all(|page| vm.states().get(page) != State::Absent)
}

/// Bytes of the image that a run needs.
fn data_bytes(vm: &Vm, run: &Run) -> usize {
    if run.hole { 0 } else { run.pages.len() * vm.regions.page_size as usize }
}

/// Most pages in one run of data.
pub fn data_run_max(vm: &Vm) -> usize {
    (CHUNK / vm.regions.page_size as usize).max(1)
}

// ---- reading -------------------------------------------------------------------------------

/// Read the runs that are still wanted into `bytes`, each with its place there. None: the filler must end.
fn read(vm: &Vm, runs: Vec<Run>, left: usize, bytes: &mut [u8]) -> Option<Vec<(Run, usize)>> {
    let _turn = READERS.enter(left, || vm.is_ending())?;
    let (mut taken, mut filled) = (Vec::with_capacity(runs.len()), 0);
    for run in runs {
        if vm.is_ending() {
            return None;
        }
        if is_served(vm, &run) {
            continue;
        }
        let room = filled..filled + data_bytes(vm, &run);
        for (run, len) in readable(vm, run, &mut bytes[room]) {
            taken.push((run, filled));
            filled += len;
        }
    }
    Some(taken)
}

/// The run with its bytes read, or what can be read of it, page by page, bytes one after the other.
///
/// A page that cannot be read is left to demand, which names and poisons it.
fn readable(vm: &Vm, run: Run, bytes: &mut [u8]) -> Vec<(Run, usize)> {
    let page_size = vm.regions.page_size;
    if run.hole || vm.image.read(bytes, vm.regions.offset(run.pages.start)).is_ok() {
        return vec![(run, bytes.len())];
    }
    let mut parts = Vec::new();
    for page in run.pages {
        let at = parts.len() * page_size as usize;
        if vm.image.read(&mut bytes[at..at + page_size as usize], vm.regions.offset(page)).is_ok() {
            parts.push((Run { pages: page..page + 1, hole: false }, page_size as usize));
        }
    }
    parts
}

// ---- installing ----------------------------------------------------------------------------

/// How large a piece may be, and when to give way: to a CPU's other threads, and to other VMs.
#[derive(Default)]
struct Pace {
    who: usize,
    left: usize, // pages
    faults: u64,
    calm: u32,
    pieces: u32,
    turn: Option<Turn<'static>>,
}

impl Pace {
    fn new(who: usize, left: usize) -> Self {
        Self { who, left, ..Self::default() }
    }

    /// Wait for a turn. False: the filler must end.
    fn begin(&mut self, vm: &Vm) -> bool {
        self.turn = None;
        self.turn = INSTALLERS.enter(self.left, || vm.is_ending());
        self.turn.is_some()
    }

    fn piece_bytes(&mut self, vm: &Vm) -> usize {
        let faults = vm.counters().faults.load(Ordering::Relaxed);
        self.calm = if faults == self.faults { self.calm.saturating_add(1) } else { 0 };
        self.faults = faults;
        if self.calm < CALM_AFTER { PIECE } else { CALM_PIECE }
    }

    /// Between two pieces. False: the filler must end.
    fn give_way(&mut self, vm: &Vm) -> bool {
        self.pieces = self.pieces.wrapping_add(1);
        if self.pieces % YIELD_EVERY == 0 {
            std::thread::yield_now();
        }
        if self.pieces % TURN_PIECES == 0 && INSTALLERS.are_wanted() { self.begin(vm) } else { true }
    }
}

/// Install the absent pages of a run. False: the filler must end.
fn install_run(vm: &Vm, run: Run, bytes: &[u8], kind: Kind, pace: &mut Pace) -> bool {
    let page_size = vm.regions.page_size as usize;
    let mut by_page = false;
    let kind = if run.hole { Kind::Zero } else { kind };
    let mut at = run.pages.start;
    let mut refused = 0;
    while at < run.pages.end {
        if vm.is_ending() {
            return false;
        }
        let piece_max = match (by_page, run.hole) {
            (true, _) => 1,
            (_, true) => vm.zero_run_max(),
            _ => (pace.piece_bytes(vm) / page_size).max(1),
        };
        let limit = run.pages.end.min(at + piece_max);
        let gate = vm.gate.enter_behind_demand();
        if vm.is_ending() {
            return false;
        }
        let piece = absent_run(vm, at..limit);
        if piece.is_empty() {
            at = limit;
            continue;
        }
        let from = (piece.start - run.pages.start) * page_size;
        let points = [Point::FillIntend, Point::FillInstall, Point::FillNote];
        let (outcome, done) = vm.install(pace.who, piece.clone(), kind, points, || {
            let outcome = match run.hole {
                true => vm.zero(piece.start, piece.len()),
                false => vm.uffd.copy(vm.regions.address(piece.start), &bytes[from..from + piece.len() * page_size]),
            };
            let done = pages_of(vm, &piece, outcome);
            (done, (outcome, done))
        });
        let passed = if done > 0 { done } else { pass_by(vm, &piece, outcome) };
        drop(gate);
        if !pace.give_way(vm) {
            return false;
        }
        match outcome {
            Outcome::Done | Outcome::Partial(_) => refused = 0,
            Outcome::Present => {}
            Outcome::Edge => by_page = true, // part of it is not registered (any more): page by page
            Outcome::Later if refused < REFUSED_TRIES => {
                refused += 1;
                std::thread::sleep(REFUSED_WAIT);
            }
            Outcome::Later => {
                at = piece.end;
                refused = 0;
                continue;
            }
            Outcome::Gone => return false,
            Outcome::Fatal(errno) => {
                let why = io::Error::from_raw_os_error(errno);
                vm.outside.warn(format!("replay or prefetch ends, demand goes on: install: {why}"));
                return false;
            }
        }
        at = piece.start + passed;
    }
    true
}

/// The first run of absent pages in `pages`; empty when there is none.
fn absent_run(vm: &Vm, mut pages: Range<usize>) -> Range<usize> {
    let absent = |page: &usize| vm.states().get(*page) == State::Absent;
    let end = pages.end;
    let start = pages.find(absent).unwrap_or(end);
    start..(start..end).find(|page| !absent(page)).unwrap_or(end)
}

/// How many pages an install brought.
fn pages_of(vm: &Vm, piece: &Range<usize>, outcome: Outcome) -> usize {
    match outcome {
        Outcome::Done => piece.len(),
        Outcome::Partial(bytes) => (bytes / vm.regions.page_size) as usize,
        _ => 0,
    }
}

/// How many pages to pass by after an install that brought none; still behind the gate.
fn pass_by(vm: &Vm, piece: &Range<usize>, outcome: Outcome) -> usize {
    match outcome {
        Outcome::Present => {
            // Whoever put it there: waiters must be woken.
            add(&vm.counters().present, 1);
            vm.states().set(piece.start, State::Installed);
            vm.uffd.wake(vm.regions.address(piece.start), vm.regions.page_size);
            1
        }
        Outcome::Edge if piece.len() == 1 => 1,
        _ => 0,
    }
}
