//! Makes a container's mounts: each is built detached, then put onto a directory or file that was
//! looked up inside of the rootfs, so that no path of the rootfs can lead it elsewhere.
//! Runs in the container's namespaces, before the root is changed.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Component, Path, PathBuf},
};

use bulkhead_agent_protocol::ErrorKind;
use rustix::{
    fs::{self, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
    mount::{
        self as kernel, FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags,
    },
};

use super::{
    Surroundings, copy_up,
    disks::{Disk, DiskSource, Disks, DisksInUse, Filesystem},
    id_maps::IdMaps,
    mount_options::MountOptions,
    rootfs::{Missing, Tree},
};
use crate::{
    error::{Attempt, Error, Result},
    network::Network,
    sys::{self, MountAttributes},
};

mod plan;

pub(super) use plan::{of_root, plan};

/// One entry of the spec's `mounts`, checked.
#[derive(Debug)]
pub(super) struct MountPlan {
    /// `mounts[i]`, for errors.
    field: String,
    /// Where, inside of the container.
    pub destination: PathBuf,
    source: Source,
    options: MountOptions,
    /// Maps of its own, for an id-mapped mount.
    id_maps: Option<IdMaps>,
}

#[derive(Debug)]
enum Source {
    /// A path of the share.
    Share { path: String, recursive: bool },
    /// A filesystem on a disk.
    Disk(DiskSource),
    /// What another container has at the same place.
    Joined,
    /// The container's own cgroup.
    ControlGroup,
    /// A filesystem of a type with, perhaps, a source.
    Filesystem {
        kind: String,
        source: Option<String>,
    },
}

/// What mounts that take the guest's privileges are made with.
pub(super) struct With<'a> {
    /// Root of the share.
    pub(super) share: BorrowedFd<'a>,
    pub(super) surroundings: &'a Surroundings,
    /// The container's own maps.
    pub(super) id_maps: Option<&'a IdMaps>,
    /// Another container's network that it joins.
    pub(super) network: Option<&'a Network>,
}

/// What mounts are made from besides the rootfs itself.
pub(super) struct Sources<'a> {
    /// Root of the share.
    pub share: BorrowedFd<'a>,
    /// The container's cgroup directory, unless the container has a cgroup namespace.
    pub control_group: Option<BorrowedFd<'a>>,
}

impl MountPlan {
    /// Whether the container can change its cgroup through it.
    pub(super) fn is_writable_cgroup(&self) -> bool {
        let set = self.options.attributes.set | self.options.recursive_attributes.set;
        matches!(self.source, Source::ControlGroup) && set & libc::MOUNT_ATTR_RDONLY == 0
    }

    /// Whether it gives the container a /dev of the host's.
    pub(super) fn binds_dev(&self) -> bool {
        matches!(self.source, Source::Share { .. }) && self.destination == Path::new("/dev")
    }

    /// The mount, detached, if it takes the guest's privileges, which the set-up in a user namespace
    /// does not have: what is on a disk or id-mapped, and what shows a network that is not its own.
    pub(super) fn prepare(
        &self,
        with: &With<'_>,
        disks: &mut DisksInUse,
    ) -> Result<Option<OwnedFd>> {
        let asked = self.id_maps.is_some() || self.options.id_map.is_some();
        let maps = self.id_maps.as_ref().or(with.id_maps).filter(|_| asked);
        let mount = match &self.source {
            Source::Disk(disk) => self.on_disk(disk, &with.surroundings.disks, disks)?,
            Source::Share { path, recursive } if maps.is_some() => {
                self.clone_leaving_nothing(path, *recursive, with.share)?
            }
            Source::Filesystem { kind, .. } if kind == "sysfs" && with.id_maps.is_some() => {
                let Some(network) = with.network else {
                    return Ok(None);
                };
                network.within(&with.surroundings.network, || {
                    self.filesystem(kind, None, &self.options)
                })?
            }
            _ => return Ok(None),
        };
        if let Some(maps) = maps {
            let namespace = maps.namespace(with.surroundings.proc.as_fd())?;
            self.map_ids(&mount, namespace.as_fd())?;
        }
        Ok(Some(mount))
    }

