//! The pager at work: takes VMs from clients, keeps a standby, hears of VMs' ends.
//!
//! One thread for all of it, and nothing that a fault waits for: VMs are served by threads of their own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::hold::Hold;
use super::message::Message;
use super::options::Options;
use super::poll::Poll;
use super::socket::{Packet, Socket};
use super::spawn::{News, Standby};
use super::{found, log};
use crate::adopt::words;
use crate::core::Core;
use crate::demand::Ended;
use crate::host;

/// Names in the directory of runs (`vmd.pager.start`).
const SOCKET: &str = "pager.sock";
const LOCK: &str = "pager.lock";
const LOG: &str = "pager.log";

/// Clients at once; one that comes when all are taken waits in the backlog.
const CLIENTS_MAX: usize = 64;
/// A client who has said nothing for so long is hung up on: he would keep others out, and the pager alive.
const CLIENT_SILENCE: Duration = Duration::from_secs(1);
/// A standby that lives for less is not followed at once by the next one.
const STANDBY_LIFE: Duration = Duration::from_secs(1);
const STANDBY_PAUSE: Duration = Duration::from_millis(200);
/// One that cannot start is tried more and more rarely.
const STANDBY_PAUSE_MAX: Duration = Duration::from_secs(5);

/// A VM and what serves it.
pub struct Served {
    pub hold: Hold,
    pub core: Core,
}

pub struct Pager {
    options: Options,
    listener: OwnedFd,
    signals: OwnedFd,
    vms: BTreeMap<String, Served>,
    clients: Vec<Client>,
    standby: Option<Standby>,
    standby_after: Instant,
    standby_pause: Duration,
    idle_since: Option<Instant>,
    leaving: bool,
}

/// A client, and since when he has been silent.
struct Client {
    socket: Socket,
    since: Instant,
}

impl Pager {
    /// `vms`: those that are served already.
    pub fn new(options: Options, listener: OwnedFd, signals: OwnedFd, vms: Vec<Served>) -> Self {
        let vms = vms.into_iter().map(|served| (served.hold.name.clone(), served)).collect();
        let now = Instant::now();
        let mut pager = Self {
            options,
            listener,
            signals,
            vms,
            clients: Vec::new(),
            standby: None,
            standby_after: now,
            standby_pause: STANDBY_PAUSE,
            idle_since: Some(now),
            leaving: false,
        };
        pager.adopt_found();
        pager
    }

    /// Serve until there is nothing more to serve, or everything has been handed over.
    pub fn run(mut self) -> io::Result<()> {
        loop {
            self.keep_standby();
            self.tell_standby();
            if self.turn()? {
                return Ok(());
            }
        }
    }

    /// Wait for something and do it. True: this is the end.
    fn turn(&mut self) -> io::Result<bool> {
        let mut poll = Poll::default();
        let signals = poll.add_if(!self.leaving, self.signals.as_raw_fd()); // it stays ready
        let listener = poll.add_if(self.clients.len() < CLIENTS_MAX, self.listener.as_raw_fd());
        let standby = self.standby.as_ref().map(|standby| standby.watch(&mut poll));
        let clients: Vec<_> = self.clients.iter().map(|client| poll.add(client.socket.raw())).collect();
        let vms: Vec<_> = self.vms.values().map(|served| poll.add(served.core.outside.ended.raw())).collect();
        poll.wait(self.patience())?;
        if let Some(places) = standby {
            self.hear_standby(&poll, places);
        }
        let ended: Vec<_> =
            self.vms.keys().zip(vms).filter(|&(_, at)| poll.ready(at)).map(|(name, _)| name.clone()).collect();
        ended.iter().for_each(|name| self.end(name));
        let heard: Vec<_> = (0..clients.len()).rev().filter(|&at| poll.ready(clients[at])).collect();
        heard.into_iter().for_each(|at| self.hear(at));
        self.clients.retain(|client| client.since.elapsed() < CLIENT_SILENCE);
        self.leaving |= signals.is_some_and(|at| poll.ready(at));
        if self.is_relieved() {
            self.hand_over();
            return Ok(true);
        }
        if listener.is_some_and(|at| poll.ready(at)) {
            self.accept();
        }
        Ok(self.is_over())
    }

    fn patience(&self) -> Option<Duration> {
        let now = Instant::now();
        let standby = self.standby.as_ref().map_or(Some(self.standby_after), Standby::must_be_ready_at);
        let idle = self.idle_since.zip(self.options.idle).map(|(since, idle)| since + idle);
        let silence = self.clients.iter().map(|client| client.since + CLIENT_SILENCE).min();
        let next = [standby, idle, silence].into_iter().flatten().min();
        next.map(|next| next.saturating_duration_since(now))
    }

