//! Devices come and go: at the machine's making, and at places that were left free for later.

use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::ports::{Place, locked};
use super::{Assembly, Machine, MachineError};
use crate::kvm::vm::Vm;
use crate::layout;
use crate::virtio::interrupt::MmioInterrupt;
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use crate::virtio::{Memory, VirtioDevice};

impl Assembly {
    /// Puts a device at the next place.
    pub fn add_device(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let index = self.ports.places.len();
        let transport = connect(&self.vm, &self.memory, index, device)?;
        self.ports.places.push(Mutex::new(Place::Taken(transport)));
        Ok(())
    }

    /// Leaves the next `count` places free, for [`Self::attach`] and [`Machine::attach`].
    pub fn add_spare_places(&mut self, count: u8) -> Result<(), MachineError> {
        let most = self.ports.places.len() + usize::from(count);
        if most > layout::MAX_DEVICES {
            return Err(MachineError::TooManyDevices(most));
        }
        let free = || Mutex::new(Place::Free);
        self.ports.places.resize_with(most, free);
        Ok(())
    }

    /// Puts a device at a free place, where it was when the machine was saved that is to be
    /// restored.
    pub fn attach(
        &mut self,
        index: usize,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), MachineError> {
        let place = self.ports.places.get(index);
        let mut place = place.map(locked).ok_or(MachineError::NoFreePlace)?;
        if place.transport().is_some() {
            return Err(MachineError::NoFreePlace);
        }
        *place = Place::Taken(connect(&self.vm, &self.memory, index, device)?);
        Ok(())
    }

    /// Interrupts of all places, in order, for the kernel's command line.
    pub fn device_interrupts(&self) -> Vec<u32> {
        (0..self.ports.places.len())
            .filter_map(layout::virtio_mmio)
            .map(|(_, gsi)| gsi)
            .collect()
    }
}

impl Machine {
    /// Puts a device at a free place, while the guest runs; gives the place. Called by one thread
    /// at a time.
    pub fn attach(&self, device: Box<dyn VirtioDevice>) -> Result<usize, MachineError> {
        let (index, place) = self
            .ports
            .places
            .iter()
            .enumerate()
            .find(|(_, place)| locked(place).transport().is_none())
            .ok_or(MachineError::NoFreePlace)?;
        let transport = connect(&self.vm, &self.memory, index, device)?;
        *locked(place) = Place::Taken(transport);
        Ok(index)
    }

    /// Takes the device at a place away, whatever its driver does; the place is free then.
    pub fn detach(&self, index: usize) -> Result<(), MachineError> {
        let Some(place) = self.ports.places.get(index) else {
            return Ok(());
        };
        // Out of the vCPUs' reach first; stopping the device may take a moment.
        let Place::Taken(transport) = std::mem::replace(&mut *locked(place), Place::Free) else {
            return Ok(());
        };
        disconnect(&self.vm, index, &transport.remove())
    }
}

/// Connects a device with KVM's machine.
fn connect(
    vm: &Arc<Vm>,
    memory: &GuestMemoryMmap,
    index: usize,
    device: Box<dyn VirtioDevice>,
) -> Result<Box<MmioTransport>, MachineError> {
    let (base, gsi) = layout::virtio_mmio(index).ok_or(MachineError::TooManyDevices(index + 1))?;
    let mut notifications = Vec::with_capacity(device.queue_sizes().len());
    for (queue, _) in (0u32..).zip(device.queue_sizes()) {
        match vm.notification(base + QUEUE_NOTIFY, queue) {
            Ok(event) => notifications.push(event),
            Err(error) => {
                // The place must be usable again.
                disconnect(vm, index, &notifications)?;
                return Err(error.into());
            }
        }
    }
    let line = vm.clone();
    let interrupt = MmioInterrupt::new(Box::new(move || line.pulse(gsi)));
    let memory = Memory::new(memory.clone());
    let transport = MmioTransport::new(device, memory, interrupt, notifications);
    Ok(Box::new(transport))
}

/// Undoes what [`connect`] did in KVM.
fn disconnect(vm: &Vm, index: usize, notifications: &[EventFd]) -> Result<(), MachineError> {
    let Some((base, _)) = layout::virtio_mmio(index) else {
        return Ok(());
    };
    let mut result = Ok(());
    for (queue, event) in (0u32..).zip(notifications) {
        let ended = vm.end_notification(event, base + QUEUE_NOTIFY, queue);
        result = result.and(ended);
    }
    Ok(result?)
}
