//! The library's file system behind an `Arc`, so that this process can ask it as well as the guest.
//! What the guest asks is passed on as it is, but for files without a name, which are `unnamed`'s.

mod frames;
mod requests;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::{AtFlags, OFlags};
use rustix::io::fcntl_dupfd_cloexec;
use virtiofsd::filesystem::{Context, Entry, FileSystem, OpenOptions, ZeroCopyWriter};
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

use super::delegations::{Delegations, may_wait};
use super::recent::Recent;
use super::unnamed::{self, Handle, Place, UnnamedFiles};
use super::unnamed_file::{Opened, attributes_of};
use crate::threads::locked;

/// The file system.
#[derive(Clone)]
pub(super) struct Tree {
    files: Arc<PassthroughFs>,
    unnamed: Arc<UnnamedFiles>,
    /// How long the guest may believe what it is told of an unnamed file.
    validity: Duration,
    /// Something that is shared lies on a file system that is not local.
    far: Arc<AtomicBool>,
    delegations: Arc<Mutex<Delegations>>,
    recent: Arc<Mutex<Recent>>,
}

impl Tree {
    pub(super) fn new(files: PassthroughFs, unnamed: UnnamedFiles, validity: Duration) -> Self {
        Self {
            files: Arc::new(files),
            unnamed: Arc::new(unnamed),
            validity,
            far: Arc::default(),
            delegations: Arc::default(),
            recent: Arc::default(),
        }
    }