    /// Whether it has been idle for long enough; then the standby is told to go.
    fn is_over(&mut self) -> bool {
        if !self.vms.is_empty() || !self.clients.is_empty() {
            self.idle_since = None;
            return false;
        }
        let since = *self.idle_since.get_or_insert_with(Instant::now);
        let over = self.leaving || self.options.idle.is_some_and(|idle| since.elapsed() >= idle);
        over && self.close()
    }

    /// Stop listening, for good: whoever comes from now on starts another pager. False: somebody has just come.
    fn close(&mut self) -> bool {
        let runs = &self.options.runs;
        let starts = host::lock_file(&runs.join(LOCK)); // held to the end of this process
        if matches!(starts, Ok(None)) {
            return false; // one is being started, by somebody who will find us
        }
        let (socket, lock, log) = (runs.join(SOCKET), runs.join(LOCK), runs.join(LOG));
        self.accept();
        if !self.clients.is_empty() {
            return false;
        }
        self.dismiss_standby();
        let nothing_said = fs::metadata(&log).is_ok_and(|log| log.len() == 0);
        for path in [Some(socket), nothing_said.then_some(log), Some(lock)].into_iter().flatten() {
            let _ = fs::remove_file(path);
        }
        std::mem::forget(starts);
        true
    }

    // ---- clients ---------------------------------------------------------------------------

    fn accept(&mut self) {
        match Socket::accept(self.listener.as_fd()) {
            Ok(Some(socket)) if socket.is_from_us() => self.clients.push(Client { socket, since: Instant::now() }),
            Ok(_) => {}
            Err(error) => log::line(&format!("accept: {}", words(&error))),
        }
    }

