//! The pager: the process that hosts the page servers of a host, and the standby beside it.
//!
//! ```text
//!   client --SERVE: journal, userfaultfd, pidfd, image--> pager --the same--> standby
//!                                                           |                    |
//!                                              a fault thread a VM        waits for the pager's
//!                                                                         death, then is the pager
//! ```
//!
//! In reading order: `message` and `socket` (what is said), `hold` (one VM's descriptors), `standby`,
//! `primary` (the pager at work), `found` (VMs that nobody serves), `spawn`, `options`,
//! `process`, `poll`, `log`.

mod found;
mod hold;
pub mod log;
pub mod message;
mod options;
mod poll;
mod primary;
mod process;
pub mod socket;
mod spawn;
mod standby;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::crash;

use options::Options;
use socket::Socket;

/// Be pager or standby, as the arguments say, to the end of this process.
pub fn main(words: Vec<String>) -> ! {
    let ended = Options::parse(words).map_err(|why| (2, why));
    let ended = ended.and_then(|options| run(options).map_err(|error| (1, error.to_string())));
    let code = ended.map_or_else(
        |(code, why)| {
            log::line(&format!("ends: {why}"));
            code
        },
        |()| 0,
    );
    // SAFETY: at once, without the interpreter's own end; a standby waits for this one.
    unsafe { libc::_exit(code) }
}

fn run(options: Options) -> io::Result<()> {
    // SAFETY: whoever started us passed these descriptors for us to own; each is named once.
    let inherit = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
    let listener = inherit(options.listener);
    process::keep_from_children(&[&listener])?;
    crash::watch();
    let signals = process::signals()?; // before there are threads that would not have them blocked
    let Some(inherited) = options.inherited else {
        process::prepare(c"vmd-pager");
        return primary::Pager::new(options, listener, signals, Vec::new()).run();
    };
    process::prepare(c"vmd-standby");
    let (socket, pager) = (inherit(inherited.socket), inherit(inherited.pager));
    process::keep_from_children(&[&socket, &pager])?;
    let Some(vms) = standby::wait(&Socket::new(socket), &pager, &signals)? else { return Ok(()) };
    process::rename(c"vmd-pager");
    primary::Pager::new(options, listener, signals, vms).run()
}
