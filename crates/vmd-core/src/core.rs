//! Starts and ends the threads of one VM.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::body::Body;
use crate::crash;
use crate::death::{Death, Watch};
use crate::demand::Ended;
use crate::faults;
use crate::fill::{data_run_max, fill_by_two, fill_from_cache};
use crate::image::Image;
use crate::journal::Journal;
use crate::plan::{Beside, Runs, recorded, sequential};
use crate::regions::Regions;
use crate::stats::Kind;
use crate::uffd::{Injection, Uffd};
use crate::vm::{Gate, Outside, Process, Vm};

/// Fault threads are many, one a VM, and shallow.
const STACK_BYTES: usize = 128 << 10;

/// What a VM is served with.
pub struct Parts {
    pub uffd: OwnedFd,
    /// None: the VMM had gone before a pidfd could be had.
    pub pidfd: Option<OwnedFd>,
    pub image: OwnedFd,
    pub journal: Journal,
    pub body: Body,
    /// Another page server has served it before.
    pub taken_over: bool,
    /// In a pager: what its threads and its lines in the log are called by.
    pub name: Option<String>,
    pub seam: Seam,
}

/// What only tests ask for.
#[derive(Default)]
pub struct Seam {
    pub injections: Vec<Injection>,
    pub death: Option<Death>,
    pub watch: Option<Watch>,
}

/// The threads of one VM.
pub struct Core {
    pub outside: Arc<Outside>,
    life: Mutex<Life>,
}

enum Life {
    Ready(Box<(Vm, Beside)>),
    Running(JoinHandle<Ended>),
    Over(Ended),
}

impl Core {
    pub fn new(parts: Parts) -> std::io::Result<Self> {
        let outside = Arc::new(Outside::new(parts.journal, parts.name)?);
        let vm = Vm {
            uffd: Uffd::new(parts.uffd, parts.seam.injections),
            image: Arc::new(Image::new(parts.image)),
            regions: Regions::new(parts.body.regions, parts.body.page_size),
            gate: Gate::default(),
            process: Process { pidfd: parts.pidfd, pid: parts.body.vmm_pid },
            limits: parts.body.limits,
            ending: AtomicBool::new(false),
            death: parts.seam.death,
            watch: parts.seam.watch,
            taken_over: parts.taken_over,
            outside: Arc::clone(&outside),
        };
        Ok(Self { outside, life: Mutex::new(Life::Ready(Box::new((vm, parts.body.beside)))) })
    }

    /// Begin to serve. A second call does nothing.
    pub fn start(&self) -> std::io::Result<()> {
        let mut life = self.life.lock().unwrap();
        if !matches!(*life, Life::Ready(_)) {
            return Ok(());
        }
        // Should no thread be had, the VM is dropped with the closure, and has stopped.
        let Life::Ready(ready) = std::mem::replace(&mut *life, Life::Over(Ended::Stopped)) else { unreachable!() };
        ready.0.outside.journal.begin(ready.0.taken_over); // who asks from now on is told who serves
        let name = self.outside.thread_name("vmd-faults");
        let run = move || {
            let (vm, beside) = *ready;
            let outside = Arc::clone(&vm.outside);
            let ended = crash::attribute(&outside.journal.live().crashes, || serve(&vm, beside));
            drop(vm); // descriptors are closed, and the journal is free, before anybody hears of the end
            if !outside.handing_over.load(Ordering::Relaxed) {
                outside.journal.unlock();
            }
            outside.ended.set();
            ended
        };
        let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(run)?;
        *life = Life::Running(thread);
        Ok(())
    }

    /// A copy of the VMM's pidfd, until serving begins.
    pub fn pidfd(&self) -> Option<OwnedFd> {
        match &*self.life.lock().unwrap() {
            Life::Ready(ready) => ready.0.process.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok()),
            _ => None,
        }
    }

    /// Stop dead; returns at once.
    pub fn kill(&self) {
        self.outside.kill();
    }

    /// Ask for the end; returns at once. Whoever else has a copy of the journal keeps it locked.
    pub fn hand_over(&self) {
        self.outside.handing_over.store(true, Ordering::Relaxed);
        self.stop();
    }

    /// Ask for the end; returns at once.
    pub fn stop(&self) {
        self.outside.stop.set();
    }

    /// Wait for the end. A core that was never started has stopped.
    pub fn join(&self) -> Ended {
        let mut life = self.life.lock().unwrap();
        let ended = match std::mem::replace(&mut *life, Life::Over(Ended::Stopped)) {
            Life::Ready(_) => Ended::Stopped,
            Life::Running(thread) => {
                thread.join().unwrap_or_else(|_| Ended::Failed("the fault thread panicked".into()))
            }
            Life::Over(ended) => ended,
        };
        *life = Life::Over(ended.clone());
        self.outside.stop.close();
        self.outside.ended.close();
        ended
    }
}

