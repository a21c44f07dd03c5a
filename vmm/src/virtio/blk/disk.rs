//! The file or block device behind a disk, with every access checked against its size.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, fcntl_getfl, flock};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::sys::guest_io;
use crate::virtio::chain;

/// Unit of virtio-blk's addresses, whatever the block size (virtio 1.2 §5.2.5).
pub(super) const SECTOR: u64 = 512;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its size or type cannot be read.
    #[error("cannot examine the disk {path}")]
    Examine {
        /// Path as configured.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("{path} cannot be a disk, give an image file or a block device")]
    Type {
        /// Path as configured.
        path: PathBuf,
    },
    /// Not open for what the guest may do.
    #[error("the disk {path} is not open for reading and writing")]
    Access {
        /// Path as configured.
        path: PathBuf,
    },
    /// A name that cannot be one.
    #[error(
        "the id {0:?} is no serial of a disk: give 1 to {ID_SIZE} of A-Z, a-z, 0-9, '.', '_', ':', '-'"
    )]
    Serial(String),
    /// Someone else writes to it, or has it while we want to write to it.
    #[error(
        "the disk {path} is in use by another virtual machine or locked by a program; one that \
         is written to can be attached only once"
    )]
    InUse {
        /// Path as configured.
        path: PathBuf,
    },
    /// Less than one sector.
    #[error("the disk {path} is empty")]
    Empty {
        /// Path as configured.
        path: PathBuf,
    },
}

/// Bytes of a disk's serial (virtio 1.2 §5.2.6).
pub(super) const ID_SIZE: usize = 20;

/// The name by which the guest finds a disk (`/sys/block/*/serial`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial([u8; ID_SIZE]);

impl Serial {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, DiskError> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte);
        let mut bytes = [0; ID_SIZE];
        match bytes.get_mut(..name.len()) {
            Some(place) if !name.is_empty() && name.bytes().all(good) => {
                place.copy_from_slice(name.as_bytes());
                Ok(Self(bytes))
            }
            _ => Err(DiskError::Serial(name.to_owned())),
        }
    }

    /// Filled up with zeroes.
    pub(super) fn bytes(&self) -> &[u8; ID_SIZE] {
        &self.0
    }
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    read_only: bool,
    sectors: u64,
    block_size: u32,
    can_discard: bool,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum AccessError {
    #[error("{count} bytes at sector {sector} are not within the disk")]
    OutOfRange { sector: u64, count: u64 },
    #[error("{0} bytes are not whole sectors")]
    NotWhole(usize),
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("the disk ended early")]
    Short,
    #[error("the host failed")]
    Host(#[source] io::Error),
}

