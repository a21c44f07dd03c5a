//! A netlink socket of the namespace in which it was made. The kernel answers a request of rtnetlink
//! before the call that sends it returns, so waiting for the answer takes no time.

use std::{fmt, io};

use netlink_packet_core::{
    DecodeError, Emitable, ErrorBuffer, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader, NlaBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::netdevice::name_to_index;

use super::messages::Request;

/// `NLMSGERR_ATTR_MSG`: the kernel's explanation in words.
const EXPLANATION: u16 = 1;

/// Size of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A socket.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// What the kernel has against a request.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) cause: io::Error,
    explanation: Option<String>,
}

impl Refusal {
    pub(super) fn is(&self, number: i32) -> bool {
        self.cause.raw_os_error() == Some(number)
    }
}

impl From<io::Error> for Refusal {
    fn from(cause: io::Error) -> Self {
        Self {
            cause,
            explanation: None,
        }
    }
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        match &refusal.explanation {
            Some(_) => Self::other(refusal),
            None => refusal.cause,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.explanation {
            Some(words) => write!(formatter, "{words} ({})", self.cause),
            None => self.cause.fmt(formatter),
        }
    }
}

impl std::error::Error for Refusal {}

impl Netlink {
    /// A socket in the caller's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        // The request is left out of answers, so that the explanation follows the header.
        socket.set_cap_ack(true)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Has the kernel do what is asked.
    pub(super) fn ask(&mut self, request: &Request, flags: u16) -> Result<(), Refusal> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER + request.body.len();
        let mut header = NetlinkHeader::default();
        header.length = u32::try_from(length).map_err(io::Error::other)?;
        header.message_type = request.kind;
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        header.sequence_number = self.sequence;
        let mut bytes = vec![0; length];
        header.emit(&mut bytes);
        bytes[HEADER..].copy_from_slice(&request.body);
        self.socket.send(&bytes, 0)?;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let answer = NetlinkBuffer::new_checked(&bytes).map_err(unreadable)?;
            if answer.sequence_number() == self.sequence && answer.message_type() == NLMSG_ERROR {
                let answer = ErrorBuffer::new_checked(answer.payload()).map_err(unreadable)?;
                return check(&answer);
            }
        }
    }

    /// The number of an interface.
    pub(super) fn index(&self, name: &str) -> io::Result<u32> {
        Ok(name_to_index(&self.socket, name)?)
    }
}

fn unreadable(error: DecodeError) -> io::Error {
    io::Error::other(error.to_string())
}

fn check(answer: &ErrorBuffer<&[u8]>) -> Result<(), Refusal> {
    match answer.code() {
        None => Ok(()),
        Some(code) => Err(Refusal {
            cause: io::Error::from_raw_os_error(code.get().saturating_neg()),
            explanation: explanation(answer.payload().get(HEADER..).unwrap_or_default()),
        }),
    }
}

fn explanation(attributes: &[u8]) -> Option<String> {
    let mut attributes = NlasIterator::new(attributes).flatten();
    let words = attributes.find(|attribute: &NlaBuffer<_>| attribute.kind() == EXPLANATION)?;
    let words = String::from_utf8_lossy(words.value()).into_owned();
    Some(
        words
            .trim_end_matches('\0')
            .trim_end_matches('.')
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explanations_are_found() {
        let mut attributes = vec![8, 0, 2, 0, 1, 2, 3, 4];
        attributes.extend([10, 0, 1, 0, b'N', b'o', b'p', b'e', b'.', 0, 0, 0]);
        assert_eq!(explanation(&attributes).as_deref(), Some("Nope"));
        for broken in [
            &b""[..],
            b"\x01",
            b"\xff\xff\x01\x00ab",
            b"\x00\x00\x01\x00",
        ] {
            assert_eq!(explanation(broken), None);
        }
    }
}
