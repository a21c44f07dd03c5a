//! The standard streams of a process as its own side sees them: pipes, or a terminal.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::{
    fs::{FileType, Gid, Uid, fchown, fstat},
    process::ioctl_tiocsctty,
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

use crate::error::{Attempt, Result};

/// Standard input, output and error; none of them with a terminal, as that comes later.
#[derive(Debug)]
pub enum ChildIo {
    /// Ends of pipes, or /dev/null.
    Streams([OwnedFd; 3]),
    /// The process opens it itself, in the devpts of its container.
    Terminal,
}

impl ChildIo {
    /// For the list of descriptors that stay open.
    pub(super) fn raw(&self) -> Vec<RawFd> {
        match self {
            Self::Streams(streams) => streams.iter().map(AsRawFd::as_raw_fd).collect(),
            Self::Terminal => Vec::new(),
        }
    }

    /// Gives pipes to the process's user (ids of the guest), who must be able to open /dev/stdout,
    /// which leads to them.
    pub(super) fn give_to(&self, (uid, gid): (u32, u32)) -> Result<()> {
        let Self::Streams(streams) = self else {
            return Ok(());
        };
        let action = || "give the standard streams to the process's user";
        for stream in streams {
            let mode = fstat(stream).or_cannot(action)?.st_mode;
            if FileType::from_raw_mode(mode) == FileType::Fifo {
                fchown(stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .or_cannot(action)?;
            }
        }
        Ok(())
    }

    /// Makes them the standard streams of this process, which leads a session.
    pub(super) fn install(&self, terminal: Option<OwnedFd>) -> Result<()> {
        let action = || "set up the standard streams";
        let [stdin, stdout, stderr] = match (self, &terminal) {
            (Self::Streams(streams), _) => [&streams[0], &streams[1], &streams[2]],
            (Self::Terminal, Some(terminal)) => {
                ioctl_tiocsctty(terminal.as_fd()).or_cannot(action)?;
                [terminal; 3]
            }
            (Self::Terminal, None) => return Ok(()),
        };
        dup2_stdin(stdin).or_cannot(action)?;
        dup2_stdout(stdout).or_cannot(action)?;
        dup2_stderr(stderr).or_cannot(action)
    }
}
