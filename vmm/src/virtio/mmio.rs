//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): registers, status, feature negotiation
//! and queue set-up, up to the hand-over of the queues to the device.
//!
//! ```text
//! reset ─ACKNOWLEDGE─ DRIVER ─(features)─ FEATURES_OK ─(queues)─ DRIVER_OK ─▶ device active
//!   ▲                                                                             │
//!   └───────────────────────────── 0 written to Status ──────────────────────────┘
//! ```
//!
//! Each register can be written only in the phase that the specification gives it; a driver that
//! does otherwise is ignored and noted in the log. What the device cannot work with at DRIVER_OK
//! sets DEVICE_NEEDS_RESET.

use std::sync::Arc;

use tracing::{debug, warn};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::MmioInterrupt;
use super::queue::QueueRegisters;
use super::registers::{CONFIG_SIZE, register};
use super::worker::signal;
use super::{Activation, ActiveQueue, Memory, VirtioDevice};
use crate::failure::Chain;

/// Bits of the status register (§2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// It has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u32 = 4;
    /// The features are agreed on.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u32 = 64;
    /// The driver has given up.
    pub const FAILED: u32 = 128;
}

/// VIRTIO_F_VERSION_1 (§6).
pub const FEATURE_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX (§6).
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;

/// A device with its transport.
pub struct MmioTransport {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) interrupt: Arc<MmioInterrupt>,
    memory: Memory,
    /// One for each queue, signalled by KVM.
    notifications: Vec<EventFd>,
    /// DEVICE_NEEDS_RESET is the interrupt's.
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<QueueRegisters>,
    /// The device works on the queues now.
    active: bool,
}

