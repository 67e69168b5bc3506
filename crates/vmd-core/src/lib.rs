//! The native page server: serves the page faults of one VM, without Python on the way.
//!
//! In reading order, each module knowing only those above it:
//!
//! | module | what it is |
//! |---|---|
//! | `abi` | the kernel's words: ioctl numbers, messages, errno |
//! | `host` | this boot, processes by their start time, the descriptors that they hold |
//! | `uffd` | one userfaultfd: read, copy, zero, wake, poison; signed results as named outcomes |
//! | `regions` | which host addresses are which pages, and which bytes of the image |
//! | `plan` | what to install beside demand: replay in recorded order, or sequentially |
//! | `states` | two bits a page |
//! | `stats` | counters, latency histogram and CPU time, readable while serving |
//! | `live` | what changes in a journal: counters, clocks, the install under way |
//! | `body` | what a journal says that never changes |
//! | `journal` | the mapped file from which another process can go on: ring, states, counters |
//! | `image` | the memory file: pread, and holes that are known zeros |
//! | `crash` | which VM a page server crashed on |
//! | `death` | a test's order to die at a named instant |
//! | `vm` | one VM: all of the above, and the gate between the fault thread and the filler |
//! | `takeover` | going on where another page server died |
//! | `wait` | what the fault thread sleeps on |
//! | `cold` | demand pages that storage has to be waited for |
//! | `demand` | installing one page, and what each outcome means |
//! | `faults` | the fault thread: drain, apply REMOVE, install, park |
//! | `turns` | whose turn it is to fill, of many VMs |
//! | `fill` | the filler: one reader, one installer, staging buffers between them |
//! | `core` | starts and ends the threads of one VM |
//! | `adopt` | finds a VM's process, userfaultfd and image by its journal |
//! | `pager` | the process that hosts the page servers of a host, and its standby |
//! | `arguments` | what Python gives, as Rust wants it |
//! | `binding` | the Python class |

mod abi;
mod adopt;
#[cfg(feature = "python")]
mod arguments;
#[cfg(feature = "python")]
mod binding;
mod body;
mod cold;
mod core;
mod crash;
mod death;
mod demand;
mod faults;
mod fill;
mod host;
mod image;
mod journal;
mod live;
mod pager;
mod plan;
mod regions;
mod staging;
mod states;
mod stats;
mod takeover;
mod turns;
mod uffd;
mod vm;
mod wait;

/// The modules, for what drives them one by one; nobody else may.
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals {
    macro_rules! open {
        ($($name:ident)*) => { $(pub mod $name { pub use crate::$name::*; })* };
    }
    open!(abi adopt body core death demand host image journal live pager plan regions staging states stats uffd vm);
    pub use crate::pager::{message, socket};
}
