//! The page servers of one interleaving, one after the other, until the guests are through.

use std::fs::File;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vmd_core::internals::body::Body;
use vmd_core::internals::core::{Core, Parts, Seam};
use vmd_core::internals::death::{Death, Point, Watch};
use vmd_core::internals::demand::Ended;
use vmd_core::internals::host;
use vmd_core::internals::journal::{self, Journal};
use vmd_core::internals::uffd::{Injection, Op, Outcome};
use vmd_core::internals::vm::{Limits, Outside};

use crate::board::Board;
use crate::chance::Chance;
use crate::events::{Kind, SERVER, Stall};
use crate::guest::Round;
use crate::plan::End;

/// The parent notices a hang long before a core does.
pub const LIMITS: Limits = Limits {
    fault_unserved: Duration::from_secs(20),
    exit_wait: Duration::from_secs(1),
    image_read_tries: 1,
    poison_lines_max: 1,
    memory_floor_percent: 0,
};

/// What all page servers of a VM share: the VMM's copy of the userfaultfd, and files.
pub struct Held<'a> {
    pub uffd: OwnedFd,
    pub image: &'a File,
    pub journal: &'a File,
    pub board: &'static Board,
}

/// Serve until a page server was stopped. `begin`: lets the guests go. What the last one leaves is returned.
pub fn serve(round: &Arc<Round>, held: &Held, body: Body, begin: impl FnOnce()) -> Result<Arc<Outside>, String> {
    let mut begin = Some(begin);
    if round.plan.guests_first {
        begin.take().expect("not begun yet")();
    }
    let mut chance = Chance::new(round.plan.seed ^ 0x5e_4e4e);
    let mut first = Some(body);
    for number in 0.. {
        let end = round.plan.ends.get(number).copied();
        Stall::draw(&mut chance).stand(&round.log);
        let core = start(round, held, first.take(), number).map_err(|error| format!("server {number}: {error}"))?;
        if let Some(begin) = begin.take() {
            begin();
        }
        let stall = Stall::long(&mut chance);
        match end {
            Some(End::Kill) => from_outside(round, stall, Kind::Kill, number, || core.kill()),
            Some(End::HandOver) => from_outside(round, stall, Kind::HandOver, number, || core.hand_over()),
            _ => {}
        }
        wait_for_either(round.done.raw(), core.outside.ended.raw());
        core.stop();
        match core.join() {
            Ended::Stopped if end != Some(End::HandOver) => return Ok(core.outside),
            Ended::Died | Ended::Stopped => round.log.note(SERVER, Kind::Dead, number),
            other => return Err(format!("server {number} has ended: {other:?}")),
        };
        held.board.count_death(end.expect("the last one has no order to die"));
    }
    unreachable!("the last one is stopped")
}

/// End a page server at a moment of our choice.
fn from_outside(round: &Round, stall: Stall, kind: Kind, number: usize, end: impl FnOnce()) {
    stall.stand(&round.log);
    round.log.note(SERVER, kind, number);
    end();
}

/// The first page server makes the journal of `body`; the others go on from what is in it.
fn start(round: &Arc<Round>, held: &Held, body: Option<Body>, number: usize) -> io::Result<Core> {
    let taken_over = body.is_none();
    let file = held.journal.try_clone()?;
    let (body, journal) = match body {
        Some(body) => {
            let journal = Journal::create(file, &body)?;
            (body, journal)
        }
        None => {
            let body = journal::read(&file).map_err(|refusal| io::Error::other(refusal.0))?;
            let journal = Journal::open(file, &body)?;
            (body, journal)
        }
    };
    let parts = Parts {
        uffd: held.uffd.try_clone()?,
        pidfd: Some(host::pidfd_open(std::process::id())?),
        image: held.image.try_clone()?.into(),
        journal,
        body,
        taken_over,
        name: None,
        seam: seam(round, held.board, number),
    };
    let core = Core::new(parts)?;
    round.log.note(SERVER, Kind::Serve, number);
    core.start()?;
    Ok(core)
}

fn seam(round: &Arc<Round>, board: &'static Board, number: usize) -> Seam {
    let death = match round.plan.ends.get(number) {
        Some(&End::At(point, after)) => Some(Death { point, after: AtomicU32::new(after), real: false }),
        _ => None,
    };
    let refused = Injection { op: Op::Copy, outcome: Outcome::Later, count: round.plan.refused, after: 0 };
    let injections = if round.plan.refused > 0 && number == 0 { vec![refused] } else { Vec::new() };
    Seam { injections, death, watch: Some(watch(round, board, number)) }
}

/// Notes each passing of a point, and waits there now and then.
fn watch(round: &Arc<Round>, board: &'static Board, number: usize) -> Watch {
    let round = Arc::clone(round);
    let passed = AtomicU32::new(0);
    Box::new(move |point| {
        round.log.note(SERVER, Kind::Pass, number_of(point));
        if point == Point::FillNote {
            let second = std::thread::current().name() == Some("vmd-install-2");
            board.fills[usize::from(second)].fetch_add(1, Ordering::Relaxed);
        }
        let at = u64::from(passed.fetch_add(1, Ordering::Relaxed));
        let mut chance = Chance::new(round.plan.seed << 16 ^ (number as u64) << 12 ^ at);
        let slow = point == round.plan.slow && chance.percent(40);
        let stall = if slow { Stall::long(&mut chance) } else { Stall::draw(&mut chance) };
        stall.stand(&round.log);
    })
}

/// The place of a point among all.
pub fn number_of(point: Point) -> usize {
    Point::ALL.iter().position(|&(_, other)| other == point).expect("one of all")
}

/// Sleep until one of two eventfds is set. The parent notices who sleeps for too long.
fn wait_for_either(one: RawFd, other: RawFd) {
    let mut fds = [one, other].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: two valid pollfds.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } > 0 {
            return;
        }
    }
}
