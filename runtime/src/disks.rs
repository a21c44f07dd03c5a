//! What of a container lies on disks rather than in the share: a root filesystem or a volume that is
//! a block device or a raw image. Each is attached to the guest by virtio-blk and mounted there.
//!
//! The guest writes to a disk behind the host's back, so a disk that may be written to is attached
//! once and is used by nobody else. The VMM locks what it attaches; what is found out here is said
//! with the name of the field.

mod superblock;

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::messages::BlockDevice;
use bulkhead_vmm::config::DiskConfig;
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::spec::SpecError;
use superblock::Filesystem;

/// The guest has so many places for disks of containers beside its other devices.
const MOST: usize = 6;

/// Disks of a container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Disks {
    /// For the VMM.
    pub configs: Vec<DiskConfig>,
    /// For the agent: the root filesystem, if it is on a disk.
    pub rootfs: Option<BlockDevice>,
    /// For the agent: the mounts (index in `mounts`) that are on disks.
    pub mounts: HashMap<u32, BlockDevice>,
}

/// Whether a root filesystem is on a disk.
pub fn is_disk(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_file() || kind.is_block_device()
    })
}

/// Collects the disks of a container, each judged.
pub fn collect(bundle: &Path, rootfs: &Path, spec: &Spec) -> Result<Disks, SpecError> {
    let mut disks = Disks::default();
    if is_disk(rootfs) {
        let readonly = spec.root().as_ref().and_then(|root| root.readonly());
        let disk = Source {
            field: "root.path",
            path: rootfs.to_owned(),
        };
        let (device, _) = disks.add("root", &disk, None, readonly.unwrap_or(false))?;
        disks.rootfs = Some(device);
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let Some(wanted) = mount.typ().as_deref().and_then(Filesystem::of_name) else {
            continue;
        };
        let (Ok(number), true) = (u32::try_from(index), disks.configs.len() < MOST) else {
            return Err(SpecError::Invalid {
                field: format!("mounts[{index}]"),
                reason: format!("{MOST} disks are the most that a guest can have"),
            });
        };
        let field = format!("mounts[{index}].source");
        let disk = source(&field, mount, bundle)?;
        let read_only = is_read_only(mount);
        let serial = format!("mount{index}");
        let (mut device, found) = disks.add(&serial, &disk, Some(wanted), read_only)?;
        device.filesystem = found.name().to_owned();
        // Its options are in the spec.
        device.options = Vec::new();
        disks.mounts.insert(number, device);
    }
    Ok(disks)
}

/// Later options win over earlier ones, as for mount(8).
fn is_read_only(mount: &Mount) -> bool {
    let options = mount.options().iter().flatten();
    let mut kinds = options.filter(|option| matches!(option.as_str(), "ro" | "rw"));
    kinds.next_back().is_some_and(|option| option == "ro")
}

/// What is to be a disk, and which field says so.
struct Source<'f> {
    field: &'f str,
    path: PathBuf,
}

impl Source<'_> {
    fn failed(&self, source: io::Error) -> SpecError {
        SpecError::Path {
            field: self.field.to_owned(),
            path: self.path.clone(),
            source,
        }
    }

    fn invalid(&self, reason: &str) -> SpecError {
        SpecError::Invalid {
            field: self.field.to_owned(),
            reason: format!("{} {reason}", self.path.display()),
        }
    }
}

fn source<'f>(field: &'f str, mount: &Mount, bundle: &Path) -> Result<Source<'f>, SpecError> {
    let given = mount.source().as_deref().unwrap_or(Path::new(""));
    let kind = mount.typ().as_deref().unwrap_or_default();
    if given.as_os_str().is_empty() {
        return Err(SpecError::Invalid {
            field: field.to_owned(),
            reason: format!("is missing: a mount of type {kind} needs a block device or an image"),
        });
    }
    let mut source = Source {
        field,
        path: bundle.join(given),
    };
    source.path = fs::canonicalize(&source.path).map_err(|error| source.failed(error))?;
    Ok(source)
}

impl Disks {
    /// Gives all of them other names, beginning with this.
    pub fn rename(&mut self, prefix: &str) {
        let renamed = |name: &str| format!("{prefix}{name}");
        for config in &mut self.configs {
            config.id = config.id.as_deref().map(renamed);
        }
        for device in self.rootfs.iter_mut().chain(self.mounts.values_mut()) {
            device.serial = renamed(&device.serial);
        }
    }

    /// One of this name was attached to a guest that runs, which knows it as this device.
    pub fn at(&mut self, name: &str, device: &str) {
        for disk in self.rootfs.iter_mut().chain(self.mounts.values_mut()) {
            if disk.serial == name {
                device.clone_into(&mut disk.device);
            }
        }
    }

    fn add(
        &mut self,
        serial: &str,
        disk: &Source<'_>,
        wanted: Option<Filesystem>,
        read_only: bool,
    ) -> Result<(BlockDevice, Filesystem), SpecError> {
        let found = examine(disk, wanted, read_only)?;
        // erofs is written by mkfs alone.
        let read_only = read_only || found == Filesystem::Erofs;
        self.configs.push(DiskConfig {
            path: disk.path.clone(),
            read_only,
            id: Some(serial.to_owned()),
        });
        let options = if read_only {
            vec!["ro".to_owned()]
        } else {
            Vec::new()
        };
        let device = BlockDevice {
            serial: serial.to_owned(),
            filesystem: found.name().to_owned(),
            options,
            ..Default::default()
        };
        Ok((device, found))
    }
}

/// Looks at what is to be a disk: whether it can be one, is free, and holds a whole filesystem.
fn examine(
    disk: &Source<'_>,
    wanted: Option<Filesystem>,
    read_only: bool,
) -> Result<Filesystem, SpecError> {
    let metadata = fs::metadata(&disk.path).map_err(|error| disk.failed(error))?;
    let device = metadata.file_type().is_block_device();
    if !device && !metadata.is_file() {
        return Err(disk.invalid("must be a block device or an image file"));
    }
    let mut flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    // open(2): a device opened like this is neither mounted nor part of another one.
    flags.set(OFlags::EXCL, device && !read_only);
    let file = match rustix::fs::open(&disk.path, flags, Mode::empty()) {
        Err(rustix::io::Errno::BUSY) => {
            return Err(disk.invalid(
                "is in use on this host: unmount it first, or take it out of what it is part of",
            ));
        }
        opened => File::from(opened.map_err(|error| disk.failed(error.into()))?),
    };
    // Let go with the file: the VMM takes the lock that lasts.
    let lock = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(&file, lock) {
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(disk.invalid(
                "is in use by another container; a disk that is written to can be attached only \
                 once, one that is read (\"ro\") as often as you like",
            ));
        }
        locked => locked.map_err(|error| disk.failed(error.into()))?,
    }
    let found = superblock::read(&file).map_err(|error| disk.failed(error))?;
    let Some(found) = found else {
        return Err(disk.invalid("holds neither ext4 nor erofs; make a file system on it first"));
    };
    if wanted.is_some_and(|wanted| wanted != found.filesystem) {
        return Err(disk.invalid(&format!(
            "holds {}: give the mount that type",
            found.filesystem.name()
        )));
    }
    if found.size > found.space {
        return Err(disk.invalid(&format!(
            "is truncated: its {} has {} bytes, and there are {}",
            found.filesystem.name(),
            found.size,
            found.space
        )));
    }
    Ok(found.filesystem)
}

#[cfg(test)]
mod tests;
