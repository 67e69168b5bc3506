//! A packet to the pager, with any descriptors, over a real socket: understood, or refused with a word.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use libfuzzer_sys::fuzz_target;
use vmd_core::internals::message::{Message, NAME_MAX, PACKET_MAX};
use vmd_core::internals::socket::Socket;

/// The kernel passes no more with one packet.
const FDS_MAX: usize = 253;
/// As many as the pager has room for, and what fills up the room for the head of them.
const FDS_TAKEN: usize = 12;

/// How many descriptors, how often the packet is repeated to make it long, the packet.
type Input<'a> = (u8, u16, &'a [u8]);

fuzz_target!(|input: Input| {
    let (count, repeated, bytes) = input;
    check_parse(bytes);
    let packet = bytes.repeat(usize::from(repeated) % (PACKET_MAX / bytes.len().max(1) + 2) + 1);
    let before = open_descriptors();
    check_received(&packet, usize::from(count).min(FDS_MAX));
    assert_eq!(open_descriptors(), before);
});

/// What is understood is written as it was; but for words that are not UTF-8.
fn check_parse(packet: &[u8]) {
    match Message::parse(packet) {
        Ok(Message::Reply { refused, text }) => {
            let written = Message::Reply { refused, text: text.clone() }.write();
            let again = Message::parse(&written);
            assert!(
                matches!(again, Ok(Message::Reply { refused: r, text: t }) if r == refused && text.starts_with(&t))
            );
        }
        Ok(message) => {
            assert_eq!(message.write(), packet);
            if let Message::Serve { name } | Message::Publish { name } | Message::Gone { name } = message {
                let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
                assert!((1..=NAME_MAX).contains(&name.len()) && name.chars().all(fits));
            }
        }
        Err(why) => assert!(why.len() < 200 && !why.contains(char::is_control), "{why:?}"),
    }
}

fn check_received(packet: &[u8], count: usize) {
    let (ours, theirs) = pair();
    let null = File::open("/dev/null").unwrap();
    if !send(&theirs, packet, &vec![null.as_raw_fd(); count]) {
        return; // longer than any socket takes
    }
    let received = Socket::new(ours).receive().unwrap();
    let Some(received) = received else { return assert!(packet.is_empty()) };
    assert_eq!(received.descriptors.len(), count.min(FDS_TAKEN));
    let whole = packet.len() <= PACKET_MAX && count <= FDS_TAKEN;
    let expected = if whole { Message::parse(packet) } else { Err("too long, or too many descriptors".into()) };
    assert_eq!(format!("{:?}", received.message), format!("{expected:?}"));
}

fn pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: room for two descriptors, which are owned here and nowhere else.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// As a client would that has not read our rules.
fn send(socket: &OwnedFd, packet: &[u8], fds: &[RawFd]) -> bool {
    let bytes = size_of_val(fds) as u32;
    let mut part = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
    let mut control = vec![0u64; 160];
    // SAFETY: all zeros is a valid msghdr; what it points to lives through the call; there is room for `FDS_MAX`.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        if !fds.is_empty() {
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = libc::CMSG_SPACE(bytes) as _;
            let first = libc::CMSG_FIRSTHDR(&raw const header);
            ((*first).cmsg_level, (*first).cmsg_type) = (libc::SOL_SOCKET, libc::SCM_RIGHTS);
            (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(first), bytes as usize);
        }
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) >= 0
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
