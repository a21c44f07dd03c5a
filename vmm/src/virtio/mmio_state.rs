//! Saving and restoring a device together with its transport.

use serde::{Deserialize, Serialize};

use super::mmio::MmioTransport;
use super::queue::QueueRegisters;
use super::{DeviceState, StateError};

/// The transport's registers and the device's own state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    interrupt_status: u32,
    config_generation: u32,
    needs_reset: bool,
    device: DeviceState,
}

impl MmioTransport {
    /// Takes the state. The device must be paused.
    pub fn save(&mut self) -> Result<TransportState, StateError> {
        if self.is_active() {
            return Err(StateError::Mismatch("the device is not paused".into()));
        }
        Ok(TransportState {
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.clone(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            needs_reset: self.interrupt.needs_reset(),
            device: self.device.save()?,
        })
    }

    /// Puts state back into a new transport. [`Self::resume`] then activates the device if it was
    /// active; the queues are checked there as those of a driver are.
    pub fn restore(&mut self, state: TransportState) -> Result<(), StateError> {
        let sizes = |queues: &[QueueRegisters]| -> Vec<u16> {
            queues.iter().map(|queue| queue.max_size).collect()
        };
        if sizes(&state.queues) != self.device.queue_sizes() {
            return Err(StateError::Mismatch("the device has other queues".into()));
        }
        let offered = self.device.features() | super::mmio::FEATURE_VERSION_1;
        if state.driver_features & !offered != 0 {
            return Err(StateError::Mismatch(
                "the driver uses features that the device does not have".into(),
            ));
        }
        self.device.restore(state.device)?;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.queues = state.queues;
        self.interrupt.restore(
            state.interrupt_status,
            state.config_generation,
            state.needs_reset,
        );
        self.show_all();
        Ok(())
    }
}
