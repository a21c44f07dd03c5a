//! Guest memory: one memfd, mapped shared, below and above the hole for devices.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestRegionMmap};

use crate::{layout, sys};

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size makes no sense.
    #[error("{0} MiB of guest memory: at least {min} MiB are needed", min = layout::MIN_MEMORY_MIB)]
    TooSmall(u32),
    /// The host refused.
    #[error("reserve {mib} MiB of guest memory (too much for this host? give the sandbox less)")]
    Reserve {
        /// Size asked for.
        mib: u32,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The parts do not fit together.
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// Makes guest memory of `mib` MiB. Nothing of it is touched yet.
///
/// A memfd mapped shared, so that a snapshot can be taken of the file and other processes (vhost-user
/// devices) can be given it. Private anonymous memory would be touched a little cheaper.
pub fn create(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    if mib < layout::MIN_MEMORY_MIB {
        return Err(MemoryError::TooSmall(mib));
    }
    let reserve = |source| MemoryError::Reserve { mib, source };
    let size = u64::from(mib) << 20;
    let file = memory_file(size).map_err(reserve)?;
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, length) in layout::memory_ranges(size) {
        let file = file.try_clone().map_err(reserve)?;
        let region = map(file, offset, start, length).map_err(reserve)?;
        sys::exclude_from_dumps(&region, 0, length).map_err(reserve)?;
        regions.push(region);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

fn memory_file(size: u64) -> io::Result<File> {
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, size)?;
    Ok(file.into())
}

fn map(file: File, offset: u64, start: GuestAddress, length: u64) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    // NORESERVE: the host gives pages as the guest touches them; cgroups hold the limit.
    let mapping = MmapRegionBuilder::new(length)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(cause)?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// The cause of a failed mapping alone; the library would say "mmap failed" before it.
fn cause(error: MmapRegionError) -> io::Error {
    match error {
        MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

/// The first address after the memory below the device hole.
pub fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, vm_memory::GuestMemoryRegion::len)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;

    #[test]
    fn small_memory_is_one_region() {
        let memory = create(64).expect("memory");
        assert_eq!(memory.num_regions(), 1);
        assert_eq!(low_end(&memory), 64 << 20);
    }

    #[test]
    fn large_memory_goes_round_the_hole() {
        let memory = create(4096).expect("memory");
        let regions: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        memory
            .write_obj(7u8, GuestAddress((5 << 30) - 1))
            .expect("last byte");
    }

    #[test]
    fn refuses_too_little() {
        assert!(matches!(create(1), Err(MemoryError::TooSmall(1))));
    }
}
