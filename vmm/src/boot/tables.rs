//! GDT, IDT and page tables for the kernel's first instructions, and the registers that go with
//! them (boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address, Bytes, GuestMemoryMmap};

use super::BootError;
use crate::layout;

/// Selectors that the protocol fixes: __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// Not asked for by the protocol, but a CPU wants a valid task register.
const TASK_SELECTOR: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 0b11;
const HUGE: u64 = 1 << 7;

/// A flat segment; `kind` is the type field, `system` is true for a task segment.
fn segment(selector: u16, kind: u8, system: bool, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long && !system),
        s: u8::from(!system),
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The descriptor of a segment with base 0 and limit 4 GiB (Intel SDM vol. 3, §3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | 0xf << 8
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    flags << 40 | 0xffff
}

fn code() -> kvm_segment {
    segment(CODE_SELECTOR, 0xb, false, true)
}

fn data() -> kvm_segment {
    segment(DATA_SELECTOR, 0x3, false, false)
}

fn task() -> kvm_segment {
    segment(TASK_SELECTOR, 0xb, true, false)
}

fn gdt() -> [u64; 5] {
    [
        0,
        0,
        descriptor(&code()),
        descriptor(&data()),
        descriptor(&task()),
    ]
}

/// Writes the GDT, an empty IDT and page tables that map the first GiB to itself.
pub(crate) fn write(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let failed = |source| BootError::Write {
        what: "page tables",
        source,
    };
    memory.write_obj(gdt(), layout::GDT).map_err(failed)?;
    memory.write_obj(0u64, layout::IDT).map_err(failed)?;
    let upper = layout::PAGE_TABLES.unchecked_add(0x1000);
    let lower = layout::PAGE_TABLES.unchecked_add(0x2000);
    memory
        .write_obj(upper.raw_value() | PRESENT_WRITABLE, layout::PAGE_TABLES)
        .map_err(failed)?;
    memory
        .write_obj(lower.raw_value() | PRESENT_WRITABLE, upper)
        .map_err(failed)?;
    let entries: Vec<u8> = (0u64..512)
        .flat_map(|page| (page << 21 | PRESENT_WRITABLE | HUGE).to_le_bytes())
        .collect();
    memory.write_slice(&entries, lower).map_err(failed)
}

/// General registers at the kernel's entry.
pub fn entry_registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rflags: 2,
        rip: entry,
        rsi: layout::ZERO_PAGE.raw_value(),
        // Unused by the kernel before it has its own stack.
        rsp: layout::ZERO_PAGE.raw_value(),
        ..Default::default()
    }
}

/// Puts 64-bit mode with the tables above into a vCPU's special registers.
pub fn enter_long_mode(registers: &mut kvm_sregs) {
    registers.gdt = kvm_dtable {
        base: layout::GDT.raw_value(),
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    registers.idt = kvm_dtable {
        base: layout::IDT.raw_value(),
        limit: 7,
        ..Default::default()
    };
    registers.cs = code();
    for segment in [
        &mut registers.ds,
        &mut registers.es,
        &mut registers.fs,
        &mut registers.gs,
        &mut registers.ss,
    ] {
        *segment = data();
    }
    registers.tr = task();
    registers.cr0 = CR0_PE | CR0_ET | CR0_PG;
    registers.cr3 = layout::PAGE_TABLES.raw_value();
    registers.cr4 = CR4_PAE;
    registers.efer = EFER_LME | EFER_LMA;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_known_ones() {
        assert_eq!(gdt()[2], 0x00af_9b00_0000_ffff);
        assert_eq!(gdt()[3], 0x00cf_9300_0000_ffff);
        assert_eq!(gdt()[4], 0x008f_8b00_0000_ffff);
    }
}
