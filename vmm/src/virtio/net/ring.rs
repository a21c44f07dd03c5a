//! A queue whose used buffers become visible to the driver together: those of one packet must
//! (virtio 1.2 §5.1.6.4.1), which the library's queue, publishing one at a time, cannot do.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::ActiveQueue;
use crate::virtio::chain::{self, Chain, QueueError};

/// Flag of the available ring: the driver wants no interrupts (virtio 1.2 §2.7.7).
const NO_INTERRUPT: u16 = 1;

/// An active queue.
pub(super) struct Ring {
    queue: Queue,
    notified: EventFd,
    index: u16,
    /// Used buffers written, not yet visible.
    written: u16,
    /// The used index when the driver's wish for an interrupt was last looked at.
    signalled: u16,
}

impl Ring {
    /// `index` is the queue's in its device.
    pub(super) fn new(active: ActiveQueue, index: u16) -> Self {
        Self {
            signalled: active.queue.next_used(),
            queue: active.queue,
            notified: active.notified,
            index,
            written: 0,
        }
    }

    pub(super) fn into_queue(self) -> Queue {
        self.queue
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    pub(super) fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The event of the driver's notifications.
    pub(super) fn event(&self) -> &EventFd {
        &self.notified
    }

    fn broken(&self, source: Error) -> QueueError {
        QueueError {
            index: self.index,
            source,
        }
    }

    pub(super) fn next<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let index = self.index;
        chain::next(&mut self.queue, memory).map_err(|source| QueueError { index, source })
    }

    pub(super) fn put_back(&mut self, count: u16) {
        chain::put_back(&mut self.queue, count);
    }

    /// Asks for notifications; says whether there are buffers already, which came without.
    pub(super) fn ask_for_notification(
        &mut self,
        memory: &GuestMemoryMmap,
    ) -> Result<bool, QueueError> {
        let result = self.queue.enable_notification(memory);
        result.map_err(|source| self.broken(source))
    }

    pub(super) fn stop_notifications(
        &mut self,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        let result = self.queue.disable_notification(memory);
        result.map_err(|source| self.broken(source))
    }

    /// Writes a used buffer, which [`Self::publish`] makes visible.
    pub(super) fn add(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        length: u32,
    ) -> Result<(), QueueError> {
        let place = self.queue.next_used().wrapping_add(self.written) % self.queue.size();
        let element = [u32::from(head).to_le(), length.to_le()];
        self.at(self.queue.used_ring(), 4 + 8 * u64::from(place))
            .and_then(|at| memory.write_obj(element, at).map_err(Error::GuestMemory))
            .map_err(|source| self.broken(source))?;
        self.written = self.written.wrapping_add(1);
        Ok(())
    }

    /// Makes all used buffers visible.
    pub(super) fn publish(&mut self, memory: &GuestMemoryMmap) -> Result<(), QueueError> {
        let next = self.queue.next_used().wrapping_add(self.written);
        self.written = 0;
        self.queue.set_next_used(next);
        self.at(self.queue.used_ring(), 2)
            .and_then(|at| {
                memory
                    .store(next.to_le(), at, Ordering::Release)
                    .map_err(Error::GuestMemory)
            })
            .map_err(|source| self.broken(source))
    }

    /// Used buffers published since [`Self::wants_interrupt`] was asked last.
    pub(super) fn unsignalled(&self) -> u16 {
        self.queue.next_used().wrapping_sub(self.signalled)
    }

    /// Whether the driver wants to know of the buffers published since this was asked last
    /// (virtio 1.2 §2.7.7.2).
    pub(super) fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.signalled, new);
        if new == old {
            return Ok(false);
        }
        // The index must be out before the driver's wish is read.
        fence(Ordering::SeqCst);
        let event_index = self.queue.event_idx_enabled();
        let offset = if event_index {
            4 + 2 * u64::from(self.queue.size())
        } else {
            0
        };
        let wish = self
            .at(self.queue.avail_ring(), offset)
            .and_then(|at| {
                memory
                    .load(at, Ordering::Relaxed)
                    .map_err(Error::GuestMemory)
            })
            .map(u16::from_le)
            .map_err(|source| self.broken(source))?;
        Ok(if event_index {
            new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            wish & NO_INTERRUPT == 0
        })
    }

    fn at(&self, base: u64, offset: u64) -> Result<GuestAddress, Error> {
        base.checked_add(offset)
            .map(GuestAddress)
            .ok_or(Error::AddressOverflow)
    }
}
