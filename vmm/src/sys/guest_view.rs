//! Guest memory as the file server's library wants to see it: the same mappings under the type with
//! a dirty bitmap that it fixes. The bitmap stays empty, so that marking pages in it does nothing.

use std::io;
use std::sync::Arc;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use crate::virtio::Memory;

type Original = <Memory as GuestAddressSpace>::T;

/// A second view of guest memory. It keeps the first alive, whose mappings it uses.
pub(crate) struct GuestView {
    view: GuestMemoryMmap<BitmapMmapRegion>,
    with_private: GuestMemoryMmap<BitmapMmapRegion>,
    original: Original,
}

/// Where private memory appears beside guest memory, beyond any address that a guest can have.
pub(crate) const PRIVATE: GuestAddress = GuestAddress(1 << 52);

impl GuestView {
    /// A view of the memory as it is now, and one with `private` bytes more that the guest cannot
    /// reach.
    pub(crate) fn of(memory: &Memory, private: usize) -> io::Result<Self> {
        let original = memory.memory();
        let regions: io::Result<Vec<_>> = original.iter().map(same_region).collect();
        let view = GuestMemoryMmap::from_regions(regions?).map_err(io::Error::other)?;
        let private = GuestRegionMmap::from_range(PRIVATE, private, None);
        let private = Arc::new(private.map_err(io::Error::other)?);
        let with_private = view.insert_region(private).map_err(io::Error::other)?;
        Ok(Self {
            view,
            with_private,
            original,
        })
    }

    /// Guest memory and private memory; for addresses that do not come from the guest unchecked.
    pub(crate) fn with_private(&self) -> &GuestMemoryMmap<BitmapMmapRegion> {
        &self.with_private
    }

    /// For the library.
    pub(crate) fn view(&self) -> &GuestMemoryMmap<BitmapMmapRegion> {
        &self.view
    }

    /// The memory that this is a view of.
    pub(crate) fn original(&self) -> &GuestMemoryMmap {
        &self.original
    }
}

fn same_region(region: &GuestRegionMmap) -> io::Result<GuestRegionMmap<BitmapMmapRegion>> {
    let address = region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(io::Error::other)?;
    let length = usize::try_from(region.len()).map_err(io::Error::other)?;
    let builder = MmapRegionBuilder::new_with_bitmap(length, BitmapMmapRegion::default())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: address and length are those of the region's mapping, which lives as long as the
    // region, and `GuestView` holds that. A region made from a pointer does not unmap it.
    let mapping = unsafe { builder.with_raw_mmap_pointer(address) }
        .build()
        .map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, region.start_addr())
        .ok_or_else(|| io::Error::other(format!("{:#x}", region.start_addr().raw_value())))
}

/// Gives the calling thread a working directory and a file mode mask of its own, which the file
/// server changes while it works.
pub(crate) fn leave_shared_fs_attributes() -> io::Result<()> {
    // SAFETY: with CLONE_FS alone, unshare(2) touches no memory and no descriptor; what it unshares
    // is per thread for the kernel, and nothing here relies on it being shared.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
