//! How a command hands its work to a monitor that outlives it.
//!
//! The monitor is this program, started anew with a Unix socket as its standard input and, as its
//! standard output, a file whose lock shows that it is there. Nothing happens until the socket brings an [`Order`], so the
//! command can first write down the monitor's pid: no process is ever at work unrecorded, and a
//! monitor whose command dies ends by itself. With the order come, as SCM_RIGHTS, the command's
//! standard input and output, for a container the way to its stand-in and, for a process with a terminal, the
//! terminal. Back comes one [`Outcome`].

use std::{
    fs::File,
    io::{self, IsTerminal},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, Stdio},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    exec::ExecOrder,
    line::{self, Lines},
    order::ContainerOrder,
};

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
        .arg0("bulkhead")
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
    /// terminal) and output, and what else belongs to the order.
    pub fn order(&mut self, order: &Order, more: &[BorrowedFd<'_>]) -> Result<(), HandoverError> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        // A process in the background that reads whatever comes would take what the user types
        // for the shell.
        let null = stdin
            .is_terminal()
            .then(|| File::open("/dev/null"))
            .transpose()
            .map_err(io_error("instruct"))?;
        let input = null.as_ref().map_or(stdin.as_fd(), File::as_fd);
        let descriptors = [&[input, stdout.as_fd()], more].concat();
        line::send(&self.socket, order, &descriptors).map_err(io_error("instruct"))
    }

    /// Waits for the outcome.
    pub fn outcome(mut self) -> Result<(), HandoverError> {
        let outcome = Lines::new(self.socket).wait();
        let Some(outcome) = outcome.map_err(io_error("hear from"))? else {
            let status = self
                .child
                .wait()
                .map_or(String::new(), |status| format!(" ({status})"));
            return Err(HandoverError::Gone(status));
        };
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

/// What a monitor was told, and what came with it.
#[derive(Debug)]
pub struct Instructions {
    /// Where to report.
    pub socket: UnixStream,
    /// What to do.
    pub order: Order,
    /// The way to the stand-in, for a container.
    pub stand_in: Option<OwnedFd>,
    /// The terminal, if the process has one.
    pub terminal: Option<OwnedFd>,
}

/// The monitor's side: waits for the order, then takes the descriptors that came with it.
/// `None` when the command has ended without giving one.
pub fn receive() -> Result<Option<Instructions>, HandoverError> {
    let failed = || io_error("receive the order of");
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)
        .map(UnixStream::from)
        .map_err(|error| failed()(error.into()))?;
    let mut lines = Lines::new(socket);
    let Some(order) = lines.wait().map_err(failed())? else {
        return Ok(None);
    };
    if let (Some(stdin), Some(stdout)) = (lines.descriptor(), lines.descriptor()) {
        rustix::stdio::dup2_stdin(&stdin)
            .and_then(|()| rustix::stdio::dup2_stdout(&stdout))
            .map_err(|error| failed()(error.into()))?;
    }
    let stand_in = match &order {
        Order::Container(_) => lines.descriptor(),
        Order::Exec(_) => None,
    };
    Ok(Some(Instructions {
        stand_in,
        terminal: lines.descriptor(),
        socket: lines.into_socket(),
        order,
    }))
}

/// The monitor's side: reports. Fails when the command is gone.
pub fn report(socket: UnixStream, outcome: &Outcome) -> io::Result<()> {
    line::send(&socket, outcome, &[])
}
