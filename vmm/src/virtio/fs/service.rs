//! Takes FUSE requests from the queues and answers them, for whoever holds it: the device's thread, or the
//! thread of a vCPU that has just notified (`by_vcpu`).

use std::sync::{Arc, Mutex};

use tracing::warn;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap, VolatileSlice};

use super::by_vcpu::Patience;
use super::host::{self, HostSide, Outcome, Waiting};
use super::library::Library;
use super::operations::{self, OUT_HEADER};
use super::request::{Message, Requests};
use super::server::FileServer;
use super::tree::Tree;
use crate::virtio::chain::{self, Chain, ChainError, QueueError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::{HandlerError, Poll};
use crate::virtio::{Interrupt, Memory, ring};

/// Requests answered between two looks at other events, such as the one that ends the thread.
const BUDGET: usize = 256;

/// Shared by the device's thread and those of vCPUs.
pub(super) type SharedService = Arc<Mutex<Service>>;

/// Owns the queues while the device is active: the one for urgent requests and one for all others
/// (virtio 1.2 §5.11.2).
pub(super) struct Service {
    pub(super) memory: <Memory as GuestAddressSpace>::T,
    pub(super) queues: Vec<Queue>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) server: Arc<FileServer>,
    pub(super) tree: Tree,
    pub(super) host: HostSide,
    pub(super) requests: Requests,
    pub(super) library: Library,
    /// The answer at hand.
    pub(super) answer: Vec<u8>,
    pub(super) patience: Patience,
    /// A queue is broken: nothing is answered any more.
    pub(super) broken: bool,
    pub(super) log: RateLimit,
}

/// Who serves.
#[derive(Clone, Copy)]
pub(super) enum By<'a> {
    /// The device's thread, with what it waits for.
    Device(&'a Poll),
    /// The thread of a vCPU, whose guest stands still meanwhile.
    Vcpu,
}

/// Why serving has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// There is nothing more; the driver will notify.
    Empty,
    /// There may be more; the driver may not notify.
    More,
}

/// What becomes of the next request.
enum Next {
    Answered(u32),
    Waits,
    /// It is not for a vCPU.
    Left,
}

impl Service {
    /// Answers what a queue holds. A request that is not for who serves stays in the queue.
    pub(super) fn serve(&mut self, by: By<'_>, index: u16) -> Result<Stopped, HandlerError> {
        let broken = |source| QueueError { index, source };
        let budget = match by {
            By::Device(_) => BUDGET,
            By::Vcpu => Patience::REQUESTS,
        };
        for _ in 0..budget {
            let memory = &*self.memory;
            let queue = &mut self.queues[usize::from(index)];
            queue.disable_notification(memory).map_err(broken)?;
            let Some(chain) = chain::next(queue, memory).map_err(broken)? else {
                if ring::ask_for_notification(queue, memory).map_err(broken)? {
                    continue;
                }
                return Ok(Stopped::Empty);
            };
            let head = chain.head_index();
            let mut one = One {
                server: &self.server,
                tree: &self.tree,
                host: &mut self.host,
                requests: &mut self.requests,
                library: &mut self.library,
                answer: &mut self.answer,
                memory,
                patience: &mut self.patience,
            };
            let written = match one.answer(by, chain, index) {
                Ok(Next::Answered(written)) => written,
                Ok(Next::Waits) => continue,
                Ok(Next::Left) => {
                    chain::put_back(&mut self.queues[usize::from(index)], 1);
                    return Ok(Stopped::More);
                }
                Err(error) => {
                    if let Some(unsaid) = self.log.allows() {
                        warn!(%error, unsaid, "a file request of the guest is malformed");
                    }
                    0
                }
            };
            // At once: the guest waits for this, and the next may take long.
            self.used(index, head, written)?;
            // A guest that waits has mostly sent one: spares a look for the next.
            if let By::Vcpu = by {
                let (memory, queue) = (&*self.memory, &mut self.queues[usize::from(index)]);
                if !ring::ask_for_notification(queue, memory).map_err(broken)? {
                    return Ok(Stopped::Empty);
                }
            }
        }
        Ok(Stopped::More)
    }

