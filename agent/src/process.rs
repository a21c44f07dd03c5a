//! A process of a container as the agent sees it: signals, terminal, end.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bulkhead_agent_protocol::ErrorKind;
use rustix::{
    process::Pid,
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::unix::AsyncFd,
    sync::{oneshot, watch},
};

use crate::{
    container::Cgroup,
    error::{Attempt, Error, Result},
    stdio::AgentIo,
    sys,
};

/// A process that has just been made.
#[derive(Debug)]
pub struct Started {
    /// In the agent's PID namespace.
    pub pid: Pid,
    /// The same.
    pub pidfd: OwnedFd,
    /// Its exit status.
    pub ended: oneshot::Receiver<i32>,
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, or 128 + signal.
    pub status: i32,
    /// Whether the kernel has ended a process of its container for want of memory.
    pub out_of_memory: bool,
}

/// A process of a container, or of the guest.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    /// Set when the process has been reaped.
    reaped: watch::Receiver<bool>,
    /// Processes of its container ended for want of memory, set before that.
    out_of_memory_kills: Arc<AtomicU64>,
    /// Set when, besides, its output is written out.
    ended: watch::Receiver<Option<Ended>>,
    waited_for: AtomicBool,
    terminal: Weak<AsyncFd<OwnedFd>>,
    close_stdin: watch::Sender<bool>,
}

impl Process {
    /// Carries the process's streams and waits for its end from now on. `first_of` is the cgroup
    /// whose first process this is, with whether the others end with it.
    pub fn new(started: Started, io: AgentIo, first_of: Option<(Arc<Cgroup>, bool)>) -> Arc<Self> {
        let (reaped_sender, reaped) = watch::channel(false);
        let (ended_sender, ended) = watch::channel(None);
        let (close_stdin, stdin_closed) = watch::channel(false);
        let terminal = io.terminal();
        let output = io.carry(stdin_closed, reaped.clone());
        let out_of_memory_kills = Arc::<AtomicU64>::default();
        let process = Self {
            pid: started.pid,
            pidfd: started.pidfd,
            reaped,
            out_of_memory_kills: out_of_memory_kills.clone(),
            ended,
            waited_for: AtomicBool::new(false),
            terminal,
            close_stdin,
        };
        tokio::spawn(async move {
            // The reaper lives as long as the agent and reports every process once.
            let status = started.ended.await.unwrap_or(255);
            let kills = first_of
                .as_ref()
                .map_or(0, |(cgroup, _)| cgroup.out_of_memory_kills());
            out_of_memory_kills.store(kills, Ordering::Relaxed);
            if let Some((cgroup, true)) = first_of
                && let Err(error) = cgroup.kill().await
            {
                tracing::warn!(error = %error.chain(), "the container's processes live on");
            }
            reaped_sender.send_replace(true);
            output.await;
            ended_sender.send_replace(Some(Ended {
                status,
                out_of_memory: kills > 0,
            }));
        });
        Arc::new(process)
    }

    /// In the agent's PID namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Refers to the process.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether it has been reaped.
    pub fn has_ended(&self) -> bool {
        *self.reaped.borrow()
    }

    /// Waits until it has been reaped. Returns how many processes of the container whose first
    /// process it is the kernel had ended for want of memory by then.
    pub async fn reaped(&self) -> u64 {
        // The sender goes only after it has sent.
        let _ = self.reaped.clone().wait_for(|reaped| *reaped).await;
        self.out_of_memory_kills.load(Ordering::Relaxed)
    }

    /// Whether somebody knows how it has ended.
    pub fn was_waited_for(&self) -> bool {
        self.waited_for.load(Ordering::Relaxed)
    }

    /// Waits until the process has ended and its output is written out.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.clone();
        let found = ended.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        self.waited_for.store(true, Ordering::Relaxed);
        // The sender goes only after it has sent.
        found.unwrap_or(Ended {
            status: 255,
            out_of_memory: false,
        })
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        match sys::signal(self.pidfd(), signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::new(
                ErrorKind::NoSuchProcess,
                "the process has ended",
            )),
            sent => sent.or_cannot(|| format!("send signal {}", signal)),
        }
    }

    /// Sets the size of its terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let terminal = self.terminal.upgrade().ok_or_else(|| {
            Error::new(
                ErrorKind::WrongState,
                "the process has no terminal: nothing to resize",
            )
        })?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&*terminal, size).or_cannot(|| "resize the terminal")
    }

    /// Ends its standard input, once what has come is passed on.
    pub fn close_stdin(&self) {
        self.close_stdin.send_replace(true);
    }
}
