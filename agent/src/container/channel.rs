//! The socket between the agent and a process that is setting itself up. It has three states:
//! the set-up runs (messages of the child), the child is ready and waits for one byte, the
//! program runs (end of file, as the child's end closes at `execve`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use bulkhead_agent_protocol::ErrorKind;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    error::{Attempt, Error, Report, Result},
    sys::{self, Never},
};

/// Longest message; longer texts are cut.
const LONGEST: usize = 16 << 10;

/// What the child says.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Comes with the terminal's master.
    Terminal,
    /// All is done but the rest that follows the agent's byte.
    Ready,
    /// The set-up failed; the child ends.
    Failed(Report),
}

/// The agent's end.
#[derive(Debug)]
pub(super) struct Parent {
    socket: AsyncFd<OwnedFd>,
}

/// The child's end.
#[derive(Debug)]
pub(super) struct Child {
    socket: OwnedFd,
}

/// How the set-up has ended.
#[derive(Debug)]
pub(super) enum Progress {
    /// It waits for [`Parent::proceed`].
    Ready,
    /// The program runs.
    Running,
}

/// A new pair.
pub(super) fn pair() -> Result<(Parent, Child)> {
    let action = || "make a socket for the set-up of a process";
    let flags = SocketFlags::CLOEXEC;
    let (parent, child) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).or_cannot(action)?;
    rustix::io::ioctl_fionbio(&parent, true).or_cannot(action)?;
    let socket = sys::watch(parent, Interest::READABLE | Interest::WRITABLE).or_cannot(action)?;
    Ok((Parent { socket }, Child { socket: child }))
}

impl Parent {
    /// Waits until the child is ready or runs its program. The terminal is handed out as soon as
    /// it comes.
    pub(super) async fn progress(&self, mut terminal: impl FnMut(OwnedFd)) -> Result<Progress> {
        loop {
            match self
                .receive()
                .await
                .or_cannot(|| "hear from the set-up of a process")?
            {
                None => return Ok(Progress::Running),
                Some((Message::Terminal, Some(master))) => terminal(master),
                Some((Message::Terminal, None)) => {
                    return Err(Error::new(ErrorKind::Internal, "no terminal came"));
                }
                Some((Message::Ready, _)) => return Ok(Progress::Ready),
                Some((Message::Failed(report), _)) => return Err(Error::Reported(report)),
            }
        }
    }

    /// Lets a child that is ready go on.
    pub(super) fn proceed(&self) -> Result<()> {
        rustix::net::send(&self.socket, b"!", SendFlags::NOSIGNAL)
            .map(drop)
            .or_cannot(|| "start the process: it has ended before")
    }

    async fn receive(&self) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        let mut buffer = vec![0; LONGEST];
        loop {
            let mut ready = self.socket.readable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = ready.try_io(|socket| {
                let mut parts = [IoSliceMut::new(&mut buffer)];
                Ok(recvmsg(
                    socket,
                    &mut parts,
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )?)
            });
            let length = match received {
                Ok(received) => received?.bytes,
                Err(_would_block) => continue,
            };
            if length == 0 {
                return Ok(None);
            }
            let descriptor = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            });
            return Ok(Some((
                serde_json::from_slice(&buffer[..length])?,
                descriptor,
            )));
        }
    }
}

impl Child {
    /// Runs the set-up of this process, which must have just been forked; reports why it failed.
    pub(super) fn run(&self, set_up: impl FnOnce() -> Result<Never>) -> ! {
        let Err(error) = set_up();
        let mut report = error.report();
        // Half of the longest, as JSON may need two bytes for one.
        let longest = LONGEST / 2 - 100;
        if report.message.len() > longest {
            let cut = String::from_utf8_lossy(&report.message.as_bytes()[..longest]);
            report.message = cut.into_owned();
        }
        // If nobody listens any more, nobody wants to know.
        let _ = self.send(&Message::Failed(report), None);
        sys::exit_now(1)
    }

    /// Hands the terminal's master to the agent.
    pub(super) fn send_terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.send(&Message::Terminal, Some(master))
            .or_cannot(|| "hand the terminal to the agent")
    }

    /// Says that all is ready and waits for the agent's byte. The agent's end closes only when the
    /// container is given up: the process ends then.
    pub(super) fn wait_to_proceed(&self) -> Result<()> {
        self.send(&Message::Ready, None)
            .or_cannot(|| "say that the container is ready")?;
        self.wait()
    }

    /// Waits for the agent's byte.
    pub(super) fn wait(&self) -> Result<()> {
        let action = || "wait for the agent";
        let mut byte = [0];
        match rustix::net::recv(&self.socket, &mut byte, RecvFlags::empty()).or_cannot(action)? {
            (_, 0) => sys::exit_now(1),
            _ => Ok(()),
        }
    }

    fn send(&self, message: &Message, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors: Vec<_> = descriptor.into_iter().collect();
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let parts = [IoSlice::new(&text)];
        sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// For the list of descriptors that stay open.
    pub(super) fn raw(&self) -> RawFd {
        self.socket.as_fd().as_raw_fd()
    }
}
