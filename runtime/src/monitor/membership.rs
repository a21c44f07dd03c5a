//! This process's place in the container's cgroup: engines take the cgroup of the container's process
//! for the container's (containerd's and Podman's statistics do), and that process is this one.
//!
//! To be moved, a process with threads waits for a grace period of the host's kernel, which takes
//! longer than anything else here: so it is done by a thread while others are waited for anyway.

use std::{
    io, panic,
    thread::{self, JoinHandle},
};

use crate::cgroup::{Cgroup, CgroupError};

/// On the way into the cgroup.
#[derive(Debug)]
pub(super) struct Membership {
    /// Whether the process is to be there at all.
    wanted: bool,
    moving: Option<JoinHandle<Result<(), CgroupError>>>,
}

impl Membership {
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            wanted,
            moving: None,
        }
    }

    /// Begins to move the process, if nobody has yet.
    pub(super) fn begin(&mut self, cgroup: &Cgroup) -> io::Result<()> {
        if self.wanted {
            self.wanted = false;
            let cgroup = cgroup.clone();
            let thread = thread::Builder::new().name("cgroup".to_owned());
            self.moving = Some(thread.spawn(move || enter(&cgroup))?);
        }
        Ok(())
    }

    /// The process is in the cgroup after this, whether its move was begun or not.
    pub(super) fn settle(&mut self, cgroup: &Cgroup) -> Result<(), CgroupError> {
        match self.moved() {
            Some(moved) => moved,
            None if self.wanted => enter(cgroup),
            None => Ok(()),
        }
    }

    fn moved(&mut self) -> Option<Result<(), CgroupError>> {
        let moved = self.moving.take()?.join();
        Some(moved.unwrap_or_else(|payload| panic::resume_unwind(payload)))
    }
}

impl Drop for Membership {
    /// Whoever leaves the cgroup or removes it does not race with a thread that enters it.
    fn drop(&mut self) {
        let _ = self.moved();
    }
}

fn enter(cgroup: &Cgroup) -> Result<(), CgroupError> {
    cgroup.place(std::process::id())
}
