//! The registers of one queue while the driver sets it up, and its place in the rings while the
//! device is stopped.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

/// A queue as the driver describes it. Nothing here is checked against memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The largest size that the device offers.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver is done with it.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
    /// Where the device goes on in the available ring.
    pub next_available: u16,
    /// Where the device goes on in the used ring.
    pub next_used: u16,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// The setters tell whether the driver may do that: a ready queue stays as it is until the
    /// driver takes it back, and a size is a power of two (virtio 1.2 §2.7).
    pub(super) fn set_size(&mut self, value: u32) -> bool {
        match u16::try_from(value) {
            Ok(size) if !self.ready && size.is_power_of_two() && size <= self.max_size => {
                self.size = size;
                true
            }
            _ => false,
        }
    }

    pub(super) fn set_ready(&mut self, value: u32) -> bool {
        self.ready = value == 1;
        value <= 1
    }

    /// `offset` is the register's distance from QueueDescLow; the six registers come in pairs of
    /// low and high halves, 0x10 apart.
    pub(super) fn set_address(&mut self, offset: u64, value: u32) -> bool {
        if self.ready {
            return false;
        }
        let address = match offset & !0xf {
            0x00 => &mut self.descriptors,
            0x10 => &mut self.driver,
            0x20 => &mut self.device,
            _ => return false,
        };
        let value = u64::from(value);
        match offset & 0xf {
            0 => *address = *address & !u64::from(u32::MAX) | value,
            4 => *address = *address & u64::from(u32::MAX) | value << 32,
            _ => return false,
        }
        true
    }

    /// Checks sizes and alignment; what lies in memory is for `Queue::is_valid`.
    pub(super) fn to_queue(&self, event_index: bool) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_available,
            next_used: self.next_used,
            event_idx_enabled: event_index,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.driver,
            used_ring: self.device,
        })
    }

    pub(super) fn note_position(&mut self, queue: &Queue) {
        self.next_available = queue.next_avail();
        self.next_used = queue.next_used();
    }
}
