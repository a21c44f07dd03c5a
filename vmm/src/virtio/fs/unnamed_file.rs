//! What a guest does with a file that has no name: as the library does it with others. The files themselves are
//! `unnamed`'s.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;
use virtiofsd::filesystem::{
    GetxattrReply, ListxattrReply, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::WritevFlags;
use virtiofsd::passthrough::credentials::{ScopedCaps, drop_effective_cap};
use virtiofsd::soft_idmap::Id;

/// Bytes of an extended attribute, or of the names of all: XATTR_SIZE_MAX, XATTR_LIST_MAX.
const MOST_ATTRIBUTE: usize = 64 << 10;

/// A file: a descriptor that keeps it without being open for anything, so that the file may be executed.
#[derive(Clone)]
pub(super) struct Unnamed {
    file: Arc<File>,
    /// /proc/self/fd
    descriptors: Arc<File>,
}

impl Unnamed {
    pub(super) fn of(opened: &Opened, descriptors: Arc<File>) -> io::Result<Self> {
        let file = open(&descriptors, &opened.0, OFlags::PATH)?;
        Ok(Self {
            file: Arc::new(file.into()),
            descriptors,
        })
    }

    /// Its name in /proc/self/fd.
    fn path(&self) -> String {
        self.file.as_raw_fd().to_string()
    }

    pub(super) fn open(&self, flags: OFlags, kill_privileges: bool) -> io::Result<OwnedFd> {
        let _limited = limit(kill_privileges)?;
        open(&self.descriptors, &self.file, flags)
    }

    /// Gives it its first name. The host refuses that for a file made with O_EXCL.
    pub(super) fn link(&self, directory: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_FOLLOW;
        rustix::fs::linkat(&self.descriptors, self.path(), directory, name, flags)?;
        Ok(())
    }

    pub(super) fn attributes(&self) -> io::Result<Attr> {
        attributes_of(&self.file)
    }

    pub(super) fn set_attributes(&self, wanted: SetattrIn, valid: SetattrValid) -> io::Result<()> {
        if valid.contains(SetattrValid::MODE) {
            self.set_mode(wanted.mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            // The greatest number means none, as for the system call.
            let chosen = |given, number: u32| (given && number != u32::MAX).then_some(number);
            let uid = chosen(valid.contains(SetattrValid::UID), wanted.uid.into_inner());
            let gid = chosen(valid.contains(SetattrValid::GID), wanted.gid.into_inner());
            let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
            rustix::fs::chownat(&self.file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let file = self.open(OFlags::RDWR, false)?;
            let _limited = limit(valid.contains(SetattrValid::KILL_SUIDGID))?;
            rustix::fs::ftruncate(&file, wanted.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |given, now, seconds: u64, nanoseconds: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (given, now) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanoseconds.into(),
                },
            };
            let times = Timestamps {
                last_access: time(
                    valid.contains(SetattrValid::ATIME),
                    valid.contains(SetattrValid::ATIME_NOW),
                    wanted.atime,
                    wanted.atimensec,
                ),
                last_modification: time(
                    valid.contains(SetattrValid::MTIME),
                    valid.contains(SetattrValid::MTIME_NOW),
                    wanted.mtime,
                    wanted.mtimensec,
                ),
            };
            let (directory, path) = (&self.descriptors, self.path());
            rustix::fs::utimensat(directory, path, &times, AtFlags::empty())?;
        }
        Ok(())
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        let mode = Mode::from(mode & 0o7777);
        rustix::fs::chmodat(&self.descriptors, self.path(), mode, AtFlags::empty())?;
        Ok(())
    }

    /// Fills in what is known of its file system.
    pub(super) fn file_system(&self, known: &mut libc::statvfs64) -> io::Result<()> {
        let found = rustix::fs::fstatvfs(&self.file)?;
        known.f_bsize = found.f_bsize;
        known.f_frsize = found.f_frsize;
        known.f_blocks = found.f_blocks;
        known.f_bfree = found.f_bfree;
        known.f_bavail = found.f_bavail;
        known.f_files = found.f_files;
        known.f_ffree = found.f_ffree;
        known.f_favail = found.f_favail;
        known.f_namemax = found.f_namemax;
        Ok(())
    }

    pub(super) fn set_attribute(
        &self,
        name: &CStr,
        value: &[u8],
        flags: u32,
        more: SetxattrFlags,
    ) -> io::Result<()> {
        let kills = more.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID);
        if kills && name == c"system.posix_acl_access" {
            self.set_mode(self.file.metadata()?.mode() & !libc::S_ISGID)?;
        }
        let flags = XattrFlags::from_bits_retain(flags);
        rustix::fs::fsetxattr(self.for_attributes()?, name, value, flags)?;
        Ok(())
    }

    pub(super) fn attribute(&self, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let file = self.for_attributes()?;
        if size == 0 {
            let length = rustix::fs::fgetxattr_query(file, name)?;
            return Ok(GetxattrReply::Count(narrow(length)));
        }
        let mut value = room(size);
        let length = rustix::fs::fgetxattr(file, name, &mut value[..])?;
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn attribute_names(&self, size: u32) -> io::Result<ListxattrReply> {
        let file = self.for_attributes()?;
        if size == 0 {
            let length = rustix::fs::flistxattr_query(file)?;
            return Ok(ListxattrReply::Count(narrow(length)));
        }
        let mut names = room(size);
        let length = rustix::fs::flistxattr(file, &mut names[..])?;
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    pub(super) fn remove_attribute(&self, name: &CStr) -> io::Result<()> {
        rustix::fs::fremovexattr(self.for_attributes()?, name)?;
        Ok(())
    }

    fn for_attributes(&self) -> io::Result<OwnedFd> {
        self.open(OFlags::RDONLY | OFlags::NONBLOCK, false)
    }
}

/// What the guest is told of a file.
pub(super) fn attributes_of(file: impl AsFd) -> io::Result<Attr> {
    let known = rustix::fs::fstat(file)?;
    Ok(Attr {
        ino: known.st_ino,
        size: known.st_size.cast_unsigned(),
        blocks: known.st_blocks.cast_unsigned(),
        atime: known.st_atime.cast_unsigned(),
        mtime: known.st_mtime.cast_unsigned(),
        ctime: known.st_ctime.cast_unsigned(),
        atimensec: narrow(known.st_atime_nsec),
        mtimensec: narrow(known.st_mtime_nsec),
        ctimensec: narrow(known.st_ctime_nsec),
        mode: known.st_mode,
        nlink: narrow(known.st_nlink),
        uid: known.st_uid.into(),
        gid: known.st_gid.into(),
        rdev: 0,
        blksize: narrow(known.st_blksize),
        flags: 0,
    })
}

/// The file as it was opened once.
#[derive(Clone)]
pub(super) struct Opened(Arc<File>);

impl Opened {
    pub(super) fn new(file: OwnedFd) -> Self {
        Self(Arc::new(file.into()))
    }

    pub(super) fn file(&self) -> &File {
        &self.0
    }

    pub(super) fn read(
        &self,
        mut target: impl ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        target.read_from_file_at(&self.0, size, offset, None)
    }

    pub(super) fn write(
        &self,
        mut source: impl ZeroCopyReader,
        size: u32,
        offset: u64,
        append: bool,
        kill_privileges: bool,
    ) -> io::Result<usize> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let _limited = limit(kill_privileges)?;
        let flags = append.then_some(WritevFlags::RWF_APPEND);
        source.write_to_file_at(&self.0, size, offset, flags)
    }

    pub(super) fn sync(&self, only_data: bool) -> io::Result<()> {
        if only_data {
            self.0.sync_data()
        } else {
            self.0.sync_all()
        }
    }

    pub(super) fn allocate(&self, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&self.0, mode, offset, length)?)
    }

    pub(super) fn seek(&self, offset: u64, whence: u32) -> io::Result<u64> {
        let place = match whence.cast_signed() {
            libc::SEEK_SET => SeekFrom::Start(offset),
            libc::SEEK_END => SeekFrom::End(offset.cast_signed()),
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(&self.0, place)?)
    }
}

/// Opens a file of this process again.
fn open(descriptors: &File, file: &File, flags: OFlags) -> io::Result<OwnedFd> {
    let path = file.as_raw_fd().to_string();
    let flags = flags | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(descriptors, path, flags, Mode::empty())?)
}

/// Without this capability what changes a file takes its set-user-id and set-group-id bits away.
fn limit(really: bool) -> io::Result<Option<ScopedCaps>> {
    if really {
        drop_effective_cap("FSETID")
    } else {
        Ok(None)
    }
}

fn room(size: u32) -> Vec<u8> {
    vec![0; usize::try_from(size).map_or(MOST_ATTRIBUTE, |size| size.min(MOST_ATTRIBUTE))]
}

fn narrow(number: impl TryInto<u32>) -> u32 {
    number.try_into().unwrap_or(u32::MAX)
}
