//! The guest's agent as the host side uses it.

pub mod connect;
pub mod rpc;

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_agent_protocol::messages::Stdio;
use protobuf::Message;
use rustix::{
    event::{PollFd, PollFlags},
    fs::{Mode, OFlags},
};
use thiserror::Error;

use self::{
    connect::{ConnectError, Connecting},
    rpc::{RpcClient, RpcError},
};
use crate::{
    state::{Container, SOCKETS},
    wait::{Deadline, poll},
};

/// The agent could not be reached or refused.
#[derive(Debug, Error)]
pub enum AgentError {
    /// Not reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// Refused, or lost.
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

/// The directory of a container's sockets, open.
pub fn sockets(container: &Container) -> Result<OwnedFd, ConnectError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(container.directory(), SOCKETS, flags, Mode::empty())
        .map_err(|error| ConnectError::Socket(error.into()))
}

/// A connection to the agent of a container whose VM runs.
pub fn connect(container: &Container, deadline: Deadline) -> Result<RpcClient, AgentError> {
    let sockets = sockets(container)?;
    let socket = Connecting::rpc(sockets.as_fd())?.finish(deadline)?;
    Ok(RpcClient::new(socket).map_err(ConnectError::Socket)?)
}

/// Asks and waits for the answer, looking at nothing else meanwhile. Answers to earlier questions
/// are kept.
pub fn call<R: Message>(
    client: &mut RpcClient,
    method: &'static str,
    request: &impl Message,
    deadline: Deadline,
) -> Result<R, RpcError> {
    let call = client.send(method, request)?;
    let mut others = Vec::new();
    loop {
        while let Some((id, answer)) = client.progress()? {
            if id == call {
                client.keep(others);
                return decode(method, &answer?);
            }
            others.push((id, answer));
        }
        let interest = client.interest();
        let mut descriptors = [PollFd::new(&*client, interest)];
        if poll(&mut descriptors, Some(deadline)).map_err(RpcError::Io)? == 0 {
            return Err(RpcError::TimedOut(method));
        }
    }
}

/// The message that an answer carries.
pub fn decode<R: Message>(method: &'static str, payload: &[u8]) -> Result<R, RpcError> {
    R::parse_from_bytes(payload).map_err(|error| RpcError::Codec(method, error))
}

/// The host's ends of a process's stdio streams.
#[derive(Debug, Default)]
pub struct Streams {
    /// Towards the process; with a terminal, both ways.
    pub stdin: Option<std::os::unix::net::UnixStream>,
    /// From the process.
    pub stdout: Option<std::os::unix::net::UnixStream>,
    /// From the process.
    pub stderr: Option<std::os::unix::net::UnixStream>,
}

/// Streams that were asked for.
#[derive(Debug)]
pub struct ConnectingStreams {
    terminal: bool,
    sockets: Vec<Connecting>,
}

impl ConnectingStreams {
    /// Asks for the streams of one process: one with a terminal, otherwise three.
    pub fn begin(
        sockets: std::os::fd::BorrowedFd<'_>,
        terminal: bool,
    ) -> Result<Self, ConnectError> {
        let count = if terminal { 1 } else { 3 };
        let sockets = (0..count)
            .map(|_| Connecting::stdio(sockets))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { terminal, sockets })
    }

    /// Waits until all are there, and numbers them for the request that starts the process.
    pub fn finish(self, deadline: Deadline) -> Result<(Streams, Stdio), ConnectError> {
        let mut streams = Streams::default();
        let mut stdio = Stdio {
            terminal: self.terminal,
            ..Stdio::default()
        };
        for (index, socket) in self.sockets.into_iter().enumerate() {
            let number = stream_number()?;
            let socket = Some(socket.finish_stdio(number, deadline)?);
            match index {
                0 => (streams.stdin, stdio.stdin) = (socket, number),
                1 => (streams.stdout, stdio.stdout) = (socket, number),
                _ => (streams.stderr, stdio.stderr) = (socket, number),
            }
        }
        Ok((streams, stdio))
    }
}

/// A number that no other process's stream has: several commands may be starting processes in one
/// guest, and none knows of the other. 0 means "no stream".
fn stream_number() -> Result<u64, ConnectError> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| ConnectError::Socket(error.into()))?;
    Ok(u64::from_le_bytes(bytes) | 1)
}

/// What to poll for a client.
pub fn poll_fd(client: &RpcClient) -> PollFd<'_> {
    PollFd::new(client, client.interest() | PollFlags::HUP)
}
