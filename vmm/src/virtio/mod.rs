//! The contract between virtio devices and their transport.
//!
//! The transport (virtio-mmio) owns status, feature negotiation and queue registers. At DRIVER_OK
//! it checks the queues and hands each device what it needs in one [`Activation`]; the device moves
//! that to a worker thread of its own. `deactivate` ends the worker and gives the queues back: the
//! transport calls it before it saves state, and `reset` when the driver resets the device.

pub mod blk;
pub mod chain;
pub mod config_space;
pub mod fs;
pub mod host_connections;
pub mod interrupt;
pub mod mmio;
pub mod mmio_state;
pub mod net;
pub mod queue;
pub mod rate_limit;
pub mod registers;
mod ring;
pub mod rng;
pub mod state;
#[cfg(test)]
pub mod testing;
pub mod vsock;
pub mod worker;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub use state::{DeviceState, StateError};

/// Guest memory as devices see it.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Virtio device ids (virtio 1.2 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum DeviceKind {
    Net = 1,
    Block = 2,
    Console = 3,
    Entropy = 4,
    Vsock = 19,
    Filesystem = 26,
}

/// How a device tells its driver something. Queue indices are the device's own.
pub trait Interrupt: Send + Sync {
    /// Buffers of the queue were used (virtio 1.2 §2.3). The caller has applied the rules of
    /// notification suppression.
    fn used_buffers(&self, queue: u16) -> io::Result<()>;
    /// The configuration space changed, to these bytes from `offset` on.
    fn configuration_changed(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// The device met something that it cannot go on from, such as a broken queue: the transport
    /// sets DEVICE_NEEDS_RESET and tells the driver (virtio 1.2 §2.1.2). A [`worker::Worker`] calls
    /// this when its handler fails.
    fn device_needs_reset(&self) -> io::Result<()>;
}

/// Why a device did not start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// Its thread could not be made.
    #[error("start the device's thread")]
    Thread(#[source] io::Error),
    /// What it serves could not be opened or set up; names that.
    #[error("set up {what}")]
    Backend {
        /// Path or name of what failed.
        what: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// A queue that the driver has set up, and the event that its notifications raise.
pub struct ActiveQueue {
    /// Validated by the transport; its addresses lie in guest memory.
    pub queue: Queue,
    /// Signalled by KVM when the driver notifies this queue, and once by the transport after
    /// `activate`, since a restored queue may hold buffers whose notification is long past.
    pub notified: EventFd,
}

/// All that a device needs to work.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// The features that the driver accepted, a subset of those offered.
    pub features: u64,
    /// The first [`VirtioDevice::needed_queues`] of `queue_sizes`, in that order. All are ready.
    pub queues: Vec<ActiveQueue>,
    /// Towards the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device behind the transport.
pub trait VirtioDevice: Send {
    /// Which device this is.
    fn kind(&self) -> DeviceKind;
    /// Device-specific feature bits plus VIRTIO_RING_F_*; the transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;
    /// The largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];
    /// How many of its queues, from the first on, the device needs with the features that the driver
    /// accepted; it does not get the others.
    fn needed_queues(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }
    /// Reads the configuration space, of [`registers::CONFIG_SIZE`] bytes at most; bytes beyond it are
    /// left as they are (zero).
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the configuration space; most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Starts the device. Called once per DRIVER_OK, never while active.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Whether the driver's notifications of a queue come to [`Self::notify`], on the thread of the
    /// vCPU, instead of to the queue's event.
    fn notified_on_vcpu(&self, _queue: u16) -> bool {
        false
    }
    /// The driver has notified such a queue of the active device. The vCPU waits for this.
    fn notify(&mut self, _queue: u16) {}
    /// Stops the device and returns its queues, none lost, when nothing of it runs any more. Harmless when
    /// inactive (returns no queues).
    fn deactivate(&mut self) -> Vec<Queue>;
    /// The driver resets the device, which is active: as [`Self::deactivate`], and what the driver has
    /// set up by a queue is forgotten.
    fn reset(&mut self) {
        self.deactivate();
    }
    /// The state beyond queues and features, taken while inactive.
    fn save(&mut self) -> Result<DeviceState, StateError>;
    /// Puts saved state back, before activation.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError>;
}