/// Run the fault thread here and the filler beside it, until both have ended.
fn serve(vm: &Vm, beside: Beside) -> Ended {
    let record = matches!(beside, Beside::Record);
    let work = || {
        if vm.taken_over {
            vm.take_over();
        }
        std::thread::scope(|scope| {
            if matches!(beside, Beside::Replay(_) | Beside::Sequential(_)) {
                let filler = std::thread::Builder::new().name("vmd-install".into()).stack_size(STACK_BYTES);
                let crashes = &vm.outside.journal.live().crashes;
                let fill = || crash::attribute(crashes, || run_filler(vm, beside));
                if let Err(error) = filler.spawn_scoped(scope, fill) {
                    vm.outside.warn(format!("no replay, no prefetch: {error}"));
                }
            }
            let ended = guard(vm, || faults::serve(vm, record));
            vm.ending.store(true, Ordering::Relaxed);
            ended
        })
    };
    let ended = vm.outside.cpu.measure(|| guard(vm, work));
    if ended != Ended::Died {
        conclude(vm, &ended);
    }
    ended
}

fn conclude(vm: &Vm, ended: &Ended) {
    let journal = &vm.outside.journal;
    if let Ended::Failed(why) = ended {
        journal.note_incident(why);
        vm.process.kill(); // a VM that cannot be served must not hang
    }
    tell_lost_pages(vm);
    vm.outside.cpu();
    journal.live().ended.store(ended.number(), Ordering::Release);
}

/// The end of `work`, whatever stops it.
fn guard(vm: &Vm, work: impl FnOnce() -> Ended) -> Ended {
    match catch_unwind(AssertUnwindSafe(work)) {
        _ if vm.outside.dead.load(Ordering::Acquire) => Ended::Died,
        Ok(ended) => ended,
        Err(_) => Ended::Failed("the fault thread panicked".into()),
    }
}

fn tell_lost_pages(vm: &Vm) {
    let lost = vm.counters().poisoned.load(Ordering::Relaxed);
    if lost > vm.limits.poison_lines_max {
        vm.outside.warn(format!("{} more pages could not be read", lost - vm.limits.poison_lines_max));
    }
}

/// Whatever becomes of the filler, demand goes on.
fn run_filler(vm: &Vm, beside: Beside) {
    let filling = || catch_unwind(AssertUnwindSafe(|| fill_beside(vm, beside)));
    let why = match vm.outside.cpu.measure(filling) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) if vm.is_ending() => return, // stopped dead with all the rest
        Err(_) => "the filler panicked".to_string(),
    };
    vm.outside.warn(format!("replay or prefetch ends, demand goes on: {why}"));
}

fn fill_beside(vm: &Vm, beside: Beside) -> std::io::Result<()> {
    match beside {
        Beside::Nothing | Beside::Record => {}
        Beside::Replay(offsets) => {
            let pages = recorded(vm, &offsets);
            vm.outside.journal.live().replay_pages.store(pages.len() as u64, Ordering::Relaxed);
            let count = pages.len();
            let runs = Runs::new(vm, pages.into_iter(), data_run_max(vm));
            let whole = fill_from_cache(vm, runs, count, Kind::Replayed)?;
            vm.outside.journal.live().replay_done.store(whole.into(), Ordering::Relaxed);
        }
        Beside::Sequential(bytes_max) => {
            let pages = (bytes_max / vm.regions.page_size).min(vm.regions.pages() as u64) as usize;
            let runs = Runs::new(vm, sequential(vm, bytes_max), data_run_max(vm));
            fill_by_two(vm, runs, pages, Kind::Prefetched)?;
        }
    }
    Ok(())
}
