//! What engines find where the container's process would be: a mount namespace whose root is the
//! container's root filesystem, with its bind mounts in their places. `podman cp` reads and writes
//! there. Mounts that exist in the guest only (tmpfs and the like) are empty, read-only
//! directories: what is copied there would reach nobody, so it fails. In the place of /proc is that of the
//! PID namespace of the process that engines see, which `podman top` reads.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_vmm::config::any_path;
use oci_spec::runtime::Spec;
use rustix::{
    fs::{CWD, FileType, fstat},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, MountPropagationFlags,
        MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_reconfigure,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick, mount_change,
        mount_remount, move_mount, open_tree, unmount,
    },
    process::{chdir, fchdir, pivot_root},
    thread::UnshareFlags,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::stand_in::has_pid_namespace;
use crate::{
    share::Share,
    sys::{self, MountChange},
};

/// Of what is mounted for its names alone.
const INERT: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The place could not be made.
#[derive(Debug, Error)]
#[error("cannot show the container's files to the host's tools: {what} {}", path.display())]
pub struct ViewError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A container's files on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    #[serde(with = "any_path")]
    root: PathBuf,
    read_only: bool,
    /// In the order of the configuration.
    mounts: Vec<Place>,
}

/// Leaves out what exists in the guest only and lies in something that does, too: there is nothing
/// to cover.
fn without_nested(places: impl Iterator<Item = Place>) -> Vec<Place> {
    let mut kept: Vec<Place> = Vec::new();
    for place in places {
        let above = kept
            .iter()
            .rfind(|above| place.destination.starts_with(&above.destination));
        if place.source.is_some() || above.is_none_or(|above| above.source.is_some()) {
            kept.push(place);
        }
    }
    kept
}

/// Where something is mounted in the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    destination: PathBuf,
    /// Without one, it exists in the guest only.
    source: Option<Source>,
    /// It shows processes.
    processes: bool,
}

/// A piece of the host's file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    #[serde(with = "any_path")]
    path: PathBuf,
    read_only: bool,
    recursive: bool,
}

impl View {
    /// That of a container. A root filesystem on a disk is the guest's alone, like what else
    /// exists there only: empty here.
    pub fn of(spec: &Spec, share: &Share, rootfs: &Path) -> Self {
        let source = |index: usize| {
            let place = share.bind_sources.get(&u32::try_from(index).ok()?)?;
            let entry = share.entries.iter().find(|entry| entry.place() == *place)?;
            Some(Source {
                path: entry.source.clone(),
                read_only: entry.read_only,
                recursive: entry.recursive,
            })
        };
        let mounts = spec.mounts().iter().flatten().enumerate();
        // Otherwise the process is among the host's, which are nobody's concern.
        let alone = has_pid_namespace(spec);
        Self {
            root: rootfs.to_owned(),
            read_only: spec
                .root()
                .as_ref()
                .is_some_and(|root| root.readonly().unwrap_or_default()),
            mounts: without_nested(mounts.map(|(index, mount)| Place {
                destination: mount.destination().clone(),
                source: source(index),
                processes: alone && mount.typ().as_deref() == Some("proc"),
            })),
        }
    }

