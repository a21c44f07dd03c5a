//! Devices by their place on the platform bus: brings the driver to a device that the VMM
//! has just put into a place, and takes it away again before the device goes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::ErrorKind;

use crate::error::{Attempt, Error, Result};

/// The platform bus as sysfs shows it.
#[derive(Clone, Debug)]
pub struct Bus {
    directory: PathBuf,
}

impl Bus {
    /// That of a sysfs.
    pub fn new(sys: &Path) -> Self {
        Self {
            directory: sys.join("bus/platform"),
        }
    }

    /// Whether a name can be that of a place.
    pub(crate) fn check(device: &str) -> std::result::Result<(), String> {
        let number = device.strip_prefix("virtio-mmio.").unwrap_or_default();
        let valid = (1..=5).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
        valid
            .then_some(())
            .ok_or_else(|| format!("{device:?} is no virtio-mmio.N"))
    }

    fn driver(&self, file: &str) -> PathBuf {
        self.directory.join("drivers/virtio-mmio").join(file)
    }

    /// Has the driver look at the device, which it does before this returns.
    pub(crate) fn bind(&self, device: &str) -> Result<()> {
        match write(&self.driver("bind"), device) {
            // The device was there when the guest booted.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                let text = format!("there is no device in place {device}: attach it first");
                Err(Error::new(ErrorKind::WrongState, text))
            }
            bound => bound.or_cannot(|| format!("bind {device} to its driver")),
        }
    }

    /// Binds a network device, and finds the name of its interface.
    pub(super) fn bind_interface(&self, device: &str) -> Result<String> {
        self.bind(device)?;
        let place = self.directory.join("devices").join(device);
        let found = interface_of(&place).or_cannot(|| format!("look for {device}"))?;
        found.ok_or_else(|| {
            let text = format!("{device} has no network interface that is free");
            Error::new(ErrorKind::WrongState, text)
        })
    }

    /// Takes the driver from the device, and its interface with that, wherever that is.
    pub(crate) fn unbind(&self, device: &str) -> Result<()> {
        match write(&self.driver("unbind"), device) {
            // It is not bound.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            unbound => unbound.or_cannot(|| format!("unbind {device} from its driver")),
        }
    }
}

/// sysfs files take one write.
fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
}

/// `virtioN/net/NAME` below the device. sysfs lists the interfaces of the namespace that it was
/// mounted in only.
fn interface_of(place: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("virtio") {
            continue;
        }
        let interfaces = match fs::read_dir(entry.path().join("net")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            interfaces => interfaces?,
        };
        if let Some(interface) = interfaces.flatten().next() {
            return Ok(Some(interface.file_name().to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}
