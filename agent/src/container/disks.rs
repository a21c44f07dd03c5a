//! Filesystems on disks of the guest: finds the disk by its serial number, tells what is on it and
//! keeps it until the container has gone, so that what was written is on the disk then. The image is
//! not trusted; what the kernel makes of it is an error with the disk's name.

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::messages::BlockDevice;
use rustix::fs::{Mode, OFlags, openat, syncfs};

use crate::{
    error::{Attempt, Error, Result},
    network::Bus,
};

/// Where the superblocks of both filesystems begin.
const SUPERBLOCK: u64 = 1024;

/// Where the guest's disks are.
#[derive(Debug)]
pub struct Disks {
    /// /sys/block
    list: PathBuf,
    bus: Bus,
}

/// A filesystem that may be on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filesystem {
    /// Read and written.
    Ext4,
    /// Read only, by its nature.
    Erofs,
}

/// A disk with a filesystem, as the host names it.
#[derive(Clone, Debug)]
pub(super) struct DiskSource {
    /// For errors.
    field: String,
    serial: String,
    filesystem: Option<Filesystem>,
    /// Its place on the platform bus, if it came after the guest had booted.
    device: Option<String>,
}

/// A disk that was found.
#[derive(Debug)]
pub(super) struct Disk {
    /// For errors: serial number and name in the guest.
    pub(super) name: String,
    pub(super) path: String,
    pub(super) filesystem: Filesystem,
    pub(super) read_only: bool,
}

/// Disks that a container uses.
#[derive(Debug, Default)]
pub(super) struct DisksInUse {
    mounts: Vec<OwnedFd>,
    devices: Vec<(Bus, String)>,
}

impl Filesystem {
    /// Its name for the kernel.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Erofs => "erofs",
        }
    }

    /// By what the superblock begins with (ext4: s_magic at 56; erofs: magic at 0).
    fn of_superblock(superblock: &[u8]) -> Option<Self> {
        if superblock.get(..4)? == 0xE0F5_E1E2_u32.to_le_bytes() {
            return Some(Self::Erofs);
        }
        (superblock.get(56..58)? == 0xEF53_u16.to_le_bytes()).then_some(Self::Ext4)
    }
}

impl DiskSource {
    /// Checks what the request says. `field` is that of the spec.
    pub(super) fn new(field: &str, asked: &BlockDevice) -> Result<Self> {
        let serial = &asked.serial;
        if !(1..=20).contains(&serial.len()) || !serial.bytes().all(|b| b.is_ascii_graphic()) {
            let problem = format!("the disk's serial {serial:?} is not 1 to 20 letters or digits");
            return Err(Error::invalid(field, problem));
        }
        let filesystem = match asked.filesystem.as_str() {
            "" => None,
            "ext4" => Some(Filesystem::Ext4),
            "erofs" => Some(Filesystem::Erofs),
            other => {
                let reason = format!("a disk with {other}: use ext4 or erofs");
                return Err(Error::unsupported(field, reason));
            }
        };
        Ok(Self {
            field: field.to_owned(),
            serial: serial.clone(),
            filesystem,
            device: (!asked.device.is_empty())
                .then(|| Bus::check(&asked.device).map(|()| asked.device.clone()))
                .transpose()
                .map_err(|problem| Error::invalid(field, problem))?,
        })
    }
}

impl Disks {
    /// Those that a sysfs shows.
    pub fn new(sys: &Path) -> Self {
        Self {
            list: sys.join("block"),
            bus: Bus::new(sys),
        }
    }

