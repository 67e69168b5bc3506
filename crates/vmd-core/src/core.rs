//! Starts and ends the threads of one VM.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::faults::{self, Ended};
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
    ready: Mutex<Option<(Vm, Beside)>>,
    thread: Mutex<Option<JoinHandle<Ended>>>,
    ended: Mutex<Option<Ended>>,
}

impl Core {
    pub fn new(vm: Vm, beside: Beside) -> Self {
        let outside = Arc::clone(&vm.outside);
        Self { outside, ready: Mutex::new(Some((vm, beside))), thread: Mutex::new(None), ended: Mutex::new(None) }
    }

    /// Begin to serve. A second call does nothing.
    pub fn start(&self) -> std::io::Result<()> {
        let Some((vm, beside)) = self.ready.lock().unwrap().take() else { return Ok(()) };
        let run = move || {
            let outside = Arc::clone(&vm.outside);
            let ended = serve(&vm, beside);
            drop(vm); // descriptors are closed before anybody hears of the end
            outside.ended.set();
            ended
        };
        let thread = std::thread::Builder::new().name("vmd-faults".into()).stack_size(STACK_BYTES).spawn(run)?;
        *self.thread.lock().unwrap() = Some(thread);
        Ok(())
    }

    /// Ask for the end; returns at once.
    pub fn stop(&self) {
        self.outside.stop.set();
    }

    /// Wait for the end. A core that was never started has stopped.
    pub fn join(&self) -> Ended {
        let mut ended = self.ended.lock().unwrap();
        if ended.is_none() {
            drop(self.ready.lock().unwrap().take());
            let thread = self.thread.lock().unwrap().take();
            let how = thread.map_or(Ok(Ended::Stopped), JoinHandle::join);
            *ended = Some(how.unwrap_or_else(|_| Ended::Failed("the fault thread panicked".into())));
            self.outside.stop.close();
            self.outside.ended.close();
        }
        ended.clone().expect("set above")
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
        vm.gate.demand_served(); // the filler may be waiting for it
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
