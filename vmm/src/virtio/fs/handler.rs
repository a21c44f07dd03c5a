//! The file server's thread: what no vCPU has answered by itself, and what happens on the host.

use std::io;

use rustix::fs::Mode;
use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::delegations;
use super::host;
use super::service::{By, SharedService, Stopped};
use crate::sys::leave_shared_fs_attributes;
use crate::threads::locked;
use crate::virtio::worker::{EventSet, Handler, HandlerError, Poll};

/// What runs on the thread.
pub(super) struct FilesystemHandler {
    pub(super) service: SharedService,
    /// The queues' notifications, in order.
    pub(super) notified: Vec<EventFd>,
    /// The thread has its own working directory and file mode mask.
    pub(super) settled: bool,
}

impl Handler for FilesystemHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, event) in (0..).zip(&self.notified) {
            poll.add_event(event, token)?;
        }
        locked(&self.service).host.register(poll)
    }

    fn handle(&mut self, poll: &Poll, token: u64, _: EventSet) -> Result<(), HandlerError> {
        let mut service = locked(&self.service);
        if !self.settled {
            settle()?;
            self.settled = true;
            let memory = service.memory.clone();
            let size = memory.iter().map(GuestMemoryRegion::len).sum();
            service.host.settle(poll, size)?;
        }
        if token == host::CHANGES {
            service.host.collect();
        } else if token == delegations::ASKED {
            service.tree.delegations().asked();
        } else if token == delegations::OVERDUE {
            service.tree.delegations().overdue();
        } else {
            let index = u16::try_from(token)?;
            match service.serve(By::Device(poll), index) {
                Ok(Stopped::Empty) => {}
                Ok(Stopped::More) => self.notified[usize::from(index)].write(1)?,
                Err(error) => {
                    service.broken = true;
                    return Err(error);
                }
            }
        }
        service.answer_events()
    }
}

/// Gives the calling thread what the file server changes while it works.
pub(super) fn settle() -> io::Result<()> {
    leave_shared_fs_attributes()?;
    rustix::process::umask(Mode::empty());
    Ok(())
}