/// A filesystem that two kernels write to is destroyed, and one that changes under its reader is
/// damaged to it. The lock is the open file's, so it goes with the last process that has it.
fn lock(file: &File, read_only: bool) -> Result<(), Errno> {
    let kind = match read_only {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    flock(file, kind)
}

impl Disk {
    /// `path` is for messages; `file` is open for what `read_only` says.
    pub fn new(path: &Path, mut file: File, read_only: bool) -> Result<Self, DiskError> {
        let examine = |source| DiskError::Examine {
            path: path.into(),
            source,
        };
        let kind = file.metadata().map_err(examine)?.file_type();
        let flags = fcntl_getfl(&file).map_err(|error| examine(error.into()))?;
        // With APPEND, writes go to the end wherever they are meant to go (pwrite(2), BUGS).
        let write = flags & OFlags::RWMODE == OFlags::RDWR && !flags.contains(OFlags::APPEND);
        if !read_only && !write {
            return Err(DiskError::Access { path: path.into() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Type { path: path.into() });
        }
        lock(&file, read_only).map_err(|error| match error {
            Errno::WOULDBLOCK => DiskError::InUse { path: path.into() },
            error => examine(error.into()),
        })?;
        let block_size = if kind.is_block_device() {
            rustix::fs::ioctl_blksszget(&file).map_err(|error| examine(error.into()))?
        } else {
            512
        };
        // The end of a block device is its size (BLKGETSIZE64).
        let bytes = file.seek(SeekFrom::End(0)).map_err(examine)?;
        if bytes < SECTOR {
            return Err(DiskError::Empty { path: path.into() });
        }
        // A hole behind the end of a file changes nothing, but tells whether there can be holes.
        let punched = || fallocate(&file, PUNCH, bytes.next_multiple_of(4096), 4096);
        let can_discard = !read_only && (kind.is_block_device() || punched().is_ok());
        Ok(Self {
            read_only,
            sectors: bytes / SECTOR,
            block_size,
            can_discard,
            file,
        })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    pub(super) fn can_discard(&self) -> bool {
        self.can_discard
    }

    /// Fills the pieces from a sector on.
    pub(super) fn read(
        &self,
        sector: u64,
        pieces: &mut Vec<VolatileSlice<'_>>,
    ) -> Result<(), AccessError> {
        let offset = self.check_pieces(sector, pieces)?;
        self.transfer(offset, pieces, |pieces, offset| {
            guest_io::read_at(self.file.as_fd(), pieces, offset, 0)
        })
    }

    /// Writes the pieces from a sector on.
    pub(super) fn write(
        &self,
        sector: u64,
        pieces: &mut Vec<VolatileSlice<'_>>,
    ) -> Result<(), AccessError> {
        self.check_writable()?;
        let offset = self.check_pieces(sector, pieces)?;
        self.transfer(offset, pieces, |pieces, offset| {
            guest_io::write_at(self.file.as_fd(), pieces, offset, 0)
        })
    }

    /// Makes what was written durable.
    pub(super) fn flush(&self) -> Result<(), AccessError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(AccessError::Host)
    }

    /// Gives the sectors' space back; what they hold then is not defined. Only a hint: a host that
    /// cannot does nothing.
    pub(super) fn discard(&self, sector: u64, count: u64) -> Result<(), AccessError> {
        self.check_writable()?;
        let (offset, length) = self.check(sector, bytes(count)?)?;
        match fallocate(&self.file, PUNCH, offset, length) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(AccessError::Host(error.into())),
        }
    }

    /// Makes the sectors read as zeroes; with `unmap` their space may be given back.
    pub(super) fn write_zeroes(
        &self,
        sector: u64,
        count: u64,
        unmap: bool,
    ) -> Result<(), AccessError> {
        self.check_writable()?;
        let (offset, length) = self.check(sector, bytes(count)?)?;
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let mode = if unmap { PUNCH } else { zero_range };
        match fallocate(&self.file, mode, offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP) => self.write_zeroes_by_hand(offset, length),
            Err(error) => Err(AccessError::Host(error.into())),
        }
    }

    fn write_zeroes_by_hand(&self, offset: u64, length: u64) -> Result<(), AccessError> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let count = ZEROES
                .len()
                .min(usize::try_from(end - at).unwrap_or(usize::MAX));
            self.file
                .write_all_at(&ZEROES[..count], at)
                .map_err(AccessError::Host)?;
            at += count as u64;
        }
        Ok(())
    }

    fn transfer(
        &self,
        mut offset: i64,
        pieces: &mut Vec<VolatileSlice<'_>>,
        mut call: impl FnMut(&[VolatileSlice<'_>], i64) -> io::Result<usize>,
    ) -> Result<(), AccessError> {
        while !pieces.is_empty() {
            let count = call(pieces, offset).map_err(AccessError::Host)?;
            if count == 0 {
                return Err(AccessError::Short);
            }
            chain::advance(pieces, count);
            // No overflow: the range was checked.
            offset += i64::try_from(count).map_err(|_| AccessError::Short)?;
        }
        Ok(())
    }

    fn check_pieces(&self, sector: u64, pieces: &[VolatileSlice<'_>]) -> Result<i64, AccessError> {
        let length = chain::length(pieces);
        if !(length as u64).is_multiple_of(SECTOR) {
            return Err(AccessError::NotWhole(length));
        }
        let (offset, length) = self.check(sector, length as u64)?;
        i64::try_from(offset).map_err(|_| AccessError::OutOfRange {
            sector,
            count: length,
        })
    }

    /// The range in bytes, if it lies within the disk.
    fn check(&self, sector: u64, count: u64) -> Result<(u64, u64), AccessError> {
        let end = sector.checked_add(count.div_ceil(SECTOR));
        if end.is_none_or(|end| end > self.sectors) {
            return Err(AccessError::OutOfRange { sector, count });
        }
        // No overflow: the disk's end in bytes is a file offset.
        Ok((sector * SECTOR, count))
    }

    fn check_writable(&self) -> Result<(), AccessError> {
        if self.read_only {
            return Err(AccessError::ReadOnly);
        }
        Ok(())
    }
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

fn bytes(sectors: u64) -> Result<u64, AccessError> {
    sectors.checked_mul(SECTOR).ok_or(AccessError::OutOfRange {
        sector: 0,
        count: u64::MAX,
    })
}
