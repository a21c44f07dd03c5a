//! The interrupt of a virtio-mmio device: what changes in its registers without the driver (virtio
//! 1.2 §4.2.2): interrupt status, configuration and its generation, whether the device is broken.
//!
//! The bit for used buffers, once set, may stay set: KVM takes its acknowledgement without us
//! (`machine::devices`), and our guest's kernel gives none ([`register::KEEPS_USED`]). The bit for the configuration is cleared as the driver asks.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::Interrupt;
use super::mmio::status;
use super::registers::{RegisterPage, register};

/// Bit of the interrupt status: a buffer was used.
pub(crate) const USED: u32 = 1;
/// Bit of the interrupt status: the configuration (or the status) has changed.
const CONFIGURATION: u32 = 2;

/// Raises an interrupt.
pub type Line = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Shared by transport and device.
pub struct MmioInterrupt {
    page: RegisterPage,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: Line,
}

impl MmioInterrupt {
    /// `line` raises the device's interrupt, edge-triggered; `page` is the device's.
    pub fn new(line: Line, page: RegisterPage) -> Self {
        Self {
            page,
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.page.get(register::INTERRUPT_STATUS)
    }

    /// What the guest reads of the device.
    pub(super) fn page(&self) -> &RegisterPage {
        &self.page
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.page.remove(register::INTERRUPT_STATUS, bits);
    }

    /// Shows the status register, with DEVICE_NEEDS_RESET if that is so now or in the next moment.
    pub(super) fn show_status(&self, status: u32) {
        self.page.set(register::STATUS, status);
        if self.needs_reset() {
            self.page.add(register::STATUS, status::NEEDS_RESET);
        }
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// As [`Interrupt::device_needs_reset`], where there is nobody to give an error to.
    pub(super) fn mark_broken(&self) {
        if let Err(error) = self.device_needs_reset() {
            tracing::warn!(%error, "cannot tell the driver that a device needs a reset");
        }
    }

    /// The configuration's generation goes on: a driver may be in the middle of reading it.
    pub(super) fn reset(&self) {
        self.page.set(register::INTERRUPT_STATUS, 0);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.page.set(register::INTERRUPT_STATUS, status);
        self.page.set(register::CONFIG_GENERATION, generation);
        self.generation.store(generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The status is set before the interrupt, so that a driver that acknowledges in between gets
    /// one interrupt too many rather than too few.
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.page.add(register::INTERRUPT_STATUS, bit);
        (self.line)()
    }
}

impl Interrupt for MmioInterrupt {
    fn used_buffers(&self, _queue: u16) -> io::Result<()> {
        self.raise(USED)
    }

    fn configuration_changed(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.page.set_config(offset, bytes);
        let before = self.generation.fetch_add(1, Ordering::SeqCst);
        self.page
            .set(register::CONFIG_GENERATION, before.wrapping_add(1));
        self.raise(CONFIGURATION)
    }

    fn device_needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.page.add(register::STATUS, status::NEEDS_RESET);
        self.raise(CONFIGURATION)
    }
}
