//! Reaps every child of the agent, orphans of the guest included, and tells those who expect one
//! how it ended.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use rustix::{
    io::Errno,
    process::{Pid, WaitOptions, WaitStatus, wait},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use crate::error::{Attempt, Result};

/// Who waits for which process.
#[derive(Debug, Default)]
pub struct Reaper {
    expected: Mutex<HashMap<Pid, oneshot::Sender<i32>>>,
}

impl Reaper {
    /// The process's exit code, or 128 + the signal that ended it. To be called between fork and
    /// the next await, so that the process cannot have been reaped before.
    pub fn expect(&self, pid: Pid) -> oneshot::Receiver<i32> {
        let (sender, receiver) = oneshot::channel();
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        expected.insert(pid, sender);
        receiver
    }

    /// Starts to hear of ended children.
    pub fn signals() -> Result<Signal> {
        signal(SignalKind::child()).or_cannot(|| "listen for SIGCHLD")
    }

    /// Reaps for ever.
    pub async fn run(&self, mut signals: Signal) {
        loop {
            self.reap();
            signals.recv().await;
        }
    }

    fn reap(&self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.report(pid, status),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot reap");
                    return;
                }
            }
        }
    }

    fn report(&self, pid: Pid, status: WaitStatus) {
        let code = status
            .exit_status()
            .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(code), Some(sender)) = (code, expected.remove(&pid)) {
            // Whoever expected it may have given up.
            let _ = sender.send(code);
        }
    }
}
