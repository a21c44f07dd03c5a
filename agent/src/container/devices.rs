//! Device nodes of a container: the default ones (runtime-spec config-linux.md "Default Devices"),
//! those of `linux.devices`, and the links that programs expect in /dev.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::{
    fs::{
        self, AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chmodat, chownat, makedev, mknodat,
    },
    io::Errno,
    mount::{self as kernel, FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags},
};

use super::{
    id_maps::IdMaps,
    mounts::{attach, clone_mount},
    rootfs::{Missing, Tree},
};
use crate::error::{Attempt, Error, Result};

/// A device node to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceNode {
    path: PathBuf,
    kind: FileType,
    number: u64,
    mode: u32,
    owner: (u32, u32),
}

/// Where the agent makes nodes for user namespaces.
const NURSERY: &str = "/tmp";

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Name in /dev, major and minor number of the devices that every container has.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// Links in /dev that every container has.
const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Checks `linux.devices` and adds the default devices that it does not redefine.
pub(super) fn plan(devices: &[LinuxDevice]) -> Result<Vec<DeviceNode>> {
    let mut planned = Vec::with_capacity(DEFAULT.len() + devices.len());
    for (index, device) in devices.iter().enumerate() {
        planned.push(plan_one(&format!("linux.devices[{index}]"), device)?);
    }
    for (name, major, minor) in DEFAULT {
        let path = Path::new("/dev").join(name);
        if !planned.iter().any(|device| device.path == path) {
            planned.push(DeviceNode {
                path,
                kind: FileType::CharacterDevice,
                number: makedev(major, minor),
                mode: 0o666,
                owner: (0, 0),
            });
        }
    }
    Ok(planned)
}

fn plan_one(field: &str, device: &LinuxDevice) -> Result<DeviceNode> {
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            let problem = "\"a\" is not a type of device node; use b, c, u or p";
            return Err(Error::invalid(format!("{field}.type"), problem));
        }
    };
    let number = |name: &str, value: i64| {
        u32::try_from(value).map_err(|_| {
            Error::invalid(
                format!("{field}.{name}"),
                format!("{value} is no number of a device"),
            )
        })
    };
    let (major, minor) = (
        number("major", device.major())?,
        number("minor", device.minor())?,
    );
    let path = Path::new("/").join(device.path());
    if path.file_name().is_none() {
        return Err(Error::invalid(format!("{field}.path"), "names no file"));
    }
    Ok(DeviceNode {
        path,
        kind,
        number: if kind == FileType::Fifo {
            0
        } else {
            makedev(major, minor)
        },
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        owner: (device.uid().unwrap_or(0), device.gid().unwrap_or(0)),
    })
}

/// Makes the nodes for a container with a user namespace, whose set-up may make none: each as a
/// detached mount of its own, from a filesystem that nobody else sees. Runs in the agent.
pub(super) fn for_user_namespace(nodes: &[DeviceNode], maps: &IdMaps) -> Result<Vec<OwnedFd>> {
    let action = || "make devices for a container with a user namespace";
    let context = kernel::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).or_cannot(action)?;
    kernel::fsconfig_create(&context).or_cannot(action)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let nursery = kernel::fsmount(&context, flags, MountAttrFlags::empty()).or_cannot(action)?;
    // Only what is mounted can be cloned: it covers this directory until all are.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let place = fs::open(NURSERY, flags, Mode::empty()).or_cannot(action)?;
    attach(&nursery, &place).or_cannot(action)?;
    let made = nodes.iter().enumerate().map(|(index, node)| {
        let owner = maps.outside(node.owner.0, node.owner.1)?;
        let name = index.to_string();
        let action = || format!("make the device {}", node.path.display());
        node.make(nursery.as_fd(), name.as_ref(), owner)
            .or_cannot(action)?;
        let made = fs::openat(&nursery, name, PATH_ONLY, Mode::empty()).or_cannot(action)?;
        clone_mount(made.as_fd(), false).or_cannot(action)
    });
    let made: Result<Vec<_>> = made.collect();
    kernel::unmount(NURSERY, UnmountFlags::DETACH).or_cannot(action)?;
    made
}

impl DeviceNode {
    /// Puts a node that the agent has made into `rootfs`.
    pub(super) fn place(&self, rootfs: &Tree, made: &OwnedFd) -> Result<()> {
        rootfs
            .lookup(&self.path, Missing::File)
            .and_then(|target| attach(made, &target))
            .or_cannot(|| format!("place the device {}", self.path.display()))
    }

