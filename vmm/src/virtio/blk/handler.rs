//! The thread of a disk: takes requests from the queue and answers them.

use std::io;
use std::sync::Arc;

use tracing::warn;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::request::Server;
use crate::virtio::chain::{self, QueueError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::{EventSet, Handler, HandlerError, Poll};
use crate::virtio::{ActiveQueue, Interrupt, Memory};

/// The only queue.
const REQUESTS: u16 = 0;
/// Requests carried out between two looks at the event that ends the thread.
const BUDGET: usize = 64;

/// Owns the queue while the device is active.
pub(super) struct BlockHandler {
    pub(super) memory: Memory,
    pub(super) queue: ActiveQueue,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) server: Server,
    pub(super) log: RateLimit,
}

impl Handler for BlockHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_event(&self.queue.notified, u64::from(REQUESTS))
    }

    fn handle(&mut self, _: &Poll, _: u64, _: EventSet) -> Result<(), HandlerError> {
        self.serve().map_err(|source| QueueError {
            index: REQUESTS,
            source,
        })??;
        Ok(())
    }
}

impl BlockHandler {
    fn serve(&mut self) -> Result<io::Result<()>, virtio_queue::Error> {
        let memory = self.memory.memory();
        let queue = &mut self.queue.queue;
        for _ in 0..BUDGET {
            queue.disable_notification(&*memory)?;
            let Some(chain) = chain::next(queue, &memory)? else {
                if queue.enable_notification(&*memory)? {
                    continue;
                }
                return Ok(Ok(()));
            };
            let head = chain.head_index();
            let written = match self.server.serve(chain) {
                Ok(done) => {
                    if let Some(error) = done.error
                        && let Some(unsaid) = self.log.allows()
                    {
                        let error: &dyn std::error::Error = &error;
                        warn!(error, unsaid, "a request of the guest to a disk failed");
                    }
                    done.written
                }
                Err(mistake) => {
                    if let Some(unsaid) = self.log.allows() {
                        warn!(%mistake, unsaid, "the guest's request to a disk has no answer");
                    }
                    0
                }
            };
            queue.add_used(&*memory, head, written)?;
            // At once: the guest waits for this, and the next may take long.
            if queue.needs_notification(&*memory)?
                && let Err(error) = self.interrupt.used_buffers(REQUESTS)
            {
                return Ok(Err(error));
            }
        }
        Ok(self.queue.notified.write(1))
    }
}
