//! Waiting for a file or directory to change.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use crate::process::{DEADLINE, wait_readable};

/// Hears of changes from the moment it is made.
pub(crate) struct Watch(OwnedFd);

impl Watch {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let changes = WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::CLOSE_WRITE;
        inotify::add_watch(&fd, path, changes)
            .with_context(|| format!("watching {}", path.display()))?;
        Ok(Self(fd))
    }

    /// Waits until the condition holds; it is looked at after each change.
    pub(crate) fn wait_until(&self, mut holds: impl FnMut() -> bool) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        while !holds() {
            self.wait(end)?;
        }
        Ok(())
    }

    /// Waits for the next change, and forgets all that came with it.
    fn wait(&self, end: Instant) -> Result<()> {
        wait_readable(
            self.0.as_fd(),
            end.saturating_duration_since(Instant::now()),
        )?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(()),
                Err(error) => return Err(error).context("reading inotify events"),
            }
        }
    }
}
