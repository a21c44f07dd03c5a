//! State of vCPUs and interrupt controllers as values that can be stored.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::KvmError;
use super::vm::Vm;
use crate::sys;

/// Most entries that KVM takes in one call (KVM_MAX_MSR_ENTRIES is 256).
const MSRS_AT_ONCE: usize = 256;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The model-specific registers that make up a vCPU's state on this host.
#[derive(Debug)]
pub struct MsrList(Vec<u32>);

impl MsrList {
    /// Asks KVM. The deadline comes last, since it is relative to the others.
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(KvmError::during("ask for the list of MSRs"))?;
        let mut indices = list.as_slice().to_vec();
        indices.sort_by_key(|index| *index == MSR_TSC_DEADLINE);
        Ok(Self(indices))
    }
}

/// All of a vCPU's state.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads it from a vCPU that is not running.
    pub(super) fn take(fd: &VcpuFd, msrs: &MsrList) -> Result<Self, KvmError> {
        let read = KvmError::during;
        // The multiprocessing state first: reading it makes KVM finish pending APIC events
        // (KVM API, KVM_GET_MP_STATE).
        let mp_state = fd.get_mp_state().map_err(read("read the MP state"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(read("read CPUID"))?
            .as_slice()
            .to_vec();
        Ok(Self {
            cpuid,
            tsc_khz: fd.get_tsc_khz().map_err(read("read the TSC's frequency"))?,
            mp_state,
            regs: fd.get_regs().map_err(read("read registers"))?,
            sregs: fd.get_sregs().map_err(read("read segments and paging"))?,
            xsave: fd.get_xsave().map_err(read("read the FPU"))?,
            xcrs: fd
                .get_xcrs()
                .map_err(read("read extended control registers"))?,
            debug_regs: fd.get_debug_regs().map_err(read("read debug registers"))?,
            lapic: fd.get_lapic().map_err(read("read the local APIC"))?,
            msrs: read_msrs(fd, &msrs.0)?,
            events: fd.get_vcpu_events().map_err(read("read pending events"))?,
        })
    }

    /// Writes it to a vCPU that has not run. The order matters: CPUID decides what the rest may
    /// be, the APIC's base is part of `sregs`, its timer needs the TSC among the MSRs.
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        let write = KvmError::during;
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| invalid("restore CPUID"))?;
        fd.set_cpuid2(&cpuid).map_err(write("restore CPUID"))?;
        if fd.get_tsc_khz().ok() != Some(self.tsc_khz) {
            fd.set_tsc_khz(self.tsc_khz).map_err(write(
                "restore the TSC's frequency (this host cannot scale it)",
            ))?;
        }
        fd.set_mp_state(self.mp_state)
            .map_err(write("restore the MP state"))?;
        fd.set_regs(&self.regs)
            .map_err(write("restore registers"))?;
        fd.set_sregs(&self.sregs)
            .map_err(write("restore segments and paging"))?;
        sys::set_xsave(fd, &self.xsave).map_err(write("restore the FPU"))?;
        fd.set_xcrs(&self.xcrs)
            .map_err(write("restore extended control registers"))?;
        fd.set_debug_regs(&self.debug_regs)
            .map_err(write("restore debug registers"))?;
        fd.set_lapic(&self.lapic)
            .map_err(write("restore the local APIC"))?;
        write_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events)
            .map_err(write("restore pending events"))
    }
}

/// KVM lists registers that this CPU lacks; it stops at the first that it cannot read.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut entries = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .take(MSRS_AT_ONCE)
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(|_| invalid("read MSRs"))?;
        let count = fd
            .get_msrs(&mut msrs)
            .map_err(KvmError::during("read MSRs"))?;
        entries.extend_from_slice(&msrs.as_slice()[..count]);
        // One that cannot be read is left out.
        let skipped = usize::from(count < wanted.len());
        rest = &rest[count + skipped..];
    }
    fix_expired_deadline(&mut entries);
    Ok(entries)
}

/// A deadline that has just expired reads as zero, which would disarm the timer although its
/// interrupt may not have been delivered yet: let it expire once more.
fn fix_expired_deadline(entries: &mut [kvm_msr_entry]) {
    let tsc = entries
        .iter()
        .find(|entry| entry.index == MSR_TSC)
        .map(|entry| entry.data);
    let deadline = entries
        .iter_mut()
        .find(|entry| entry.index == MSR_TSC_DEADLINE);
    if let (Some(tsc), Some(deadline)) = (tsc, deadline)
        && deadline.data == 0
    {
        deadline.data = tsc;
    }
}

fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for chunk in entries.chunks(MSRS_AT_ONCE) {
        let msrs = Msrs::from_entries(chunk).map_err(|_| invalid("restore MSRs"))?;
        let count = fd
            .set_msrs(&msrs)
            .map_err(KvmError::during("restore MSRs"))?;
        if let Some(refused) = chunk.get(count) {
            tracing::error!(
                index = format!("{:#x}", refused.index),
                "this host refuses an MSR"
            );
            return Err(invalid("restore MSRs (saved on another kind of CPU?)"));
        }
    }
    Ok(())
}

fn invalid(what: &'static str) -> KvmError {
    KvmError::Operation(what, std::io::ErrorKind::InvalidData.into())
}

/// State of the machine beside its vCPUs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChipState {
    /// The two PICs and the IO-APIC.
    chips: [kvm_irqchip; 3],
    /// kvm-clock.
    clock: kvm_clock_data,
}

impl ChipState {
    /// Reads it while all vCPUs are paused.
    pub fn take(vm: &Vm) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.fd()
                .get_irqchip(&mut chip)
                .map_err(KvmError::during("read an interrupt controller"))?;
            Ok(chip)
        };
        let mut clock = vm
            .fd()
            .get_clock()
            .map_err(KvmError::during("read the clock"))?;
        // The flags say how it was read; set, they would let the clock jump by the time between.
        clock.flags = 0;
        Ok(Self {
            chips: [
                chip(KVM_IRQCHIP_PIC_MASTER)?,
                chip(KVM_IRQCHIP_PIC_SLAVE)?,
                chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            clock,
        })
    }

    /// Writes it to a machine whose vCPUs are there but have not run.
    pub fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        for chip in &self.chips {
            vm.fd()
                .set_irqchip(chip)
                .map_err(KvmError::during("restore an interrupt controller"))?;
        }
        vm.fd()
            .set_clock(&self.clock)
            .map_err(KvmError::during("restore the clock"))
    }
}
