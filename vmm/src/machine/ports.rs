//! Where the vCPUs' accesses to devices go: virtio-mmio by address, the few legacy ports by number.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use tracing::debug;

use super::serial::SerialPort;
use crate::kvm::exits::{Bus, Ending};
use crate::layout;
use crate::threads::locked;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::registers::register;

/// First of the eight ports of COM1.
const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = SERIAL + 7;
/// Command and status port of the keyboard controller.
const KEYBOARD: u16 = 0x64;
/// Its command that pulses the CPU's reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// So many accesses to nothing are logged.
const LOGGED: u32 = 64;

/// Where a virtio-mmio device is or may be.
pub(super) enum Place {
    /// The guest finds a placeholder.
    Free,
    Taken(Box<MmioTransport>),
}

impl Place {
    pub(super) fn transport(&mut self) -> Option<&mut MmioTransport> {
        match self {
            Self::Free => None,
            Self::Taken(transport) => Some(transport),
        }
    }
}

/// The devices of a machine.
#[derive(Default)]
pub(super) struct Ports {
    /// Address and interrupt of each follow from its index.
    pub(super) places: Vec<Mutex<Place>>,
    pub(super) serial: Option<Mutex<SerialPort>>,
    missed: AtomicU32,
}

impl Ports {
    fn place(&self, address: u64) -> Option<(&Mutex<Place>, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((self.places.get(index)?, offset % layout::VIRTIO_MMIO_SIZE))
    }

    /// Of which device a port takes the notifications.
    fn notified(&self, port: u16) -> Option<&Mutex<Place>> {
        let index = port.checked_sub(layout::NOTIFY_PORTS)?;
        self.places.get(usize::from(index))
    }

    fn serial(&self, port: u16) -> Option<(&Mutex<SerialPort>, u8)> {
        let offset = u8::try_from(port.checked_sub(SERIAL)?).ok()?;
        let serial = self.serial.as_ref()?;
        (port <= SERIAL_LAST).then_some((serial, offset))
    }

    fn missed(&self, what: &str, address: u64) {
        if self.missed.fetch_add(1, Ordering::Relaxed) < LOGGED {
            debug!(
                address = format!("{address:#x}"),
                "the guest {what} where no device is"
            );
        }
    }
}

impl Bus for Ports {
    fn read_memory(&self, address: u64, data: &mut [u8]) {
        // What a bus without a device reads as. The devices' registers the guest reads by itself.
        data.fill(0xff);
        self.missed("reads memory", address);
    }

    fn write_memory(&self, address: u64, data: &[u8]) {
        match self.place(address) {
            Some((place, offset)) => {
                if let Some(device) = locked(place).transport() {
                    device.write(offset, data);
                }
            }
            None => self.missed("writes memory", address),
        }
    }

    fn read_port(&self, port: u16, data: &mut [u8]) {
        if let Some((serial, offset)) = self.serial(port) {
            let mut serial = locked(serial);
            data.fill_with(|| serial.read(offset));
            return;
        }
        // A keyboard controller that is never busy, so that a reset through it needs no patience.
        data.fill(if port == KEYBOARD { 0 } else { 0xff });
        if port != KEYBOARD {
            self.missed("reads a port", port.into());
        }
    }

    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending> {
        if let Some((serial, offset)) = self.serial(port) {
            let mut serial = locked(serial);
            data.iter().for_each(|byte| serial.write(offset, *byte));
        } else if let Some(place) = self.notified(port) {
            if let Some(device) = locked(place).transport() {
                device.write(register::QUEUE_NOTIFY, data);
            }
        } else if port == KEYBOARD {
            return data.contains(&KEYBOARD_RESET).then_some(Ending::Reset);
        } else {
            self.missed("writes a port", port.into());
        }
        None
    }
}
