//! Devices come and go: at the machine's making, and at places that were left free for later.

use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::ports::Place;
use super::{Assembly, Machine, MachineError};
use crate::kvm::vm::Vm;
use crate::layout;
use crate::threads::locked;
use crate::virtio::interrupt::{MmioInterrupt, USED};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::registers::{RegisterPages, register};
use crate::virtio::{Memory, VirtioDevice};

impl Assembly {
    /// Puts a device at the next place.
    pub fn add_device(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let index = self.ports.places.len();
        let transport = self.backplane.connect(index, device)?;
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
        *place = Place::Taken(self.backplane.connect(index, device)?);
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
        // The guest may see it before it has its place; what it does then waits.
        let mut place = locked(place);
        *place = Place::Taken(self.backplane.connect(index, device)?);
        Ok(index)
    }

    /// Whether the guest's driver uses the device at a place.
    pub fn is_in_use(&self, index: usize) -> bool {
        let place = self.ports.places.get(index).map(locked);
        place.is_some_and(|mut place| place.transport().is_some_and(|device| device.is_active()))
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
        self.backplane.disconnect(index, &transport.remove())
    }
}

/// What devices are put into.
pub(super) struct Backplane {
    vm: Arc<Vm>,
    memory: GuestMemoryMmap,
    registers: RegisterPages,
    /// Signalled by every acknowledgement of used buffers; nobody listens.
    acknowledged: EventFd,
}

impl Backplane {
    /// All places show placeholders.
    pub(super) fn new(vm: &Arc<Vm>, memory: &GuestMemoryMmap) -> Result<Self, MachineError> {
        let registers = RegisterPages::new().map_err(MachineError::Registers)?;
        vm.set_registers(&registers)?;
        let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK;
        Ok(Self {
            vm: vm.clone(),
            memory: memory.clone(),
            registers,
            acknowledged: EventFd::new(flags).map_err(MachineError::Event)?,
        })
    }

    #[cfg(test)]
    pub(super) fn registers(&self) -> &RegisterPages {
        &self.registers
    }

    /// Connects a device with KVM's machine. The guest can see it when this returns.
    fn connect(
        &self,
        index: usize,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Box<MmioTransport>, MachineError> {
        let (base, gsi) =
            layout::virtio_mmio(index).ok_or(MachineError::TooManyDevices(index + 1))?;
        // Most interrupts are for used buffers: to take note of that in KVM saves a way to us.
        self.vm
            .absorb(&self.acknowledged, base + register::INTERRUPT_ACK, USED)?;
        let mut notifications = Vec::with_capacity(device.queue_sizes().len());
        for (queue, _) in (0u16..).zip(device.queue_sizes()) {
            let event = if device.notified_on_vcpu(queue) {
                self.vm.unconnected()
            } else {
                self.vm
                    .notification(base + register::QUEUE_NOTIFY, queue.into())
            };
            match event {
                Ok(event) => notifications.push(event),
                Err(error) => {
                    // The place must be usable again.
                    self.disconnect(index, &notifications)?;
                    return Err(error.into());
                }
            }
        }
        let line = self.vm.clone();
        let interrupt = MmioInterrupt::new(
            Box::new(move || line.pulse(gsi)),
            self.registers.page(index),
        );
        let memory = Memory::new(self.memory.clone());
        let on_vcpu = (0u16..)
            .zip(device.queue_sizes())
            .any(|(queue, _)| device.notified_on_vcpu(queue));
        // Queues that KVM serves by itself are quicker without.
        let port = layout::notify_port(index).filter(|_| on_vcpu).unwrap_or(0);
        let page = self.registers.page(index);
        page.set(register::NOTIFY_PORT, port.into());
        page.set(register::KEEPS_USED, 1);
        let transport = MmioTransport::new(device, memory, interrupt, notifications);
        Ok(Box::new(transport))
    }

    /// Undoes what [`Self::connect`] did in KVM.
    fn disconnect(&self, index: usize, notifications: &[EventFd]) -> Result<(), MachineError> {
        let Some((base, _)) = layout::virtio_mmio(index) else {
            return Ok(());
        };
        let acknowledge = base + register::INTERRUPT_ACK;
        let mut result = self
            .vm
            .end_notification(&self.acknowledged, acknowledge, USED);
        for (queue, event) in (0u32..).zip(notifications) {
            let ended = self
                .vm
                .end_notification(event, base + register::QUEUE_NOTIFY, queue);
            result = result.and(ended);
        }
        Ok(result?)
    }
}
