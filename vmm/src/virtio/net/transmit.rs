//! From the guest to the tap, a packet by one `writev`.
//!
//! Used buffers are published at once, but the driver is interrupted for them late: it only frees
//! memory then, and does that by itself when it sends or receives the next packet. So a request and
//! its response cost one interrupt, not two.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use tracing::debug;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::ring::Ring;
use super::{HEADER_SIZE, LARGEST_PACKET};
use crate::sys::guest_io::{self, PIECES};
use crate::virtio::Interrupt;
use crate::virtio::chain::{self, Chain, ChainError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::HandlerError;

/// Packets sent between two looks at other events.
const BUDGET: usize = 256;
/// The driver hears of used buffers after so many, or so many bytes, at the latest.
const MOST_SILENT: u16 = 16;
const MOST_SILENT_BYTES: usize = 64 << 10;
/// Bytes of header that make an Ethernet frame possible.
const SMALLEST: usize = HEADER_SIZE + 14;

/// Why sending stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stopped {
    /// The driver has nothing more to send.
    Empty,
    /// The tap takes no more for now.
    Full,
    /// There may be more.
    Budget,
}

/// The transmitting queue.
pub(super) struct Transmit {
    ring: Ring,
    memory: Arc<GuestMemoryMmap>,
    /// Bytes sent that the driver has not been interrupted for.
    silent_bytes: usize,
    log: RateLimit,
}

impl Transmit {
    pub(super) fn new(ring: Ring, memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            ring,
            memory,
            silent_bytes: 0,
            log: RateLimit::default(),
        }
    }

    pub(super) fn into_queue(self) -> Queue {
        self.ring.into_queue()
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Sends until something is missing.
    pub(super) fn run(
        &mut self,
        tap: BorrowedFd<'_>,
        interrupt: &dyn Interrupt,
    ) -> Result<Stopped, HandlerError> {
        let stopped = self.send(tap)?;
        let most = MOST_SILENT.min(self.ring.size() / 4);
        if self.ring.unsignalled() > most || self.silent_bytes >= MOST_SILENT_BYTES {
            self.signal(interrupt)?;
        }
        Ok(stopped)
    }

    /// Whether the driver has yet to be told of used buffers.
    pub(super) fn is_silent(&self) -> bool {
        self.ring.unsignalled() > 0
    }

    /// Tells the driver of used buffers, if it wants to know.
    pub(super) fn signal(&mut self, interrupt: &dyn Interrupt) -> Result<(), HandlerError> {
        self.silent_bytes = 0;
        if self.ring.wants_interrupt(&self.memory)? {
            interrupt.used_buffers(self.ring.index())?;
        }
        Ok(())
    }

    fn send(&mut self, tap: BorrowedFd<'_>) -> Result<Stopped, HandlerError> {
        let memory = self.memory.clone();
        let mut pieces = Vec::new();
        self.ring.stop_notifications(&memory)?;
        for _ in 0..BUDGET {
            let Some(chain) = self.ring.next(&memory)? else {
                if self.ring.ask_for_notification(&memory)? {
                    continue;
                }
                return Ok(Stopped::Empty);
            };
            let head = chain.head_index();
            pieces.clear();
            let sent = match gather(&memory, chain, self.ring.size(), &mut pieces) {
                Ok(()) => guest_io::write(tap, &pieces).inspect(|count| self.silent_bytes += count),
                Err(mistake) => Err(io::Error::other(mistake)),
            };
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.ring.put_back(1);
                    return Ok(Stopped::Full);
                }
                // As on a wire: whatever cannot be sent is lost, others go on.
                Err(error) => {
                    if let Some(unsaid) = self.log.allows() {
                        debug!(%error, unsaid, "a packet of the guest was dropped");
                    }
                }
            }
            self.ring.add(&memory, head, 0)?;
            self.ring.publish(&memory)?;
        }
        Ok(Stopped::Budget)
    }
}

/// The pieces of a packet and its header.
fn gather<'m>(
    memory: &'m GuestMemoryMmap,
    chain: Chain<'m>,
    queue_size: u16,
    pieces: &mut Vec<VolatileSlice<'m>>,
) -> Result<(), ChainError> {
    let mut bytes = 0usize;
    chain::walk(memory, chain, queue_size, |piece, writable| {
        // §5.1.6.2: the device reads only.
        if writable {
            return Err(ChainError::WrongDirection);
        }
        bytes = bytes.saturating_add(piece.len());
        if bytes > HEADER_SIZE + LARGEST_PACKET || pieces.len() == PIECES {
            return Err(ChainError::TooLong);
        }
        pieces.push(piece);
        Ok(())
    })?;
    if bytes < SMALLEST {
        return Err(ChainError::TooShort);
    }
    Ok(())
}