    /// Moves the calling thread there, for good. Nothing of it is seen from elsewhere on the host,
    /// and nothing of the host's is left in it.
    pub fn enter(self) -> Result<(), ViewError> {
        let failed = |what, path: &Path| error(what, path.to_owned());
        // What lies on the host is opened while its paths still mean the host's.
        let on_disk = crate::disks::is_disk(&self.root);
        let root = match on_disk {
            true => empty(),
            false => clone_mount(&self.root, true),
        }
        .map_err(failed("open", &self.root))?;
        let mut pieces = Vec::with_capacity(self.mounts.len());
        for place in self.mounts {
            let piece = place.source.as_ref().map(|source| {
                clone_mount(&source.path, source.recursive).map_err(failed("open", &source.path))
            });
            pieces.push((place, piece.transpose()?));
        }
        change_root(&root).map_err(failed("enter", &self.root))?;
        // From here on every path is one of the container's.
        let mut absent = Vec::new();
        for (place, piece) in &pieces {
            let failed = |source| ViewError {
                what: "mount",
                path: place.destination.clone(),
                source,
            };
            match piece {
                Some(mount) => attach(place, mount).map_err(failed)?,
                None => {
                    let processes = place.processes.then(proc).and_then(Result::ok);
                    let mount = processes.map_or_else(empty, Ok);
                    let mount = mount.map_err(io::Error::from).map_err(failed)?;
                    attach(place, &mount).map_err(failed)?;
                    absent.push(mount);
                }
            }
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        absent.extend(on_disk.then_some(root));
        absent
            .iter()
            .try_for_each(write_protect)
            .and_then(|()| mount_change("/", private))
            .map_err(failed("finish", &self.root))?;
        if self.read_only {
            remount_read_only(Path::new("/")).map_err(failed("write-protect", &self.root))?;
        }
        Ok(())
    }
}

fn error(what: &'static str, path: PathBuf) -> impl FnOnce(Errno) -> ViewError {
    move |source| ViewError {
        what,
        path,
        source: source.into(),
    }
}

/// A detached copy of the mount at a path, private: the copy of a shared mount would be shared with
/// it, so that what is mounted below it here would appear on the host.
fn clone_mount(path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = open_tree(CWD, path, flags)?;
    let private = MountChange {
        private: true,
        recursive,
        ..MountChange::default()
    };
    sys::change_mount(mount.as_fd(), private)?;
    Ok(mount)
}

/// Makes `root` the root of a mount namespace of the calling thread's own that holds nothing else.
fn change_root(root: &OwnedFd) -> Result<(), Errno> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    sys::unshare(UnshareFlags::NEWNS)?;
    mount_change("/", private)?;
    // Only what is mounted below the old root can take its place; any directory will do.
    let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(root, "", CWD, "/proc", whole)?;
    fchdir(root)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")
}

/// Stands for what exists in the guest only. Writable until the mount points in it are made.
fn empty() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", "guest")?;
    fsconfig_set_string(context.as_fd(), "mode", "755")?;
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, INERT)
}

/// Those of the caller's PID namespace. Root of a user's own namespace may not have them.
fn proc() -> Result<OwnedFd, Errno> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, INERT)
}

/// From now on nobody writes to the file system.
fn write_protect(mount: &OwnedFd) -> Result<(), Errno> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(mount, "", flags)?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    fsconfig_reconfigure(context.as_fd())
}

/// Attaches a detached mount where the container has it. The agent has made the mount points in
/// the root filesystem; those in what exists in the guest only are made here.
fn attach(place: &Place, mount: &OwnedFd) -> io::Result<()> {
    let destination = place.destination.as_path();
    let directory = FileType::from_raw_mode(fstat(mount)?.st_mode).is_dir();
    if !destination.try_exists()? {
        if directory {
            fs::create_dir_all(destination)?;
        } else {
            fs::create_dir_all(destination.parent().unwrap_or(destination))?;
            fs::File::create(destination)?;
        }
    }
    let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(mount, "", CWD, destination, whole)?;
    if place.source.as_ref().is_some_and(|source| source.read_only) {
        remount_read_only(destination)?;
    }
    Ok(())
}

