//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT, IDT            0x0000_7000  boot_params (the "zero page")
//! 0x0000_8000  setup_data: seed    0x0000_9000  page tables (3 pages)
//! 0x0002_0000  command line        0x0009_fc00  MP table
//! 0x0010_0000  memory for the kernel …
//! 0xc000_0000  the hole for devices: from 0xd000_0000 one page for each virtio-mmio device,
//!              IO-APIC 0xfec0_0000, KVM's own pages 0xfffb_c000, local APIC 0xfee0_0000
//! 0x1_0000_0000 memory beyond 3 GiB
//! ```

use vm_memory::GuestAddress;

/// GDT for the first instructions.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Empty IDT.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// `boot_params`.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First entry of the `setup_data` list.
pub const SETUP_DATA: GuestAddress = GuestAddress(0x8000);
/// Top-level page table; the next two pages hold the lower levels.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Kernel command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line with its zero byte (x86's COMMAND_LINE_SIZE).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// MP floating pointer and table, in the last KiB of base memory, where kernels search it (Intel
/// MultiProcessor Specification 1.4, §4).
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// Start of the memory that the kernel may lie in.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Memory stops here and goes on at [`ABOVE_HOLE`].
pub const HOLE: u64 = 0xc000_0000;
/// End of the hole.
pub const ABOVE_HOLE: u64 = 0x1_0000_0000;

/// First virtio-mmio device.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Address space of one virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt of the serial port, as on every PC.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the first virtio-mmio device; one each, up to [`LAST_GSI`].
pub const FIRST_GSI: u32 = 5;
/// Last pin of the IO-APIC.
pub const LAST_GSI: u32 = 23;

/// Port of the first virtio-mmio device's notifications; one each.
pub const NOTIFY_PORTS: u16 = 0xb00;

/// IO-APIC's registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs' registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page that KVM needs on Intel CPUs to run real mode (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel CPUs (KVM_SET_TSS_ADDR).
pub const KVM_TSS: usize = 0xfffb_d000;

/// virtio-mmio devices that fit, by their interrupts.
pub const MAX_DEVICES: usize = (LAST_GSI - FIRST_GSI) as usize + 1;

/// Address and interrupt of a virtio-mmio device by its place.
pub fn virtio_mmio(index: usize) -> Option<(u64, u32)> {
    let place = u32::try_from(index).ok().filter(|_| index < MAX_DEVICES)?;
    let address = VIRTIO_MMIO + u64::from(place) * VIRTIO_MMIO_SIZE;
    Some((address, FIRST_GSI + place))
}

/// The port for notifications of the virtio-mmio device at a place.
pub fn notify_port(index: usize) -> Option<u16> {
    let place = u16::try_from(index).ok().filter(|_| index < MAX_DEVICES)?;
    Some(NOTIFY_PORTS + place)
}

/// Less than this no kernel of ours fits into.
pub const MIN_MEMORY_MIB: u32 = 4;

/// The ranges of guest memory of `size` bytes: start and length.
pub fn memory_ranges(size: u64) -> impl Iterator<Item = (GuestAddress, u64)> {
    let low = size.min(HOLE);
    [(0, low), (ABOVE_HOLE, size - low)]
        .into_iter()
        .filter(|(_, length)| *length > 0)
        .map(|(start, length)| (GuestAddress(start), length))
}