    /// Finds a disk and what is on it.
    pub(super) fn find(&self, wanted: &DiskSource, in_use: &mut DisksInUse) -> Result<Disk> {
        let DiskSource { field, serial, .. } = wanted;
        if let Some(device) = &wanted.device {
            self.bus.bind(device)?;
            in_use.devices.push((self.bus.clone(), device.clone()));
        }
        let entry = self.entry(serial).or_cannot(|| "list the disks")?;
        let entry = entry.ok_or_else(|| {
            let problem = format!("there is no disk {serial}: attach it first");
            Error::invalid(field, problem)
        })?;
        let kernel_name = entry.file_name().unwrap_or_default().to_string_lossy();
        let name = format!("{serial} ({kernel_name})");
        let path = format!("/dev/{kernel_name}");
        let mut superblock = [0; 64];
        let read = File::open(&path).and_then(|disk| disk.read_at(&mut superblock, SUPERBLOCK));
        let length = read.or_cannot(|| format!("read the disk {name} ({field})"))?;
        let found = Filesystem::of_superblock(&superblock[..length]);
        let filesystem = match (found, wanted.filesystem) {
            (Some(found), wanted) if wanted.is_none_or(|wanted| wanted == found) => found,
            (found, _) => {
                let found = found.map_or("neither ext4 nor erofs", Filesystem::name);
                let problem = format!(
                    "the disk {name} holds {found}: make the filesystem that is wanted on it"
                );
                return Err(Error::invalid(field, problem));
            }
        };
        Ok(Disk {
            name,
            path,
            filesystem,
            read_only: fs::read_to_string(entry.join("ro")).is_ok_and(|text| text.trim() == "1"),
        })
    }

    /// The directory of the disk with this serial number.
    fn entry(&self, serial: &str) -> std::io::Result<Option<PathBuf>> {
        for entry in fs::read_dir(&self.list)? {
            let path = entry?.path();
            // Other kinds of disks have no such file.
            if fs::read_to_string(path.join("serial")).is_ok_and(|text| text.trim_end() == serial) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

impl DisksInUse {
    /// Keeps a mount of a disk.
    pub(super) fn keep(&mut self, mount: &OwnedFd) -> Result<()> {
        let mount = mount.try_clone().or_cannot(|| "keep the mount of a disk")?;
        self.mounts.push(mount);
        Ok(())
    }

    /// Writes everything to the disks and lets go of them.
    pub(super) fn release(&mut self) -> Result<()> {
        for mount in self.mounts.drain(..) {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            openat(mount.as_fd(), ".", flags, Mode::empty())
                .and_then(syncfs)
                .or_cannot(|| "write what is left to a disk")?;
        }
        for (bus, device) in self.devices.drain(..) {
            bus.unbind(&device)?;
        }
        Ok(())
    }
}

impl Drop for DisksInUse {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::warn!(error = %error.chain(), "a disk is not released");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_told_apart() {
        let mut superblock = [0; 64];
        assert_eq!(Filesystem::of_superblock(&superblock), None);
        superblock[56..58].copy_from_slice(&[0x53, 0xEF]);
        let found = Filesystem::of_superblock(&superblock);
        assert_eq!(found, Some(Filesystem::Ext4));
        superblock[..4].copy_from_slice(&[0xE2, 0xE1, 0xF5, 0xE0]);
        let found = Filesystem::of_superblock(&superblock);
        assert_eq!(found, Some(Filesystem::Erofs));
        for length in 0..4 {
            assert_eq!(Filesystem::of_superblock(&superblock[..length]), None);
        }
    }

    #[test]
    fn what_names_no_disk_is_refused() {
        let device = |serial: &str, filesystem: &str, device: &str| BlockDevice {
            serial: serial.to_owned(),
            filesystem: filesystem.to_owned(),
            device: device.to_owned(),
            ..Default::default()
        };
        assert!(DiskSource::new("mounts[1]", &device("vol1", "", "virtio-mmio.3")).is_ok());
        for wrong in [
            device("", "", ""),
            device("123456789012345678901", "", ""),
            device("a\n", "", ""),
            device("vol1", "xfs", ""),
            device("vol1", "ext4", "../virtio-mmio.3"),
        ] {
            let error = DiskSource::new("mounts[1]", &wrong).expect_err("refused");
            assert!(error.to_string().starts_with("mounts[1]"), "{error}");
        }
    }
}