    /// Files that the guest has for itself.
    pub(super) fn delegations(&self) -> MutexGuard<'_, Delegations> {
        locked(&self.delegations)
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        locked(&self.recent)
    }

    /// Removes a name. The library looks at it first, for the sake of a snapshot that is being taken at the same
    /// time, which is never so here.
    fn remove(&self, context: Context, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let known = self.recent().directory(parent);
        let directory = match known {
            Some(directory) => directory,
            None => match self.open_node(parent) {
                Ok(directory) => {
                    let directory = Arc::new(directory);
                    self.recent().keep_directory(parent, directory.clone());
                    directory
                }
                // It may be written to, but not read.
                Err(_) if flags.contains(AtFlags::REMOVEDIR) => {
                    return self.files.rmdir(context, parent, name);
                }
                Err(_) => return self.files.unlink(context, parent, name),
            },
        };
        Ok(rustix::fs::unlinkat(&directory, name, flags)?)
    }

    /// Opens a file for the guest. Who has it for itself is asked for it by that, but not waited for: the guest
    /// tries again (guest-kernel/patches/0011). What is opened for writing is opened for reading as well, if that
    /// may be: the guest may have to read what it writes a part of.
    fn open_with<T>(flags: u32, open: impl Fn(u32) -> io::Result<T>) -> io::Result<T> {
        let [access, write_only, both] =
            [libc::O_ACCMODE, libc::O_WRONLY, libc::O_RDWR].map(i32::unsigned_abs);
        // Of a directory, O_TMPFILE would make the library's open a new file.
        let flags = flags & !(libc::O_TMPFILE & !libc::O_DIRECTORY).unsigned_abs();
        let flags = flags | libc::O_NONBLOCK.unsigned_abs();
        if flags & access == write_only {
            match open(flags & !access | both) {
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                opened => return opened,
            }
        }
        open(flags)
    }

    /// To be called before a node is opened for the server's own use, which would wait for the guest if that has
    /// the file for itself, by this node or by another one.
    fn make_way(&self, node: u64) {
        let mut delegations = self.delegations();
        delegations.take_back(node);
        if !delegations.are_given() {
            return;
        }
        let Ok(Place::Library(node)) = self.unnamed.place(node) else {
            return;
        };
        let context = of_this_process();
        let flags = (libc::O_RDWR | libc::O_NONBLOCK).unsigned_abs();
        match self.files.open(context, node, false, flags) {
            Ok((Some(handle), _)) => {
                // Fails for handles that are not there.
                let _ = self
                    .files
                    .release(context, node, 0, handle, false, false, None);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                delegations.take_back_wanted();
            }
            _ => {}
        }
    }

    /// Opens a node that the guest knows for reading; files and directories only.
    pub(super) fn open_node(&self, node: u64) -> io::Result<OwnedFd> {
        self.make_way(node);
        let context = of_this_process();
        let node = match self.unnamed.place(node)? {
            Place::Library(node) => node,
            Place::Unnamed(file) => return file.open(OFlags::RDONLY, false),
        };
        let (handle, directory) = match self.files.opendir(context, node, 0) {
            Ok((handle, _)) => (handle, true),
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {
                (self.files.open(context, node, false, 0)?.0, false)
            }
            Err(error) => return Err(error),
        };
        let handle = handle.ok_or(io::ErrorKind::NotFound)?;
        let descriptor = self.descriptor(Handle::Library(node), handle);
        let closed = if directory {
            self.files.releasedir(context, node, 0, handle)
        } else {
            let release = (false, false, None);
            self.files
                .release(context, node, 0, handle, release.0, release.1, release.2)
        };
        let descriptor = descriptor?;
        closed.and(Ok(descriptor))
    }

    /// A file was just made in a directory, and nobody else has it: gives it to the guest, if that may be.
    pub(super) fn give(&self, directory: u64, node: u64, handle: u64, flags: u32) -> bool {
        if !may_wait(OFlags::from_bits_retain(flags)) {
            return false;
        }
        let Ok(file) = self.descriptor(Handle::Library(node), handle) else {
            return false;
        };
        self.delegations().give(directory, node, handle, file)
    }

    /// The guest tells all that it has of a file, and returns it: `work` makes that known to the host.
    pub(super) fn finish(
        &self,
        node: u64,
        handle: u64,
        close: bool,
        work: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<Attr> {
        // Returned at the end: until then others wait.
        let given = self.delegations().take(node, handle);
        let work = |file: BorrowedFd<'_>| work(file).and_then(|()| attributes_of(file));
        let done = match &given {
            Some(given) => work(given.file()),
            // It was taken back meanwhile, or the guest was restored.
            None => self
                .unnamed
                .handle(node, handle)
                .and_then(|of| self.descriptor(of, handle))
                .and_then(|file| work(file.as_fd())),
        };
        if close {
            let context = of_this_process();
            self.release(context, node, 0, handle, false, false, None)?;
            if let Some(given) = given {
                given.end_with_file();
            }
        }
        done
    }

    /// How long the guest may believe what it is told of a file.
    pub(super) fn validity(&self) -> Duration {
        self.validity
    }

    /// A descriptor of an open file.
    fn descriptor(&self, of: Handle, handle: u64) -> io::Result<OwnedFd> {
        let node = match of {
            Handle::Library(node) => node,
            Handle::Unnamed(opened) => return Ok(opened.file().try_clone()?.into()),
        };
        let mut descriptor = Look::new(|file| Ok(fcntl_dupfd_cloexec(file, 0)?));
        let context = of_this_process();
        self.files
            .read(context, node, handle, &mut descriptor, 0, 0, None, 0)?;
        descriptor
            .seen
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Makes a file without a name in a directory (O_TMPFILE), and opens it.
    pub(super) fn create_unnamed(
        &self,
        directory: u64,
        request: &unnamed::Request,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let directory = self.open_node(directory)?;
        let made = self.unnamed.make(directory.as_fd(), request)?;
        let entry = Entry {
            inode: made.node,
            generation: 0,
            attr: made.attributes,
            attr_timeout: self.validity,
            entry_timeout: self.validity,
        };
        let options = self.unnamed_options(&made.opened, request.flags);
        Ok((entry, Some(made.handle), options))
    }

    fn unnamed_options(&self, opened: &Opened, flags: u32) -> OpenOptions {
        let kind = rustix::fs::fstatfs(opened.file()).map(|known| known.f_type);
        let local = kind.is_ok_and(|kind| LOCAL.contains(&kind));
        self.note(local);
        let options = OpenOptions::KEEP_CACHE;
        if local || is_read_only(flags) {
            options | OpenOptions::NOFLUSH
        } else {
            options
        }
    }

    /// An entry with the guest's own number for the file.
    fn as_known(&self, context: Context, entry: Entry) -> Entry {
        match self.unnamed.refer(entry.inode) {
            Some(inode) => {
                // The library counts one reference for all of the guest's.
                self.files.forget(context, entry.inode, 1);
                Entry { inode, ..entry }
            }
            None => entry,
        }
    }

    /// Whether the host calls the node so in a directory that is watched, though that is no name in it.
    fn is_called(&self, node: u64, name: &CStr) -> bool {
        unnamed::is_ours(node)
            && self.attributes(node).is_ok_and(|known| {
                // d_mark_tmpfile() of the host's kernel
                name.to_bytes() == format!("#{}", known.ino).as_bytes()
            })
    }

    /// A handle that may serve to change the file's attributes.
    fn note_opened(&self, node: u64, handle: Option<u64>, flags: u32) {
        if let Some(handle) = handle.filter(|_| !is_read_only(flags)) {
            self.recent().opened(node, handle);
        }
    }

    /// Spares the guest a request at each close where it can tell nothing: of files that are only
    /// read, and where the host's file system has told all at the write.
    fn with_flushing(
        &self,
        options: OpenOptions,
        node: u64,
        handle: Option<u64>,
        flags: u32,
    ) -> OpenOptions {
        if is_read_only(flags) || handle.is_some_and(|handle| self.closes_silently(node, handle)) {
            options | OpenOptions::NOFLUSH
        } else {
            options
        }
    }

    fn closes_silently(&self, node: u64, handle: u64) -> bool {
        let mut kind = Look::new(|file| Ok(rustix::fs::fstatfs(file)?.f_type));
        let context = of_this_process();
        let asked = self
            .files
            .read(context, node, handle, &mut kind, 0, 0, None, 0);
        let local = asked.is_ok() && kind.seen.is_some_and(|kind| LOCAL.contains(&kind));
        self.note(local);
        local
    }

    /// Whether everything that is known to be shared lies on local file systems. Others may make who
    /// asks wait for ever.
    pub(super) fn is_near(&self) -> bool {
        !self.far.load(Ordering::Relaxed)
    }

    fn note(&self, local: bool) {
        if !local {
            self.far.store(true, Ordering::Relaxed);
        }
    }

    /// A mount within the share is found: notes what kind of file system that is.
    fn note_mount(&self, entry: &Entry) {
        if entry.attr.flags & ATTR_SUBMOUNT != 0 {
            let kind = self
                .open_node(entry.inode)
                .and_then(|directory| Ok(rustix::fs::fstatfs(&directory)?.f_type));
            self.note(kind.is_ok_and(|kind| LOCAL.contains(&kind)));
        }
    }

    /// What is known of a node.
    pub(super) fn attributes(&self, node: u64) -> io::Result<Attr> {
        Ok(self.getattr(of_this_process(), node, None)?.0)
    }

    /// Whether a name in a directory is this node.
    pub(super) fn is_at(&self, node: u64, directory: u64, name: &CStr) -> bool {
        let context = of_this_process();
        if self.is_called(node, name) {
            return true;
        }
        let Ok(entry) = self.files.lookup(context, directory, name) else {
            return false;
        };
        let known = self.unnamed.known_as(entry.inode);
        // A lookup is a reference, which the guest knows nothing of.
        self.files.forget(context, entry.inode, 1);
        known == node
    }
}

fn is_read_only(flags: u32) -> bool {
    flags & libc::O_ACCMODE.unsigned_abs() == libc::O_RDONLY.unsigned_abs()
}

fn of_this_process() -> Context {
    Context {
        uid: 0.into(),
        gid: 0.into(),
        pid: 0,
    }
}

/// Looks at the file that the library would read from: its way to give one out.
struct Look<T> {
    at: fn(&File) -> io::Result<T>,
    seen: Option<T>,
}

impl<T> Look<T> {
    fn new(at: fn(&File) -> io::Result<T>) -> Self {
        Self { at, seen: None }
    }
}

impl<T> ZeroCopyWriter for &mut Look<T> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _: usize,
        _: u64,
        _: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        self.seen = Some((self.at)(file)?);
        Ok(0)
    }
}

/// Local file systems, statfs(2): ext4, XFS, btrfs, tmpfs, overlayfs (whose upper directory is local),
/// F2FS, ZFS, bcachefs. Those of a network may have something to say when a file is closed.
const LOCAL: [i64; 8] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    0x0102_1994,
    0x794c_7630,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];