    /// Whether it is another container's.
    pub(super) fn is_joined(&self) -> bool {
        matches!(self.source, Source::Joined)
    }

    /// Clones what is mounted at its destination, in the mount namespace of another container, which
    /// this process is in. That container may have put anything there, but no link leads elsewhere.
    pub(super) fn clone_here(&self) -> io::Result<OwnedFd> {
        let root = fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let path = self
            .destination
            .strip_prefix("/")
            .unwrap_or(&self.destination);
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = fs::openat2(&root, path, flags, Mode::empty(), how)?;
        clone_mount(place.as_fd(), false)
    }

    fn map_ids(&self, mount: &OwnedFd, namespace: BorrowedFd<'_>) -> Result<()> {
        let below = self.options.id_map == Some(true);
        match sys::map_mount_ids(mount.as_fd(), below, namespace) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let reason = "the filesystem of its source cannot be id-mapped; \
                    give the files other owners, or choose another filesystem";
                let field = format!("{}.uidMappings", self.field);
                Err(Error::unsupported(field, reason))
            }
            mapped => mapped.or_cannot(|| format!("map the ids of {}", self.field)),
        }
    }

    /// Mounts what is on a disk.
    fn on_disk(
        &self,
        source: &DiskSource,
        disks: &Disks,
        in_use: &mut DisksInUse,
    ) -> Result<OwnedFd> {
        let Disk {
            name,
            path,
            filesystem,
            read_only,
        } = disks.find(source, in_use)?;
        let mut options = self.options.clone();
        let asked = options.attributes.set & libc::MOUNT_ATTR_RDONLY != 0;
        if asked || filesystem == Filesystem::Erofs {
            options.superblock.push("ro");
        } else if read_only {
            let problem = format!("the disk {name} can only be read: add ro");
            return Err(Error::invalid(format!("{}.options", self.field), problem));
        }
        let says = |option: &String| option.starts_with("errors=");
        if filesystem == Filesystem::Ext4 && !options.data.iter().any(says) {
            // The image may say that an error is to end the guest.
            options.data.push("errors=remount-ro".to_owned());
        }
        let kind = filesystem.name();
        let mount = self.filesystem(kind, Some(&path), &options).map_err(|error| {
            let text = format!(
                "{}: the disk {name} cannot be mounted as {kind}: {}; is the image whole, and has \
                 fsck seen it?",
                self.field,
                error.chain()
            );
            Error::new(ErrorKind::InvalidSpec, text)
        })?;
        set_attributes(&mount, false, options.attributes)
            .or_cannot(|| format!("set the options of the disk {name} ({})", self.field))?;
        in_use.keep(&mount)?;
        Ok(mount)
    }

    /// Makes the mount inside of `rootfs`, from what the agent has prepared, if it has. Its
    /// propagation is left for [`MountPlan::propagate`].
    pub(super) fn mount(
        &self,
        rootfs: &Tree,
        sources: &Sources<'_>,
        prepared: Option<OwnedFd>,
    ) -> Result<OwnedFd> {
        let action = || format!("mount {} ({})", self.destination.display(), self.field);
        let (mount, directory) = match &self.source {
            Source::Share { path, recursive } => {
                let mount = match prepared {
                    Some(mount) => mount,
                    None => self.clone_from_share(path, *recursive, sources.share)?,
                };
                let mode = fs::fstat(&mount).or_cannot(action)?.st_mode;
                (mount, FileType::from_raw_mode(mode) == FileType::Directory)
            }
            Source::Disk(_) | Source::Joined => {
                let mount = prepared.ok_or(io::ErrorKind::NotFound);
                (mount.or_cannot(action)?, true)
            }
            Source::ControlGroup => (self.control_group(sources)?, true),
            Source::Filesystem { kind, source } => {
                let made = match prepared {
                    Some(mount) => mount,
                    None => self.filesystem(kind, source.as_deref(), &self.options)?,
                };
                (made, true)
            }
        };
        let missing = if directory {
            Missing::Directory
        } else {
            Missing::File
        };
        let target = rootfs.lookup(&self.destination, missing).or_cannot(|| {
            format!(
                "make the mount point {} ({})",
                self.destination.display(),
                self.field
            )
        })?;
        if self.options.copy_up {
            copy_up::copy(&target, &mount).or_cannot(|| {
                format!(
                    "copy what {} holds into its tmpfs",
                    self.destination.display()
                )
            })?;
        }
        set_attributes(&mount, false, self.options.attributes).or_cannot(action)?;
        set_attributes(&mount, true, self.options.recursive_attributes).or_cannot(action)?;
        attach(&mount, &target).or_cannot(action)?;
        Ok(mount)
    }

    /// Gives the mount the propagation that its options ask for, if any. That of the whole root
    /// goes before it.
    pub(super) fn propagate(&self, mount: &OwnedFd) -> Result<()> {
        for &(propagation, recursive) in &self.options.propagation {
            let change = MountAttributes {
                propagation,
                ..Default::default()
            };
            let destination = self.destination.display();
            let field = &self.field;
            sys::set_mount_attributes(mount.as_fd(), recursive, change)
                .or_cannot(|| format!("set the propagation of {destination} ({field}.options)"))?;
        }
        Ok(())
    }

    fn clone_from_share(
        &self,
        path: &str,
        recursive: bool,
        share: BorrowedFd<'_>,
    ) -> Result<OwnedFd> {
        clone_shared(share, path, recursive)
            .or_cannot(|| format!("bind {path} of the share ({}.source)", self.field))
    }

    /// For the agent, which keeps its mounts: takes the one that going to the source has made out of its
    /// namespace. It lies at the source, or at the directory around it.
    fn clone_leaving_nothing(
        &self,
        path: &str,
        recursive: bool,
        share: BorrowedFd<'_>,
    ) -> Result<OwnedFd> {
        // To open a place by its path alone mounts nothing there, but on the way to it.
        let device = |path: &str| {
            let place = open_shared(share, path).ok()?;
            Some(fs::fstat(place).ok()?.st_dev)
        };
        let around = path.rsplit_once('/').map_or("", |(around, _)| around);
        let places = [around, path].map(|path| (path, device(path)));
        let mount = self.clone_from_share(path, recursive, share)?;
        if let Some((made, _)) = places.iter().find(|(path, before)| *before != device(path)) {
            let place = format!("/proc/self/fd/{}/{made}", share.as_raw_fd());
            kernel::unmount(place, UnmountFlags::DETACH)
                .or_cannot(|| format!("let go of {made} of the share ({}.source)", self.field))?;
        }
        Ok(mount)
    }

    fn control_group(&self, sources: &Sources<'_>) -> Result<OwnedFd> {
        match sources.control_group {
            Some(directory) => clone_mount(directory, false)
                .or_cannot(|| format!("bind the container's cgroup ({})", self.field)),
            None => self.filesystem("cgroup2", Some("cgroup"), &self.options),
        }
    }

    fn filesystem(
        &self,
        kind: &str,
        source: Option<&str>,
        options: &MountOptions,
    ) -> Result<OwnedFd> {
        let context =
            kernel::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| match error {
                Errno::NODEV => Error::unsupported(
                    format!("{}.type {kind}", self.field),
                    "the guest kernel lacks this filesystem",
                ),
                _ => Error::System {
                    action: format!("open a filesystem of type {kind} ({})", self.field),
                    cause: error.into(),
                },
            })?;
        if let Some(source) = source {
            self.configure(&context, source, || {
                kernel::fsconfig_set_string(&context, "source", source)
            })?;
        }
        for flag in &options.superblock {
            self.configure(&context, flag, || {
                kernel::fsconfig_set_flag(&context, *flag)
            })?;
        }
        for option in &options.data {
            // devpts takes `newinstance` from no one any more: every mount is one. cgroup v1 names
            // of controllers do not get here, since cgroup mounts carry no data.
            if kind == "devpts" && option == "newinstance" {
                continue;
            }
            self.configure(&context, option, || match option.split_once('=') {
                Some((key, value)) => kernel::fsconfig_set_string(&context, key, value),
                None => kernel::fsconfig_set_flag(&context, option.as_str()),
            })?;
        }
        self.configure(&context, kind, || kernel::fsconfig_create(&context))?;
        kernel::fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
        .or_cannot(|| format!("mount a filesystem of type {kind} ({})", self.field))
    }

    fn configure(
        &self,
        context: &OwnedFd,
        subject: &str,
        step: impl FnOnce() -> rustix::io::Result<()>,
    ) -> Result<()> {
        step().map_err(|error| {
            let explanation = kernel_explanation(context).unwrap_or_else(|| error.to_string());
            let field = format!("{}.options", self.field);
            match error {
                Errno::INVAL => Error::invalid(field, format!("{subject}: {explanation}")),
                _ => Error::System {
                    action: format!("configure {subject} ({})", self.field),
                    cause: io::Error::other(explanation),
                },
            }
        })
    }
}

