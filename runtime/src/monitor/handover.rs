//! How a command hands its work to a monitor that outlives it.
//!
//! The monitor is this program, started anew with a Unix socket as its standard input and, as its
//! standard output, a file whose lock shows that it is there. Nothing happens until the socket brings an [`Order`], so the
//! command can first write down the monitor's pid: no process is ever at work unrecorded, and a
//! monitor whose command dies ends by itself. With the order come, as SCM_RIGHTS, the command's
//! standard input and output and, for a process with a terminal, the terminal. Back comes one [`Outcome`].

use std::{
    fs::File,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, IsTerminal, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{exec::ExecOrder, order::ContainerOrder};

/// What a monitor is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Order {
    /// Make a container, and stand for its process.
    Container(Box<ContainerOrder>),
    /// Run a process in a container, and stand for it.
    Exec(ExecOrder),
}

/// What has become of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// It is there.
    Done,
    /// It is not.
    Failed {
        /// Why, the whole chain.
        message: String,
        /// The exit code that this gives the command.
        exit_code: u8,
    },
}

/// The work could not be handed over, or failed.
#[derive(Debug, Error)]
pub enum HandoverError {
    /// In the monitor's words.
    #[error("{message}")]
    Failed {
        /// The whole chain.
        message: String,
        /// The exit code that it gives.
        exit_code: u8,
    },
    /// It ended without a word.
    #[error("the monitor process ended unexpectedly{0}")]
    Gone(String),
    /// The processes could not speak to each other.
    #[error("cannot {0} the monitor process")]
    Io(&'static str, #[source] io::Error),
}

/// A monitor that waits for its order, or works on it.
#[derive(Debug)]
pub struct Waiting {
    socket: UnixStream,
    child: Child,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> HandoverError {
    move |error| HandoverError::Io(what, error)
}

/// Starts a monitor, with these global options. It holds `held` open until it has its order.
pub fn spawn(options: &[std::ffi::OsString], held: Option<File>) -> Result<Waiting, HandoverError> {
    let (socket, theirs) = UnixStream::pair().map_err(io_error("start"))?;
    let child = Command::new("/proc/self/exe")
        .args(options)
        .arg("monitor")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(held.map_or_else(Stdio::null, Stdio::from))
        .spawn()
        .map_err(io_error("start"))?;
    Ok(Waiting { socket, child })
}

impl Waiting {
    /// The monitor's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets the monitor work; it gets this process's standard input (unless that is a
    /// terminal) and output, and the terminal that was made for it.
    pub fn order(
        &mut self,
        order: &Order,
        terminal: Option<BorrowedFd<'_>>,
    ) -> Result<(), HandoverError> {
        let mut line =
            serde_json::to_vec(order).map_err(|error| io_error("instruct")(error.into()))?;
        line.push(b'\n');
        let (stdin, stdout) = (io::stdin(), io::stdout());
        // A process in the background that reads whatever comes would take what the user types
        // for the shell.
        let null = stdin
            .is_terminal()
            .then(|| File::open("/dev/null"))
            .transpose()
            .map_err(io_error("instruct"))?;
        let input = null.as_ref().map_or(stdin.as_fd(), File::as_fd);
        let mut descriptors = vec![input, stdout.as_fd()];
        descriptors.extend(terminal);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&line)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(|error| io_error("instruct")(error.into()))?;
        self.socket
            .write_all(&line[sent..])
            .map_err(io_error("instruct"))
    }

    /// Waits for the outcome.
    pub fn outcome(mut self) -> Result<(), HandoverError> {
        let mut line = String::new();
        BufReader::new(&self.socket)
            .read_line(&mut line)
            .map_err(io_error("hear from"))?;
        if line.is_empty() {
            let status = self
                .child
                .wait()
                .map_or(String::new(), |status| format!(" ({status})"));
            return Err(HandoverError::Gone(status));
        }
        let outcome =
            serde_json::from_str(&line).map_err(|error| io_error("hear from")(error.into()))?;
        match outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed { message, exit_code } => {
                // Its end is near, and with it everything that it has made is gone.
                let _ = self.child.wait();
                Err(HandoverError::Failed { message, exit_code })
            }
        }
    }
}

/// The monitor's side: waits for the order, then takes the descriptors that came with it.
/// `None` when the command has ended without giving one.
pub fn receive() -> Result<Option<(UnixStream, Order, Option<OwnedFd>)>, HandoverError> {
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)
        .map(UnixStream::from)
        .map_err(|error| io_error("receive the order of")(error.into()))?;
    let mut descriptors = Vec::new();
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let mut buffer = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(|error| io_error("receive the order of")(error.into()))?;
        if received.bytes == 0 {
            return Ok(None);
        }
        line.extend_from_slice(&buffer[..received.bytes]);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
    }
    let order = serde_json::from_slice(&line)
        .map_err(|error| io_error("receive the order of")(error.into()))?;
    let mut descriptors = descriptors.into_iter();
    if let (Some(stdin), Some(stdout)) = (descriptors.next(), descriptors.next()) {
        rustix::stdio::dup2_stdin(&stdin)
            .and_then(|()| rustix::stdio::dup2_stdout(&stdout))
            .map_err(|error| io_error("receive the order of")(error.into()))?;
    }
    Ok(Some((socket, order, descriptors.next())))
}

/// The monitor's side: reports. Fails when the command is gone.
pub fn report(mut socket: UnixStream, outcome: &Outcome) -> io::Result<()> {
    let mut line = serde_json::to_vec(outcome)?;
    line.push(b'\n');
    socket.write_all(&line)
}
