//! `boot_params`: memory map, command line, seed for the kernel's random numbers.

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use vm_memory::{Address, Bytes, GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

use super::BootError;
use crate::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined boot loader".
const LOADER_TYPE: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.15.
const PROTOCOL: u16 = 0x020f;
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: u32 = 32;

/// Writes `boot_params` and what it refers to, but for the command line.
pub(super) fn write(memory: &GuestMemoryMmap, command_line: usize) -> Result<(), BootError> {
    write_seed(memory)?;
    let mut params = boot_params::default();
    params.hdr.type_of_loader = LOADER_TYPE;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL;
    // Below 4 GiB and 2048 by `layout` and the check of the command line.
    params.hdr.cmd_line_ptr = u32::try_from(layout::COMMAND_LINE.raw_value()).unwrap_or(u32::MAX);
    params.hdr.cmdline_size = u32::try_from(command_line).unwrap_or(u32::MAX);
    params.hdr.setup_data = layout::SETUP_DATA.raw_value();
    let mut count = 0;
    for entry in memory_map(memory) {
        params.e820_table[usize::from(count)] = entry;
        count += 1;
    }
    params.e820_entries = count;
    let params = BootParams::new(&params, layout::ZERO_PAGE);
    LinuxBootConfigurator::write_bootparams(&params, memory).map_err(|_| BootError::Write {
        what: "boot_params",
        source: vm_memory::GuestMemoryError::InvalidGuestAddress(layout::ZERO_PAGE),
    })
}

/// Base memory up to the MP table, then everything from 1 MiB.
fn memory_map(memory: &GuestMemoryMmap) -> impl Iterator<Item = boot_e820_entry> {
    let mp_table = layout::MP_TABLE.raw_value();
    let entry = |addr, end: u64, type_| boot_e820_entry {
        addr,
        size: end - addr,
        type_,
    };
    let high = memory.iter().map(move |region| {
        let start = region.start_addr().raw_value().max(layout::HIGH_MEMORY);
        entry(start, region.last_addr().raw_value() + 1, E820_RAM)
    });
    [
        entry(0, mp_table, E820_RAM),
        entry(mp_table, layout::HIGH_MEMORY, E820_RESERVED),
    ]
    .into_iter()
    .chain(high)
}

/// The guest has good random numbers from its first moment, without waiting for its devices.
fn write_seed(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let mut entry = [0u8; 16 + SEED_BYTES as usize];
    // struct setup_data: next (8 bytes, none), type, length, data.
    entry[8..12].copy_from_slice(&SETUP_RNG_SEED.to_le_bytes());
    entry[12..16].copy_from_slice(&SEED_BYTES.to_le_bytes());
    fill_random(&mut entry[16..]).map_err(BootError::Seed)?;
    memory
        .write_slice(&entry, layout::SETUP_DATA)
        .map_err(|source| BootError::Write {
            what: "the random seed",
            source,
        })
}

fn fill_random(mut buffer: &mut [u8]) -> std::io::Result<()> {
    while !buffer.is_empty() {
        let count = rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty())?;
        buffer = &mut buffer[count..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_covers_all_but_the_gap() {
        let memory = crate::memory::create(4096).expect("memory");
        let map: Vec<_> = memory_map(&memory)
            .map(|e| (e.addr, e.size, e.type_))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0x6_0400, E820_RESERVED),
                (0x10_0000, (3 << 30) - 0x10_0000, E820_RAM),
                (4 << 30, 1 << 30, E820_RAM),
            ]
        );
    }

    #[test]
    fn seed_is_random_data() {
        let memory = crate::memory::create(8).expect("memory");
        write(&memory, 5).expect("write");
        let seed: [u8; SEED_BYTES as usize] = memory
            .read_obj(layout::SETUP_DATA.unchecked_add(16))
            .expect("read");
        assert_ne!(seed, [0; SEED_BYTES as usize]);
    }
}
