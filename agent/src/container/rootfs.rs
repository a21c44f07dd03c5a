//! Paths inside of a tree that an attacker has made: every lookup starts at the tree's root and
//! cannot leave it, whatever symbolic links it meets. Owns lookups and the making of mount points;
//! knows no mounts.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Component, Path},
};

use rustix::{
    fs::{self, FileType, Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// How many symbolic links a lookup follows, as in the kernel.
const MAX_LINKS: usize = 40;

const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// What to make where a path ends in nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Nothing: the lookup fails.
    Fail,
    /// An empty file, and directories above it.
    File,
    /// Directories.
    Directory,
}

/// A directory tree whose content is not trusted.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// The tree below an open directory.
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root }
    }

    /// The root itself.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens (O_PATH) what the path leads to inside of the tree, links included.
    pub(super) fn open(&self, path: &Path) -> io::Result<OwnedFd> {
        self.lookup(path, Missing::Fail)
    }

    /// Like [`Tree::open`], and makes what is missing.
    pub(super) fn lookup(&self, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
        let inside = relative(path);
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match fs::openat2(&self.root, &*inside, PATH_ONLY, Mode::empty(), how) {
            Ok(found) => Ok(found),
            // EAGAIN: something moved meanwhile. ELOOP: a magic link, which the walk takes for
            // the text that it shows.
            Err(Errno::AGAIN | Errno::LOOP) => self.walk(path, missing),
            Err(Errno::NOENT) if missing != Missing::Fail => self.walk(path, missing),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory that holds the last component of the path (made if missing) and that
    /// component, not followed.
    pub(super) fn parent<'p>(&self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        Ok((self.lookup(parent, Missing::Directory)?, name))
    }

    /// Looks a path up one component at a time. `..` goes back the way that was come, so that no
    /// directory moved meanwhile can lead out of the tree.
    fn walk(&self, path: &Path, missing: Missing) -> io::Result<OwnedFd> {
        let mut way: Vec<OwnedFd> = Vec::new();
        let mut pending = reversed(path);
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == ".." {
                way.pop();
                continue;
            }
            let here = way.last().unwrap_or(&self.root).as_fd();
            let found = match fs::openat(here, &*name, PATH_ONLY | OFlags::NOFOLLOW, Mode::empty())
            {
                Err(Errno::NOENT) if missing != Missing::Fail => {
                    make(here, &name, pending.is_empty() && missing == Missing::File)?;
                    pending.push(name);
                    continue;
                }
                found => found?,
            };
            if FileType::from_raw_mode(fs::fstat(&found)?.st_mode) != FileType::Symlink {
                way.push(found);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP.into());
            }
            let target = fs::readlinkat(here, &*name, Vec::new())?;
            let target = OsString::from_vec(target.into_bytes());
            if target.as_bytes().starts_with(b"/") {
                way.clear();
            }
            pending.extend(reversed(Path::new(&target)));
        }
        match way.pop() {
            Some(found) => Ok(found),
            None => Ok(fs::openat(&self.root, ".", PATH_ONLY, Mode::empty())?),
        }
    }
}

fn make(directory: BorrowedFd<'_>, name: &OsStr, file: bool) -> io::Result<()> {
    let made = if file {
        let how = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        fs::openat(directory, name, how, Mode::from_raw_mode(0o644)).map(drop)
    } else {
        fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))
    };
    match made {
        // Somebody else was quicker: the walk looks at what there is now.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The path relative to the root, "." for the root itself.
fn relative(path: &Path) -> std::borrow::Cow<'_, Path> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    if inside.as_os_str().is_empty() {
        Path::new(".").into()
    } else {
        inside.into()
    }
}

/// The components, the last first, without the root and ".".
fn reversed(path: &Path) -> Vec<OsString> {
    path.components()
        .rev()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Fixture {
        top: std::path::PathBuf,
    }

    impl Fixture {
        /// `<top>/outside` must stay empty, `<top>/root` is the tree.
        fn new(name: &str) -> Self {
            let top = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
            std::fs::create_dir_all(top.join("root")).expect("made");
            std::fs::create_dir_all(top.join("outside")).expect("made");
            Self { top }
        }

        fn tree(&self) -> Tree {
            let root = fs::open(self.top.join("root"), PATH_ONLY, Mode::empty()).expect("opened");
            Tree::new(root)
        }

        fn link(&self, target: &str, at: &str) {
            symlink(target, self.top.join("root").join(at)).expect("linked");
        }

        fn assert_confined(&self) {
            let outside = std::fs::read_dir(self.top.join("outside")).expect("read");
            assert_eq!(outside.count(), 0, "something was made outside of the tree");
            let top = std::fs::read_dir(&self.top).expect("read");
            assert_eq!(top.count(), 2, "something was made beside the tree");
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.top);
        }
    }

    #[test]
    fn missing_directories_and_files_are_made() {
        let fixture = Fixture::new("made");
        let tree = fixture.tree();
        tree.lookup(Path::new("/a/b/c"), Missing::Directory)
            .expect("directory");
        tree.lookup(Path::new("/a/b/f"), Missing::File)
            .expect("file");
        assert!(fixture.top.join("root/a/b/c").is_dir());
        assert!(fixture.top.join("root/a/b/f").is_file());
        assert!(tree.open(Path::new("/nothing")).is_err());
    }

    #[test]
    fn links_do_not_lead_out() {
        let fixture = Fixture::new("links");
        let outside = fixture.top.join("outside");
        let outside = outside.to_str().expect("text");
        fixture.link(outside, "absolute");
        fixture.link("../outside", "relative");
        fixture.link("../../../../../../../../", "up");
        fixture.link("/proc/self/root", "magic");
        let tree = fixture.tree();
        for path in [
            "/absolute/x",
            "/relative/x",
            "/up/x",
            "/magic/x",
            "/../../outside/x",
        ] {
            tree.lookup(Path::new(path), Missing::File)
                .unwrap_or_else(|e| panic!("{path}: {e}"));
        }
        fixture.assert_confined();
    }

    #[test]
    fn dangling_links_are_followed_inside() {
        let fixture = Fixture::new("dangling");
        std::fs::create_dir(fixture.top.join("root/etc")).expect("made");
        fixture.link("../run/systemd/resolv.conf", "etc/resolv.conf");
        let tree = fixture.tree();
        tree.lookup(Path::new("/etc/resolv.conf"), Missing::File)
            .expect("made");
        assert!(fixture.top.join("root/run/systemd/resolv.conf").is_file());
        fixture.assert_confined();
    }

    #[test]
    fn loops_end() {
        let fixture = Fixture::new("loops");
        fixture.link("loop", "loop");
        let error = fixture
            .tree()
            .lookup(Path::new("/loop/x"), Missing::Directory)
            .expect_err("loop");
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }
}
