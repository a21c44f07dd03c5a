//! The file server's thread: takes FUSE requests from the queues and answers them.

use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::Mode;
use tracing::warn;
use virtio_queue::QueueT;
use virtiofsd::descriptor_utils::Writer;

use super::host::{self, HostSide, Outcome, Waiting};
use super::request::Requests;
use super::server::FileServer;
use crate::sys::guest_view::{GuestView, leave_shared_fs_attributes};
use crate::virtio::chain::{self, Chain, QueueError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::{EventSet, Handler, HandlerError, Poll};
use crate::virtio::{ActiveQueue, Interrupt};

/// Requests answered between two looks at other events, such as the one that ends the thread.
const BUDGET: usize = 256;
/// Bytes of `struct fuse_out_header`: length, error, unique.
const OUT_HEADER: u32 = 16;

/// Owns the queues while the device is active: the one for urgent requests and one for all others
/// (virtio 1.2 §5.11.2).
pub(super) struct FilesystemHandler {
    pub(super) memory: GuestView,
    pub(super) queues: Vec<ActiveQueue>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) server: Arc<FileServer>,
    pub(super) host: HostSide,
    pub(super) requests: Requests,
    /// The thread has its own working directory and file mode mask.
    pub(super) settled: bool,
    pub(super) log: RateLimit,
}

impl Handler for FilesystemHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            poll.add_event(&queue.notified, token)?;
        }
        self.host.register(poll)
    }

    fn handle(&mut self, poll: &Poll, token: u64, _: EventSet) -> Result<(), HandlerError> {
        if !self.settled {
            leave_shared_fs_attributes()?;
            rustix::process::umask(Mode::empty());
            self.settled = true;
            self.host.settle(poll)?;
        }
        if token == host::CHANGES {
            self.host.collect();
        } else {
            self.serve(poll, u16::try_from(token)?)?;
        }
        match self.host.answerable() {
            Some(waiting) => self.answer_waiting(&waiting),
            None => Ok(()),
        }
    }
}

impl FilesystemHandler {
    fn serve(&mut self, poll: &Poll, index: u16) -> Result<(), HandlerError> {
        let broken = |source| QueueError { index, source };
        for _ in 0..BUDGET {
            let memory = self.memory.original();
            let queue = &mut self.queues[usize::from(index)].queue;
            queue.disable_notification(memory).map_err(broken)?;
            let Some(chain) = chain::next(queue, memory).map_err(broken)? else {
                if queue.enable_notification(memory).map_err(broken)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let place = (index, queue.size());
            let mut service = Service {
                server: &self.server,
                host: &mut self.host,
                requests: &mut self.requests,
                memory: &self.memory,
            };
            let written = match service.answer(poll, chain, place) {
                Ok(Outcome::Answered(written)) => written,
                Ok(Outcome::Waits) => continue,
                Err(error) => {
                    if let Some(unsaid) = self.log.allows() {
                        warn!(%error, unsaid, "a file request of the guest is malformed");
                    }
                    0
                }
            };
            // At once: the guest waits for this, and the next may take long.
            self.used(index, head, written)?;
        }
        self.queues[usize::from(index)].notified.write(1)?;
        Ok(())
    }

    /// Gives a request back to the driver, answered with so many bytes.
    fn used(&mut self, index: u16, head: u16, written: u32) -> Result<(), HandlerError> {
        let broken = |source| QueueError { index, source };
        let memory = self.memory.original();
        let queue = &mut self.queues[usize::from(index)].queue;
        queue.add_used(memory, head, written).map_err(broken)?;
        if queue.needs_notification(memory).map_err(broken)? {
            self.interrupt.used_buffers(index)?;
        }
        Ok(())
    }

    fn answer_waiting(&mut self, waiting: &Waiting) -> Result<(), HandlerError> {
        let written = self.host.answer(self.memory.original(), waiting)?;
        self.used(waiting.queue, waiting.head, written)
    }

    /// Answers the request that waits for events with none: it is asked again. No request is lost
    /// that way when the queues are taken from here.
    pub(super) fn leave_nothing_waiting(&mut self) {
        if let Some(waiting) = self.host.give_up_waiting()
            && let Err(error) = self.answer_waiting(&waiting)
        {
            warn!(%error, "the guest hears of no more changes of the host");
        }
    }
}

/// What a request is answered with.
struct Service<'a> {
    server: &'a FileServer,
    host: &'a mut HostSide,
    requests: &'a mut Requests,
    memory: &'a GuestView,
}

impl Service<'_> {
    /// Carries out one request of a queue of this number and size. Requests that the server cannot
    /// read, or must not, get EINVAL, and an error if there is no room for that.
    fn answer(
        &mut self,
        poll: &Poll,
        chain: Chain<'_>,
        place: (u16, u16),
    ) -> Result<Outcome, HandlerError> {
        let writer = Writer::new(self.memory.view(), chain.clone())?;
        let request = self.requests.take(self.memory, chain.clone(), place.1)?;
        if !request.acceptable {
            return refuse(writer, request.unique);
        }
        if let host::WATCH | host::EVENTS | host::CONNECT = self.requests.opcode() {
            let memory = self.memory.original();
            return Ok(self.host.serve(poll, memory, self.requests, chain, place)?);
        }
        let details = self.host.before(self.requests);
        let spare = writer.clone();
        let answered = self
            .server
            .handle_message(request.reader, writer, None::<&mut ()>);
        if let Some(details) = details {
            self.host.after(&details);
        }
        match answered {
            Ok(written) => Ok(Outcome::Answered(u32::try_from(written)?)),
            Err(error) => {
                // The library's messages are limited in number already.
                log::warn!("{error}");
                refuse(spare, request.unique)
            }
        }
    }
}

/// Writes an answer of EINVAL.
fn refuse(mut writer: Writer<'_>, unique: [u8; 8]) -> Result<Outcome, HandlerError> {
    let mut answer = [0; 16];
    answer[..4].copy_from_slice(&OUT_HEADER.to_le_bytes());
    answer[4..8].copy_from_slice(&(-libc::EINVAL).to_le_bytes());
    answer[8..].copy_from_slice(&unique);
    writer.write_all(&answer)?;
    Ok(Outcome::Answered(OUT_HEADER))
}
