//! The stand-in's place in the container's cgroup: engines take the cgroup of the container's process
//! for the container's (containerd's and Podman's statistics do).
//!
//! Who moves a process waits for a grace period of the host's kernel, which takes longer than anything
//! else here: so it is done by a thread while others are waited for anyway.

use std::{
    io, panic,
    thread::{self, JoinHandle},
};

use crate::cgroup::{Cgroup, CgroupError};

/// On the way into the cgroup, if anybody is.
#[derive(Debug, Default)]
pub(super) struct Membership {
    moving: Option<JoinHandle<Result<(), CgroupError>>>,
}

impl Membership {
    /// Begins to move the process.
    pub(super) fn begin(&mut self, cgroup: &Cgroup, pid: u32) -> io::Result<()> {
        let cgroup = cgroup.clone();
        let thread = thread::Builder::new().name("cgroup".to_owned());
        self.moving = Some(thread.spawn(move || cgroup.place(pid))?);
        Ok(())
    }

    /// The process is in the cgroup after this.
    pub(super) fn settle(&mut self) -> Result<(), CgroupError> {
        let Some(moving) = self.moving.take() else {
            return Ok(());
        };
        moving
            .join()
            .unwrap_or_else(|payload| panic::resume_unwind(payload))
    }
}

impl Drop for Membership {
    /// Whoever removes the cgroup does not race with a process that enters it.
    fn drop(&mut self) {
        let _ = self.settle();
    }
}
