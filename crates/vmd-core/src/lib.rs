//! The native page server: serves the page faults of one VM, without Python on the way.
//!
//! In reading order, each module knowing only those above it:
//!
//! | module | what it is |
//! |---|---|
//! | `abi` | the kernel's words: ioctl numbers, messages, errno |
//! | `uffd` | one userfaultfd: read, copy, zero, wake, poison; signed results as named outcomes |
//! | `regions` | which host addresses are which pages, and which bytes of the image |
//! | `states` | two bits a page |
//! | `image` | the memory file: pread, and holes that are known zeros |
//! | `stats` | counters, latency histogram and CPU time, readable while serving |
//! | `vm` | one VM: all of the above, and the gate between the fault thread and the filler |
//! | `wait` | what the fault thread sleeps on |
//! | `cold` | demand pages that storage has to be waited for |
//! | `demand` | installing one page, and what each outcome means |
//! | `faults` | the fault thread: drain, apply REMOVE, install, park |
//! | `plan` | what to install beside demand: replay in recorded order, or sequentially |
//! | `fill` | the filler: one reader, one installer, staging buffers between them |
//! | `core` | starts and ends the threads of one VM |
//! | `binding` | the Python class |

mod abi;
mod binding;
mod cold;
mod core;
mod demand;
mod faults;
mod fill;
mod image;
mod plan;
mod regions;
mod staging;
mod states;
mod stats;
mod uffd;
mod vm;
mod wait;
