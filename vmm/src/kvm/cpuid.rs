//! The CPU that the guest sees: what KVM supports, less what a microVM has no use for, with the
//! topology of one package whose cores have one thread each.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::KvmError;

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the entry is one of several sub-leaves.
const SUBLEAF: u32 = 1;

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_POWER: u32 = 6;
const LEAF_PERFORMANCE: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_PERFORMANCE: u32 = 0x8000_0022;
const LEAF_AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// What every vCPU's CPUID is made from.
#[derive(Debug)]
pub struct CpuModel {
    supported: Vec<kvm_cpuid_entry2>,
    cpus: u8,
}

impl CpuModel {
    /// Asks KVM what it supports and takes away what guests shall not see.
    pub fn new(kvm: &Kvm, cpus: u8) -> Result<Self, KvmError> {
        let entries = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::during("ask for the supported CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut supported = entries.as_slice().to_vec();
        supported.retain(|entry| {
            // Topology is built afresh; the others say how to count events on this very host.
            !matches!(
                entry.function,
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_TOPOLOGY_V2 | LEAF_AMD_PERFORMANCE
            )
        });
        for entry in &mut supported {
            restrict(entry, cpus, deadline);
        }
        Ok(Self { supported, cpus })
    }

    /// CPUID of the vCPU with this index, which is its APIC id.
    pub fn for_cpu(&self, index: u8) -> Result<CpuId, KvmError> {
        let mut entries = self.supported.clone();
        let id = u32::from(index);
        for entry in &mut entries {
            match entry.function {
                LEAF_FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                LEAF_AMD_TOPOLOGY => {
                    // APIC id; core id with one thread (AMD APM vol. 3, E.4.17).
                    entry.eax = id;
                    entry.ebx = id & 0xff;
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        entries.extend(self.topology(id));
        CpuId::from_entries(&entries).map_err(|_| {
            KvmError::Operation("compose CPUID", std::io::ErrorKind::OutOfMemory.into())
        })
    }

    /// Leaf 0xb (Intel SDM vol. 2, CPUID): a level of threads, a level of cores, the end.
    fn topology(&self, id: u32) -> [kvm_cpuid_entry2; 3] {
        let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
            function: LEAF_TOPOLOGY,
            index,
            flags: SUBLEAF,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: id,
            ..Default::default()
        };
        let cpus = u32::from(self.cpus);
        [
            level(0, 0, 1, 1),
            level(1, id_bits(self.cpus), cpus, 2),
            level(2, 0, 0, 0),
        ]
    }
}

/// Bits that an APIC id of `cpus` CPUs needs.
fn id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// Changes one entry to what all vCPUs have in common.
fn restrict(entry: &mut kvm_cpuid_entry2, cpus: u8, deadline: bool) {
    let count = u32::from(cpus);
    match entry.function {
        LEAF_FEATURES => {
            // CLFLUSH line of 8 × 8 bytes, number of logical CPUs.
            entry.ebx = count << 16 | 8 << 8;
            // A hypervisor is here; no virtualisation of the guest's own (VMX).
            entry.ecx |= 1 << 31;
            set_bit(&mut entry.ecx, 5, false);
            set_bit(&mut entry.ecx, 24, deadline);
            set_bit(&mut entry.edx, 28, cpus > 1);
        }
        LEAF_CACHES | LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
            // Levels 1 and 2 belong to a core, level 3 to the package.
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                (1 << id_bits(cpus)) - 1
            } else {
                0
            };
            let cores = if entry.function == LEAF_CACHES {
                (1 << id_bits(cpus)) - 1
            } else {
                0
            };
            // Six bits only, saturating.
            entry.eax = entry.eax & 0x3fff | sharing << 14 | std::cmp::min(cores, 63) << 26;
        }
        // Only "the APIC timer always runs".
        LEAF_POWER => {
            entry.eax &= 1 << 2;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // No performance counters: they cost the guest's boot time and bind snapshots to a host.
        LEAF_PERFORMANCE => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        LEAF_AMD_FEATURES => {
            // No virtualisation of the guest's own (SVM).
            set_bit(&mut entry.ecx, 2, false);
            // No PerfCtrExtCore, PerfCtrExtNB; CmpLegacy as leaf 1's HTT; TopologyExtensions stay.
            set_bit(&mut entry.ecx, 23, false);
            set_bit(&mut entry.ecx, 24, false);
            let legacy = cpus > 1 && entry.ecx & 1 << 22 != 0;
            set_bit(&mut entry.ecx, 1, legacy);
        }
        // ApicIdSize, number of threads - 1.
        LEAF_AMD_SIZES => entry.ecx = id_bits(cpus) << 12 | (count - 1),
        _ => {}
    }
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        }
    }

    #[test]
    fn ids_need_few_bits() {
        assert_eq!([1, 2, 3, 4, 5, 254].map(id_bits), [0, 1, 2, 2, 3, 8]);
    }

    #[test]
    fn each_cpu_has_its_id() {
        let mut supported = vec![entry(LEAF_FEATURES, 0), entry(LEAF_AMD_TOPOLOGY, 0)];
        supported
            .iter_mut()
            .for_each(|entry| restrict(entry, 3, true));
        let model = CpuModel { supported, cpus: 3 };
        let cpuid = model.for_cpu(2).expect("cpuid");
        let find = |leaf, index| {
            cpuid
                .as_slice()
                .iter()
                .find(|entry| entry.function == leaf && entry.index == index)
                .copied()
                .expect("entry")
        };
        assert_eq!(find(LEAF_FEATURES, 0).ebx, 2 << 24 | 3 << 16 | 8 << 8);
        assert_eq!(find(LEAF_FEATURES, 0).ecx, 1 << 31 | 1 << 24);
        assert_eq!(find(LEAF_FEATURES, 0).edx, 1 << 28);
        assert_eq!(find(LEAF_AMD_TOPOLOGY, 0).eax, 2);
        let cores = find(LEAF_TOPOLOGY, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
    }

    #[test]
    fn caches_are_shared_from_the_third_level() {
        let mut second = entry(LEAF_CACHES, 0xffff_c000 | 2 << 5 | 3);
        restrict(&mut second, 4, true);
        assert_eq!((second.eax >> 14 & 0xfff, second.eax >> 26), (0, 3));
        let mut third = entry(LEAF_AMD_CACHES, 3 << 5 | 3);
        restrict(&mut third, 4, true);
        assert_eq!(third.eax >> 14 & 0xfff, 3);
    }
}
