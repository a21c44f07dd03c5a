//! The jail: what the process can reach once the guest runs.
//!
//! 1. Own mount, PID, IPC, UTS and network namespace (or the network namespace that was named).
//! 2. The root is a read-only tmpfs that holds the share's tree at `/share` and the directory of
//!    the sandbox's sockets at `/sockets`, nothing else; no /proc, no /dev. The mounts belong to the
//!    namespace, so none is left on the host however the process ends.
//! 3. The capabilities that the file server acts with, none if there is no share;
//!    `no_new_privs`; no core dumps; not traceable by its own kind.
//! 4. Each thread's seccomp filter: [`crate::threads::spawn`], and the end of [`enter`] for the main
//!    thread.

pub mod share;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, mkdirat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, chdir, fchdir, pivot_root, set_dumpable_behavior,
    setrlimit, umask,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags, capabilities,
    capability_is_in_bounding_set, clear_ambient_capability_set, move_into_link_name_space,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
};
use std::os::fd::{AsFd, OwnedFd};

use crate::sys;
use share::ShareTree;

pub use crate::config::SHARE;

/// Where the sandbox's sockets lie in the jail.
pub const SOCKETS: &str = "/sockets";

/// What virtio-fs needs to act for the guest's users on the host's files: owners and modes of
/// files (CHOWN, FOWNER, FSETID), access as any user (SETUID, SETGID, DAC_OVERRIDE), devices and
/// file capabilities that a guest makes (MKNOD, SETFCAP), files that it has for itself (LEASE).
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::LEASE)
    .union(CapabilitySet::SETFCAP);

/// Why the jail could not be built.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Without the rights it takes.
    #[error("{0}: root's rights are needed, run as root")]
    NotPermitted(&'static str, #[source] io::Error),
    /// Another step.
    #[error("{0} for the VMM's jail")]
    Step(&'static str, #[source] io::Error),
    /// A share's source.
    #[error("share {}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A share's target.
    #[error("share target {0:?}: {1}")]
    Target(String, &'static str),
    /// A mount at its target.
    #[error("put the share {target:?} into the VMM's jail")]
    Attach {
        /// The target.
        target: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// For `map_err` after a system call.
fn step(what: &'static str) -> impl Fn(Errno) -> JailError {
    move |error| match error {
        Errno::PERM => JailError::NotPermitted(what, error.into()),
        _ => JailError::Step(what, error.into()),
    }
}

/// What the jail is made from.
#[derive(Debug)]
pub struct Contents {
    /// The share's pieces.
    pub share: Option<ShareTree>,
    /// The directory of the sandbox's sockets, a detached mount.
    pub sockets: Option<OwnedFd>,
    /// Network namespace to join instead of a new, empty one.
    pub network: Option<OwnedFd>,
}

/// Makes the next fork begin a PID namespace.
pub fn unshare_pids() -> Result<(), JailError> {
    sys::unshare(UnshareFlags::NEWPID).map_err(step("make a PID namespace"))
}

/// Enters the jail, for good. Gives a descriptor of this process's own /proc/self/fd, which the
/// file server needs, and from which nothing else can be reached.
pub fn enter(contents: Contents) -> Result<File, JailError> {
    let groups_are_fixed = groups_are_fixed();
    enter_namespaces(contents.network)?;
    let descriptors = open_tree(
        CWD,
        "/proc/self/fd",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(step("open /proc/self/fd"))?;
    let root = make_root()?;
    // What is made here has the mode that it is given: of whom the guest acts for, many are others.
    umask(Mode::empty());
    let shares = contents.share.is_some();
    if let Some(share) = contents.share {
        mkdirat(&root, "share", Mode::from(0o755)).map_err(step("make /share"))?;
        share.attach(root.as_fd())?;
    }
    if let Some(sockets) = contents.sockets {
        mkdirat(&root, "sockets", Mode::from(0o755)).map_err(step("make /sockets"))?;
        sys::restrict_mount(sockets.as_fd(), MountAttrFlags::empty())
            .map_err(|error| JailError::Step("restrict the directory of sockets", error))?;
        attach(&sockets, &root, "sockets").map_err(step("mount /sockets"))?;
    }
    close_root(&root)?;
    drop_rights(shares, groups_are_fixed)?;
    Ok(descriptors.into())
}

fn enter_namespaces(network: Option<OwnedFd>) -> Result<(), JailError> {
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    match network {
        Some(namespace) => {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(step("join the network namespace"))?;
        }
        None => flags |= UnshareFlags::NEWNET,
    }
    sys::unshare(flags).map_err(step("make namespaces"))?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(step("make the mounts private"))
}

/// A tmpfs over the old root, which it hides until [`close_root`] removes it.
fn make_root() -> Result<OwnedFd, JailError> {
    let failed = step("make the root");
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(&failed)?;
    fsconfig_set_string(&tmpfs, "mode", "0755").map_err(&failed)?;
    fsconfig_set_string(&tmpfs, "size", "1m").map_err(&failed)?;
    fsconfig_create(&tmpfs).map_err(&failed)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(&failed)?;
    attach(&root, CWD, "/").map_err(&failed)?;
    Ok(root)
}

/// Attaches a detached mount.
fn attach(mount: impl AsFd, directory: impl AsFd, path: &str) -> Result<(), Errno> {
    move_mount(
        mount,
        "",
        directory,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

/// The new root takes the place of the old, which is unmounted with everything below it.
fn close_root(root: &OwnedFd) -> Result<(), JailError> {
    fchdir(root).map_err(step("enter the root"))?;
    // Old on top of new at the same place: pivot_root(2), NOTES.
    pivot_root(".", ".").map_err(step("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("leave the host's mounts"))?;
    chdir("/").map_err(step("enter the root"))?;
    sys::make_read_only(root.as_fd())
        .map_err(|error| JailError::Step("make the root read-only", error))
}

/// Whether nobody may change his groups here, as in the user namespace of somebody who has one id only
/// (user_namespaces(7)).
fn groups_are_fixed() -> bool {
    std::fs::read("/proc/self/setgroups").is_ok_and(|text| text.starts_with(b"deny"))
}

/// Drops what is not needed any more. Only the main thread exists.
fn drop_rights(shares: bool, groups_are_fixed: bool) -> Result<(), JailError> {
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )
    .map_err(step("forbid core dumps"))?;
    if !groups_are_fixed {
        set_thread_groups(&[]).map_err(step("drop the groups"))?;
    }
    let keep = if shares {
        FILE_SERVER
    } else {
        CapabilitySet::empty()
    };
    clear_ambient_capability_set().map_err(step("drop capabilities"))?;
    for capability in CapabilitySet::all().difference(keep).iter() {
        // Kernels know more or fewer of them.
        if capability_is_in_bounding_set(capability) == Ok(true) {
            remove_capability_from_bounding_set(capability).map_err(step("drop capabilities"))?;
        }
    }
    let have = capabilities(None).map_err(step("read capabilities"))?;
    let sets = CapabilitySets {
        effective: have.effective & keep,
        permitted: have.permitted & keep,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets).map_err(step("drop capabilities"))?;
    set_no_new_privs(true).map_err(step("forbid new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("forbid core dumps"))
}
