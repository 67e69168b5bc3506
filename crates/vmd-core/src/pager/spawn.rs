//! The standby as a child process: the same program with other arguments.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use super::options::{Inherited, Options};
use super::socket::Socket;
use crate::host;

/// A running standby, as its pager sees it.
pub struct Spawned {
    pub child: Child,
    pub pidfd: OwnedFd,
    pub socket: Socket,
}

/// Start one. It inherits the listening socket, its end of a connection to us, and our pidfd.
pub fn standby(options: &Options, listener: &OwnedFd) -> io::Result<Spawned> {
    let (ours, theirs) = Socket::pair()?;
    let this = host::pidfd_open(std::process::id())?;
    let inherited = Inherited { socket: theirs.raw(), pager: this.as_raw_fd() };
    let numbers: [RawFd; 3] = [listener.as_raw_fd(), inherited.socket, inherited.pager];
    let words = options.command(listener.as_raw_fd(), &inherited)?;
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdin(Stdio::null());
    // SAFETY: between fork and exec only fcntl(2) is called, which is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(move || {
            for fd in numbers {
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    let pidfd = host::pidfd_open(child.id())?;
    Ok(Spawned { child, pidfd, socket: ours })
}