    fn hear(&mut self, at: usize) {
        self.clients[at].since = Instant::now();
        match self.clients[at].socket.receive() {
            Ok(Some(packet)) => self.obey(at, packet),
            Ok(None) => drop(self.clients.swap_remove(at)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => drop(self.clients.swap_remove(at)),
        }
    }

    fn obey(&mut self, at: usize, packet: Packet) {
        let answer = match packet.message {
            Ok(Message::Serve { name }) => Hold::check(name, packet.descriptors).and_then(|hold| self.serve(hold)),
            Ok(Message::Publish { name }) => self.publish(&name),
            Ok(Message::Status) => Ok(self.status()),
            Ok(Message::Upgrade) if self.is_upgrading() => Err("an upgrade is under way".into()),
            Ok(Message::Upgrade) => return self.upgrade(at),
            Ok(other) => Err(format!("not for a client to say: {other:?}")),
            Err(why) => Err(why),
        };
        if self.clients[at].socket.send(&Message::reply(answer), &[]).is_err() {
            self.clients.swap_remove(at); // does not read, or has gone
        }
    }

    fn serve(&mut self, hold: Hold) -> Result<String, String> {
        if let Some(Served { hold: other, .. }) = self.vms.values().find(|served| served.hold.is_of_vmm(&hold)) {
            return match other.is_same(&hold) {
                true => Ok("served already".into()), // who asked did not hear the answer
                false => Err(format!("its VMM is served already, under the name {}", other.name)),
            };
        }
        if self.vms.contains_key(&hold.name) {
            return Err(format!("another VM of the name {} is served", hold.name));
        }
        let core = hold.prepare(false).map_err(|error| words(&error))?;
        let name = hold.name.clone();
        self.vms.insert(name.clone(), Served { hold, core });
        self.tell(News::Serve(name.clone()));
        self.tell_standby(); // before it is answered: what was answered outlives us
        let served = &self.vms[&name];
        let started = served.hold.start(&served.core);
        if started.is_err() {
            self.forget(&name);
        }
        started.map(|()| "served".into())
    }

    fn publish(&self, name: &str) -> Result<String, String> {
        let served = self.vms.get(name).ok_or_else(|| format!("no VM of the name {name} is served"))?;
        Ok(format!("{}", served.core.outside.cpu().as_micros()))
    }

    fn status(&self) -> String {
        let mut text = format!("pager {}\n", std::process::id());
        if let Some(standby) = &self.standby {
            let state = if standby.ready { "ready" } else { "starting" };
            text += &format!("standby {} {state}\n", standby.child.id());
        }
        for (name, served) in &self.vms {
            text += &format!("vm {name} {}\n", served.hold.body.vmm_pid);
        }
        text
    }

    // ---- VMs -------------------------------------------------------------------------------

    /// VMs that no page server serves, found by their journals: this one was started after a crash of all.
    fn adopt_found(&mut self) {
        for hold in found::all(&self.options.runs) {
            let adopted = hold.prepare(true).map_err(|error| words(&error)).and_then(|core| {
                hold.start(&core)?;
                Ok(core)
            });
            match adopted {
                Ok(core) => {
                    log::line(&format!("{}: adopted", hold.name));
                    self.vms.insert(hold.name.clone(), Served { hold, core });
                }
                Err(why) => log::line(&format!("{}: killed: {why}", hold.name)),
            }
        }
    }

    fn end(&mut self, name: &str) {
        if let Some(served) = self.vms.get(name) {
            if let Ended::Failed(why) = served.core.join() {
                log::line(&format!("{name}: failed, its VMM is killed: {why}"));
            }
            self.forget(name);
        }
    }

    fn forget(&mut self, name: &str) {
        self.vms.remove(name);
        self.tell(News::Gone(name.into()));
    }

    // ---- the standby -----------------------------------------------------------------------

    fn keep_standby(&mut self) {
        if self.standby.is_some() || Instant::now() < self.standby_after || self.vms.is_empty() {
            return;
        }
        if let Err(error) = self.start_standby() {
            log::line(&format!("standby: {}", words(&error)));
            self.put_off_standby(false);
        }
    }

    /// One that could not even start will most likely not the next time either.
    fn put_off_standby(&mut self, it_started: bool) {
        self.standby_pause = if it_started { STANDBY_PAUSE } else { (2 * self.standby_pause).min(STANDBY_PAUSE_MAX) };
        self.standby_after = Instant::now() + self.standby_pause;
    }

    fn start_standby(&mut self) -> io::Result<()> {
        self.standby = Some(Standby::start(&self.options, &self.listener, self.vms.keys().cloned())?);
        Ok(())
    }

    fn tell(&mut self, news: News) {
        if let Some(standby) = &mut self.standby {
            standby.push(news);
        }
    }

    fn tell_standby(&mut self) {
        if let Some(standby) = &mut self.standby {
            standby.tell(&self.vms);
        }
    }

    fn hear_standby(&mut self, poll: &Poll, [socket, pidfd]: [usize; 2]) {
        let Some(standby) = &mut self.standby else { return };
        if poll.ready(pidfd) {
            self.lose_standby();
        } else {
            standby.hear(poll.ready(socket));
        }
    }

    /// Whether it is to go, and a standby is there that goes on.
    fn is_relieved(&mut self) -> bool {
        let Some(standby) = self.standby.as_mut().filter(|standby| standby.knows_all()) else { return false };
        if let Some(client) = standby.upgrade.take() {
            let _ = client.send(&Message::reply(Ok("handed over".into())), &[]);
            return true;
        }
        self.leaving
    }

    fn lose_standby(&mut self) {
        let Some(mut standby) = self.standby.take() else { return };
        let _ = standby.child.wait(); // it has exited
        if let Some(client) = standby.upgrade {
            let _ = client.send(&Message::reply(Err("the new standby has died; nothing has changed".into())), &[]);
        }
        if standby.since.elapsed() < STANDBY_LIFE || !standby.ready {
            log::line("standby: it has died young");
            self.put_off_standby(standby.ready);
        }
    }

    fn dismiss_standby(&mut self) {
        if let Some(mut standby) = self.standby.take() {
            let _ = standby.socket.send(&Message::Bye, &[]);
            let _ = standby.child.kill(); // it holds nothing that anybody needs
            let _ = standby.child.wait();
        }
    }

    fn is_upgrading(&self) -> bool {
        self.standby.as_ref().is_some_and(|standby| standby.upgrade.is_some())
    }

    /// Start a new standby, of the program as it is on disk now; hand over when it is ready.
    fn upgrade(&mut self, at: usize) {
        let client = self.clients.swap_remove(at).socket;
        self.dismiss_standby();
        if let Err(error) = self.start_standby() {
            let _ = client.send(&Message::reply(Err(format!("a new standby: {}", words(&error)))), &[]);
        } else if let Some(standby) = &mut self.standby {
            standby.upgrade = Some(client);
        }
    }

    /// Stop reading, in all VMs, with nothing left in hand; the standby goes on when we have exited.
    fn hand_over(&mut self) {
        self.vms.values().for_each(|served| served.core.hand_over());
        self.vms.values().for_each(|served| drop(served.core.join()));
        log::line("handed over");
    }
}
