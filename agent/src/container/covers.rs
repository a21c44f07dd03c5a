//! Paths of a container that are hidden or made read-only (`linux.maskedPaths`,
//! `linux.readonlyPaths`): mounts over what is there. Runs before the root is changed.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{self, CWD, FileType, Mode, OFlags},
    mount::{self as kernel, FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use super::{
    mounts::{attach, clone_mount},
    rootfs::Tree,
};
use crate::{
    error::{Attempt, Result},
    sys::{self, MountAttributes},
};

/// Hides a path: a file behind /dev/null, a directory behind an empty read-only tmpfs
/// (runtime-spec config-linux.md "Masked Paths"). What does not exist needs no hiding.
pub(super) fn mask(rootfs: &Tree, path: &Path) -> Result<()> {
    let action = || format!("mask {} (linux.maskedPaths)", path.display());
    let Some(target) = existing(rootfs, path).or_cannot(action)? else {
        return Ok(());
    };
    let mode = fs::fstat(&target).or_cannot(action)?.st_mode;
    let cover = if FileType::from_raw_mode(mode) == FileType::Directory {
        empty_directory()
    } else {
        null_device()
    };
    attach(&cover.or_cannot(action)?, &target).or_cannot(action)
}

fn empty_directory() -> io::Result<OwnedFd> {
    let context = kernel::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    kernel::fsconfig_set_string(&context, "nr_blocks", "1")?;
    kernel::fsconfig_set_string(&context, "nr_inodes", "1")?;
    kernel::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY;
    Ok(kernel::fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

fn null_device() -> io::Result<OwnedFd> {
    // The guest's own device, not the container's: the root has not changed yet.
    let null = fs::openat(
        CWD,
        "/dev/null",
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    clone_mount(null.as_fd(), false)
}

/// Makes a path and what is mounted below it read-only.
pub(super) fn make_read_only(rootfs: &Tree, path: &Path) -> Result<()> {
    let action = || format!("make {} read-only (linux.readonlyPaths)", path.display());
    let Some(target) = existing(rootfs, path).or_cannot(action)? else {
        return Ok(());
    };
    let mount = clone_mount(target.as_fd(), true).or_cannot(action)?;
    let read_only = MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..Default::default()
    };
    sys::set_mount_attributes(mount.as_fd(), true, read_only).or_cannot(action)?;
    attach(&mount, &target).or_cannot(action)
}

fn existing(rootfs: &Tree, path: &Path) -> io::Result<Option<OwnedFd>> {
    match rootfs.open(path) {
        Ok(found) => Ok(Some(found)),
        Err(error) if [Some(libc::ENOENT), Some(libc::ENOTDIR)].contains(&error.raw_os_error()) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
