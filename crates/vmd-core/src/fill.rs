//! The filler: installs a plan's runs beside the demand faults.
//!
//! A replay of what the page cache holds is read and installed by one thread: a second one would
//! only take a CPU from the guest. From the first run on that is not cached, and for the long runs
//! of a sequential prefetch from the start, a reader of its own fetches the runs into staging
//! buffers and the installer takes them from there, so that no install waits for a disk. Demand
//! goes first all the time: the installer enters the gate piece by piece, and stays out while a
//! demand fault is being served.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use crate::death::Point;
use crate::plan::Run;
use crate::staging::{self, Buffer};
use crate::states::State;
use crate::stats::{Counters, add};
use crate::turns::{INSTALLERS, READERS, Turn};
use crate::uffd::Outcome;
use crate::vm::Vm;

/// One buffer is read while another is installed; more only smooth out.
const BUFFERS: usize = 4;
/// The first bytes must arrive early; later on, fewer and larger hand-overs cost less.
const FIRST_CHUNK: usize = 32 << 10;
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

/// Runs with the place of their bytes in the buffer (holes have none).
struct Chunk {
    buffer: Buffer,
    runs: Vec<(Run, usize)>,
}

/// Install all runs; `counter` counts the pages of data. True when the plan came to its end.
///
/// Reads on this thread for as long as the page cache has what is needed.
pub fn fill_from_cache(
    vm: &Vm,
    mut runs: impl Iterator<Item = Run> + Send,
    pages: usize,
    counter: usize,
) -> io::Result<bool> {
    let mut buffer = Buffer::take(vm.regions.page_size as usize)?;
    let mut pace = Pace::new(pages);
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
        if !install_run(vm, run, bytes, counter, &mut pace) {
            return Ok(false);
        }
    };
    buffer.give_back();
    let left = pace.left;
    drop(pace);
    cold.map_or(Ok(true), |run| fill_reading_ahead(vm, std::iter::once(run).chain(runs), left, counter))
}

/// The same with a reader beside the installer.
pub fn fill_reading_ahead(
    vm: &Vm,
    runs: impl Iterator<Item = Run> + Send,
    pages: usize,
    counter: usize,
) -> io::Result<bool> {
    let (give, empty) = channel();
    for _ in 0..BUFFERS {
        give.send(Buffer::take(vm.regions.page_size as usize)?).expect("the receiver is here");
    }
    std::thread::scope(|scope| {
        let (full, take) = sync_channel(BUFFERS);
        let reader = move || (vm.outside.cpu.measure(|| read(vm, runs, pages, &empty, &full)), empty);
        let thread = std::thread::Builder::new().name("vmd-read".into()).stack_size(64 << 10);
        let reader = thread.spawn_scoped(scope, reader)?;
        let installed = install_all(vm, &take, give, pages, counter);
        drop(take);
        let (read, unused) = reader.join().expect("the reader does not panic");
        unused.try_iter().for_each(Buffer::give_back);
        Ok(installed && read)
    })
}

/// Whether demand was faster, for all of a run.
fn is_served(vm: &Vm, run: &Run) -> bool {
    run.pages.clone().all(|page| vm.states().get(page) != State::Absent)
}

/// Bytes of the image that a run needs.
fn data_bytes(vm: &Vm, run: &Run) -> usize {
    if run.hole { 0 } else { run.pages.len() * vm.regions.page_size as usize }
}

/// Most pages in one run of data: what fits a buffer.
pub fn data_run_max(vm: &Vm) -> usize {
    (staging::SIZE / vm.regions.page_size as usize).max(1)
}

// ---- the reader ----------------------------------------------------------------------------

fn read(
    vm: &Vm,
    runs: impl Iterator<Item = Run>,
    mut left: usize,
    empty: &Receiver<Buffer>,
    full: &SyncSender<Chunk>,
) -> bool {
    let Ok(mut buffer) = empty.recv() else { return false };
    let mut target = FIRST_CHUNK;
    let (mut filled, mut taken) = (0, Vec::new());
    for run in runs {
        let bytes = data_bytes(vm, &run);
        if filled + bytes > buffer.bytes().len() || filled >= target || taken.len() >= CHUNK_RUNS_MAX {
            if full.send(Chunk { buffer, runs: std::mem::take(&mut taken) }).is_err() {
                return false;
            }
            let Ok(next) = empty.recv() else { return false };
            buffer = next;
            (filled, target) = (0, (target * 2).min(staging::SIZE));
        }
        if vm.is_ending() {
            return false;
        }
        if is_served(vm, &run) {
            continue;
        }
        left = left.saturating_sub(run.pages.len());
        let Some(_turn) = READERS.enter(left, || vm.is_ending()) else { return false };
        for (run, bytes) in readable(vm, run, &mut buffer.bytes()[filled..filled + bytes]) {
            taken.push((run, filled));
            filled += bytes;
        }
    }
    full.send(Chunk { buffer, runs: taken }).is_ok()
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

// ---- the installer -------------------------------------------------------------------------

/// How large a piece may be, and when to give way: to a CPU's other threads, and to other VMs.
#[derive(Default)]
struct Pace {
    left: usize, // pages
    faults: u64,
    calm: u32,
    pieces: u32,
    turn: Option<Turn<'static>>,
}

impl Pace {
    fn new(left: usize) -> Self {
        Self { left, ..Self::default() }
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

fn install_all(vm: &Vm, full: &Receiver<Chunk>, give: Sender<Buffer>, pages: usize, counter: usize) -> bool {
    let mut whole = true;
    let mut pace = Pace::new(pages);
    for mut chunk in full {
        if !pace.begin(vm) {
            return false;
        }
        pace.left = pace.left.saturating_sub(chunk.runs.iter().map(|(run, _)| run.pages.len()).sum());
        let bytes = chunk.buffer.bytes();
        whole = chunk.runs.drain(..).all(|(run, at)| install_run(vm, run, &bytes[at..], counter, &mut pace));
        if !whole {
            break;
        }
        pace.turn = None; // the reader may be slow
        if let Err(unsent) = give.send(chunk.buffer) {
            unsent.0.give_back(); // the reader has come to the end
        }
    }
    whole
}

/// Install the absent pages of a run. False: the filler must end.
fn install_run(vm: &Vm, run: Run, bytes: &[u8], counter: usize, pace: &mut Pace) -> bool {
    let page_size = vm.regions.page_size as usize;
    let mut by_page = false;
    let counter = if run.hole { Counters::ZERO } else { counter };
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
        let (outcome, done) = vm.install(piece.clone(), counter, [Point::FillInstall, Point::FillNote], || {
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
