//! The host's side of a terminal. The guest's terminal has the line discipline; the host's only
//! carries bytes, so it is raw: either the one that the user sits at, put back when we end, or a
//! new pair whose master goes to whoever listens at --console-socket.

use std::{
    io::{self, IoSlice, IsTerminal},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    pty::OpenptFlags,
    termios::{OptionalActions, Termios},
};
use thiserror::Error;

/// A terminal cannot be used.
#[derive(Debug, Error)]
pub enum TerminalError {
    /// Standard input is none.
    #[error(
        "the container has a terminal but standard input is none; use --console-socket or set \
         process.terminal to false"
    )]
    NoTerminal,
    /// The terminal refused.
    #[error("cannot {0} the terminal")]
    Io(&'static str, #[source] io::Error),
    /// The console socket could not be used.
    #[error("cannot send the terminal to the console socket {path}")]
    ConsoleSocket {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Rows and columns of a terminal; zeros when it has none.
pub fn size(terminal: BorrowedFd<'_>) -> (u32, u32) {
    rustix::termios::tcgetwinsize(terminal)
        .map_or((0, 0), |size| (size.ws_row.into(), size.ws_col.into()))
}

/// The terminal at standard input, raw until this is dropped.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Makes the terminal raw.
    pub fn enter() -> Result<Self, TerminalError> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Err(TerminalError::NoTerminal);
        }
        let before = rustix::termios::tcgetattr(&stdin)
            .map_err(|error| TerminalError::Io("read the settings of", error.into()))?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Drain, &raw)
            .map_err(|error| TerminalError::Io("change the settings of", error.into()))?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Flushing would throw away what the user has typed ahead for the shell.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Our end of a terminal pair whose master was given away.
#[derive(Debug)]
pub struct Console {
    slave: OwnedFd,
}

impl Console {
    /// Makes a pair; the master is for [`send_master`].
    pub fn make() -> Result<(Self, OwnedFd), TerminalError> {
        let failed = |error: rustix::io::Errno| TerminalError::Io("make", error.into());
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = rustix::pty::openpt(flags).map_err(failed)?;
        rustix::pty::grantpt(&master).map_err(failed)?;
        rustix::pty::unlockpt(&master).map_err(failed)?;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(failed)?;
        let mut raw = rustix::termios::tcgetattr(&slave).map_err(failed)?;
        raw.make_raw();
        rustix::termios::tcsetattr(&slave, OptionalActions::Now, &raw).map_err(failed)?;
        Ok((Self { slave }, master))
    }

    /// A slave that another process of ours has made.
    pub fn from_slave(slave: OwnedFd) -> Self {
        Self { slave }
    }

    /// Our end.
    pub fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }

    /// Makes it the controlling terminal of this process, which leads a session, so that a change
    /// of its size and its hanging up come as signals.
    pub fn control(&self) -> Result<(), TerminalError> {
        rustix::process::ioctl_tiocsctty(&self.slave)
            .map_err(|error| TerminalError::Io("take control of", error.into()))
    }
}

/// Sends the master to the console socket, as runc does: its name as the message, the descriptor
/// beside it.
pub fn send_master(path: &Path, master: OwnedFd) -> Result<(), TerminalError> {
    let failed = |source| TerminalError::ConsoleSocket {
        path: path.to_owned(),
        source,
    };
    let socket = UnixStream::connect(path).map_err(failed)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [master.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(
        &socket,
        &[IoSlice::new(b"/dev/ptmx")],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .map_err(|error| failed(error.into()))?;
    Ok(())
}