/// What the kernel has to say about a filesystem context: a message that begins with its severity
/// and a space.
fn kernel_explanation(context: &OwnedFd) -> Option<String> {
    let mut buffer = [0; 256];
    let length = rustix::io::read(context, &mut buffer).ok()?;
    let text = String::from_utf8_lossy(buffer.get(..length)?);
    Some(text.trim_end().get(2..)?.to_owned())
}

/// Opens the directory that the host has mounted at a path of the share. One that is a mount on the host
/// becomes one in the guest when somebody goes into it, and a clone of the directory below would
/// be covered by that: its id maps would hold for nothing, and its device number would not be that
/// of its entries, for which `find -xdev` leaves them out.
pub(super) fn open_shared_mount(share: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open_below(share, path, OFlags::DIRECTORY)
}

/// A detached mount of what the host has put at a path of the share. As open_tree(2) goes there, what is
/// a mount on the host becomes one in the guest.
fn clone_shared(share: BorrowedFd<'_>, path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let path = Path::new(path);
    let plain = |part| matches!(part, Component::Normal(_));
    if !path.components().all(plain) {
        return Err(Errno::XDEV.into());
    }
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(kernel::open_tree(share, path, flags)?)
}

/// Opens a path of the share. The host has put it together from plain names, so links have no
/// place in it.
pub(super) fn open_shared(share: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    open_below(share, path, OFlags::empty())
}

fn open_below(share: BorrowedFd<'_>, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let path = path.trim_start_matches('/');
    let path = if path.is_empty() { "." } else { path };
    Ok(fs::openat2(share, path, flags, Mode::empty(), how)?)
}

/// A detached mount of what the descriptor refers to.
pub(super) fn clone_mount(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(kernel::open_tree(source, "", flags)?)
}

/// Mounts a directory over itself, with what is mounted below it.
pub(super) fn mount_over(directory: &OwnedFd) -> io::Result<OwnedFd> {
    let mount = clone_mount(directory.as_fd(), true)?;
    attach(&mount, directory)?;
    Ok(mount)
}

/// Puts a detached mount onto a target.
pub(super) fn attach(mount: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(kernel::move_mount(mount, "", target, "", flags)?)
}

fn set_attributes(mount: &OwnedFd, recursive: bool, attributes: MountAttributes) -> io::Result<()> {
    if attributes == MountAttributes::default() {
        return Ok(());
    }
    sys::set_mount_attributes(mount.as_fd(), recursive, attributes)
}
