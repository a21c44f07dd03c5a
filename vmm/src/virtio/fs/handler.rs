//! The file server's thread: takes FUSE requests from the queues and answers them.

use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::Mode;
use tracing::warn;
use virtio_queue::QueueT;
use virtiofsd::descriptor_utils::Writer;

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
        Ok(())
    }

    fn handle(&mut self, _: &Poll, token: u64, _: EventSet) -> Result<(), HandlerError> {
        if !self.settled {
            leave_shared_fs_attributes()?;
            rustix::process::umask(Mode::empty());
            self.settled = true;
        }
        let index = u16::try_from(token)?;
        self.serve(index)
    }
}

impl FilesystemHandler {
    fn serve(&mut self, index: u16) -> Result<(), HandlerError> {
        let broken = |source| QueueError { index, source };
        let memory = self.memory.original();
        let active = &mut self.queues[usize::from(index)];
        let queue = &mut active.queue;
        for _ in 0..BUDGET {
            queue.disable_notification(memory).map_err(broken)?;
            let Some(chain) = chain::next(queue, memory).map_err(broken)? else {
                if queue.enable_notification(memory).map_err(broken)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let size = queue.size();
            let answered = answer(&self.server, &mut self.requests, &self.memory, chain, size);
            let written = match answered {
                Ok(written) => written,
                Err(error) => {
                    if let Some(unsaid) = self.log.allows() {
                        warn!(%error, unsaid, "a file request of the guest is malformed");
                    }
                    0
                }
            };
            queue.add_used(memory, head, written).map_err(broken)?;
            // At once: the guest waits for this, and the next may take long.
            if queue.needs_notification(memory).map_err(broken)? {
                self.interrupt.used_buffers(index)?;
            }
        }
        active.notified.write(1)?;
        Ok(())
    }
}

/// Carries out one request. Gives how many bytes the answer has; requests that the server cannot
/// read, or must not, get EINVAL, and an error if there is no room for that.
fn answer(
    server: &FileServer,
    requests: &mut Requests,
    memory: &GuestView,
    chain: Chain<'_>,
    queue_size: u16,
) -> Result<u32, HandlerError> {
    let writer = Writer::new(memory.view(), chain.clone())?;
    let request = requests.take(memory, chain, queue_size)?;
    if !request.acceptable {
        return refuse(writer, request.unique);
    }
    let spare = writer.clone();
    match server.handle_message(request.reader, writer, None::<&mut ()>) {
        Ok(written) => Ok(u32::try_from(written)?),
        Err(error) => {
            // The library's messages are limited in number already.
            log::warn!("{error}");
            refuse(spare, request.unique)
        }
    }
}

/// Writes an answer of EINVAL.
fn refuse(mut writer: Writer<'_>, unique: [u8; 8]) -> Result<u32, HandlerError> {
    let mut answer = [0; 16];
    answer[..4].copy_from_slice(&OUT_HEADER.to_le_bytes());
    answer[4..8].copy_from_slice(&(-libc::EINVAL).to_le_bytes());
    answer[8..].copy_from_slice(&unique);
    writer.write_all(&answer)?;
    Ok(OUT_HEADER)
}
