//! From the guest to the tap, a packet by one `writev`.
//!
//! A lone small packet, such as a response, goes out on the vCPU's own thread, which has come here
//! with the driver's notification; more is the device's thread's work, beside which the guest goes on.
//! A full Ethernet frame is "more": it is mostly part of a stream, whose sender gathers larger
//! segments while the thread is at work on those before.
//!
//! Used buffers are published at once, but the driver is interrupted for them late: it only frees
//! memory then, and does that by itself when it sends or receives the next packet. So a request and
//! its response cost one interrupt, not two.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::debug;
use virtio_queue::Queue;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::ring::Ring;
use super::tap::Tap;
use super::{HEADER_SIZE, LARGEST_PACKET};
use crate::sys::guest_io::{self, PIECES};
use crate::virtio::Interrupt;
use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::rate_limit::RateLimit;
use crate::virtio::worker::HandlerError;

/// Packets sent between two looks at other events.
const BUDGET: usize = 256;
/// What a vCPU sends by itself: so many packets, of so many bytes at most. Less than a full frame
/// (above).
const BY_VCPU: usize = 2;
const BY_VCPU_BYTES: usize = 1024;
/// The driver hears of used buffers at the latest after so long.
const LONGEST_SILENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};
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
    tap: Tap,
    pair: usize,
    interrupt: Arc<dyn Interrupt>,
    /// Bytes sent that the driver has not been interrupted for.
    silent_bytes: usize,
    /// Expires when the silence has been long enough.
    timer: OwnedFd,
    armed: bool,
    log: RateLimit,
}

impl Transmit {
    pub(super) fn new(
        ring: Ring,
        memory: Arc<GuestMemoryMmap>,
        tap: Tap,
        pair: usize,
        interrupt: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self {
            ring,
            memory,
            tap,
            pair,
            interrupt,
            silent_bytes: 0,
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: false,
            log: RateLimit::default(),
        })
    }

    pub(super) fn into_queue(self) -> Queue {
        self.ring.into_queue()
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Readable when [`Self::expired`] is to be called.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// On the device's thread: sends until something is missing.
    pub(super) fn run(&mut self) -> Result<Stopped, HandlerError> {
        let stopped = self.send(BUDGET, usize::MAX)?;
        self.signal_in_time()?;
        Ok(stopped)
    }

    /// On a vCPU's thread: sends what is quickly done; says whether that is all.
    pub(super) fn run_on_vcpu(&mut self) -> Result<bool, HandlerError> {
        let stopped = self.send(BY_VCPU, BY_VCPU_BYTES)?;
        self.signal_in_time()?;
        Ok(stopped == Stopped::Empty)
    }

    /// The timer has expired.
    pub(super) fn expired(&mut self) -> Result<(), HandlerError> {
        let mut count = [0; 8];
        // Nonblocking: empties it.
        let _ = rustix::io::read(&self.timer, &mut count);
        self.armed = false;
        self.signal()
    }

    /// Tells the driver of used buffers if they are many, or sees to it that it is told later.
    fn signal_in_time(&mut self) -> Result<(), HandlerError> {
        let most = MOST_SILENT.min(self.ring.size() / 4);
        if self.ring.unsignalled() > most || self.silent_bytes >= MOST_SILENT_BYTES {
            self.signal()?;
        } else if self.ring.unsignalled() > 0 && !self.armed {
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: LONGEST_SILENCE,
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
            self.armed = true;
        }
        Ok(())
    }

    fn signal(&mut self) -> Result<(), HandlerError> {
        self.silent_bytes = 0;
        if self.ring.wants_interrupt(&self.memory)? {
            self.interrupt.used_buffers(self.ring.index())?;
        }
        Ok(())
    }

    /// Sends packets of `largest` bytes at most.
    fn send(&mut self, budget: usize, largest: usize) -> Result<Stopped, HandlerError> {
        let memory = self.memory.clone();
        let tap = self.tap.queue(self.pair);
        let mut pieces = Vec::new();
        self.ring.stop_notifications(&memory)?;
        for _ in 0..budget {
            let Some(chain) = self.ring.next(&memory)? else {
                if self.ring.ask_for_notification(&memory)? {
                    continue;
                }
                return Ok(Stopped::Empty);
            };
            let head = chain.head_index();
            pieces.clear();
            let sent = match gather(chain, &mut pieces) {
                Ok(bytes) if bytes > largest => {
                    self.ring.put_back(1);
                    return Ok(Stopped::Budget);
                }
                Ok(_) => guest_io::write(tap, &pieces).inspect(|count| self.silent_bytes += count),
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

/// The pieces of a packet and its header; gives their bytes.
fn gather<'m>(chain: Chain<'m>, pieces: &mut Vec<VolatileSlice<'m>>) -> Result<usize, ChainError> {
    let mut bytes = 0usize;
    chain.walk(|piece, writable| {
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
    Ok(bytes)
}
