//! The serial port that carries the guest kernel's log into a file.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use tracing::warn;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::rate_limit::RateLimit;

/// The log's file, opened before the jail.
#[derive(Debug)]
pub struct GuestLog(File);

impl GuestLog {
    /// Opens for appending, and makes it if it is missing, for its owner only.
    pub fn open(path: &Path) -> io::Result<Self> {
        // NOCTTY: the log may be a terminal, which must not become ours.
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Self(fd.into()))
    }

    /// Takes any open file.
    pub fn new(file: File) -> Self {
        Self(file)
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A 16550 whose output is a file; nothing is ever received.
pub(super) struct SerialPort {
    serial: Serial<Irq, NoEvents, File>,
    refused: RateLimit,
}

impl SerialPort {
    pub(super) fn new(interrupt: EventFd, log: GuestLog) -> Self {
        Self {
            serial: Serial::new(Irq(interrupt), log.0),
            refused: RateLimit::default(),
        }
    }

    pub(super) fn read(&mut self, offset: u8) -> u8 {
        self.serial.read(offset)
    }

    pub(super) fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.serial.write(offset, value)
            && let Some(kept_back) = self.refused.allows()
        {
            warn!(?error, kept_back, "cannot write the guest's log");
        }
    }
}
