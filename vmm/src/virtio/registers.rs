//! The registers of a virtio-mmio device as memory that the guest reads without leaving its CPU: a
//! page for each device, which KVM lets the guest read only. Writes still come to the transport,
//! which shows here what they change; the interrupt shows what changes by itself.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::mmap::MmapRegion;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, VolatileMemory,
    VolatileSlice,
};

use crate::layout;

/// Registers (virtio 1.2 §4.2.2).
#[allow(missing_docs)]
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    /// Notifies the device, by the queue's index; KVM serves it.
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHARED_MEMORY_SELECT: u64 = 0xac;
    pub const SHARED_MEMORY_LENGTH: u64 = 0xb0;
    pub const SHARED_MEMORY_BASE_HIGH: u64 = 0xbc;
    /// Not virtio's, ours for our guest's kernel (guest-kernel/patches/0007): a port where the driver may
    /// write what it would write to [`QUEUE_NOTIFY`], if not zero. KVM has no instruction to decode then.
    pub const NOTIFY_PORT: u64 = 0xf0;
    /// Ours as well (guest-kernel/patches/0009): not zero if [`INTERRUPT_STATUS`] never loses the bit for used
    /// buffers by itself, so that the driver need not acknowledge it.
    pub const KEEPS_USED: u64 = 0xf4;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// The vendor means nothing to drivers: "BLKH".
const VENDOR: u32 = 0x484b_4c42;
/// Bytes of configuration space that are shown; no device has more.
pub const CONFIG_SIZE: usize = 256;

/// The pages of all places for devices.
#[derive(Clone, Debug)]
pub struct RegisterPages(Arc<GuestRegionMmap>);

impl RegisterPages {
    /// Placeholders at all places: device id 0, without a function (§4.2.3.1.1).
    pub fn new() -> io::Result<Self> {
        let size = layout::VIRTIO_MMIO_SIZE * layout::MAX_DEVICES as u64;
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let mapping = MmapRegion::new(size).map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(layout::VIRTIO_MMIO))
            .ok_or(io::ErrorKind::InvalidInput)?;
        let pages = Self(Arc::new(region));
        for index in 0..layout::MAX_DEVICES {
            pages.page(index).clear();
        }
        Ok(pages)
    }

    /// As guest memory.
    pub fn region(&self) -> &GuestRegionMmap {
        &self.0
    }

    /// The page of a place. An index beyond them is that of the last.
    pub fn page(&self, index: usize) -> RegisterPage {
        let index = index.min(layout::MAX_DEVICES - 1);
        RegisterPage {
            pages: self.clone(),
            start: layout::VIRTIO_MMIO_SIZE * index as u64,
        }
    }
}

/// What the guest reads of one device.
#[derive(Clone, Debug)]
pub struct RegisterPage {
    pages: RegisterPages,
    start: u64,
}

impl RegisterPage {
    /// Shows a placeholder.
    pub fn clear(&self) {
        self.set(register::DEVICE_ID, 0);
        for offset in (0..register::CONFIG).step_by(4) {
            let value = match offset {
                register::MAGIC => MAGIC,
                register::VERSION => VERSION,
                register::VENDOR_ID => VENDOR,
                _ => 0,
            };
            self.set(offset, value);
        }
        self.set_config(0, &[0; CONFIG_SIZE]);
    }

    /// Shows a register's value.
    pub fn set(&self, register: u64, value: u32) {
        self.with(register, |place| place.store(value, Ordering::SeqCst));
    }

    /// A register's value.
    pub fn get(&self, register: u64) -> u32 {
        self.with(register, |place| place.load(Ordering::SeqCst))
            .unwrap_or(0)
    }

    /// Sets bits of a register.
    pub fn add(&self, register: u64, bits: u32) {
        self.with(register, |place| place.fetch_or(bits, Ordering::SeqCst));
    }

    /// Clears bits of a register.
    pub fn remove(&self, register: u64, bits: u32) {
        self.with(register, |place| place.fetch_and(!bits, Ordering::SeqCst));
    }

    /// Shows part of the configuration space.
    pub fn set_config(&self, offset: u64, bytes: &[u8]) {
        if let Some(place) = self.bytes(register::CONFIG.saturating_add(offset), bytes.len()) {
            place.copy_from(bytes);
        }
    }

    /// What the guest reads.
    #[cfg(test)]
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(place) = self.bytes(offset, data.len()) {
            place.copy_to(data);
        }
    }

    /// Offsets within the page only.
    fn bytes(&self, offset: u64, count: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(count as u64)?;
        if end > layout::VIRTIO_MMIO_SIZE {
            return None;
        }
        let region: &GuestRegionMmap = &self.pages.0;
        region
            .get_slice(MemoryRegionAddress(self.start + offset), count)
            .ok()
    }

    fn with<T>(&self, register: u64, act: impl FnOnce(&AtomicU32) -> T) -> Option<T> {
        let place = self.bytes(register, size_of::<u32>())?;
        place.get_atomic_ref::<AtomicU32>(0).ok().map(act)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_apart_and_have_an_end() {
        let pages = RegisterPages::new().expect("pages");
        let (first, second) = (pages.page(0), pages.page(1));
        first.set(register::STATUS, 7);
        first.add(register::STATUS, 8);
        first.remove(register::STATUS, 1);
        assert_eq!(first.get(register::STATUS), 14);
        assert_eq!(second.get(register::STATUS), 0);
        first.set_config(layout::VIRTIO_MMIO_SIZE - 0x100 - 1, &[1, 2]);
        first.set_config(u64::MAX, &[3]);
        first.set(layout::VIRTIO_MMIO_SIZE, 9);
        assert_eq!(second.get(register::MAGIC), MAGIC);
        let mut data = [9; 4];
        first.read(layout::VIRTIO_MMIO_SIZE - 2, &mut data);
        assert_eq!(data, [0; 4]);
        first.clear();
        assert_eq!(first.get(register::STATUS), 0);
    }
}
