//! The interrupt of a virtio-mmio device: status register (virtio 1.2 §4.2.2), the configuration's
//! generation, and whether the device is broken.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::Interrupt;

/// Bit of the interrupt status: a buffer was used.
const USED: u32 = 1;
/// Bit of the interrupt status: the configuration (or the status) has changed.
const CONFIGURATION: u32 = 2;

/// Raises an interrupt.
pub type Line = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Shared by transport and device.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: Line,
}

impl MmioInterrupt {
    /// `line` raises the device's interrupt, edge-triggered.
    pub fn new(line: Line) -> Self {
        Self {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
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
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The status is set before the interrupt, so that a driver that acknowledges in between gets
    /// one interrupt too many rather than too few.
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        (self.line)()
    }
}

impl Interrupt for MmioInterrupt {
    fn used_buffers(&self, _queue: u16) -> io::Result<()> {
        self.raise(USED)
    }

    fn configuration_changed(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIGURATION)
    }

    fn device_needs_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIGURATION)
    }
}
