//! Which VM a page server crashed on.
//!
//! A bug that a VM can trigger would kill its pager, then the standby that takes over, then the next one, and
//! with them every other VM's service. So a thread that works for a VM says so, and the handler of
//! the signals that end a process counts the crash in that VM's journal. SIGKILL counts for nobody.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    static SERVING: Cell<*const AtomicU64> = const { Cell::new(ptr::null()) };
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

/// Do `work` for the VM whose crashes `crashes` counts. It must stay mapped for as long.
pub fn attribute<T>(crashes: &AtomicU64, work: impl FnOnce() -> T) -> T {
    let before = SERVING.replace(ptr::from_ref(crashes));
    let result = work();
    SERVING.set(before);
    result
}

/// Count crashes from now on.
pub fn watch() {
    for signal in SIGNALS {
        // SAFETY: all zeros is a valid sigaction; the handler does only what a signal handler may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as *const () as usize;
            action.sa_flags = libc::SA_RESETHAND; // the second time it is the default, which ends the process
            libc::sigaction(signal, &raw const action, ptr::null_mut());
        }
    }
}

/// An atomic add, and then the instruction, or the abort, that raised the signal raises it again.
extern "C" fn count(signal: i32) {
    let crashes = SERVING.get();
    if !crashes.is_null() {
        // SAFETY: `attribute` keeps it valid for as long as it is set.
        unsafe { (*crashes).fetch_add(1, Ordering::Relaxed) };
    }
    // SAFETY: raise(3) may be called in a handler; a signal that was sent, not raised, must end us as well.
    unsafe { libc::raise(signal) };
}
