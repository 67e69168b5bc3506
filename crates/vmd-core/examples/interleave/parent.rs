//! The runner's first process: starts the others, notices who fails or hangs, reports.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmd_core::internals::host;
use vmd_core::internals::journal::{self, Journal};
use vmd_core::internals::vm::Process;

use crate::Asked;
use crate::board::Board;
use crate::image;
use crate::plan::VARIATIONS;
use crate::worker::Worker;

/// How often it looks whether each process goes on.
const LOOK: Duration = Duration::from_millis(250);

/// A process that goes through interleavings. It is the VMM of its cores too: one that fails its VM kills it.
struct Child {
    number: usize,
    process: Process,
    journal: File,
    /// How far it was, and since when.
    done: u64,
    since: Instant,
}

/// Run all that was asked for; says how it went, or what failed first.
pub fn run(asked: &Asked) -> Result<String, String> {
    let words = |error: io::Error| format!("interleave: {error}");
    let board = Board::new(asked.count).map_err(words)?;
    let started = Instant::now();
    let mut children = Vec::new();
    let mut result = Ok(());
    for number in 0..asked.workers {
        match spawn(board, asked, number) {
            Ok(child) => children.push(child),
            Err(error) => result = Err(words(error)),
        }
    }
    while result.is_ok() && !children.is_empty() {
        result = look(board, asked, &mut children);
    }
    for child in &children {
        child.process.kill();
        child.wait();
    }
    result.map(|()| report(board, asked, started.elapsed()))
}

fn spawn(board: &'static Board, asked: &Asked, number: usize) -> io::Result<Child> {
    let journal = image::anonymous(c"journal")?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => work(board, asked, number, journal),
        pid => {
            let pidfd: OwnedFd = host::pidfd_open(pid as u32)?;
            let process = Process { pidfd: Some(pidfd), pid: pid as u32 };
            Ok(Child { number, process, journal, done: 0, since: Instant::now() })
        }
    }
}

/// The child's whole life.
fn work(board: &'static Board, asked: &Asked, number: usize, journal: File) -> ! {
    // A thread that stops dead does so without this; any other panic is the end.
    std::panic::set_hook(Box::new(move |panic| leave(board, number, &panic.to_string())));
    // SAFETY: no memory is passed.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let done = Worker::new(board, number, journal).map_err(|error| error.to_string()).and_then(|worker| {
        loop {
            let first = board.next.fetch_add(VARIATIONS, Ordering::Relaxed);
            if first >= asked.count {
                return Ok(());
            }
            for at in first..asked.count.min(first + VARIATIONS) {
                worker.run(if asked.only { asked.seed } else { asked.seed.wrapping_add(at) })?;
            }
        }
    });
    match done {
        // SAFETY: as in `leave`.
        Ok(()) => unsafe { libc::_exit(0) },
        Err(why) => leave(board, number, &why),
    }
}

fn leave(board: &Board, number: usize, why: &str) -> ! {
    board.slot(number).say(why);
    // SAFETY: what has to be told is on the board; guests that wait for a page must not be waited for.
    unsafe { libc::_exit(1) }
}

/// Wait a little, and see who has ended and who has not gone on.
fn look(board: &Board, asked: &Asked, children: &mut Vec<Child>) -> Result<(), String> {
    let entry = |child: &Child| libc::pollfd { fd: child.process.raw(), events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<_> = children.iter().map(entry).collect();
    // SAFETY: as many valid pollfds as it says.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, LOOK.as_millis() as i32) };
    for at in (0..children.len()).rev() {
        let child = &mut children[at];
        let seed = board.slot(child.number).seed.load(Ordering::Relaxed);
        let failed = |why: String| {
            Err(format!("seed {seed}: {why}\nafter {} interleavings\nagain: make interleave SEED={seed}", board.done()))
        };
        if fds[at].revents != 0 {
            let child = children.swap_remove(at);
            match child.wait() {
                0 => continue,
                libc::SIGKILL => return failed(format!("the core failed the VM: {}", child.incident())),
                status => return failed(format!("{} (wait status {status:#x})", board.slot(child.number).said())),
            }
        }
        let done = board.slot(child.number).done.load(Ordering::Relaxed);
        if done != child.done {
            (child.done, child.since) = (done, Instant::now());
        } else if child.since.elapsed() > asked.hang {
            let (doing, states) = (board.slot(child.number).doing(), child.states());
            return failed(format!("hangs for {} s: {doing}\n{states}", asked.hang.as_secs()));
        }
    }
    Ok(())
}

impl Child {
    /// Wait for its end; 0 when it went well, else the signal or some other status.
    fn wait(&self) -> i32 {
        let mut status = 0;
        // SAFETY: a child of ours that nobody else waits for; the status goes to a valid place.
        while unsafe { libc::waitpid(self.process.pid as i32, &raw mut status, 0) } < 0 {}
        status
    }

    fn journal(&self) -> Option<Journal> {
        let body = journal::read(&self.journal).ok()?;
        Journal::look(self.journal.try_clone().ok()?, &body).ok()
    }

    /// Why its core gave up.
    fn incident(&self) -> String {
        let noted = self.journal().map_or_else(String::new, |journal| journal.incident());
        if noted.is_empty() { "no incident is noted; or somebody else killed it".into() } else { noted }
    }

    /// The page states, in words.
    fn states(&self) -> String {
        let Ok(body) = journal::read(&self.journal) else { return "no journal".into() };
        let Some(journal) = self.journal() else { return "no journal".into() };
        let words: Vec<String> =
            (0..body.pages()).map(|page| format!("{page} {:?}", journal.states().get(page))).collect();
        format!("pages: {}; {} take-overs", words.join(", "), journal.live().takeovers.load(Ordering::Relaxed))
    }
}

fn report(board: &Board, asked: &Asked, took: Duration) -> String {
    let (deaths, words) = board.deaths();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let seeds = if asked.only { format!("of seed {}", asked.seed) } else { format!("from seed {}", asked.seed) };
    format!(
        "{} interleavings {seeds} in {:.1} s ({:.0}/s): 0 wrong bytes, 0 hangs, {} different orders of events\n\
         {deaths} page servers died or handed over: {words}\n\
         {} faults, {} removals, {} faults parked, {} pages there already, {} fills, {} by the second filler",
        board.done(),
        took.as_secs_f64(),
        board.done() as f64 / took.as_secs_f64(),
        count(&board.orders),
        count(&board.faults),
        count(&board.removals),
        count(&board.parked),
        count(&board.present),
        count(&board.fills[0]) + count(&board.fills[1]),
        count(&board.fills[1]),
    )
}