    /// Makes the node inside of `rootfs`.
    pub(super) fn create(&self, rootfs: &Tree) -> Result<()> {
        let action = || format!("make the device {}", self.path.display());
        let (directory, name) = rootfs.parent(&self.path).or_cannot(action)?;
        match self.make(directory.as_fd(), name, self.owner) {
            // The rootfs holds something else there, or lies on a filesystem that takes no
            // devices (another host's, or a read-only one).
            Err(Errno::EXIST | Errno::PERM | Errno::ROFS | Errno::ACCESS) => {
                self.bind(rootfs).or_cannot(action)
            }
            made => made.or_cannot(action),
        }
    }

    fn make(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        (uid, gid): (u32, u32),
    ) -> rustix::io::Result<()> {
        let mode = Mode::from_raw_mode(self.mode);
        match mknodat(directory, name, self.kind, mode, self.number) {
            Err(Errno::EXIST) if self.exists(directory, name)? => {}
            made => made?,
        }
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        chownat(directory, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        // The umask is 0 here, but mknod leaves out set-id bits, and the node may be an old one.
        chmodat(directory, name, mode, AtFlags::empty())
    }

    fn exists(&self, directory: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<bool> {
        let status = fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(status.st_mode) == self.kind
            && (self.kind == FileType::Fifo || status.st_rdev == self.number))
    }

    /// Binds the guest's own node of the same path over a file. The guest's /dev is reachable, as
    /// the root has not changed yet.
    fn bind(&self, rootfs: &Tree) -> io::Result<()> {
        let own = fs::openat(CWD, &self.path, PATH_ONLY, Mode::empty())?;
        let status = fs::fstat(&own)?;
        let same = FileType::from_raw_mode(status.st_mode) == self.kind;
        if !same || status.st_rdev != self.number {
            return Err(io::Error::other(
                "the guest has another device of this name",
            ));
        }
        let target = rootfs.lookup(&self.path, Missing::File)?;
        attach(&clone_mount(own.as_fd(), false)?, &target)
    }
}

/// Makes the links in /dev. What exists already is left as it is, but for /dev/ptmx: the
/// container's terminals must come from its own devpts.
pub(super) fn create_links(rootfs: &Tree) -> Result<()> {
    for (path, target) in LINKS {
        let action = || format!("make the link {path}");
        let (directory, name) = rootfs.parent(Path::new(path)).or_cannot(action)?;
        if path == "/dev/ptmx" {
            let _ = fs::unlinkat(&directory, name, AtFlags::empty());
        }
        match fs::symlinkat(target, &directory, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).or_cannot(action),
        }
    }
    Ok(())
}

/// Puts a terminal onto /dev/console.
pub(super) fn bind_console(rootfs: &Tree, terminal: &OwnedFd) -> Result<()> {
    let action = || "bind the terminal to /dev/console";
    let target = rootfs
        .lookup(Path::new("/dev/console"), Missing::File)
        .or_cannot(action)?;
    let mount = clone_mount(terminal.as_fd(), false).or_cannot(action)?;
    attach(&mount, &target).or_cannot(action)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(json: serde_json::Value) -> Vec<LinuxDevice> {
        serde_json::from_value(json).expect("devices")
    }

    #[test]
    fn defaults_are_added_once() {
        let own = devices(serde_json::json!([
            {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 420, "uid": 5},
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
        ]));
        let planned = plan(&own).expect("valid");
        assert_eq!(planned.len(), DEFAULT.len() + 1);
        assert_eq!(planned[0].mode, 0o644);
        assert_eq!(planned[0].owner, (5, 0));
        assert_eq!(planned[1].mode, 0o666);
    }

    #[test]
    fn wrong_devices_are_named() {
        for wrong in [
            serde_json::json!([{"path": "/dev/x", "type": "a"}]),
            serde_json::json!([{"path": "/", "type": "c"}]),
            serde_json::json!([{"path": "/dev/x", "type": "c", "major": -1}]),
        ] {
            let error = plan(&devices(wrong)).expect_err("refused");
            assert!(
                error.to_string().starts_with("linux.devices[0]."),
                "{error}"
            );
        }
    }
}
