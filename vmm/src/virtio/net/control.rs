//! The control queue (virtio 1.2 §5.1.6.5): how many pairs of queues the driver uses, and which
//! offloads it wants to receive with.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use tracing::debug;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

use super::features;
use super::ring::Ring;
use super::tap::Tap;
use crate::virtio::Interrupt;
use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::worker::HandlerError;

const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// The longest command: class, command, eight bytes.
const LONGEST: usize = 10;
/// Commands carried out between two looks at other events.
const BUDGET: usize = 16;

/// The queue, and what it has changed.
pub(super) struct Control {
    ring: Ring,
    memory: Arc<GuestMemoryMmap>,
    tap: Tap,
    features: u64,
    /// Shared with the device, for its state.
    pairs_in_use: Arc<AtomicU16>,
    pub(super) guest_offloads: Option<u64>,
}

impl Control {
    pub(super) fn new(
        ring: Ring,
        memory: Arc<GuestMemoryMmap>,
        tap: Tap,
        features: u64,
        pairs_in_use: Arc<AtomicU16>,
    ) -> Self {
        Self {
            ring,
            memory,
            tap,
            features,
            pairs_in_use,
            guest_offloads: None,
        }
    }

    pub(super) fn into_queue(self) -> Queue {
        self.ring.into_queue()
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Carries out what the driver asks for; true if there may be more.
    pub(super) fn run(&mut self, interrupt: &dyn Interrupt) -> Result<bool, HandlerError> {
        let memory = self.memory.clone();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(chain) = self.ring.next(&memory)? else {
                if self.ring.ask_for_notification(&memory)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let written = match self.serve(chain) {
                Ok(()) => 1,
                Err(mistake) => {
                    debug!(%mistake, "the driver's control command has no answer");
                    0
                }
            };
            self.ring.add(&memory, head, written)?;
            self.ring.publish(&memory)?;
        }
        if self.ring.wants_interrupt(&memory)? {
            interrupt.used_buffers(self.ring.index())?;
        }
        Ok(more)
    }

    /// An error means that there is no place for an answer.
    fn serve(&mut self, chain: Chain<'_>) -> Result<(), ChainError> {
        let mut bytes = [0; LONGEST];
        let (mut length, mut answer) = (0usize, None);
        chain.walk(|piece, writable| {
            if writable {
                answer.get_or_insert(piece);
            } else if answer.is_some() {
                // Readable buffers come first (virtio 1.2 §2.7.4.2).
                return Err(ChainError::WrongDirection);
            } else if let Some(room) = bytes.get_mut(length..) {
                piece.copy_to(room);
                length = length.saturating_add(piece.len());
            } else {
                length = length.saturating_add(piece.len());
            }
            Ok(())
        })?;
        let answer = answer.ok_or(ChainError::TooShort)?;
        let done = bytes
            .get(..length)
            .is_some_and(|command| self.obey(command));
        answer.copy_from(&[if done { OK } else { ERROR }]);
        Ok(())
    }

    /// Whether the command was carried out.
    fn obey(&mut self, command: &[u8]) -> bool {
        match *command {
            [CLASS_MQ, MQ_PAIRS_SET, low, high] if self.features & features::MQ != 0 => {
                self.use_pairs(u16::from_le_bytes([low, high]))
            }
            [CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET, ref bits @ ..]
                if self.features & features::CTRL_GUEST_OFFLOADS != 0 =>
            {
                <[u8; 8]>::try_from(bits)
                    .is_ok_and(|bits| self.set_offloads(u64::from_le_bytes(bits)))
            }
            _ => {
                debug!(?command, "the driver gives a control command that is none");
                false
            }
        }
    }

    fn use_pairs(&mut self, pairs: u16) -> bool {
        let count = usize::from(pairs);
        if count == 0 || count > self.tap.pairs() {
            return false;
        }
        match self.tap.use_queues(count) {
            Ok(()) => {
                self.pairs_in_use.store(pairs, Ordering::SeqCst);
                true
            }
            Err(error) => {
                debug!(%error, tap = self.tap.name(), "a tap does not change its queues");
                false
            }
        }
    }

    fn set_offloads(&mut self, bits: u64) -> bool {
        if bits & !(self.features & features::GUEST_OFFLOADS) != 0 {
            return false;
        }
        match self.tap.set_offloads(features::tap_offloads(bits)) {
            Ok(()) => {
                self.guest_offloads = Some(bits);
                true
            }
            Err(error) => {
                debug!(%error, tap = self.tap.name(), "a tap does not change its offloads");
                false
            }
        }
    }
}
