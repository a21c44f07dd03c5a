//! What the guest asks of the tree: the library does it, but for files without a name.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::AtFlags;
use rustix::io::Errno;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ROOT_ID, SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;

use super::super::unnamed::{self, Handle, Place};
use super::{Tree, is_read_only};

/// Methods that pass on to the library: each with the names of its arguments.
macro_rules! pass_on {
    ($($name:ident(&self $(, $argument:ident: $kind:ty)*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self $(, $argument: $kind)*) $(-> $result)? {
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
        match self.unnamed.place(inode)? {
            Place::Library(node) => {
                let open = |flags| self.files.open(ctx, node, kill_priv, flags);
                let (handle, options) = Self::open_with(flags, open)?;
                self.note_opened(inode, handle, flags);
                Ok((handle, self.with_flushing(options, node, handle, flags)))
            }
            Place::Unnamed(file) => {
                let (handle, opened) = self.unnamed.open(inode, &file, kill_priv, flags)?;
                Ok((Some(handle), self.unnamed_options(&opened, flags)))
            }
        }
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
        let (entry, handle, options) = Self::open_with(flags, |flags| {
            let extensions = extensions.clone();
            self.files
                .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
        })?;
        // What is made in a directory is on its file system; what was there before may be a mount.
        let is_new = flags & libc::O_EXCL.unsigned_abs() != 0;
        let options = if is_new && self.recent().is_local(parent) {
            options | OpenOptions::NOFLUSH
        } else {
            self.with_flushing(options, entry.inode, handle, flags)
        };
        if is_new && options.contains(OpenOptions::NOFLUSH) && !is_read_only(flags) {
            self.recent().note_local(parent);
        }
        let entry = self.as_known(ctx, entry);
        self.note_opened(entry.inode, handle, flags);
        Ok((entry, handle, options))
    }

    /// Files are made as the user who asks, whom the guest has judged. It may know of capabilities that
    /// the host cannot (those of a user namespace over this user's directories), so the right to write
    /// anywhere stays with the thread that serves: the library keeps it for guests that do not tell
    /// supplementary groups.
    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.unnamed.clear();
        self.recent().clear();
        self.files
            .init(capable.difference(FsOptions::CREATE_SUPP_GROUP))
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let mut entry = self.files.lookup(ctx, parent, name)?;
        self.note_mount(&entry);
        self.settle_frame(parent, &mut entry);
        Ok(self.as_known(ctx, entry))
    }

    fn destroy(&self) {
        self.unnamed.clear();
        self.recent().clear();
        self.files.destroy();
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.recent().forgotten(inode);
        if let Some((node, count)) = self.unnamed.forget(inode, count) {
            self.files.forget(ctx, node, count);
        }
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let told = requests.into_iter().filter_map(|(inode, count)| {
            self.recent().forgotten(inode);
            self.unnamed.forget(inode, count)
        });
        self.files.batch_forget(ctx, told.collect());
    }

    /// The file's first name makes it one of the library's.
    fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let file = match self.unnamed.place(inode)? {
            Place::Library(node) => {
                let entry = self.files.link(ctx, node, parent, name)?;
                return Ok(self.as_known(ctx, entry));
            }
            Place::Unnamed(file) => file,
        };
        file.link(self.open_node(parent)?.as_fd(), name)?;
        let entry = self.files.lookup(ctx, parent, name)?;
        // Somebody on the host may have put another there meanwhile.
        if entry.attr.ino != file.attributes()?.ino {
            return Ok(entry);
        }
        self.unnamed.has_been_linked(inode, entry.inode);
        Ok(Entry { inode, ..entry })
    }

    fn getattr(
        &self,
        ctx: Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(Attr, Duration)> {
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.getattr(ctx, node, handle),
            Place::Unnamed(file) => Ok((file.attributes()?, self.validity)),
        }
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if handle.is_none() && valid.contains(SetattrValid::SIZE) {
            self.make_way(inode);
        }
        match self.unnamed.place(inode)? {
            Place::Library(node) => {
                let handle = handle
                    .filter(|handle| !unnamed::is_ours(*handle))
                    .or_else(|| self.recent().handle(inode));
                self.files.setattr(ctx, node, attr, handle, valid)
            }
            Place::Unnamed(file) => {
                file.set_attributes(attr, valid)?;
                Ok((file.attributes()?, self.validity))
            }
        }
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.statfs(ctx, node),
            Place::Unnamed(file) => {
                let mut known = self.files.statfs(ctx, ROOT_ID)?;
                file.file_system(&mut known)?;
                Ok(known)
            }
        }
    }

    fn access(&self, ctx: Context, inode: u64, mask: u32) -> io::Result<()> {
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.access(ctx, node, mask),
            // The guest's kernel decides that by itself.
            Place::Unnamed(_) => Ok(()),
        }
    }

    // The library opens the file for these.

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        self.make_way(inode);
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.setxattr(ctx, node, name, value, flags, extra),
            Place::Unnamed(file) => file.set_attribute(name, value, flags, extra),
        }
    }

    fn getxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.make_way(inode);
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.getxattr(ctx, node, name, size),
            Place::Unnamed(file) => file.attribute(name, size),
        }
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.make_way(inode);
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.listxattr(ctx, node, size),
            Place::Unnamed(file) => file.attribute_names(size),
        }
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.make_way(inode);
        match self.unnamed.place(inode)? {
            Place::Library(node) => self.files.removexattr(ctx, node, name),
            Place::Unnamed(file) => file.remove_attribute(name),
        }
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        writer: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self
                .files
                .read(ctx, node, handle, writer, size, offset, lock_owner, flags),
            Handle::Unnamed(opened) => opened.read(writer, size, offset),
        }
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        reader: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self.files.write(
                ctx, node, handle, reader, size, offset, lock_owner, delayed, kill_priv, flags,
            ),
            Handle::Unnamed(opened) => {
                let append = !delayed && flags & libc::O_APPEND.unsigned_abs() != 0;
                opened.write(reader, size, offset, append, kill_priv)
            }
        }
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self.files.flush(ctx, node, handle, lock_owner),
            // Not asked for on a local file system; elsewhere it tells as much as a close does.
            Handle::Unnamed(opened) => opened.sync(true),
        }
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self.files.fsync(ctx, node, datasync, handle),
            Handle::Unnamed(opened) => opened.sync(datasync),
        }
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self
                .files
                .fallocate(ctx, node, handle, mode, offset, length),
            Handle::Unnamed(opened) => opened.allocate(mode, offset, length),
        }
    }

    fn lseek(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        match self.unnamed.handle(inode, handle)? {
            Handle::Library(node) => self.files.lseek(ctx, node, handle, offset, whence),
            Handle::Unnamed(opened) => opened.seek(offset, whence),
        }
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.delegations().closed(handle);
        self.recent().closed(handle);
        if self.unnamed.release(inode, handle) {
            return Ok(());
        }
        let Place::Library(node) = self.unnamed.place(inode)? else {
            return Err(Errno::BADF.into());
        };
        self.files
            .release(ctx, node, flags, handle, flush, flock_release, lock_owner)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let from = self.unnamed.handle(inode_in, handle_in)?;
        let to = self.unnamed.handle(inode_out, handle_out)?;
        if let (Handle::Library(from), Handle::Library(to)) = (&from, &to) {
            return self.files.copyfilerange(
                ctx, *from, handle_in, offset_in, *to, handle_out, offset_out, len, flags,
            );
        }
        if flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let from = self.descriptor(from, handle_in)?;
        let to = self.descriptor(to, handle_out)?;
        let (mut offset_in, mut offset_out) = (offset_in, offset_out);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (offset_in, offset_out) = (Some(&mut offset_in), Some(&mut offset_out));
        Ok(rustix::fs::copy_file_range(
            from, offset_in, to, offset_out, len,
        )?)
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(ctx, parent, name, AtFlags::empty())
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(ctx, parent, name, AtFlags::REMOVEDIR)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        match self.frame(inode) {
            Some(frame) => self.sync_piece(inode, frame),
            None => self.files.syncfs(ctx, inode),
        }
    }

    pass_on! {
        readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>>;
        symlink(&self, ctx: Context, target: &CStr, parent: u64, name: &CStr, extensions: Extensions) -> io::Result<Entry>;
        mknod(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        mkdir(&self, ctx: Context, parent: u64, name: &CStr, mode: u32, umask: u32, extensions: Extensions) -> io::Result<Entry>;
        rename(&self, ctx: Context, old: u64, old_name: &CStr, new: u64, new_name: &CStr, flags: u32) -> io::Result<()>;
        opendir(&self, ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)>;
        readdir(&self, ctx: Context, inode: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()>;
        releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()>;
    }
}

impl SerializableFileSystem for Tree {
    pass_on! {
        prepare_serialization(&self, cancel: Arc<AtomicBool>);
        serialize(&self, state: File) -> io::Result<()>;
        deserialize_and_apply(&self, state: File) -> io::Result<()>;
    }
}
