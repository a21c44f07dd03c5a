//! The library's file system behind an `Arc`, so that this process can ask it as well as the guest.
//! Everything that the guest asks is passed on as it is.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::fcntl_dupfd_cloexec;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr, SetattrIn};
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

/// The file system.
#[derive(Clone)]
pub(super) struct Tree {
    files: Arc<PassthroughFs>,
    /// Something that is shared lies on a file system that is not local.
    far: Arc<AtomicBool>,
}

impl Tree {
    pub(super) fn new(files: PassthroughFs) -> Self {
        Self {
            files: Arc::new(files),
            far: Arc::default(),
        }
    }

    /// Opens a node that the guest knows for reading; files and directories only.
    pub(super) fn open_node(&self, node: u64) -> io::Result<OwnedFd> {
        let context = of_this_process();
        let (handle, directory) = match self.files.opendir(context, node, 0) {
            Ok((handle, _)) => (handle, true),
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {
                (self.files.open(context, node, false, 0)?.0, false)
            }
            Err(error) => return Err(error),
        };
        let handle = handle.ok_or(io::ErrorKind::NotFound)?;
        let mut descriptor = Look::new(|file| Ok(fcntl_dupfd_cloexec(file, 0)?));
        let read = self
            .files
            .read(context, node, handle, &mut descriptor, 0, 0, None, 0);
        let closed = if directory {
            self.files.releasedir(context, node, 0, handle)
        } else {
            let release = (false, false, None);
            self.files
                .release(context, node, 0, handle, release.0, release.1, release.2)
        };
        read.and(closed)?;
        descriptor
            .seen
            .ok_or_else(|| io::ErrorKind::NotFound.into())
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
        let read_only = flags & libc::O_ACCMODE.unsigned_abs() == libc::O_RDONLY.unsigned_abs();
        if read_only || handle.is_some_and(|handle| self.closes_silently(node, handle)) {
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
        Ok(self.files.getattr(of_this_process(), node, None)?.0)
    }

    /// Whether a name in a directory is this node.
    pub(super) fn is_at(&self, node: u64, directory: u64, name: &CStr) -> bool {
        let context = of_this_process();
        let Ok(entry) = self.files.lookup(context, directory, name) else {
            return false;
        };
        // A lookup is a reference, which the guest knows nothing of.
        self.files.forget(context, entry.inode, 1);
        entry.inode == node
    }
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

/// Methods that pass on to the library: each with the names of its arguments.
macro_rules! pass_on {
    ($($name:ident $(<$generic:ident: $bound:ident>)? (&self $(, $argument:ident: $kind:ty)*) $(-> $result:ty)?;)*) => {
        $(fn $name $(<$generic: $bound>)? (&self $(, $argument: $kind)*) $(-> $result)? {
            self.files.$name($($argument),*)
        })*
    };
}

#[allow(clippy::too_many_arguments)]
impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.files.open(ctx, inode, kill_priv, flags)?;
        Ok((handle, self.with_flushing(options, inode, handle, flags)))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let created = self
            .files
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions);
        let (entry, handle, options) = created?;
        let options = self.with_flushing(options, entry.inode, handle, flags);
        Ok((entry, handle, options))
    }

    /// Files are made as the user who asks, whom the guest has judged. It may know of capabilities that
    /// the host cannot (those of a user namespace over this user's directories), so the right to write
    /// anywhere stays with the thread that serves: the library keeps it for guests that do not tell
    /// supplementary groups.
    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.files
            .init(capable.difference(FsOptions::CREATE_SUPP_GROUP))
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.files.lookup(ctx, parent, name)?;
        self.note_mount(&entry);
        Ok(entry)
    }

    pass_on! {
        destroy(&self);
        forget(&self, ctx: Context, inode: u64, count: u64);
        batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>);
        getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)>;
        setattr(&self, ctx: Context, inode: u64, attr: SetattrIn, handle: Option<u64>, valid: SetattrValid) -> io::Result<(Attr, Duration)>;
        readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>>;
        symlink(&self, ctx: Context, target: &CStr, parent: u64, name: &CStr, extensions: Extensions) -> io::Result<Entry>;
        mknod(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        mkdir(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        rename(&self, ctx: Context, old: u64, old_name: &CStr, new: u64, new_name: &CStr, flags: u32) -> io::Result<()>;
        link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry>;
        read<W: ZeroCopyWriter>(&self, ctx: Context, inode: u64, handle: u64, writer: W, size: u32, offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        write<R: ZeroCopyReader>(&self, ctx: Context, inode: u64, handle: u64, reader: R, size: u32, offset: u64, lock_owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32) -> io::Result<usize>;
        flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()>;
        fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        fallocate(&self, ctx: Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        release(&self, ctx: Context, inode: u64, flags: u32, handle: u64, flush: bool, flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64>;
        setxattr(&self, ctx: Context, inode: u64, name: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags) -> io::Result<()>;
        getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply>;
        removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()>;
        opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)>;
        readdir(&self, ctx: Context, inode: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()>;
        access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()>;
        lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64>;
        copyfilerange(&self, ctx: Context, inode_in: u64, handle_in: u64, offset_in: u64, inode_out: u64, handle_out: u64, offset_out: u64, len: u64, flags: u64) -> io::Result<usize>;
        syncfs(&self, ctx: Context, inode: u64) -> io::Result<()>;
    }
}

impl SerializableFileSystem for Tree {
    pass_on! {
        prepare_serialization(&self, cancel: Arc<AtomicBool>);
        serialize(&self, state: File) -> io::Result<()>;
        deserialize_and_apply(&self, state: File) -> io::Result<()>;
    }
}
