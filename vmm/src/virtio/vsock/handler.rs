//! The vsock thread: moves packets between the queues and the muxer.

use std::io;
use std::sync::Arc;

use tracing::warn;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap, VolatileSlice};

use super::muxer::{LISTENER, Muxer};
use super::packet::{HEADER_SIZE, Header};
use super::receive::{self, Batch, RECEIVE};
use crate::virtio::chain::{self, ChainError, QueueError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::{EventSet, Handler, HandlerError, Poll};
use crate::virtio::{ActiveQueue, Interrupt, Memory};

/// The transmit queue's index.
const TRANSMIT: u16 = 1;
/// The event queue's index.
const EVENT: u16 = 2;
/// Chains handled between two looks at other events, such as the one that ends the thread.
const BUDGET: usize = 512;
/// Data read from one connection before it is the next one's turn, bytes.
const TURN: usize = 64 << 10;
/// Receive buffers filled by one read: with Linux's buffers of 4 KiB, a turn.
const BATCH: usize = 16;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2 §5.10.6.7), a `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Owns the queues while the device is active.
pub(super) struct VsockHandler {
    pub(super) memory: Memory,
    pub(super) queues: [ActiveQueue; 3],
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) muxer: Muxer,
    /// The driver must hear that all connections are gone.
    pub(super) owes_transport_reset: bool,
    pub(super) log: RateLimit,
}

impl Handler for VsockHandler {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            poll.add_event(&queue.notified, token)?;
        }
        self.muxer.register(poll)
    }

    fn handle(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), HandlerError> {
        match token {
            LISTENER => self.muxer.accept(poll),
            // A queue's notification: `work` looks at all of them.
            0..LISTENER => {}
            token => self.muxer.socket_event(poll, token, events),
        }
        if self.owes_transport_reset {
            self.reset_transport()?;
        }
        self.work(poll)
    }
}

impl VsockHandler {
    /// Moves packets until there is nothing to do, or until it is time to look at other events.
    fn work(&mut self, poll: &Poll) -> Result<(), HandlerError> {
        let memory = self.memory.memory();
        let mut batch = Batch::new(&memory);
        let mut pieces = Vec::new();
        let mut left = BUDGET;
        let mut used = [false; 2];
        while left > 0 {
            let before = left;
            used[0] |= self.fill(&mut batch, &mut left)?;
            used[1] |= self.drain(poll, &memory, &mut pieces, &mut left)?;
            if left == before && !self.await_driver(&memory)? {
                break;
            }
        }
        if left == 0 {
            // The queues may hold more: come back after other events had their chance.
            self.queues[usize::from(TRANSMIT)].notified.write(1)?;
        }
        for (index, used) in [(RECEIVE, used[0]), (TRANSMIT, used[1])] {
            if used {
                self.interrupt(&memory, index)?;
            }
        }
        Ok(())
    }

    /// Takes packets of the guest. True if any buffer was used.
    fn drain<'m>(
        &mut self,
        poll: &Poll,
        memory: &'m GuestMemoryMmap,
        pieces: &mut Vec<VolatileSlice<'m>>,
        left: &mut usize,
    ) -> Result<bool, HandlerError> {
        let broken = |source| QueueError {
            index: TRANSMIT,
            source,
        };
        let queue = &mut self.queues[usize::from(TRANSMIT)].queue;
        queue.disable_notification(memory).map_err(broken)?;
        let mut used = false;
        while *left > 0 && self.muxer.takes_packets() {
            let Some(chain) = chain::next(queue, memory).map_err(broken)? else {
                break;
            };
            *left -= 1;
            let head = chain.head_index();
            match read_packet(chain, pieces) {
                Ok(header) => self.muxer.packet(poll, &header, pieces),
                Err(mistake) => complain(&mut self.log, TRANSMIT, mistake),
            }
            queue.add_used(memory, head, 0).map_err(broken)?;
            used = true;
        }
        Ok(used)
    }

    /// Sends packets to the guest. True if any buffer was used.
    fn fill(&mut self, batch: &mut Batch<'_>, left: &mut usize) -> Result<bool, HandlerError> {
        let queue = &mut self.queues[usize::from(RECEIVE)].queue;
        let mut used = false;
        while *left > 0 && self.muxer.has_work() {
            let count = fill_once(queue, &mut self.muxer, batch).map_err(receive::broken)?;
            if let Some(mistake) = batch.take_mistake() {
                complain(&mut self.log, RECEIVE, mistake);
                used = true;
            }
            let Some(count) = count else { break };
            // A turn that needed no buffer counts as well, so that the loop ends.
            *left = left.saturating_sub(count.max(1));
            used |= count > 0;
        }
        Ok(used)
    }

    /// Asks the driver to notify us of what we wait for. True if it is there already.
    fn await_driver(&mut self, memory: &GuestMemoryMmap) -> Result<bool, HandlerError> {
        let mut there = false;
        if self.muxer.takes_packets() {
            there |= enable(&mut self.queues, TRANSMIT, memory)?;
        }
        if self.muxer.has_work() {
            there |= enable(&mut self.queues, RECEIVE, memory)?;
        }
        Ok(there)
    }

    /// Tells the driver that no connection of before exists, once it has a buffer for it.
    fn reset_transport(&mut self) -> Result<(), HandlerError> {
        let broken = |source| QueueError {
            index: EVENT,
            source,
        };
        let memory = self.memory.memory();
        loop {
            let queue = &mut self.queues[usize::from(EVENT)].queue;
            let Some(chain) = chain::next(queue, &memory).map_err(broken)? else {
                if enable(&mut self.queues, EVENT, &memory)? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let mut pieces = Vec::new();
            let walked = chain.walk(|piece, writable| {
                pieces.push(piece);
                writable.then_some(()).ok_or(ChainError::WrongDirection)
            });
            let written = match walked {
                Ok(()) => chain::copy_in(&pieces, &TRANSPORT_RESET),
                Err(mistake) => {
                    complain(&mut self.log, EVENT, mistake);
                    0
                }
            };
            let length = u32::try_from(written).unwrap_or(0);
            queue.add_used(&*memory, head, length).map_err(broken)?;
            self.interrupt(&memory, EVENT)?;
            if written == TRANSPORT_RESET.len() {
                self.owes_transport_reset = false;
                return Ok(());
            }
        }
    }

    /// Tells the driver of used buffers unless it does not want to know.
    fn interrupt(&mut self, memory: &GuestMemoryMmap, index: u16) -> Result<(), HandlerError> {
        let queue = &mut self.queues[usize::from(index)].queue;
        let wanted = queue
            .needs_notification(memory)
            .map_err(|source| QueueError { index, source })?;
        if wanted {
            self.interrupt.used_buffers(index)?;
        }
        Ok(())
    }
}

/// Sends what comes next, from one connection at most: an RST, a packet without data, or a batch of
/// packets with data. Gives how many buffers that took, or nothing if the driver has none.
fn fill_once(
    queue: &mut Queue,
    muxer: &mut Muxer,
    batch: &mut Batch<'_>,
) -> Result<Option<usize>, virtio_queue::Error> {
    if muxer.next_reset().is_some() {
        if !batch.take(queue, 1, 1)? {
            return Ok(None);
        }
        if let Some(header) = muxer.next_reset() {
            batch.finish_control(queue, header)?;
        }
        muxer.reset_sent();
        return Ok(Some(1));
    }
    let guest_cid = muxer.guest_cid();
    let Some(connection) = muxer.next_ready() else {
        return Ok(Some(0));
    };
    let bytes = connection.readable_bytes().min(TURN);
    let control = connection.owes_control();
    if !control && bytes == 0 {
        muxer.turn_over();
        return Ok(Some(0));
    }
    let most = if control { 1 } else { BATCH };
    if !batch.take(queue, most, bytes.max(1))? {
        return Ok(None);
    }
    if let Some(header) = connection.next_control(guest_cid).filter(|_| control) {
        batch.finish_control(queue, &header)?;
        muxer.turn_over();
        return Ok(Some(1));
    }
    let count = connection.read(batch.data());
    let used = batch.finish_data(queue, count, |len| connection.data_header(guest_cid, len))?;
    muxer.turn_over();
    Ok(Some(used))
}

/// Reads the header of a packet of the guest and finds its payload.
fn read_packet<'m>(
    chain: chain::Chain<'m>,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<Header, ChainError> {
    pieces.clear();
    chain.walk(|piece, writable| {
        if writable {
            return Err(ChainError::WrongDirection);
        }
        pieces.push(piece);
        Ok(())
    })?;
    let mut bytes = [0; HEADER_SIZE];
    if chain::copy_out(pieces, &mut bytes) < HEADER_SIZE {
        return Err(ChainError::TooShort);
    }
    let header = Header::parse(&bytes);
    chain::advance(pieces, HEADER_SIZE);
    let length = usize::try_from(header.len).map_err(|_| ChainError::TooShort)?;
    if chain::length(pieces) < length {
        return Err(ChainError::TooShort);
    }
    chain::truncate(pieces, length);
    Ok(header)
}

fn enable(
    queues: &mut [ActiveQueue; 3],
    index: u16,
    memory: &GuestMemoryMmap,
) -> Result<bool, QueueError> {
    queues[usize::from(index)]
        .queue
        .enable_notification(memory)
        .map_err(|source| QueueError { index, source })
}

fn complain(log: &mut RateLimit, queue: u16, mistake: ChainError) {
    if let Some(unsaid) = log.allows() {
        warn!(queue, %mistake, unsaid, "the driver's vsock buffer cannot be used");
    }
}
