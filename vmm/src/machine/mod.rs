//! The microVM put together: memory, KVM's machine, devices on their transports, vCPUs.
//!
//! ```text
//! Assembly::new ─ add_device … ─ boot or restore ─▶ Machine (paused) ─ run ⇄ pause, save ─▶ dropped
//! ```

mod devices;
pub mod ports;
pub mod serial;

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use crate::boot::kernel::Kernel;
use crate::boot::{self, BootError};
use crate::kvm::KvmError;
use crate::kvm::cpuid::CpuModel;
use crate::kvm::exits::EndingSlot;
use crate::kvm::state::{ChipState, MsrList, VcpuState};
use crate::kvm::vcpu::{RunningVcpu, Vcpu};
use crate::kvm::vm::Vm;
use crate::layout;
use crate::memory::{self, MemoryError};
use crate::threads::locked;
use crate::virtio::StateError;
use crate::virtio::mmio_state::TransportState;
use devices::Backplane;
use ports::Ports;
use serial::{GuestLog, SerialPort};

/// Why a machine could not be made, started or saved.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel and boot structures.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The memory of the devices' registers.
    #[error("reserve memory for the devices' registers")]
    Registers(#[source] io::Error),
    /// An event.
    #[error("make an event")]
    Event(#[source] io::Error),
    /// The IO-APIC has no pin left.
    #[error("{0} devices and spare places, at most {most} are possible: fewer are needed", most = layout::MAX_DEVICES)]
    TooManyDevices(usize),
    /// All places are taken.
    #[error(
        "none of the VM's places for devices is free: detach one, or start the VM with more spare places"
    )]
    NoFreePlace,
    /// The state of a device.
    #[error("device {index}")]
    DeviceState {
        /// Its place.
        index: usize,
        /// Cause.
        #[source]
        source: StateError,
    },
    /// The state of a machine of another shape.
    #[error("the saved machine has {saved} {what}, this one has {present}")]
    Shape {
        /// vCPUs or devices.
        what: &'static str,
        /// In the state.
        saved: usize,
        /// Here.
        present: usize,
    },
}

/// All state of a machine but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    vcpus: Vec<VcpuState>,
    chips: ChipState,
    /// By place; none where no device was.
    devices: Vec<Option<TransportState>>,
}

/// A machine that is being put together; nothing runs yet.
///
/// The fields' order is that of their end: vCPUs, then devices, KVM's machine, its memory.
pub struct Assembly {
    vcpus: Vec<Vcpu>,
    ports: Ports,
    msrs: MsrList,
    vm: Arc<Vm>,
    backplane: Backplane,
    memory: GuestMemoryMmap,
}

impl Assembly {
    /// Begins a machine of `cpus` vCPUs and `memory_mib` MiB, without devices.
    pub fn new(kvm: Kvm, cpus: u8, memory_mib: u32) -> Result<Self, MachineError> {
        let memory = memory::create(memory_mib)?;
        let model = CpuModel::new(&kvm, cpus)?;
        let msrs = MsrList::new(&kvm)?;
        let vm = Arc::new(Vm::new(kvm, cpus)?);
        vm.set_memory(&memory)?;
        let mut vcpus = Vec::with_capacity(usize::from(cpus));
        for index in 0..cpus {
            vcpus.push(Vcpu::new(
                index,
                vm.create_vcpu(index)?,
                &model.for_cpu(index)?,
            )?);
        }
        let backplane = Backplane::new(&vm, &memory)?;
        Ok(Self {
            vcpus,
            ports: Ports::default(),
            msrs,
            vm,
            backplane,
            memory,
        })
    }

    /// Adds the serial port that carries the guest kernel's log.
    pub fn add_serial(&mut self, log: GuestLog) -> Result<(), MachineError> {
        let interrupt = self.vm.interrupt(layout::SERIAL_GSI)?;
        self.ports.serial = Some(Mutex::new(SerialPort::new(interrupt, log)));
        Ok(())
    }