impl MmioTransport {
    /// Puts a device behind a transport. `notifications` has an event for each of its queues.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: MmioInterrupt,
        notifications: Vec<EventFd>,
    ) -> Self {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| QueueRegisters::new(*size))
            .collect();
        let transport = Self {
            device,
            interrupt: Arc::new(interrupt),
            memory,
            notifications,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            active: false,
        };
        transport.show_all();
        transport
    }

    /// Ends the device for good, whatever its driver does; gives the events of its queues. The guest
    /// finds a placeholder.
    pub fn remove(mut self) -> Vec<EventFd> {
        self.interrupt.page().clear();
        self.device.deactivate();
        // Its thread may have said something yet.
        self.interrupt.page().clear();
        self.notifications
    }

    /// Shows what registers the guest may read, and last that there is a device.
    pub(super) fn show_all(&self) {
        let page = self.interrupt.page();
        let mut config = [0; CONFIG_SIZE];
        self.device.read_config(0, &mut config);
        page.set_config(0, &config);
        // No shared memory regions: length and base read as all ones (§4.2.2.1).
        for offset in
            (register::SHARED_MEMORY_LENGTH..=register::SHARED_MEMORY_BASE_HIGH).step_by(4)
        {
            page.set(offset, u32::MAX);
        }
        self.show();
        page.set(register::DEVICE_ID, self.device.kind() as u32);
    }

    /// Shows what the driver's writes change.
    fn show(&self) {
        let page = self.interrupt.page();
        let features = match self.device_features_select {
            0 => low(self.offered()),
            1 => high(self.offered()),
            _ => 0,
        };
        page.set(register::DEVICE_FEATURES, features);
        let selected = self.selected();
        let most = selected.map_or(0, |queue| u32::from(queue.max_size));
        page.set(register::QUEUE_SIZE_MAX, most);
        let ready = selected.map_or(0, |queue| u32::from(queue.ready));
        page.set(register::QUEUE_READY, ready);
        self.interrupt.show_status(self.status);
    }

    /// The driver writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            if self.status & (status::DRIVER | status::FAILED) == status::DRIVER {
                self.device.write_config(offset - register::CONFIG, data);
                self.show_all();
            }
            return;
        }
        // §4.2.2.2: registers are read and written with 32 bits, aligned.
        match <[u8; 4]>::try_from(data) {
            Ok(data) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(data));
                // The only one that comes often changes nothing to be seen.
                if offset != register::QUEUE_NOTIFY {
                    self.show();
                }
            }
            _ => debug!(offset, "the driver writes part of a register"),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SELECT => self.device_features_select = value,
            register::DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SELECT => self.queue_select = value,
            register::QUEUE_SIZE
            | register::QUEUE_READY
            | register::QUEUE_DESCRIPTORS..=register::QUEUE_DEVICE_HIGH => {
                self.set_up_queue(offset, value);
            }
            register::QUEUE_NOTIFY => self.notify(value),
            // There is none, whichever is selected.
            register::SHARED_MEMORY_SELECT => {}
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            _ => debug!(
                offset,
                "the driver writes a register that cannot be written"
            ),
        }
    }

    /// For most queues KVM signals the device itself.
    fn notify(&mut self, queue: u32) {
        let known = u16::try_from(queue)
            .ok()
            .and_then(|queue| Some((queue, self.notifications.get(usize::from(queue))?)));
        match known {
            Some((queue, _)) if self.device.notified_on_vcpu(queue) => {
                if self.active {
                    self.device.notify(queue);
                }
            }
            // By the port, where a device has queues of both kinds.
            Some((_, event)) => signal(event),
            None => debug!(queue, "the driver notifies a queue that is none"),
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | FEATURE_VERSION_1
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// §3.1.1: between DRIVER and FEATURES_OK.
    fn set_driver_features(&mut self, value: u32) {
        if self.status & !status::ACKNOWLEDGE != status::DRIVER {
            debug!("the driver chooses features out of turn");
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !u64::from(u32::MAX) | value,
            1 => self.driver_features = self.driver_features & u64::from(u32::MAX) | value << 32,
            _ if value != 0 => debug!("the driver chooses features that are not defined"),
            _ => {}
        }
    }

    /// §3.1.1: between FEATURES_OK and DRIVER_OK.
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let phase = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        if self.status & phase != status::FEATURES_OK {
            debug!("the driver sets up a queue out of turn");
            return;
        }
        let Some(queue) = usize::try_from(self.queue_select)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
        else {
            debug!(
                self.queue_select,
                "the driver sets up a queue that does not exist"
            );
            return;
        };
        let done = match offset {
            register::QUEUE_READY => queue.set_ready(value),
            register::QUEUE_SIZE => queue.set_size(value),
            _ => queue.set_address(offset - register::QUEUE_DESCRIPTORS, value),
        };
        if !done {
            debug!(offset, value, "the driver sets up a queue wrongly");
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // DEVICE_NEEDS_RESET is the device's to set; the driver may write back what it has read.
        let value = value & !status::NEEDS_RESET;
        let added = value & !self.status;
        if value & self.status != self.status || !self.may_add(added) {
            debug!(value, "the driver changes the status out of turn");
            return;
        }
        if added & status::FEATURES_OK != 0 && !self.features_agreed() {
            debug!(
                self.driver_features,
                "the driver chooses features that were not offered"
            );
            // Without FEATURES_OK, which tells the driver (§3.1.1, step 6).
            self.status |= added & !status::FEATURES_OK;
            return;
        }
        self.status |= added;
        if added & status::DRIVER_OK != 0 {
            self.resume();
        }
    }

    /// Each step needs the one before, and is a write of its own from FEATURES_OK on.
    fn may_add(&self, added: u32) -> bool {
        match added {
            // Written again, or given up.
            0 | status::FAILED => true,
            _ if self.status & status::FAILED != 0 => false,
            status::ACKNOWLEDGE => true,
            status::DRIVER => self.status & status::ACKNOWLEDGE != 0,
            status::FEATURES_OK => self.status & status::DRIVER != 0,
            status::DRIVER_OK => self.status & status::FEATURES_OK != 0,
            _ if added == status::ACKNOWLEDGE | status::DRIVER => true,
            _ => false,
        }
    }

    fn features_agreed(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & FEATURE_VERSION_1 != 0
    }

    /// §2.4.
    fn reset(&mut self) {
        if self.active {
            self.active = false;
            self.device.reset();
        }
        for event in &self.notifications {
            // Nonblocking: empties it.
            let _ = event.read();
        }
        self.interrupt.reset();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueRegisters::reset);
    }

    /// Lets the device work, if the driver is set up: at DRIVER_OK and after [`Self::pause`].
    pub fn resume(&mut self) {
        if self.active || self.status & status::DRIVER_OK == 0 || self.interrupt.needs_reset() {
            return;
        }
        let result = self.active_queues().and_then(|queues| {
            self.device
                .activate(Activation {
                    memory: self.memory.clone(),
                    features: self.driver_features,
                    queues,
                    interrupt: self.interrupt.clone(),
                })
                .map_err(|error| Chain(&error).to_string())
        });
        if let Err(error) = result {
            warn!(kind = ?self.device.kind(), error, "a device cannot be activated");
            self.interrupt.mark_broken();
            return;
        }
        self.active = true;
        self.notifications.iter().for_each(signal);
    }

    /// The queues as the device gets them.
    fn active_queues(&self) -> Result<Vec<ActiveQueue>, String> {
        let memory = self.memory.memory();
        let event_index = self.driver_features & FEATURE_EVENT_INDEX != 0;
        let needed = self.device.needed_queues(self.driver_features);
        let mut queues = Vec::with_capacity(needed);
        let all = self.queues.iter().zip(&self.notifications);
        for (index, (registers, event)) in all.take(needed).enumerate() {
            let queue: Queue = registers
                .to_queue(event_index)
                .map_err(|error| format!("queue {index}: {error}"))?;
            if !queue.is_valid(&*memory) {
                return Err(format!(
                    "queue {index} is not ready or lies outside of memory"
                ));
            }
            let notified = event.try_clone().map_err(|error| error.to_string())?;
            queues.push(ActiveQueue { queue, notified });
        }
        Ok(queues)
    }

    /// Stops the device until [`Self::resume`], so that its state can be taken.
    pub fn pause(&mut self) {
        if self.active {
            self.active = false;
            for (registers, queue) in self.queues.iter_mut().zip(self.device.deactivate()) {
                registers.note_position(&queue);
            }
        }
    }

    /// Whether the device works on its queues.
    pub fn is_active(&self) -> bool {
        self.active
    }
}

/// The register's low half; the cast keeps just these bits.
#[allow(clippy::cast_possible_truncation)]
fn low(features: u64) -> u32 {
    features as u32
}

fn high(features: u64) -> u32 {
    low(features >> 32)
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
