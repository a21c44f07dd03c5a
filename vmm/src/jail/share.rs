//! The share's tree: pieces of the host's file system as detached mounts, later attached in the
//! jail. On the host nothing is ever mounted.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};

use super::{JailError, attach};
use crate::config::{FRAME_MODE, ShareConfig, ShareEntry};
use crate::sys;

/// One piece.
#[derive(Debug)]
struct Piece {
    mount: OwnedFd,
    /// Its name, in a directory at the target.
    name: Option<String>,
    /// A directory; else a file.
    directory: bool,
    read_only: bool,
}

/// All pieces by target, parents before children.
#[derive(Debug)]
pub struct ShareTree(BTreeMap<String, Piece>);

/// Opens the sources and checks the targets.
pub fn open(share: &ShareConfig) -> Result<ShareTree, JailError> {
    check_targets(&share.entries)?;
    let mut pieces = BTreeMap::new();
    for entry in &share.entries {
        let mount = detached(&entry.source, entry.recursive)?;
        let stat = fstat(&mount).map_err(|error| source(&entry.source)(error))?;
        let piece = Piece {
            mount,
            name: entry.name.clone(),
            directory: FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
            read_only: entry.read_only,
        };
        pieces.insert(entry.target.clone(), piece);
    }
    Ok(ShareTree(pieces))
}

fn source(path: &Path) -> impl Fn(Errno) -> JailError {
    move |error| match error {
        Errno::PERM => JailError::NotPermitted("share files with a guest", error.into()),
        _ => JailError::Source {
            path: path.to_owned(),
            source: error.into(),
        },
    }
}

/// A private copy of the mount at `path`, attached nowhere.
pub(crate) fn detached(path: &Path, recursive: bool) -> Result<OwnedFd, JailError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags).map_err(source(path))
}

/// Plain names joined by `/`, none of them inside another: a mount point is made in the jail's own
/// root and never in a directory of the host.
fn check_targets(entries: &[ShareEntry]) -> Result<(), JailError> {
    let bad = |target: &str, why| Err(JailError::Target(target.to_owned(), why));
    for entry in entries {
        let plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
        if !entry.target.split('/').all(plain) {
            return bad(&entry.target, "plain names joined by / are needed");
        }
        if let Some(name) = &entry.name
            && (!plain(name) || name.contains('/'))
        {
            return bad(&entry.place(), "the name in the frame is no plain one");
        }
    }
    // Compared by names, so that "a/b" follows "a" directly and "a-b" does not come between.
    let mut sorted: Vec<Vec<&str>> = entries
        .iter()
        .map(|entry| entry.target.split('/').collect())
        .collect();
    sorted.sort();
    for pair in sorted.windows(2) {
        if pair[1].starts_with(&pair[0]) {
            return bad(&pair[1].join("/"), "it lies at or in another target");
        }
    }
    Ok(())
}

impl ShareTree {
    /// Attaches all pieces below `share` in the jail's root.
    pub(super) fn attach(self, root: BorrowedFd<'_>) -> Result<(), JailError> {
        for (target, piece) in self.0 {
            attach_one(root, &target, &piece)
                .map_err(|source| JailError::Attach { target, source })?;
        }
        Ok(())
    }
}

fn attach_one(root: BorrowedFd<'_>, target: &str, piece: &Piece) -> io::Result<()> {
    let mut path = format!("share/{target}");
    for (end, _) in path.match_indices('/').skip(1) {
        make_directory(root, &path[..end])?;
    }
    if let Some(name) = &piece.name {
        let mode = if piece.directory { FRAME_MODE } else { 0o755 };
        mkdirat(root, &*path, Mode::from(mode))?;
        path = format!("{path}/{name}");
    }
    if piece.directory {
        make_directory(root, &path)?;
    } else {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        openat(root, &*path, flags | OFlags::RDONLY, Mode::from(0o644))?;
    }
    let attributes = if piece.read_only {
        MountAttrFlags::MOUNT_ATTR_RDONLY
    } else {
        MountAttrFlags::empty()
    };
    sys::restrict_mount(piece.mount.as_fd(), attributes)?;
    attach(&piece.mount, root, &path)?;
    Ok(())
}

/// Parents are shared between targets.
fn make_directory(root: BorrowedFd<'_>, path: &str) -> Result<(), Errno> {
    match mkdirat(root, path, Mode::from(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(targets: &[&str]) -> bool {
        let entries: Vec<_> = targets
            .iter()
            .map(|target| ShareEntry {
                source: "/".into(),
                target: (*target).to_owned(),
                name: None,
                read_only: false,
                recursive: false,
            })
            .collect();
        check_targets(&entries).is_ok()
    }

    #[test]
    fn targets_are_plain_names() {
        assert!(check(&[]));
        assert!(check(&["a", "b/c", "b/d"]));
        for bad in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a\0"] {
            assert!(!check(&[bad]), "{bad:?}");
        }
    }

    #[test]
    fn names_in_frames_are_plain() {
        let check = |name: &str| {
            let entry = ShareEntry {
                source: "/".into(),
                target: "a".to_owned(),
                name: Some(name.to_owned()),
                read_only: false,
                recursive: false,
            };
            check_targets(&[entry])
        };
        for good in ["etc", " ", "a\nb", "...", "-", &"x".repeat(255)] {
            assert!(check(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "/", "a/b", "../a", "a\0"] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn targets_do_not_nest() {
        assert!(!check(&["a", "a"]));
        assert!(!check(&["a/b", "a-b", "a"]));
        assert!(check(&["a/b", "a-b", "ab"]));
    }
}
