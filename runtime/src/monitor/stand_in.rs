//! The process that engines see behind a container's pid, and the monitor's way to it.
//!
//! Engines enter what they find there: `podman cp` copies in the mount namespace of the container's
//! process, CNI plugins and Docker's hook take its network namespace, `nsenter` all of them. So it
//! sits where the container's process would, in namespaces that are nobody else's, and does nothing
//! but what the monitor tells it: it goes to these places, passes signals on, and ends with the
//! status of the container's process. Everything else is the monitor's, in the runtime's own
//! namespaces. It is a process of its own because a PID or user namespace is for a whole process, and
//! it is a child of whoever makes the container, which is how engines learn its status.

mod namespaces;
mod process;

use std::{
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Command, Stdio},
};

use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use namespaces::Map;
pub use namespaces::Namespaces;
pub(super) use namespaces::has_pid_namespace;
pub use process::{is_called, stand};

use super::{
    View,
    line::{self, Lines, Received},
};
use crate::stdio::Caught;

/// In the environment of the program that is to stand in: the container's id.
const MARK: &str = "BULKHEAD_STAND_IN";
/// What it is called for a container without a process.
const NAME: &str = "bulkhead-stand-in";
/// Bytes of the container's command that it is called by.
const LONGEST_COMMAND: usize = 4096;

/// The container's process has nobody to stand in for it.
#[derive(Debug, Error)]
pub enum StandInError {
    /// It cannot be started.
    #[error("cannot start the process that stands for the container's: {0}")]
    Start(&'static str, #[source] io::Error),
    /// It does not get what it needs, in its own words.
    #[error("{0}")]
    Failed(String),
    /// It was killed.
    #[error("the process that stands for the container's has been killed")]
    Gone,
    /// It cannot be spoken to.
    #[error("cannot speak to the process that stands for the container's")]
    Io(#[source] io::Error),
    /// The user namespace's mappings cannot be written.
    #[error("cannot map the user namespace of the process that stands for the container's")]
    Map(#[source] io::Error),
}

/// Something to do.
#[derive(Debug, Serialize, Deserialize)]
enum Task {
    /// Enter the network namespace that comes with this.
    EnterNetwork,
    /// Go to where the container's process would be.
    Show { view: View, namespaces: Namespaces },
    /// The container's process has ended: let its files go.
    Leave,
    /// End.
    End { status: i32 },
}

/// What it says.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// It is done.
    Done,
    /// It is not: the whole chain.
    Failed(String),
    /// Somebody has sent a signal.
    Caught(Caught),
}

/// One that was started and has nothing to do yet. It ends when nobody holds the socket any more.
#[derive(Debug)]
pub struct Spawned {
    /// The way to it.
    pub socket: UnixStream,
    /// Its pid, the container's.
    pub pid: u32,
}

/// Starts one, in the PID namespace that the configuration asks for. The process must have no other
/// thread.
pub fn spawn(id: &str, spec: &Spec) -> Result<Spawned, StandInError> {
    let failed = |error| StandInError::Start("no socket", error);
    let (socket, theirs) = UnixStream::pair().map_err(failed)?;
    let mut command = Command::new("/proc/self/exe");
    let mut words = command_of(spec);
    command
        .arg0(words.next().unwrap_or(NAME))
        .args(words)
        .env_clear()
        .env(MARK, id)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = namespaces::in_pid_namespace(spec, || command.spawn())
        .map_err(|error| StandInError::Start("no PID namespace", error))?
        .map_err(|error| StandInError::Start("no process", error))?;
    Ok(Spawned {
        socket,
        pid: child.id(),
    })
}

/// The command of the container's process, which `ps` and `podman top` are to show for the container; as much
/// of it as they would.
fn command_of(spec: &Spec) -> impl Iterator<Item = &str> {
    let process = spec.process().as_ref();
    let words = process.and_then(|process| process.args().as_ref());
    let words = words.into_iter().flatten().map(String::as_str);
    words.scan(LONGEST_COMMAND, |left, word| {
        *left = left.checked_sub(word.len() + 1)?;
        // No argument of a program has a NUL; the agent refuses it.
        (!word.contains('\0')).then_some(word)
    })
}

/// The monitor's way to the one of its container.
#[derive(Debug)]
pub struct StandIn {
    lines: Lines,
    pid: u32,
    /// Signals that came while something else was waited for.
    caught: Vec<Caught>,
    /// It is on its way, and what is to be done once it is there.
    underway: Option<Option<Map>>,
}

impl StandIn {
    /// By the socket that [`spawn`] gave.
    pub fn new(socket: impl Into<UnixStream>, pid: u32) -> Self {
        Self {
            lines: Lines::new(socket.into()),
            pid,
            caught: Vec::new(),
            underway: None,
        }
    }

    /// The container's pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Has it enter a network namespace.
    pub fn enter_network(&mut self, namespace: BorrowedFd<'_>) -> Result<(), StandInError> {
        self.tell(&Task::EnterNetwork, &[namespace])?;
        self.hear()
    }

    /// Sends it to where the container's process would be.
    pub fn show(&mut self, view: View, namespaces: Namespaces) -> Result<(), StandInError> {
        self.underway = Some(namespaces.map());
        self.tell(&Task::Show { view, namespaces }, &[])
    }

    /// It is where it was sent after this.
    pub fn arrive(&mut self) -> Result<(), StandInError> {
        let Some(map) = self.underway.take() else {
            return Ok(());
        };
        self.hear()?;
        match map {
            Some(map) => map.write(self.pid).map_err(StandInError::Map),
            None => Ok(()),
        }
    }

    /// Has it let the container's files go, since its process has ended. To take a mount namespace down
    /// waits for the host's kernel, so it is done while the virtual machine ends, and not waited for.
    pub fn leave(&self) {
        // Fails if it was killed.
        let _ = line::send(self.lines.socket(), &Task::Leave, &[]);
    }

    /// Lets it end; whoever waits for it learns the status.
    pub fn end(self, status: i32) {
        // Fails if it was killed.
        let _ = line::send(self.lines.socket(), &Task::End { status }, &[]);
    }

    /// What to poll.
    pub fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.lines.socket(), PollFlags::IN)
    }

    /// The signals that have come in.
    pub fn caught(&mut self) -> Result<Vec<Caught>, StandInError> {
        let mut caught = std::mem::take(&mut self.caught);
        loop {
            match self.lines.progress().map_err(StandInError::Io)? {
                Received::Line(Said::Caught(signal)) => caught.push(signal),
                Received::Line(Said::Done | Said::Failed(_)) => {}
                Received::Nothing => return Ok(caught),
                Received::End => return Err(StandInError::Gone),
            }
        }
    }

    fn tell(&self, task: &Task, descriptors: &[BorrowedFd<'_>]) -> Result<(), StandInError> {
        line::send(self.lines.socket(), task, descriptors).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => StandInError::Gone,
            _ => StandInError::Io(error),
        })
    }

    /// Whether what it was told is done.
    fn hear(&mut self) -> Result<(), StandInError> {
        loop {
            match self.lines.wait().map_err(StandInError::Io)? {
                Some(Said::Done) => return Ok(()),
                Some(Said::Failed(message)) => return Err(StandInError::Failed(message)),
                Some(Said::Caught(signal)) => self.caught.push(signal),
                None => return Err(StandInError::Gone),
            }
        }
    }
}
