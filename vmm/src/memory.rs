//! Guest memory: anonymous mappings below and above the hole for devices.

use std::io;

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::{layout, sys};

/// What a huge page spans on x86-64, in the host's page tables and in those for the guest.
const HUGE_PAGE: u64 = 2 << 20;
/// What Linux touches at the top of memory beside its page descriptors.
const DENSE: u64 = 8 << 20;
/// Huge pages that our guest's kernel fills while it boots, whatever the size of its memory: where its first
/// allocations come from. Measured; docs/decisions/0003-guest-memory.md tells how.
const FILLED: [u64; 4] = [2 << 20, 8 << 20, 10 << 20, 126 << 20];

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
/// Private and anonymous, since no other process needs it, and such a page costs less on its first
/// touch than one of a memfd (docs/decisions/0003-guest-memory.md). A restored machine may just as
/// well have a file mapped privately.
pub fn create(mib: u32) -> Result<GuestMemoryMmap, MemoryError> {
    if mib < layout::MIN_MEMORY_MIB {
        return Err(MemoryError::TooSmall(mib));
    }
    let reserve = |source| MemoryError::Reserve { mib, source };
    let mut regions = Vec::with_capacity(2);
    for (start, length) in layout::memory_ranges(u64::from(mib) << 20) {
        let region = sys::map_memory(start, length, HUGE_PAGE).map_err(reserve)?;
        advise(&region).map_err(reserve)?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

/// Small pages, whatever the host's default, so that a guest that has booted costs what it has touched;
/// huge pages at the end, which Linux fills densely meanwhile: it allocates from the top, first of
/// all 64 bytes for each page of memory, then what belongs to CPUs.
fn advise(region: &GuestRegionMmap) -> io::Result<()> {
    let length = region.len();
    // Also tells guest memory from the process's own: VmFlags "dd" in /proc/PID/smaps.
    sys::advise(region, 0, length, libc::MADV_DONTDUMP)?;
    let dense = (length / 64 + DENSE)
        .next_multiple_of(HUGE_PAGE)
        .min(length);
    choose_pages(region, 0, length - dense, libc::MADV_NOHUGEPAGE);
    choose_pages(region, length - dense, dense, libc::MADV_HUGEPAGE);
    if region.start_addr().0 == 0 {
        for start in FILLED {
            if start + HUGE_PAGE <= length {
                choose_pages(region, start, HUGE_PAGE, libc::MADV_HUGEPAGE);
            }
        }
    }
    Ok(())
}

/// The guest will write to all of this: gives it huge pages where it fills them.
pub fn expect_writes(memory: &GuestMemoryMmap, start: GuestAddress, length: u64) {
    let first = start.0.next_multiple_of(HUGE_PAGE);
    let end = (start.0 + length) & !(HUGE_PAGE - 1);
    if let Some((region, at)) = memory.to_region_addr(GuestAddress(first))
        && first < end
    {
        choose_pages(region, at.0, end - first, libc::MADV_HUGEPAGE);
    }
}

/// From now on the guest gets huge pages where it has touched nothing yet: Linux hands its memory out
/// in pieces larger than these, one after the other. What it has touched here and there stays small, or
/// the host's kernel would fill the gaps in time.
pub fn prefer_huge_pages(memory: &GuestMemoryMmap) {
    for region in memory.iter() {
        let whole = region.len() - region.len() % HUGE_PAGE;
        let mut untouched = 0;
        let mut at = 0;
        while at < whole {
            if sys::is_untouched(region, at, HUGE_PAGE).unwrap_or(false) {
                untouched += HUGE_PAGE;
            } else {
                choose_pages(region, at - untouched, untouched, libc::MADV_HUGEPAGE);
                untouched = 0;
            }
            at += HUGE_PAGE;
        }
        choose_pages(region, at - untouched, untouched, libc::MADV_HUGEPAGE);
    }
}

/// A kernel without huge pages refuses this, and the guest does without.
fn choose_pages(region: &GuestRegionMmap, start: u64, length: u64, advice: libc::c_int) {
    if length > 0
        && let Err(error) = sys::advise(region, start, length, advice)
    {
        tracing::debug!(%error, "huge pages cannot be chosen");
    }
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
    fn what_is_touched_is_told() {
        let memory = create(8).expect("memory");
        let region = memory.iter().next().expect("a region");
        assert_eq!(region.as_ptr() as u64 % HUGE_PAGE, 0);
        memory.write_obj(7u8, GuestAddress(3 << 20)).expect("byte");
        let untouched: Vec<_> = (0..4)
            .map(|block| sys::is_untouched(region, block * HUGE_PAGE, HUGE_PAGE).expect("mincore"))
            .collect();
        assert_eq!(untouched, [true, false, true, true]);
        prefer_huge_pages(&memory);
        assert!(sys::is_untouched(region, 7 << 20, 2 << 20).is_err());
    }

    #[test]
    fn refuses_too_little() {
        assert!(matches!(create(1), Err(MemoryError::TooSmall(1))));
    }
}