    /// Loads a kernel, which the machine will start with.
    pub fn boot(self, kernel: &Kernel, command_line: &str) -> Result<Machine, MachineError> {
        let cpus = u8::try_from(self.vcpus.len()).unwrap_or(u8::MAX);
        let entry = boot::load(&self.memory, kernel, command_line, cpus)?;
        for vcpu in &self.vcpus {
            vcpu.prepare(entry)?;
        }
        self.start()
    }

    /// Puts back a state. Guest memory is the caller's affair.
    pub fn restore(self, state: MachineState) -> Result<Machine, MachineError> {
        let same = |what, saved, present| {
            if saved == present {
                Ok(())
            } else {
                Err(MachineError::Shape {
                    what,
                    saved,
                    present,
                })
            }
        };
        same("vCPUs", state.vcpus.len(), self.vcpus.len())?;
        same("devices", state.devices.len(), self.ports.places.len())?;
        for (vcpu, state) in self.vcpus.iter().zip(&state.vcpus) {
            vcpu.restore(state)?;
        }
        state.chips.restore(&self.vm)?;
        for (index, (place, state)) in self.ports.places.iter().zip(state.devices).enumerate() {
            let restored = match (locked(place).transport(), state) {
                (Some(device), Some(state)) => device.restore(state),
                (None, None) => Ok(()),
                (None, Some(_)) => Err(StateError::Mismatch("it is not attached".into())),
                (Some(_), None) => Err(StateError::Mismatch("there was none".into())),
            };
            restored.map_err(|source| MachineError::DeviceState { index, source })?;
        }
        self.start()
    }

    /// Gives each vCPU its thread, paused.
    fn start(self) -> Result<Machine, MachineError> {
        let ports = Arc::new(self.ports);
        let msrs = Arc::new(self.msrs);
        let ending = Arc::new(EndingSlot::new().map_err(MachineError::Event)?);
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for vcpu in self.vcpus {
            vcpus.push(vcpu.start(ports.clone(), ending.clone(), msrs.clone())?);
        }
        Ok(Machine {
            vcpus,
            ports,
            ending,
            vm: self.vm,
            backplane: self.backplane,
            memory: self.memory,
        })
    }
}

/// A microVM, paused at first.
///
/// The fields' order is that of their end: vCPUs, then devices, KVM's machine, its memory.
pub struct Machine {
    vcpus: Vec<RunningVcpu>,
    ports: Arc<Ports>,
    ending: Arc<EndingSlot>,
    vm: Arc<Vm>,
    backplane: Backplane,
    memory: GuestMemoryMmap,
}

impl Machine {
    /// Lets devices and vCPUs go.
    pub fn run(&self) -> Result<(), MachineError> {
        for place in &self.ports.places {
            if let Some(device) = locked(place).transport() {
                device.resume();
            }
        }
        for vcpu in &self.vcpus {
            vcpu.run()?;
        }
        Ok(())
    }

    /// The guest has booted.
    pub fn settle(&self) {
        memory::prefer_huge_pages(&self.memory);
    }

    /// Stops vCPUs and devices; returns once they have.
    pub fn pause(&self) -> Result<(), MachineError> {
        for vcpu in &self.vcpus {
            vcpu.pause()?;
        }
        for place in &self.ports.places {
            if let Some(device) = locked(place).transport() {
                device.pause();
            }
        }
        Ok(())
    }

    /// Takes the state of a paused machine.
    pub fn save(&self) -> Result<MachineState, MachineError> {
        let mut vcpus = Vec::with_capacity(self.vcpus.len());
        for vcpu in &self.vcpus {
            vcpus.push(*vcpu.save()?);
        }
        let mut devices = Vec::with_capacity(self.ports.places.len());
        for (index, place) in self.ports.places.iter().enumerate() {
            let state = locked(place).transport().map(|device| device.save());
            devices.push(
                state
                    .transpose()
                    .map_err(|source| MachineError::DeviceState { index, source })?,
            );
        }
        Ok(MachineState {
            vcpus,
            chips: ChipState::take(&self.vm)?,
            devices,
        })
    }

    /// Where the guest's end is reported.
    pub fn ending(&self) -> &EndingSlot {
        &self.ending
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

#[cfg(test)]
mod tests;
