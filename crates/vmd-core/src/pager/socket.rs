//! Packets with descriptors (unix(7), SCM_RIGHTS), and who sent them.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::message::{DESCRIPTORS, Message, PACKET_MAX};

/// One end of a connection that keeps packets apart.
pub struct Socket(OwnedFd);

/// What came with one packet.
pub struct Packet {
    pub message: Result<Message, String>,
    pub descriptors: Vec<OwnedFd>,
}

/// Room for the descriptors of one message, aligned as the kernel wants it.
#[repr(C, align(8))]
struct Control([u8; 64]);

const DESCRIPTOR_BYTES: u32 = (DESCRIPTORS * size_of::<RawFd>()) as u32;
// SAFETY: CMSG_SPACE computes with integers only.
const _: () = assert!(unsafe { libc::CMSG_SPACE(DESCRIPTOR_BYTES) } as usize <= size_of::<Control>());

impl Socket {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Two connected ends.
    pub fn pair() -> io::Result<(Self, Self)> {
        let mut fds = [-1; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: room for two descriptors, which are owned here and nowhere else.
        unsafe {
            if libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok((Self(OwnedFd::from_raw_fd(fds[0])), Self(OwnedFd::from_raw_fd(fds[1]))))
        }
    }

    /// The next connection to a listening socket; None when there is none after all.
    pub fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let flags = libc::SOCK_CLOEXEC;
        // SAFETY: null addresses are allowed; the new descriptor is owned here and nowhere else.
        match unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) } {
            -1 => match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ECONNABORTED)) => Ok(None),
                error => Err(error),
            },
            // SAFETY: as above.
            fd => Ok(Some(Self(unsafe { OwnedFd::from_raw_fd(fd) }))),
        }
    }

    pub fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Whether the peer, when it connected, was this user or root (SO_PEERCRED).
    pub fn is_from_us(&self) -> bool {
        let mut peer = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        let (peer_at, len_at) = ((&raw mut peer).cast(), &raw mut len);
        // SAFETY: room for one ucred, of the length that is said.
        let told = unsafe { libc::getsockopt(self.raw(), libc::SOL_SOCKET, libc::SO_PEERCRED, peer_at, len_at) } == 0;
        // SAFETY: takes and touches nothing.
        told && (peer.uid == 0 || peer.uid == unsafe { libc::geteuid() })
    }

    /// Send one message, without waiting for a peer that does not read.
    pub fn send(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        assert!(descriptors.len() <= DESCRIPTORS);
        let packet = message.write();
        let mut part = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
        let mut control = Control([0; 64]);
        // SAFETY: all zeros is a valid msghdr; what it points to lives through the call, and is only read.
        let sent = unsafe {
            let mut header: libc::msghdr = MaybeUninit::zeroed().assume_init();
            (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
            if !descriptors.is_empty() {
                let bytes = size_of_val(descriptors) as u32;
                header.msg_control = control.0.as_mut_ptr().cast();
                header.msg_controllen = libc::CMSG_SPACE(bytes) as _;
                let first = libc::CMSG_FIRSTHDR(&raw const header);
                (*first).cmsg_level = libc::SOL_SOCKET;
                (*first).cmsg_type = libc::SCM_RIGHTS;
                (*first).cmsg_len = libc::CMSG_LEN(bytes) as _;
                let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
                std::ptr::copy_nonoverlapping(numbers.as_ptr().cast(), libc::CMSG_DATA(first), bytes as usize);
            }
            libc::sendmsg(self.raw(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The next packet that has come; None: the peer has hung up. Fails with EAGAIN when there is none yet.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut packet = vec![0; PACKET_MAX];
        let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
        let mut control = Control([0; 64]);
        // SAFETY: all zeros is a valid msghdr; what it points to lives through the call and may be written.
        let (len, header) = unsafe {
            let mut header: libc::msghdr = MaybeUninit::zeroed().assume_init();
            (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            (libc::recvmsg(self.raw(), &raw mut header, flags), header)
        };
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has filled the control data that `header` points to.
        let descriptors = unsafe { take_descriptors(&header) };
        if len == 0 {
            return Ok(None);
        }
        let cut = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        let message =
            if cut { Err("too long, or too many descriptors".into()) } else { Message::parse(&packet[..len as usize]) };
        Ok(Some(Packet { message, descriptors }))
    }
}

/// # Safety
/// `header` must be as recvmsg(2) left it, with its control data still there.
unsafe fn take_descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut taken = Vec::new();
    // SAFETY: by this function's own contract; the new descriptors are owned here and nowhere else.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(std::ptr::from_ref(header));
        while !part.is_null() {
            if (*part).cmsg_level == libc::SOL_SOCKET && (*part).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*part).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                let first: *const RawFd = libc::CMSG_DATA(part).cast();
                for at in 0..bytes / size_of::<RawFd>() {
                    taken.push(OwnedFd::from_raw_fd(first.add(at).read_unaligned()));
                }
            }
            part = libc::CMSG_NXTHDR(std::ptr::from_ref(header), part);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_come_with_their_message() {
        let (ours, theirs) = Socket::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        ours.send(&Message::Status, &[file.as_fd(), file.as_fd()]).unwrap();
        let packet = theirs.receive().unwrap().unwrap();
        assert!(matches!(packet.message, Ok(Message::Status)));
        assert_eq!(packet.descriptors.len(), 2);
        assert_eq!(theirs.receive().err().unwrap().raw_os_error(), Some(libc::EAGAIN));
        assert!(theirs.is_from_us());
        drop(ours);
        assert!(theirs.receive().unwrap().is_none());
    }
}
