//! A conversation with the kernel about the network namespace that the calling thread is in, by
//! rtnetlink(7): dumps, changes that are confirmed, and the announcement of changes.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink,
        recv, send, socket_with,
    },
};
use thiserror::Error;

/// The kernel makes a dump's pieces no larger than the reader's buffer and 32 KiB.
const BUFFER: usize = 64 * 1024;
/// linux/netlink.h: the dump is not of one moment, since something changed meanwhile.
const NLM_F_DUMP_INTR: u16 = 0x10;
/// A namespace that changes during so many dumps in a row is taken as it comes: each change is
/// announced, too, and looked at later.
const DUMPS: usize = 8;
/// linux/rtnetlink.h: RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE.
const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// The kernel could not be asked.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error("cannot {0} a netlink socket")]
    Socket(&'static str, #[source] io::Error),
    /// The kernel said no.
    #[error("the kernel refuses")]
    Refused(#[source] io::Error),
    /// An answer that cannot be read.
    #[error("the kernel's answer cannot be understood")]
    Malformed(#[source] DecodeError),
}

impl NetlinkError {
    /// The kernel's reason, if it gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused(error) => Errno::from_io_error(error),
            _ => None,
        }
    }
}

fn failed(what: &'static str) -> impl Fn(Errno) -> NetlinkError {
    move |errno| NetlinkError::Socket(what, errno.into())
}

fn open(groups: u32, flags: SocketFlags) -> Result<OwnedFd, NetlinkError> {
    let flags = flags | SocketFlags::CLOEXEC;
    // No protocol stands for NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)
        .map_err(failed("open"))?;
    rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups)).map_err(failed("bind"))?;
    Ok(socket)
}

/// Questions and changes.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// For the namespace that the calling thread is in now.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            socket: open(0, SocketFlags::empty())?,
            sequence: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// All that the kernel has of a kind.
    pub(super) fn dump(
        &mut self,
        request: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut found = Vec::new();
        for _ in 0..DUMPS {
            found.clear();
            self.send(request.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if self.collect(&mut found)? {
                break;
            }
        }
        Ok(found)
    }

    /// Has the kernel change something.
    pub(super) fn change(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.send(request, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        self.collect(&mut Vec::new()).map(drop)
    }

    fn send(&mut self, request: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let mut message = NetlinkMessage::from(request);
        self.sequence = self.sequence.wrapping_add(1);
        (message.header.flags, message.header.sequence_number) = (flags, self.sequence);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        rustix::io::retry_on_intr(|| send(&self.socket, &bytes, SendFlags::empty()))
            .map_err(failed("write to"))?;
        Ok(())
    }

    /// Takes in the answer to the last request; false if a dump was disturbed.
    fn collect(&mut self, found: &mut Vec<RouteNetlinkMessage>) -> Result<bool, NetlinkError> {
        let mut undisturbed = true;
        loop {
            let (_, length) = rustix::io::retry_on_intr(|| {
                recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC)
            })
            .map_err(failed("read from"))?;
            let mut rest = self.buffer.get(..length).ok_or_else(|| {
                NetlinkError::Socket(
                    "read a whole message from",
                    io::ErrorKind::InvalidData.into(),
                )
            })?;
            while !rest.is_empty() {
                let header = NetlinkBuffer::new_checked(rest).map_err(NetlinkError::Malformed)?;
                let length = usize::try_from(header.length()).unwrap_or(usize::MAX);
                let stranger = header.sequence_number() != self.sequence;
                undisturbed &= header.flags() & NLM_F_DUMP_INTR == 0;
                let (message, others) = rest.split_at_checked(length).unwrap_or((rest, &[]));
                // Messages begin at multiples of four (NLMSG_ALIGNTO).
                rest = others.get(length.wrapping_neg() % 4..).unwrap_or(&[]);
                if stranger {
                    continue;
                }
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message)
                    .map_err(NetlinkError::Malformed)?;
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(NetlinkError::Refused(error.to_io()));
                    }
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        let error = io::Error::from_raw_os_error(done.code.saturating_neg());
                        return Err(NetlinkError::Refused(error));
                    }
                    NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(undisturbed),
                    _ => {}
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Hears that something in a namespace has changed.
#[derive(Debug)]
pub(super) struct Changes {
    socket: OwnedFd,
}

impl Changes {
    /// Of the namespace that the calling thread is in now, from now on.
    pub(super) fn watch() -> Result<Self, NetlinkError> {
        let socket = open(GROUPS, SocketFlags::NONBLOCK)?;
        Ok(Self { socket })
    }

    /// Whether anything was announced since the last call. What it was tells a look at the
    /// namespace only: announcements may get lost (ENOBUFS).
    pub(super) fn happened(&mut self) -> Result<bool, NetlinkError> {
        // Only whether there is something counts, so it may be cut off.
        let mut buffer = [0; 64];
        let mut happened = false;
        loop {
            match recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok(_) | Err(Errno::NOBUFS) => happened = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(happened),
                Err(errno) => return Err(failed("read from")(errno)),
            }
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
