//! The test's side of a terminal.

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::process::{DEADLINE, excerpt, wait_readable};

/// The controlling side of a pseudo-terminal, and what came from it so far.
pub(crate) struct Terminal {
    master: File,
    seen: Vec<u8>,
}

impl Terminal {
    /// A new pseudo-terminal and its other end.
    pub(crate) fn open(rows: u16, columns: u16) -> Result<(Self, File)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = File::options()
            .read(true)
            .write(true)
            .open(name.to_str()?)?;
        let terminal = Self {
            master: master.into(),
            seen: Vec::new(),
        };
        terminal.resize(rows, columns)?;
        Ok((terminal, slave))
    }

    /// The terminal that a runtime sends over its console socket.
    pub(crate) fn receive(socket: &UnixStream) -> Result<Self> {
        wait_readable(socket.as_fd(), DEADLINE).context("waiting for the terminal")?;
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 4096];
        let mut data = [IoSliceMut::new(&mut name)];
        recvmsg(socket, &mut data, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        ensure!(
            fds.len() == 1,
            "the console socket carried {} descriptors, not 1",
            fds.len()
        );
        let master = fds.pop().context("one descriptor")?;
        rustix::termios::tcgetattr(&master).context("the descriptor received is no terminal")?;
        Ok(Self {
            master: master.into(),
            seen: Vec::new(),
        })
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    /// Types.
    pub(crate) fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Waits until the terminal has shown this text, and forgets everything up to its end.
    pub(crate) fn wait_for(&mut self, needle: &str) -> Result<String> {
        let end = Instant::now() + DEADLINE;
        loop {
            let text = String::from_utf8_lossy(&self.seen).into_owned();
            if let Some(at) = text.find(needle) {
                let rest = at + needle.len();
                self.seen = text.as_bytes()[rest..].to_vec();
                return Ok(text[..rest].to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            if !self.read(left)? {
                bail!(
                    "the terminal closed before {needle:?}: {}",
                    excerpt(&self.seen)
                );
            }
        }
    }

    /// All that the terminal shows until its other side closes.
    pub(crate) fn drain(&mut self) -> Result<String> {
        let end = Instant::now() + DEADLINE;
        while self.read(end.saturating_duration_since(Instant::now()))? {}
        Ok(String::from_utf8_lossy(&self.seen).into_owned())
    }

    /// Reads once; false when the other side is closed.
    fn read(&mut self, time: Duration) -> Result<bool> {
        wait_readable(self.master.as_fd(), time)
            .with_context(|| format!("the terminal shows {:?}", excerpt(&self.seen)))?;
        let mut buffer = [0; 4096];
        match self.master.read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(n) => {
                self.seen.extend_from_slice(&buffer[..n]);
                Ok(true)
            }
            // A master whose slaves are all closed.
            Err(error) if error.raw_os_error() == Some(5) => Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(error).context("reading the terminal"),
        }
    }
}
