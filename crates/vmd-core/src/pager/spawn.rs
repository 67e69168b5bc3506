//! The standby as its pager sees it: the same program with other arguments, and what it has yet to be told.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::message::Message;
use super::options::{Inherited, Options};
use super::poll::Poll;
use super::primary::Served;
use super::socket::{Packet, Socket};
use crate::host;

/// One that is not ready after so long hangs, and another one may not.
const READY_WITHIN: Duration = Duration::from_secs(5);

pub struct Standby {
    pub child: Child,
    pub socket: Socket,
    /// It has understood all that there was to say when it was started.
    pub ready: bool,
    pub since: Instant,
    /// Who asked for the upgrade that it was started for.
    pub upgrade: Option<Socket>,
    pidfd: OwnedFd,
    news: VecDeque<News>,
}

pub enum News {
    Serve(String),
    Gone(String),
    Sync,
}

impl Standby {
    /// `vms`: the names of those that are served already.
    pub fn start(options: &Options, listener: &OwnedFd, vms: impl Iterator<Item = String>) -> io::Result<Self> {
        let (child, pidfd, socket) = spawn(options, listener)?;
        let news = vms.map(News::Serve).chain([News::Sync]).collect();
        Ok(Self { child, socket, ready: false, since: Instant::now(), upgrade: None, pidfd, news })
    }

    /// Watch its socket and its end.
    pub fn watch(&self, poll: &mut Poll) -> [usize; 2] {
        let socket = self.socket.raw();
        let place = if self.news.is_empty() { poll.add(socket) } else { poll.add_writing(socket) };
        [place, poll.add(self.pidfd.as_raw_fd())]
    }

    pub fn push(&mut self, news: News) {
        self.news.push_back(news);
    }

    /// Send what it takes without waiting.
    pub fn tell(&mut self, vms: &BTreeMap<String, Served>) {
        while let Some(news) = self.news.front() {
            let sent = match news {
                News::Serve(name) => vms.get(name).map_or(Ok(()), |served| {
                    self.socket.send(&Message::Serve { name: name.clone() }, &served.hold.descriptors())
                }),
                News::Gone(name) => self.socket.send(&Message::Gone { name: name.clone() }, &[]),
                News::Sync => self.socket.send(&Message::Sync, &[]),
            };
            if sent.is_err() {
                return; // full: later; gone: its pidfd tells
            }
            self.news.pop_front();
        }
    }

    /// Hear it, if it has `spoken`; one that should have is killed, and its end will be noticed.
    pub fn hear(&mut self, spoken: bool) {
        if spoken && matches!(self.socket.receive(), Ok(Some(Packet { message: Ok(Message::Ready), .. }))) {
            self.ready = true;
        }
        if self.must_be_ready_at().is_some_and(|end| end <= Instant::now()) {
            let _ = self.child.kill();
        }
    }

    pub fn must_be_ready_at(&self) -> Option<Instant> {
        (!self.ready).then(|| self.since + READY_WITHIN)
    }

    /// Whether it can go on with everything.
    pub fn knows_all(&self) -> bool {
        self.ready && self.news.is_empty()
    }
}

/// Start one. It inherits the listening socket, its end of a connection to us, and our pidfd.
fn spawn(options: &Options, listener: &OwnedFd) -> io::Result<(Child, OwnedFd, Socket)> {
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
    Ok((child, pidfd, ours))
}
