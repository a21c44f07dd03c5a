//! Reaching the guest's ports through the VM's Unix sockets: the `CONNECT` handshake, and the
//! listener to which the agent says that it is ready.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
};

use bulkhead_agent_protocol::{Greeting, READY_PORT, RPC_PORT, STDIO_PORT};
use rustix::event::{PollFd, PollFlags};
use thiserror::Error;

use crate::wait::{Deadline, poll};

/// A guest's port could not be reached.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No such socket, or nobody listens.
    #[error("cannot reach the virtual machine's socket")]
    Socket(#[source] io::Error),
    /// The socket failed during the handshake.
    #[error("the handshake with the guest's port {port} failed")]
    Handshake {
        /// Which port.
        port: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest did not accept.
    #[error("the guest refused a connection to its port {0}")]
    Refused(u32),
    /// The agent's greeting is not one.
    #[error("the guest's agent sent a malformed greeting")]
    Greeting(#[source] serde_json::Error),
    /// The greeting's connection failed.
    #[error("cannot receive the greeting of the guest's agent")]
    Ready(#[source] io::Error),
}

/// Unix socket addresses end at 108 bytes while the state root may be anywhere: so sockets are
/// named relative to an open descriptor of their directory.
fn socket_path(directory: BorrowedFd<'_>, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

/// A connection that has been asked for; several can be under way at once.
#[derive(Debug)]
pub struct Connecting {
    socket: UnixStream,
    port: u32,
}

impl Connecting {
    /// Asks for a connection to a port of the guest. `sockets` is the directory of the sockets.
    pub fn to(sockets: BorrowedFd<'_>, port: u32) -> Result<Self, ConnectError> {
        let mut socket = UnixStream::connect(socket_path(sockets, "vsock.sock"))
            .map_err(ConnectError::Socket)?;
        socket
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .map_err(|source| ConnectError::Handshake { port, source })?;
        Ok(Self { socket, port })
    }

    /// Asks for a connection to the agent's RPC port.
    pub fn rpc(sockets: BorrowedFd<'_>) -> Result<Self, ConnectError> {
        Self::to(sockets, RPC_PORT)
    }

    /// Asks for a connection to the agent's stdio port.
    pub fn stdio(sockets: BorrowedFd<'_>) -> Result<Self, ConnectError> {
        Self::to(sockets, STDIO_PORT)
    }

    /// Waits until the guest has accepted.
    pub fn finish(mut self, deadline: Deadline) -> Result<UnixStream, ConnectError> {
        let port = self.port;
        let failed = |source| ConnectError::Handshake { port, source };
        // Byte by byte: what follows the line belongs to the stream.
        let mut line = Vec::new();
        loop {
            let mut descriptors = [PollFd::new(&self.socket, PollFlags::IN)];
            if poll(&mut descriptors, Some(deadline)).map_err(failed)? == 0 {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            let mut byte = [0];
            match self.socket.read(&mut byte) {
                Ok(0) => return Err(ConnectError::Refused(port)),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) if line.len() < 32 => line.push(byte[0]),
                Ok(_) => return Err(ConnectError::Refused(port)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ConnectError::Refused(port));
                }
                Err(error) => return Err(failed(error)),
            }
        }
        if line.starts_with(b"OK ") {
            Ok(self.socket)
        } else {
            Err(ConnectError::Refused(port))
        }
    }

    /// Waits until the guest has accepted, then says which stream this is to be.
    pub fn finish_stdio(self, number: u64, deadline: Deadline) -> Result<UnixStream, ConnectError> {
        let port = self.port;
        let mut socket = self.finish(deadline)?;
        socket
            .write_all(&number.to_le_bytes())
            .map_err(|source| ConnectError::Handshake { port, source })?;
        Ok(socket)
    }
}

/// Where the agent's greeting arrives.
#[derive(Debug)]
pub struct ReadyListener {
    listener: UnixListener,
    accepted: Option<UnixStream>,
    line: Vec<u8>,
}

impl ReadyListener {
    /// Listens, before the VM runs.
    pub fn bind(sockets: BorrowedFd<'_>) -> Result<Self, ConnectError> {
        let path = socket_path(sockets, &format!("vsock.sock_{READY_PORT}"));
        let listener = UnixListener::bind(path).map_err(ConnectError::Ready)?;
        listener
            .set_nonblocking(true)
            .map_err(ConnectError::Ready)?;
        Ok(Self {
            listener,
            accepted: None,
            line: Vec::new(),
        })
    }

    /// What to poll for [`PollFlags::IN`].
    pub fn poll_fd(&self) -> PollFd<'_> {
        match &self.accepted {
            Some(socket) => PollFd::new(socket, PollFlags::IN),
            None => PollFd::new(&self.listener, PollFlags::IN),
        }
    }

    /// The greeting, if it is there.
    pub fn progress(&mut self) -> Result<Option<Greeting>, ConnectError> {
        loop {
            let Some(socket) = &mut self.accepted else {
                match self.listener.accept() {
                    Ok((socket, _)) => {
                        socket.set_nonblocking(true).map_err(ConnectError::Ready)?;
                        self.accepted = Some(socket);
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                    Err(error) => return Err(ConnectError::Ready(error)),
                }
            };
            let mut buffer = [0; 512];
            match socket.read(&mut buffer) {
                Ok(0) => {
                    return serde_json::from_slice(&self.line)
                        .map(Some)
                        .map_err(ConnectError::Greeting);
                }
                Ok(count) => self.line.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ConnectError::Ready(error)),
            }
            // A whole line is enough; a guest that goes on has said something else.
            if self.line.contains(&b'\n') || self.line.len() > 4096 {
                return serde_json::from_slice(&self.line)
                    .map(Some)
                    .map_err(ConnectError::Greeting);
            }
        }
    }
}
