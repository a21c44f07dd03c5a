//! The MP configuration table (Intel MultiProcessor Specification 1.4, §4): CPUs, the ISA bus, the
//! IO-APIC and its pins. It spares the guest ACPI.

use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::BootError;
use crate::layout;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

const POINTER_SIZE: u8 = 16;
const HEADER_SIZE: u8 = 44;
const SPECIFICATION: u8 = 4;
/// Of the integrated APIC, as KVM reports it.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
const ISA_BUS: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Writes floating pointer and table for `cpus` CPUs, whose APIC ids are 0, 1, ….
pub(super) fn write(memory: &GuestMemoryMmap, cpus: u8) -> Result<(), BootError> {
    let address = layout::MP_TABLE.unchecked_add(u64::from(POINTER_SIZE));
    let mut bytes = pointer(address.raw_value()).to_vec();
    bytes.extend(table(cpus));
    memory
        .write_slice(&bytes, layout::MP_TABLE)
        .map_err(|source| BootError::Write {
            what: "the MP table",
            source,
        })
}

/// The floating pointer structure (§4.1).
fn pointer(table: u64) -> [u8; POINTER_SIZE as usize] {
    let mut bytes = [0; POINTER_SIZE as usize];
    bytes[..4].copy_from_slice(b"_MP_");
    // Low memory: `layout`.
    bytes[4..8].copy_from_slice(&table.to_le_bytes()[..4]);
    bytes[8] = POINTER_SIZE / 16;
    bytes[9] = SPECIFICATION;
    bytes[10] = checksum(&bytes);
    bytes
}

/// The byte that makes the sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

/// Header and entries (§4.2, §4.3).
fn table(cpus: u8) -> Vec<u8> {
    let io_apic = cpus;
    let mut entries = Vec::with_capacity(usize::from(cpus) * 20 + 256);
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = if cpu == 0 {
            ENABLED | BOOTSTRAP
        } else {
            ENABLED
        };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, cpu, LOCAL_APIC_VERSION, flags]);
        // CPU signature (family 6) and features (FPU, APIC): informative, kernels ask CPUID.
        entry[4..6].copy_from_slice(&0x600u16.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    let mut bus = [ENTRY_BUS, ISA_BUS, 0, 0, 0, 0, 0, 0];
    bus[2..].copy_from_slice(b"ISA   ");
    add(&bus);
    let mut apic = [ENTRY_IO_APIC, io_apic, IO_APIC_VERSION, ENABLED, 0, 0, 0, 0];
    apic[4..].copy_from_slice(&layout::IO_APIC.to_le_bytes());
    add(&apic);
    // Every pin as the ISA interrupt of the same number: edge-triggered, active high (§4.3.4).
    for pin in (0u8..).take(layout::LAST_GSI as usize + 1) {
        add(&[
            ENTRY_INTERRUPT,
            INTERRUPT_INT,
            0,
            0,
            ISA_BUS,
            pin,
            io_apic,
            pin,
        ]);
    }
    add(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_EXTINT,
        0,
        0,
        ISA_BUS,
        0,
        0,
        0,
    ]);
    add(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        ISA_BUS,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);
    let mut bytes = header(entries.len(), count);
    bytes.extend(entries);
    bytes[7] = checksum(&bytes);
    bytes
}

fn header(entries: usize, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; usize::from(HEADER_SIZE)];
    bytes[..4].copy_from_slice(b"PCMP");
    // At most 255 CPUs: 5,388 bytes.
    let length = u16::try_from(entries + usize::from(HEADER_SIZE)).unwrap_or(u16::MAX);
    bytes[4..6].copy_from_slice(&length.to_le_bytes());
    bytes[6] = SPECIFICATION;
    bytes[8..16].copy_from_slice(b"BULKHEAD");
    bytes[16..28].copy_from_slice(b"microVM     ");
    bytes[34..36].copy_from_slice(&count.to_le_bytes());
    bytes[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_are_zero() {
        assert_eq!(sum(&pointer(0x9_fc10)), 0);
        for cpus in [1, 2, 254] {
            assert_eq!(sum(&table(cpus)), 0);
        }
    }

    #[test]
    fn table_is_as_long_as_it_says() {
        let table = table(3);
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );
        // 3 CPUs, bus, IO-APIC, 24 pins, 2 local interrupts.
        assert_eq!(u16::from_le_bytes([table[34], table[35]]), 31);
    }

    #[test]
    fn fits_below_the_kernel() {
        let size = usize::from(POINTER_SIZE) + table(254).len();
        assert!(layout::MP_TABLE.raw_value() + size as u64 <= layout::HIGH_MEMORY);
    }
}
