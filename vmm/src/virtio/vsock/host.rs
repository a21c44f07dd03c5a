//! The Unix sockets on the host: the listener with its `CONNECT` line, and the sockets that the
//! guest's connections go to.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, connect, recv,
    socket_with,
};

use crate::virtio::host_connections::{FIRST_PORT, HostConnections};

/// Name of the listening socket in its directory.
pub const LISTENER_NAME: &str = "vsock.sock";
/// The longest line that a client may send: `CONNECT`, a space, ten digits, the line's end, and
/// as much again for those who end lines with a carriage return.
const LONGEST_LINE: usize = 32;
/// The longest path of a Unix socket (`sun_path` with its final NUL).
const LONGEST_PATH: usize = 107;

/// Where the host's side of connections is.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) listener: UnixListener,
    /// `<directory>/vsock.sock`; a guest's connection to port P goes to this with `_P` added.
    path: PathBuf,
    connections: HostConnections,
}

impl Host {
    pub(super) fn new(
        listener: UnixListener,
        directory: &Path,
        connections: HostConnections,
    ) -> io::Result<Self> {
        let path = directory.join(LISTENER_NAME);
        let longest = path.as_os_str().len() + "_4294967295".len();
        if longest > LONGEST_PATH {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "its sockets' paths would have {longest} bytes, {LONGEST_PATH} is the most"
                ),
            ));
        }
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            connections,
        })
    }

    /// Takes a waiting client, if there is one.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(socket) => return Ok(Some(socket)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Connects to whoever listens for a port; never waits. Ports from [`FIRST_PORT`] on stand for
    /// connections that are there already.
    pub(super) fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        if port >= FIRST_PORT {
            let gone = || io::ErrorKind::NotConnected.into();
            return self.connections.take(port).ok_or_else(gone);
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path.as_bytes())?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(socket)
    }
}

/// A client that has connected and owes its line.
#[derive(Debug)]
pub(super) struct Greeting {
    socket: OwnedFd,
}

/// What a client has said so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read {
    /// Less than a line.
    More,
    /// Something that is not a line as it should be, or its end.
    Refused,
    /// `CONNECT` with this port.
    Port(u32),
}

impl Greeting {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Reads the line if it is there, and not a byte beyond: what follows is for the guest.
    pub(super) fn read(&self) -> Read {
        let mut bytes = [0; LONGEST_LINE];
        let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let count = match recv(&self.socket, &mut bytes, peek) {
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Read::More,
            Err(_) => return Read::Refused,
        };
        if count == 0 {
            return Read::Refused;
        }
        let Some(end) = bytes[..count].iter().position(|byte| *byte == b'\n') else {
            return if count < LONGEST_LINE && !self.has_ended() {
                Read::More
            } else {
                Read::Refused
            };
        };
        let Some(port) = parse_line(&bytes[..end]) else {
            return Read::Refused;
        };
        match recv(&self.socket, &mut bytes[..=end], RecvFlags::DONTWAIT) {
            Ok((taken, _)) if taken == end + 1 => Read::Port(port),
            _ => Read::Refused,
        }
    }

    /// Whether what a peek showed is all that will ever come.
    fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut watched = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        matches!(poll(&mut watched, Some(&now)), Ok(count) if count > 0)
    }
}

/// `CONNECT <port>`, with the carriage return that some send.
fn parse_line(line: &[u8]) -> Option<u32> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let port = line.strip_prefix(b"CONNECT ")?;
    if port.is_empty() || !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(port).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn lines() {
        assert_eq!(parse_line(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_line(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for bad in [
            &b""[..],
            b"CONNECT",
            b"CONNECT ",
            b"CONNECT +1",
            b"CONNECT -1",
            b"CONNECT 4294967296",
            b"CONNECT 1 2",
            b"connect 1",
            b"\xff\xff",
        ] {
            assert_eq!(parse_line(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn takes_the_line_and_no_more() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let greeting = Greeting::new(ours.into());
        assert_eq!(greeting.read(), Read::More);
        theirs.write_all(b"CONN").expect("write");
        assert_eq!(greeting.read(), Read::More);
        theirs.write_all(b"ECT 7\nabc").expect("write");
        assert_eq!(greeting.read(), Read::Port(7));
        drop(theirs);
        let mut rest = String::new();
        UnixStream::from(greeting.into_socket())
            .read_to_string(&mut rest)
            .expect("read");
        assert_eq!(rest, "abc");
    }

    #[test]
    fn refuses_other_talk_and_a_close() {
        for said in [&b"GET / HTTP/1.1\r\n"[..], &[b'x'; 64], b"CONNECT 7", b""] {
            let (ours, mut theirs) = UnixStream::pair().expect("pair");
            theirs.write_all(said).expect("write");
            drop(theirs);
            assert_eq!(Greeting::new(ours.into()).read(), Read::Refused);
        }
    }
}
