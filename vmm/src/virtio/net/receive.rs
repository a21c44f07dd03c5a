//! From the tap to the guest. Buffers of the driver are taken ahead and kept, as many as the largest
//! packet needs, so that a packet is one `readv` into however many of them it fills.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use tracing::debug;
use vm_memory::{Address, GuestMemoryMmap};

use super::ring::Ring;
use super::{ETHERNET, HEADER_SIZE, LARGEST_PACKET, NUM_BUFFERS, features};
use crate::sys::held::{HeldBuffers, MOST_PIECES};
use crate::virtio::Interrupt;
use crate::virtio::chain::{Chain, ChainError, QueueError};
use crate::virtio::worker::HandlerError;
use virtio_queue::Queue;

/// Packets given to the guest between two looks at other events.
const BUDGET: usize = 256;
/// After a packet of so many bytes another is likely, and is asked for without waiting for an event.
const LARGE: usize = 1000;
/// Packets after which a guest that wants to know is told, in a stream without a gap.
const BATCH: usize = 32;

/// A chain of the driver.
struct Held {
    head: u16,
    pieces: usize,
    bytes: usize,
}

/// Why receiving stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The tap has no packet, or says so if it has.
    Empty,
    /// The driver has too few buffers for a packet.
    Starved,
    /// There may be more.
    Budget,
    /// The tap does not exist any more.
    Gone,
}

/// The receiving queue.
pub(super) struct Receive {
    ring: Ring,
    buffers: HeldBuffers,
    held: VecDeque<Held>,
    bytes: usize,
    /// Room that must be there before a packet is read: what does not fit is lost.
    room: usize,
    mergeable: bool,
}

impl Receive {
    pub(super) fn new(ring: Ring, memory: Arc<GuestMemoryMmap>, features: u64, mtu: u16) -> Self {
        let packet = if features::large_packets(features) {
            LARGEST_PACKET
        } else {
            usize::from(mtu).max(1500) + ETHERNET
        };
        Self {
            ring,
            buffers: HeldBuffers::new(memory),
            held: VecDeque::new(),
            bytes: 0,
            room: HEADER_SIZE + packet,
            mergeable: features & features::MRG_RXBUF != 0,
        }
    }

    /// Gives back the queue, with the buffers that were taken ahead in it.
    pub(super) fn into_queue(mut self) -> Queue {
        self.ring
            .put_back(u16::try_from(self.held.len()).unwrap_or(0));
        self.ring.into_queue()
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Moves packets until something is missing. A small packet alone, such as a request, is not worth
    /// the question whether there is another: the tap's event comes again if so.
    pub(super) fn run(
        &mut self,
        tap: BorrowedFd<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<Stopped, HandlerError> {
        let mut stopped = Stopped::Budget;
        for packet in 0..BUDGET {
            let Some(pieces) = self.hold()? else {
                stopped = Stopped::Starved;
                break;
            };
            match self.buffers.read(tap, pieces) {
                Ok(count) if count >= HEADER_SIZE => {
                    self.deliver(count)?;
                    if packet == 0 && count < LARGE {
                        stopped = Stopped::Empty;
                        break;
                    }
                }
                // The end of what is no tap.
                Ok(_) => {
                    stopped = Stopped::Gone;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stopped = Stopped::Empty;
                    break;
                }
                Err(error) => {
                    debug!(%error, "cannot read from a tap");
                    stopped = Stopped::Gone;
                    break;
                }
            }
            // The first at once, since the guest may be waiting for just this one.
            if packet % BATCH == 0 {
                self.signal(interrupt)?;
            }
        }
        self.signal(interrupt)?;
        Ok(stopped)
    }

    fn signal(&mut self, interrupt: &dyn Interrupt) -> Result<(), HandlerError> {
        if self.ring.wants_interrupt(self.buffers.memory())? {
            interrupt.used_buffers(self.ring.index())?;
        }
        Ok(())
    }

    /// Takes buffers until there is room for any packet; gives the number of pieces to read into,
    /// or nothing if the driver has to add buffers first, of which it will notify.
    fn hold(&mut self) -> Result<Option<usize>, QueueError> {
        let memory = self.buffers.memory().clone();
        loop {
            match self.held.front() {
                Some(first) if !self.mergeable => return Ok(Some(first.pieces)),
                Some(_) if self.bytes >= self.room || self.buffers.len() >= MOST_PIECES => {
                    return Ok(Some(self.buffers.len()));
                }
                _ => {}
            }
            let Some(chain) = self.ring.next(&memory)? else {
                if self.ring.ask_for_notification(&memory)? {
                    continue;
                }
                // All that fits into the queue: it does not become more by waiting.
                let all = self.buffers.len() >= usize::from(self.ring.size());
                return Ok((all && self.mergeable).then_some(self.buffers.len()));
            };
            let head = chain.head_index();
            if let Err(mistake) = self.take(chain) {
                debug!(%mistake, "the driver's buffer cannot take packets");
                self.ring.add(&memory, head, 0)?;
                self.ring.publish(&memory)?;
            }
        }
    }

    /// Keeps a chain for a packet.
    fn take(&mut self, chain: Chain<'_>) -> Result<(), ChainError> {
        let head = chain.head_index();
        let before = self.buffers.len();
        match self.push(chain) {
            Ok(bytes) if bytes >= HEADER_SIZE => {
                self.held.push_back(Held {
                    head,
                    pieces: self.buffers.len() - before,
                    bytes,
                });
                self.bytes += bytes;
                Ok(())
            }
            result => {
                self.buffers.forget_last(before);
                result.and(Err(ChainError::TooShort))
            }
        }
    }

    fn push(&mut self, chain: Chain<'_>) -> Result<usize, ChainError> {
        let mut bytes = 0usize;
        chain.buffers(|address, length, writable| {
            if !writable {
                return Err(ChainError::WrongDirection);
            }
            let size = length as usize;
            self.buffers
                .push(address, size)
                .map_err(|_| ChainError::OutsideMemory {
                    address: address.raw_value(),
                    length,
                })?;
            bytes = bytes.saturating_add(size);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Hands the buffers that `count` bytes fill to the driver.
    fn deliver(&mut self, count: usize) -> Result<(), QueueError> {
        let memory = self.buffers.memory().clone();
        let mut left = count;
        let (mut chains, mut pieces) = (0u16, 0);
        while let Some(held) = self.held.pop_front() {
            let used = left.min(held.bytes);
            self.ring
                .add(&memory, held.head, u32::try_from(used).unwrap_or(u32::MAX))?;
            self.bytes -= held.bytes;
            pieces += held.pieces;
            chains += 1;
            left -= used;
            if left == 0 || !self.mergeable {
                break;
            }
        }
        // §5.1.6.4.1: 1 without mergeable buffers. The tap leaves it as it is.
        self.buffers.write_at(NUM_BUFFERS, &chains.to_le_bytes());
        self.buffers.forget_first(pieces);
        self.ring.publish(&memory)
    }
}
