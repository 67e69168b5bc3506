//! The standby: holds what the pager holds, and waits for its death.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::hold::Hold;
use super::log;
use super::message::Message;
use super::poll::Poll;
use super::primary::Served;
use super::socket::{Packet, Socket};
use crate::adopt::words;

/// Keep up with the pager until it dies; then what it served. None: there is nothing left to serve.
///
/// Everything is prepared beforehand: mapped, locked, looked through. When the pager has died, for
/// which its pidfd is the only authority, nothing is left but to apply each ring, wake and serve.
pub fn wait(socket: &Socket, pager: &OwnedFd, signals: &OwnedFd) -> io::Result<Option<Vec<Served>>> {
    let mut vms = BTreeMap::new();
    let mut connected = true;
    loop {
        let mut poll = Poll::default();
        let (death, signal) = (poll.add(pager.as_raw_fd()), poll.add(signals.as_raw_fd()));
        let news = poll.add_if(connected, socket.raw());
        poll.wait(None)?;
        if news.is_some_and(|news| poll.ready(news)) {
            match hear_one(socket, &mut vms)? {
                Heard::Something | Heard::Nothing => {}
                Heard::Bye => return Ok(None),
                Heard::End => connected = false,
            }
        }
        if poll.ready(death) {
            while connected && matches!(hear_one(socket, &mut vms)?, Heard::Something) {} // what it said last
            return Ok(Some(go_on(vms)));
        }
        if poll.ready(signal) {
            return Ok(None);
        }
    }
}

enum Heard {
    Something,
    Nothing,
    Bye,
    /// The pager is dead, or about to be.
    End,
}

fn hear_one(socket: &Socket, vms: &mut BTreeMap<String, Served>) -> io::Result<Heard> {
    let packet = match socket.receive() {
        Ok(Some(packet)) => packet,
        Ok(None) => return Ok(Heard::End),
        // It died with an answer of ours unread; what it said last is still to be heard.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Heard::Something),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
        Err(error) => return Err(error),
    };
    let Packet { message, descriptors } = packet;
    match message {
        Ok(Message::Serve { .. }) if Hold::is_over(&descriptors) => {}
        Ok(Message::Serve { name }) => match prepare(name.clone(), descriptors) {
            Ok(served) => drop(vms.insert(name, served)),
            Err(why) => log::line(&format!("standby: {name}: {why}")),
        },
        Ok(Message::Gone { name }) => drop(vms.remove(&name)),
        // A pager that has died meanwhile does not hear it: now it is our turn, and no time to give up.
        Ok(Message::Sync) => drop(socket.send(&Message::Ready, &[])),
        Ok(Message::Bye) => return Ok(Heard::Bye),
        other => log::line(&format!("standby: not understood: {other:?}")),
    }
    Ok(Heard::Something)
}

fn prepare(name: String, descriptors: Vec<OwnedFd>) -> Result<Served, String> {
    let hold = Hold::check(name, descriptors)?;
    let core = hold.prepare(true).map_err(|error| words(&error))?;
    Ok(Served { hold, core })
}

fn go_on(vms: BTreeMap<String, Served>) -> Vec<Served> {
    let started = |served: &Served| match served.hold.start(&served.core) {
        Ok(()) => true,
        Err(why) => {
            log::line(&format!("{}: killed: {why}", served.hold.name));
            false
        }
    };
    let served: Vec<_> = vms.into_values().filter(started).collect();
    log::line(&format!("pager died; {} VMs taken over", served.len()));
    served
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is heard to the end of a pager that has died.
    fn heard(socket: &Socket) -> Vec<Heard> {
        let mut all = Vec::new();
        while !matches!(all.last(), Some(Heard::End)) {
            all.push(hear_one(socket, &mut BTreeMap::new()).expect("the standby goes on"));
        }
        all
    }

    #[test]
    fn a_pager_that_dies_before_it_hears_ready_is_followed() {
        let (pager, standby) = Socket::pair().unwrap();
        pager.send(&Message::Sync, &[]).unwrap();
        drop(pager);
        assert!(matches!(heard(&standby)[..], [Heard::Something, Heard::End]));
    }

    #[test]
    fn what_a_pager_said_before_it_died_is_heard_though_it_left_our_word_unread() {
        let (pager, standby) = Socket::pair().unwrap();
        standby.send(&Message::Ready, &[]).unwrap();
        pager.send(&Message::Gone { name: "vm".into() }, &[]).unwrap();
        drop(pager);
        // The reset comes first, then the message, then the end.
        assert!(matches!(heard(&standby)[..], [Heard::Something, Heard::Something, Heard::End]));
    }
}
