//! Signals that this process receives, as something to poll for.

use std::{io, os::unix::net::UnixStream};

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};
use signal_hook::{
    consts::signal::{
        SIGBUS, SIGCHLD, SIGFPE, SIGHUP, SIGILL, SIGINT, SIGKILL, SIGPIPE, SIGQUIT, SIGSEGV,
        SIGSTOP, SIGTERM, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH,
    },
    iterator::{backend::SignalDelivery, exfiltrator::SignalOnly},
};

/// A signal that was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Caught {
    /// The terminal's size has changed.
    Resized,
    /// For the container's process.
    Forward(i32),
}

impl Caught {
    /// Whether this asks whoever gets it to end.
    pub fn asks_to_end(self) -> bool {
        matches!(self, Self::Forward(SIGTERM | SIGINT | SIGHUP | SIGQUIT))
    }
}

/// Catches signals from now on.
#[derive(Debug)]
pub struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
}

impl Signals {
    /// Catches everything that is meant for the container: all but what cannot be caught, what
    /// tells of a fault in this very process, and what concerns its own children, writes and
    /// place in the terminal.
    pub fn catch() -> io::Result<Self> {
        const OWN: [i32; 11] = [
            SIGKILL, SIGSTOP, SIGILL, SIGFPE, SIGSEGV, SIGBUS, SIGCHLD, SIGPIPE, SIGURG, SIGTTIN,
            SIGTTOU,
        ];
        // 32 and 33 belong to the C library.
        let signals = (1..=64).filter(|signal| !OWN.contains(signal) && !matches!(signal, 32 | 33));
        let (read, write) = UnixStream::pair()?;
        read.set_nonblocking(true)?;
        write.set_nonblocking(true)?;
        Ok(Self {
            delivery: SignalDelivery::with_pipe(read, write, SignalOnly, signals)?,
        })
    }

    /// What to poll.
    pub fn poll_fd(&self) -> PollFd<'_> {
        PollFd::new(self.delivery.get_read(), PollFlags::IN)
    }

    /// What has come in, each signal once.
    pub fn caught(&mut self) -> Vec<Caught> {
        self.delivery
            .pending()
            .map(|signal| match signal {
                SIGWINCH => Caught::Resized,
                signal => Caught::Forward(signal),
            })
            .collect()
    }
}
