//! The virtual machine as KVM has it: memory slots, interrupt controllers, the events that connect
//! devices with it.

use std::io;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use rustix::fs::{Mode, OFlags};
use vm_memory::{GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::KvmError;
use crate::virtio::registers::RegisterPages;
use crate::{layout, sys};

/// What the monitor cannot do without.
const NEEDED: &[(Cap, &str)] = &[
    (
        Cap::Irqchip,
        "in-kernel interrupt controllers (KVM_CAP_IRQCHIP)",
    ),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Memory slot of the devices' registers, after those of guest memory.
const REGISTERS: u32 = 8;

/// Opens /dev/kvm. Done before the jail, which has no /dev.
pub fn open() -> Result<Kvm, KvmError> {
    let fd = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KvmError::Missing(error),
            Some(libc::EACCES | libc::EPERM) => KvmError::Permission(error),
            _ => KvmError::Open(error),
        })?;
    let kvm = sys::kvm_from(fd);
    let version = kvm.get_api_version();
    if version.unsigned_abs() != KVM_API_VERSION {
        return Err(KvmError::Version(version));
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(*capability) {
            return Err(KvmError::Capability(name));
        }
    }
    Ok(kvm)
}

/// A virtual machine without vCPUs or devices.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
}

impl Vm {
    /// Makes the machine with its interrupt controllers (two PICs, IO-APIC, a local APIC for each
    /// vCPU). There is no PIT: the guest has kvm-clock and the local APIC's timer.
    pub fn new(kvm: Kvm, cpus: u8) -> Result<Self, KvmError> {
        let possible = kvm.get_max_vcpus();
        if usize::from(cpus) > possible {
            return Err(KvmError::TooManyCpus {
                asked: cpus,
                possible,
            });
        }
        let fd = create(&kvm)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::during("place the identity map"))?;
        fd.set_tss_address(layout::KVM_TSS)
            .map_err(KvmError::during("place the task segment"))?;
        fd.create_irq_chip()
            .map_err(KvmError::during("make the interrupt controllers"))?;
        Ok(Self { kvm, fd })
    }

    /// Gives the machine its memory. The caller keeps `memory` alive as long as the machine.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            sys::set_memory_slot(&self.fd, slot, region, false)
                .map_err(|error| KvmError::Operation("register guest memory", error))?;
        }
        Ok(())
    }

    /// Lets the guest read the devices' registers by itself. The caller keeps `pages` alive as long
    /// as the machine.
    pub fn set_registers(&self, pages: &RegisterPages) -> Result<(), KvmError> {
        sys::set_memory_slot(&self.fd, REGISTERS, pages.region(), true)
            .map_err(|error| KvmError::Operation("register the devices' registers", error))
    }

    /// Makes a vCPU.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(KvmError::during("make a vCPU"))
    }

    /// Raises an edge-triggered interrupt. Twice as quick as an event: KVM delivers those to the
    /// IO-APIC through a worker thread.
    pub fn pulse(&self, gsi: u32) -> io::Result<()> {
        let set = |level| {
            self.fd
                .set_irq_line(gsi, level)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))
        };
        set(true)?;
        set(false)
    }

    /// An event that raises an edge-triggered interrupt.
    pub fn interrupt(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = event()?;
        self.fd
            .register_irqfd(&event, gsi)
            .map_err(KvmError::during("connect an interrupt"))?;
        Ok(event)
    }

    /// An event that is signalled when the guest writes `value` (32 bits) to `address`.
    pub fn notification(&self, address: u64, value: u32) -> Result<EventFd, KvmError> {
        let event = event()?;
        self.fd
            .register_ioevent(&event, &IoEventAddress::Mmio(address), value)
            .map_err(KvmError::during("connect a queue's notification"))?;
        Ok(event)
    }

    /// An event that the guest's writes do not signal: they come to the vCPU's thread.
    pub fn unconnected(&self) -> Result<EventFd, KvmError> {
        event()
    }

    /// Takes the guest's writes of `value` (32 bits) to `address`: nobody needs to know of them.
    pub fn absorb(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(KvmError::during("connect an interrupt's acknowledgement"))
    }

    /// Undoes [`Self::notification`] or [`Self::absorb`]: KVM holds the event until then, whoever else closes it.
    pub fn end_notification(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(address);
        match self.fd.unregister_ioevent(event, &address, value) {
            // It was never connected.
            Err(error) if error.errno() == libc::ENOENT => Ok(()),
            result => result.map_err(KvmError::during("disconnect a queue's notification")),
        }
    }

    /// The KVM that the machine belongs to.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// For the ioctls that belong to the state of the machine.
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }
}

/// KVM_CREATE_VM is interrupted by signals.
fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(KvmError::during("make a virtual machine")),
        }
    }
}

fn event() -> Result<EventFd, KvmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|error| KvmError::Operation("make an event", error))
}
