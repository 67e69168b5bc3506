//! What is said over the control socket, and between pager and standby.
//!
//! One packet (SOCK_SEQPACKET) is one message, little-endian:
//!
//! ```text
//!  0  magic "vmdp", version u16 = 1, kind u16
//!  8  SERVE: the name; descriptors: journal, userfaultfd, pidfd of the VMM, image
//!     PUBLISH, GONE: the name
//!     REPLY: status u64 (0 done, 1 refused), then text
//!     STATUS, UPGRADE, SYNC, READY, BYE: nothing
//! ```
//!
//! A name is 1 to 64 characters of `a-z A-Z 0-9 . _ -`.

const MAGIC: &[u8; 4] = b"vmdp";
const VERSION: u16 = 1;
const HEAD: usize = 8;
pub const NAME_MAX: usize = 64;
/// Longest packet; only the text of a REPLY comes near it.
pub const PACKET_MAX: usize = 1 << 16;
/// Descriptors of a SERVE.
pub const DESCRIPTORS: usize = 4;

#[derive(Clone, Debug)]
pub enum Message {
    /// Serve a VM: all that there is to know stands in its journal.
    Serve {
        name: String,
    },
    /// Bring what the journal says of a VM's CPU time up to date.
    Publish {
        name: String,
    },
    /// Who serves what.
    Status,
    /// Hand everything over to a fresh standby, and end.
    Upgrade,
    Reply {
        refused: bool,
        text: String,
    },
    // between pager and standby
    /// A VM has ended.
    Gone {
        name: String,
    },
    /// Say READY when you have understood all that came before.
    Sync,
    Ready,
    /// There is nothing left to serve: end.
    Bye,
}

impl Message {
    pub fn reply(answer: Result<String, String>) -> Self {
        match answer {
            Ok(text) => Self::Reply { refused: false, text },
            Err(text) => Self::Reply { refused: true, text },
        }
    }

    pub fn write(&self) -> Vec<u8> {
        let mut packet = MAGIC.to_vec();
        packet.extend_from_slice(&VERSION.to_le_bytes());
        packet.extend_from_slice(&self.kind().to_le_bytes());
        match self {
            Self::Serve { name } | Self::Publish { name } | Self::Gone { name } => {
                packet.extend_from_slice(name.as_bytes())
            }
            Self::Reply { refused, text } => {
                packet.extend_from_slice(&u64::from(*refused).to_le_bytes());
                packet.extend_from_slice(text.as_bytes());
                packet.truncate(PACKET_MAX);
            }
            Self::Status | Self::Upgrade | Self::Sync | Self::Ready | Self::Bye => {}
        }
        packet
    }

    /// What was expected and what came, for anything that `write` does not write.
    pub fn parse(packet: &[u8]) -> Result<Self, String> {
        let Some((head, rest)) = packet.split_at_checked(HEAD) else {
            return Err(format!("expected a message of {HEAD} bytes and more, got {}", packet.len()));
        };
        if &head[..4] != MAGIC {
            return Err("expected a message of vmd, got something else".into());
        }
        let number = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        if number(4) != VERSION {
            return Err(format!("expected version {VERSION} of the protocol, got {}", number(4)));
        }
        match number(6) {
            1 => Ok(Self::Serve { name: parse_name(rest)? }),
            2 => Ok(Self::Publish { name: parse_name(rest)? }),
            3 => nothing_more(rest, Self::Status),
            4 => nothing_more(rest, Self::Upgrade),
            5 => parse_reply(rest),
            6 => Ok(Self::Gone { name: parse_name(rest)? }),
            7 => nothing_more(rest, Self::Sync),
            8 => nothing_more(rest, Self::Ready),
            9 => nothing_more(rest, Self::Bye),
            kind => Err(format!("there is no message of kind {kind}")),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Serve { .. } => 1,
            Self::Publish { .. } => 2,
            Self::Status => 3,
            Self::Upgrade => 4,
            Self::Reply { .. } => 5,
            Self::Gone { .. } => 6,
            Self::Sync => 7,
            Self::Ready => 8,
            Self::Bye => 9,
        }
    }
}

fn parse_reply(rest: &[u8]) -> Result<Message, String> {
    let Some((status, text)) = rest.split_at_checked(8) else {
        return Err(format!("expected a status, got {} bytes", rest.len()));
    };
    let refused = u64::from_le_bytes(status.try_into().expect("eight bytes")) != 0;
    Ok(Message::Reply { refused, text: String::from_utf8_lossy(text).into_owned() })
}

fn parse_name(bytes: &[u8]) -> Result<String, String> {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.is_empty() && name.len() <= NAME_MAX && bytes.iter().all(fits) => Ok(name.into()),
        _ => Err(format!("expected a name of 1 to {NAME_MAX} letters, digits, . _ -, got {} bytes", bytes.len())),
    }
}

fn nothing_more(rest: &[u8], message: Message) -> Result<Message, String> {
    if rest.is_empty() { Ok(message) } else { Err(format!("expected nothing more, got {} bytes", rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_parsed() {
        let name = || "sb-1".to_string();
        let messages = [
            Message::Serve { name: name() },
            Message::Publish { name: name() },
            Message::Status,
            Message::Upgrade,
            Message::reply(Err("no".into())),
            Message::Gone { name: name() },
            Message::Sync,
            Message::Ready,
            Message::Bye,
        ];
        for message in messages {
            let parsed = Message::parse(&message.write()).unwrap();
            assert_eq!(format!("{parsed:?}"), format!("{message:?}"));
        }
    }

    #[test]
    fn anything_else_is_refused_in_words() {
        let refused = |packet: &[u8]| Message::parse(packet).unwrap_err();
        assert!(refused(b"").starts_with("expected a message of 8 bytes"));
        assert!(refused(b"GET / HTTP/1.1").contains("of vmd"));
        assert!(refused(b"vmdp\x02\0\x03\0").contains("version 1"));
        assert!(refused(b"vmdp\x01\0\x63\0").contains("kind 99"));
        assert!(refused(b"vmdp\x01\0\x03\0x").contains("nothing more"));
        assert!(refused(b"vmdp\x01\0\x02\0").contains("a name"));
        assert!(refused(b"vmdp\x01\0\x02\0../../etc").contains("a name"));
        let mut long = b"vmdp\x01\0\x02\0".to_vec();
        long.extend_from_slice(&[b'a'; NAME_MAX + 1]);
        assert!(refused(&long).contains("a name"));
    }
}
