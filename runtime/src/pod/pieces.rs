//! A container's files in the share of a VM that runs already. The VM's process has no right to
//! mount anything: a thread of ours enters its mount namespace, moves the pieces there as detached
//! mounts, and ends. Whoever has taken over the VM could only have read what lies in the share
//! anyway: its root is a tmpfs that it cannot write to, no other process is seen from there, and
//! every lookup stays below it, follows no link and crosses no mount.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    thread,
};

use bulkhead_vmm::config::{FRAME_MODE, SHARE, ShareEntry};
use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2,
        unlinkat,
    },
    io::Errno,
    mount::{
        MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
        mount_change, move_mount, open_tree, unmount,
    },
    process::umask,
    thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces},
};
use thiserror::Error;

use crate::{
    share::Overlay,
    state::{LiveProcess, ProcessIdentity, Record},
    sys::{self, MountChange},
};

/// A container's files cannot be put into the VM, or taken out of it.
#[derive(Debug, Error)]
pub enum PieceError {
    /// The VM has ended.
    #[error("the virtual machine has ended")]
    Gone,
    /// A piece of the host's file system.
    #[error("cannot share {path} with the virtual machine")]
    Source {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An overlay of the host's directories.
    #[error("cannot mount an overlay with {options}: are all of them directories of this host?")]
    Overlay {
        /// Its options.
        options: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A place in the share.
    #[error("cannot {what} {target:?} in the share of the virtual machine")]
    Target {
        /// What was tried.
        what: &'static str,
        /// Where.
        target: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VM's mounts.
    #[error("cannot {0}")]
    Enter(&'static str, #[source] io::Error),
}

fn enter(what: &'static str) -> impl FnOnce(Errno) -> PieceError {
    move |error| PieceError::Enter(what, error.into())
}

/// A container's directory in the share. One that has joined a VM never gets the same again: the
/// guest may remember for a moment what was there.
pub fn directory_of(record: &Record) -> String {
    match record.sandbox {
        None => record.id.clone(),
        Some(_) => {
            let monitor = record.monitor.map_or(0, |monitor| monitor.pid);
            format!("{}.{monitor}", record.id)
        }
    }
}

/// Puts pieces into the VM's share.
pub fn add(
    vmm: ProcessIdentity,
    entries: &[ShareEntry],
    overlays: &[Overlay],
) -> Result<(), PieceError> {
    if entries.is_empty() && overlays.is_empty() {
        return Ok(());
    }
    let process = open(vmm)?;
    // While paths still mean the host's.
    let mut pieces = Vec::with_capacity(entries.len() + overlays.len());
    for entry in entries {
        let failed = |error: Errno| PieceError::Source {
            path: entry.source.clone(),
            source: error.into(),
        };
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        flags.set(OpenTreeFlags::AT_RECURSIVE, entry.recursive);
        let mount = open_tree(CWD, &entry.source, flags)
            .and_then(|mount| confine(mount, entry.read_only))
            .map_err(failed)?;
        pieces.push((entry.target.clone(), entry.name.clone(), mount));
    }
    for overlay in overlays {
        pieces.push((overlay.target.clone(), None, mount_overlay(overlay)?));
    }
    inside(process, move |root| {
        pieces
            .iter()
            .try_for_each(|(target, name, mount)| attach(root, target, name.as_deref(), mount))
    })
}

/// As the VMM has its own pieces: no set-user-id programs, devices or execution on the host.
fn confine(mount: OwnedFd, read_only: bool) -> Result<OwnedFd, Errno> {
    let change = MountChange {
        restricted: true,
        read_only,
        private: true,
        recursive: true,
        ..MountChange::default()
    };
    sys::change_mount(mount.as_fd(), change).map(|()| mount)
}

/// Mounts an overlay that is attached nowhere. A parameter of fsconfig(2) has 255 bytes at most, which its
/// directories exceed, so it is mounted as of old, in a namespace that goes with its thread.
fn mount_overlay(overlay: &Overlay) -> Result<OwnedFd, PieceError> {
    let failed = |source| PieceError::Overlay {
        options: overlay.options.clone(),
        source,
    };
    let options = CString::new(overlay.options.as_str())
        .map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    in_a_thread(|| {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        let (kind, flags) = ("overlay", MountFlags::empty());
        let tree = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        sys::unshare(UnshareFlags::NEWNS)
            .and_then(|()| mount_change("/", private))
            .and_then(|()| mount(kind, &overlay.lower, kind, flags, Some(&*options)))
            .and_then(|()| open_tree(CWD, &overlay.lower, tree))
            .and_then(|mount| confine(mount, false))
            .map_err(|error| failed(error.into()))
    })
}

/// Takes the directory of a container out of the VM's share, with all that is mounted in it.
pub(super) fn remove(vmm: ProcessIdentity, directory: &str) -> Result<(), PieceError> {
    let process = match open(vmm) {
        Ok(process) => process,
        // Its mounts are gone with it.
        Err(PieceError::Gone) => return Ok(()),
        Err(error) => return Err(error),
    };
    let target = directory.to_owned();
    inside(process, move |root| {
        let place = format!("{}/{target}", below(SHARE));
        empty(root, &place)
            .and_then(|()| remove_one(root, &place, AtFlags::REMOVEDIR))
            .map_err(|error| PieceError::Target {
                what: "remove",
                target,
                source: error.into(),
            })
    })
}

fn open(vmm: ProcessIdentity) -> Result<LiveProcess, PieceError> {
    let failed = |error| PieceError::Enter("find the virtual machine's process", error);
    vmm.open().map_err(failed)?.ok_or(PieceError::Gone)
}

/// Does something in the VM's mount namespace, in a thread that ends with it. The thread gets the
/// VM's root by a mount that can be written through.
fn inside(
    process: LiveProcess,
    work: impl FnOnce(BorrowedFd<'_>) -> Result<(), PieceError> + Send,
) -> Result<(), PieceError> {
    let task = move || {
        sys::unshare(UnshareFlags::FS)
            .map_err(enter("leave the directories of the other threads"))?;
        // The thread's own from here on. What is made has the mode that it is given.
        umask(Mode::empty());
        move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT)
            .map_err(enter("enter the mount namespace of the virtual machine"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let root = open_tree(CWD, "/", flags).map_err(enter("open the virtual machine's root"))?;
        let change = MountChange {
            writable: true,
            ..MountChange::default()
        };
        sys::change_mount(root.as_fd(), change)
            .map_err(enter("write to the virtual machine's root"))?;
        work(root.as_fd())
    };
    in_a_thread(task)
}

/// Does something that changes the thread for good.
fn in_a_thread<R: Send>(
    work: impl FnOnce() -> Result<R, PieceError> + Send,
) -> Result<R, PieceError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, work);
        let thread = thread.map_err(|error| PieceError::Enter("start a thread", error))?;
        thread
            .join()
            .unwrap_or_else(|payload| std::panic::resume_unwind(payload))
    })
}

fn below(path: &str) -> &str {
    path.trim_start_matches('/')
}

/// Opens a directory of the tmpfs that is the VM's root.
fn directory(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    openat2(root, path, flags, Mode::empty(), confined())
}

fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV
}

/// As the VMM does with its own pieces: at the target, or under its name in a directory there.
fn attach(
    root: BorrowedFd<'_>,
    target: &str,
    name: Option<&str>,
    mount: &OwnedFd,
) -> Result<(), PieceError> {
    let failed = |what| {
        move |error: Errno| PieceError::Target {
            what,
            target: target.to_owned(),
            source: error.into(),
        }
    };
    let is_directory = fstat(mount)
        .map(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
        .map_err(failed("look at"))?;
    let mut path = format!("{}/{target}", below(SHARE));
    make_place(root, &mut path, name, is_directory).map_err(failed("make"))?;
    // The place as the VM sees it: a mount goes onto a mount of the namespace.
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let real = openat(CWD, "/", flags | OFlags::DIRECTORY, Mode::empty())
        .and_then(|real| openat2(&real, &*path, flags, Mode::empty(), confined()))
        .map_err(failed("find"))?;
    let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", &real, "", whole).map_err(failed("mount"))
}

/// Makes the mount point, and a directory around it if it has a name, which the path gets then.
fn make_place(
    root: BorrowedFd<'_>,
    path: &mut String,
    name: Option<&str>,
    is_directory: bool,
) -> Result<(), Errno> {
    let (parent, mut last) = path.rsplit_once('/').unwrap_or((".", path));
    let mut parent = make_directories(root, parent)?;
    if let Some(name) = name {
        let mode = if is_directory { FRAME_MODE } else { 0o755 };
        mkdirat(&parent, last, Mode::from_raw_mode(mode))?;
        parent = directory(parent.as_fd(), last)?;
        last = name;
    }
    let mode = Mode::from_raw_mode(0o755);
    if is_directory {
        mkdirat(&parent, last, mode)?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(&parent, last, flags | OFlags::RDONLY, mode)?;
    }
    if let Some(name) = name {
        path.push('/');
        path.push_str(name);
    }
    Ok(())
}

fn make_directories(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let mut here = directory(root, ".")?;
    for name in path.split('/') {
        match mkdirat(&here, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        here = directory(here.as_fd(), name)?;
    }
    Ok(here)
}

/// Unmounts and removes what is in a directory, as deep as mount points lie.
fn empty(root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    let directory = match directory(root, path) {
        // Nothing was put there yet.
        Err(Errno::NOENT) => return Ok(()),
        directory => directory?,
    };
    let entries: Vec<_> = Dir::read_from(&directory)?.collect::<Result<_, _>>()?;
    for entry in entries {
        let Ok(name) = entry.file_name().to_str() else {
            continue;
        };
        if matches!(name, "." | "..") {
            continue;
        }
        let place = format!("{path}/{name}");
        // Busy or not: who still has a file of it open loses it with that.
        match unmount(
            format!("/{place}"),
            UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
        ) {
            // EINVAL: nothing is mounted there.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        if entry.file_type().is_dir() {
            empty(root, &place)?;
            remove_one(root, &place, AtFlags::REMOVEDIR)?;
        } else {
            remove_one(root, &place, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Two may be removing at once.
fn remove_one(root: BorrowedFd<'_>, path: &str, flags: AtFlags) -> Result<(), Errno> {
    match unlinkat(root, path, flags) {
        Err(Errno::NOENT) => Ok(()),
        removed => removed,
    }
}
