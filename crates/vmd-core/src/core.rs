//! Starts and ends the threads of one VM.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::demand::Ended;
use crate::faults;
use crate::fill::{data_run_max, fill_from_cache, fill_reading_ahead};
use crate::plan::{Runs, recorded, sequential};
use crate::vm::{Outside, Vm};

/// Fault threads are many, one a VM, and shallow.
const STACK_BYTES: usize = 128 << 10;

/// What to do beside demand faults.
pub enum Beside {
    Nothing,
    Record,
    /// File offsets in first-touch order.
    Replay(Vec<u64>),
    /// At most so many bytes.
    Sequential(u64),
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
    pub fn new(vm: Vm, beside: Beside) -> Self {
        let outside = Arc::clone(&vm.outside);
        Self { outside, life: Mutex::new(Life::Ready(Box::new((vm, beside)))) }
    }

    /// Begin to serve. A second call does nothing.
    pub fn start(&self) -> std::io::Result<()> {
        let mut life = self.life.lock().unwrap();
        if !matches!(*life, Life::Ready(_)) {
            return Ok(());
        }
        // Should no thread be had, the VM is dropped with the closure, and has stopped.
        let Life::Ready(ready) = std::mem::replace(&mut *life, Life::Over(Ended::Stopped)) else { unreachable!() };
        let run = move || {
            let (vm, beside) = *ready;
            let outside = Arc::clone(&vm.outside);
            let ended = serve(&vm, beside);
            drop(vm); // descriptors are closed before anybody hears of the end
            outside.ended.set();
            ended
        };
        let thread = std::thread::Builder::new().name("vmd-faults".into()).stack_size(STACK_BYTES).spawn(run)?;
        *life = Life::Running(thread);
        Ok(())
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
    std::thread::scope(|scope| {
        if matches!(beside, Beside::Replay(_) | Beside::Sequential(_)) {
            let filler = std::thread::Builder::new().name("vmd-install".into()).stack_size(STACK_BYTES);
            if let Err(error) = filler.spawn_scoped(scope, || run_filler(vm, beside)) {
                vm.warn(format!("no replay, no prefetch: {error}"));
            }
        }
        let serving = || catch_unwind(AssertUnwindSafe(|| faults::serve(vm, record)));
        let ended = vm.stats().cpu.measure(serving);
        let ended = ended.unwrap_or_else(|_| Ended::Failed("the fault thread panicked".into()));
        vm.ending.store(true, Ordering::Relaxed);
        if matches!(ended, Ended::Failed(_)) {
            vm.process.kill(); // a VM that cannot be served must not hang
        }
        tell_lost_pages(vm);
        ended
    })
}

fn tell_lost_pages(vm: &Vm) {
    let lost = vm.stats().counters.poisoned.load(Ordering::Relaxed);
    if lost > vm.limits.poison_lines_max {
        vm.warn(format!("{} more pages could not be read", lost - vm.limits.poison_lines_max));
    }
}

/// Whatever becomes of the filler, demand goes on.
fn run_filler(vm: &Vm, beside: Beside) {
    let filling = || catch_unwind(AssertUnwindSafe(|| fill_beside(vm, beside)));
    let why = match vm.stats().cpu.measure(filling) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the filler panicked".to_string(),
    };
    vm.warn(format!("replay or prefetch ends, demand goes on: {why}"));
}

fn fill_beside(vm: &Vm, beside: Beside) -> std::io::Result<()> {
    let counters = &vm.stats().counters;
    match beside {
        Beside::Nothing | Beside::Record => {}
        Beside::Replay(offsets) => {
            let pages = recorded(vm, &offsets);
            vm.stats().replay_pages.store(pages.len() as u64, Ordering::Relaxed);
            let whole = fill_from_cache(vm, Runs::new(vm, pages.into_iter(), data_run_max(vm)), &counters.replayed)?;
            vm.stats().replay_done.store(whole, Ordering::Relaxed);
        }
        Beside::Sequential(bytes_max) => {
            fill_reading_ahead(vm, Runs::new(vm, sequential(vm, bytes_max), data_run_max(vm)), &counters.prefetched)?;
        }
    }
    Ok(())
}