fn remount_read_only(path: &Path) -> Result<(), Errno> {
    mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, c"")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does something in a thread that has entered the view, if this is root.
    fn inside<R: Send + 'static>(
        view: View,
        task: impl FnOnce() -> R + Send + 'static,
    ) -> Option<Result<R, ViewError>> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let thread = std::thread::spawn(move || {
            // Mounts are shared on most hosts, those of this test only with itself.
            sys::unshare(UnshareFlags::NEWNS).unwrap();
            for kind in [
                MountPropagationFlags::PRIVATE,
                MountPropagationFlags::SHARED,
            ] {
                mount_change("/", kind | MountPropagationFlags::REC).unwrap();
            }
            view.enter().map(|()| task())
        });
        Some(thread.join().unwrap())
    }

    fn names(path: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn bind(destination: &str, path: PathBuf, read_only: bool) -> Place {
        Place {
            destination: destination.into(),
            source: Some(Source {
                path,
                read_only,
                recursive: true,
            }),
            processes: false,
        }
    }

    fn of_the_guest(destination: &str) -> Place {
        Place {
            destination: destination.into(),
            source: None,
            processes: false,
        }
    }

    #[test]
    fn shows_the_containers_files_and_no_others() {
        let host = tempfile::tempdir().unwrap();
        let path = |name: &str| host.path().join(name);
        for directory in ["root/proc", "root/etc", "root/data", "volume"] {
            fs::create_dir_all(path(directory)).unwrap();
        }
        // Absolute links mean the container's root.
        std::os::unix::fs::symlink("/data", path("root/link")).unwrap();
        for file in ["root/etc/hosts", "hosts", "volume/kept"] {
            fs::write(path(file), file).unwrap();
        }
        let view = View {
            root: path("root"),
            read_only: false,
            mounts: vec![
                of_the_guest("/proc"),
                bind("/etc/hosts", path("hosts"), true),
                bind("/link", path("volume"), false),
                of_the_guest("/run"),
                bind("/run/inside/a/file", path("hosts"), false),
            ],
        };
        let Some(seen) = inside(view, || {
            assert_eq!(names("/"), ["data", "etc", "link", "proc", "run"]);
            assert_eq!(names("/proc"), [""; 0]);
            assert_eq!(fs::read_to_string("/etc/hosts").unwrap(), "hosts");
            let error = fs::write("/etc/hosts", "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            fs::write("/data/new", "new").unwrap();
            fs::write("/etc/new", "new").unwrap();
            let error = fs::write("/run/lost", "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            fs::read_to_string("/run/inside/a/file").unwrap()
        }) else {
            return;
        };
        assert_eq!(seen.unwrap(), "hosts");
        assert_eq!(fs::read_to_string(path("volume/new")).unwrap(), "new");
        assert_eq!(fs::read_to_string(path("root/etc/new")).unwrap(), "new");
        assert!(!path("root/data/new").exists());
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        assert!(!mounts.contains(host.path().to_str().unwrap()), "{mounts}");
    }

    #[test]
    fn what_the_guest_has_in_its_own_is_not_covered_again() {
        let places = [
            of_the_guest("/dev"),
            of_the_guest("/dev/pts"),
            bind("/dev/shm", "/shm".into(), false),
            of_the_guest("/dev/shm/deep"),
            of_the_guest("/device"),
        ];
        let kept: Vec<_> = without_nested(places.into_iter())
            .into_iter()
            .map(|place| place.destination)
            .collect();
        let expected = ["/dev", "/dev/shm", "/dev/shm/deep", "/device"];
        assert_eq!(kept, expected.map(PathBuf::from));
    }

    #[test]
    fn a_read_only_root_is_one() {
        let host = tempfile::tempdir().unwrap();
        let view = View {
            root: host.path().to_owned(),
            read_only: true,
            mounts: Vec::new(),
        };
        if let Some(written) = inside(view, || fs::write("/x", "x")) {
            let error = written.unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
    }

    #[test]
    fn a_root_on_a_disk_is_empty_but_for_the_mounts() {
        let host = tempfile::tempdir().unwrap();
        let image = host.path().join("image");
        fs::write(&image, "no directory").unwrap();
        fs::create_dir(host.path().join("volume")).unwrap();
        let view = View {
            root: image,
            read_only: false,
            mounts: vec![bind("/data", host.path().join("volume"), false)],
        };
        let task = || (names("/"), fs::write("/x", "x"), fs::write("/data/x", "x"));
        if let Some(seen) = inside(view, task) {
            let (names, root, volume) = seen.unwrap();
            assert_eq!(names, ["data"]);
            assert_eq!(root.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
            volume.unwrap();
        }
    }

    #[test]
    fn paths_that_are_no_texts_are_handed_over() {
        use std::os::unix::ffi::OsStrExt;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(b"/\xff"));
        let view = View {
            root: path.clone(),
            read_only: false,
            mounts: vec![bind("/data", path, true), of_the_guest("/proc")],
        };
        let line = serde_json::to_string(&view).unwrap();
        assert_eq!(serde_json::from_str::<View>(&line).unwrap(), view);
    }

    #[test]
    fn a_source_that_is_gone_is_named() {
        let host = tempfile::tempdir().unwrap();
        let view = View {
            root: host.path().to_owned(),
            read_only: false,
            mounts: vec![bind("/data", host.path().join("gone"), false)],
        };
        if let Some(entered) = inside(view, || ()) {
            let error = crate::error::chain(&entered.unwrap_err());
            assert!(error.contains("/gone: No such file"), "{error}");
        }
    }
}
