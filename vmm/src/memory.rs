//! Guest memory: anonymous mappings below and above the hole for devices.

use std::io;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::{layout, sys};

const HUGE_PAGE: u64 = 2 << 20;
/// What Linux touches at the top of memory beside its page descriptors.
const DENSE: u64 = 8 << 20;

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
/// Private and anonymous: a page costs a quarter less on first touch than one of a memfd, and no
/// other process needs it. A restored machine may just as well have a file mapped privately.
pub fn create(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    if mib < layout::MIN_MEMORY_MIB {
        return Err(MemoryError::TooSmall(mib));
    }
    let reserve = |source| MemoryError::Reserve { mib, source };
    let mut regions = Vec::with_capacity(2);
    for (start, length) in layout::memory_ranges(u64::from(mib) << 20) {
        let region = map(start, length).map_err(reserve)?;
        advise(&region).map_err(reserve)?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

fn map(start: GuestAddress, length: u64) -> io::Result<GuestRegionMmap> {
    let length = usize::try_from(length).map_err(io::Error::other)?;
    // NORESERVE: the host gives pages as the guest touches them; cgroups hold the limit.
    let mapping = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(io_error)?;
    GuestRegionMmap::new(mapping, start).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// The cause of a failed mapping alone; the library would say "Mapping failed" before it.
fn io_error(error: vm_memory::mmap::MmapRegionError) -> io::Error {
    match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => error,
        other => io::Error::other(other),
    }
}

/// Small pages, whatever the host's default, so that an idle guest costs what it touches; huge
/// pages at the end, which Linux fills densely when it boots: it allocates from the top, first of
/// all 64 bytes for each page of memory, then what belongs to CPUs.
fn advise(region: &GuestRegionMmap) -> io::Result<()> {
    let length = region.len();
    // Also tells guest memory from the process's own: VmFlags "dd" in /proc/PID/smaps.
    sys::advise(region, 0, length, libc::MADV_DONTDUMP)?;
    let dense = (length / 64 + DENSE)
        .next_multiple_of(HUGE_PAGE)
        .min(length);
    // A kernel without huge pages refuses these.
    for (start, length, advice) in [
        (0, length - dense, libc::MADV_NOHUGEPAGE),
        (length - dense, dense, libc::MADV_HUGEPAGE),
    ] {
        if let Err(error) = sys::advise(region, start, length, advice) {
            tracing::debug!(%error, "huge pages cannot be chosen");
        }
    }
    Ok(())
}

/// The first address after the memory below the device hole.
pub fn low_end(memory: &GuestMemoryMmap) -> u64 {
    memory
        .find_region(GuestAddress(0))
        .map_or(0, GuestMemoryRegion::len)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

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