    /// Gives a request back to the driver, answered with so many bytes.
    fn used(&mut self, index: u16, head: u16, written: u32) -> Result<(), HandlerError> {
        let broken = |source| QueueError { index, source };
        let memory = &*self.memory;
        let queue = &mut self.queues[usize::from(index)];
        if ring::give_back(queue, memory, head, written).map_err(broken)? {
            self.interrupt.used_buffers(index)?;
        }
        Ok(())
    }

    /// Answers the request that waits for events, if there are any.
    pub(super) fn answer_events(&mut self) -> Result<(), HandlerError> {
        match self.host.answerable() {
            Some(waiting) => self.answer_waiting(&waiting),
            None => Ok(()),
        }
    }

    fn answer_waiting(&mut self, waiting: &Waiting) -> Result<(), HandlerError> {
        let written = self.host.answer(&self.memory, waiting)?;
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

/// What one request is answered with.
struct One<'a> {
    server: &'a FileServer,
    tree: &'a Tree,
    host: &'a mut HostSide,
    requests: &'a mut Requests,
    library: &'a mut Library,
    answer: &'a mut Vec<u8>,
    memory: &'a GuestMemoryMmap,
    patience: &'a mut Patience,
}

impl One<'_> {
    /// Carries out one request of a queue. Requests that the server cannot read, or must not, get EINVAL,
    /// and an error if there is no room for that.
    fn answer(&mut self, by: By<'_>, chain: Chain<'_>, queue: u16) -> Result<Next, HandlerError> {
        let message = self.requests.take(chain)?;
        let poll = match by {
            By::Device(poll) => Some(poll),
            By::Vcpu if !self.patience.allows(self.tree, self.requests) => return Ok(Next::Left),
            By::Vcpu => None,
        };
        if !self.requests.is_acceptable() {
            return self.refuse(&message.room);
        }
        if let host::WATCH | host::EVENTS | host::CONNECT = self.requests.opcode() {
            let Some(poll) = poll else {
                return Ok(Next::Left);
            };
            let outcome = self
                .host
                .serve(poll, self.memory, self.requests, chain, queue)?;
            return Ok(match outcome {
                Outcome::Answered(written) => Next::Answered(written),
                Outcome::Waits => Next::Waits,
            });
        }
        let details = self.host.before(self.requests);
        let answered = self.carry_out(&message);
        if let Some(details) = details {
            self.host.after(&details);
        }
        if poll.is_none() {
            self.patience.note();
        }
        let read = match answered {
            Ok(read) => read,
            Err(error) => {
                // The library's messages are limited in number already.
                log::warn!("{error}");
                return self.refuse(&message.room);
            }
        };
        if chain::copy_in(&message.room, self.answer) < self.answer.len() {
            return self.refuse(&message.room);
        }
        Ok(Next::Answered(u32::try_from(self.answer.len() + read)?))
    }

    /// Makes the answer, but for data that was read; gives how much that is.
    fn carry_out(&mut self, message: &Message<'_>) -> Result<usize, HandlerError> {
        if let Some(read) = operations::carry_out(self.tree, self.requests, message, self.answer) {
            return Ok(read);
        }
        let room = chain::length(&message.room);
        let request = self.requests.bytes();
        self.library
            .answer(self.server, request, room, self.answer)?;
        Ok(0)
    }

    /// Writes an answer of EINVAL.
    fn refuse(&self, room: &[VolatileSlice<'_>]) -> Result<Next, HandlerError> {
        let mut answer = [0; OUT_HEADER];
        operations::finish(&mut answer, 0, libc::EINVAL, self.requests.unique());
        if chain::copy_in(room, &answer) < OUT_HEADER {
            return Err(ChainError::TooShort.into());
        }
        Ok(Next::Answered(u32::try_from(OUT_HEADER)?))
    }
}
