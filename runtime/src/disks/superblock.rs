//! Which filesystem a disk holds, and how large it says that it is: two magic numbers and a few
//! fields. What is in a filesystem is for the guest's kernel to judge.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

/// Both have their superblock here.
const OFFSET: u64 = 1024;

/// Filesystems that the guest's kernel has for disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filesystem {
    Ext4,
    Erofs,
}

impl Filesystem {
    pub(super) fn of_name(name: &str) -> Option<Self> {
        match name {
            "ext4" => Some(Self::Ext4),
            "erofs" => Some(Self::Erofs),
            _ => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Erofs => "erofs",
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) filesystem: Filesystem,
    /// Bytes that the filesystem says it has.
    pub(super) size: u64,
    /// Bytes that there are.
    pub(super) space: u64,
}

/// Reads the superblock of a file or a block device; `None` where there is none that is known.
pub(super) fn read(mut file: &File) -> io::Result<Option<Found>> {
    let space = file.seek(SeekFrom::End(0))?;
    let mut block = [0; 1024];
    match file.read_exact_at(&mut block, OFFSET) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let size = |filesystem, size| Found {
        filesystem,
        size,
        space,
    };
    Ok(ext4(&block)
        .map(|bytes| size(Filesystem::Ext4, bytes))
        .or_else(|| erofs(&block).map(|bytes| size(Filesystem::Erofs, bytes))))
}

fn u16_at(block: &[u8; 1024], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn u32_at(block: &[u8; 1024], at: usize) -> u32 {
    u32::from(u16_at(block, at)) | u32::from(u16_at(block, at + 2)) << 16
}

/// Documentation/filesystems/ext4/super.rst: s_magic, s_log_block_size, s_feature_incompat (64BIT),
/// s_blocks_count_lo and _hi.
fn ext4(block: &[u8; 1024]) -> Option<u64> {
    const MAGIC: u16 = 0xef53;
    const FEATURE_64BIT: u32 = 0x80;
    let logarithm = u32_at(block, 0x18);
    if u16_at(block, 0x38) != MAGIC || logarithm > 6 {
        return None;
    }
    let mut blocks = u64::from(u32_at(block, 0x04));
    if u32_at(block, 0x60) & FEATURE_64BIT != 0 {
        blocks |= u64::from(u32_at(block, 0x150)) << 32;
    }
    Some(blocks.saturating_mul(1024 << logarithm))
}

/// fs/erofs/erofs_fs.h, struct erofs_super_block: magic, blkszbits, blocks.
fn erofs(block: &[u8; 1024]) -> Option<u64> {
    const MAGIC: u32 = 0xe0f5_e1e2;
    let bits = block[12];
    if u32_at(block, 0) != MAGIC || !(9..=16).contains(&bits) {
        return None;
    }
    Some(u64::from(u32_at(block, 36)) << bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn found(block: &[(usize, &[u8])], space: u64) -> Option<Found> {
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 2048];
        for (at, value) in block {
            bytes[1024 + at..1024 + at + value.len()].copy_from_slice(value);
        }
        file.write_all(&bytes).unwrap();
        file.set_len(space).unwrap();
        read(&file).unwrap()
    }

    #[test]
    fn filesystems_are_known_by_their_superblocks() {
        let ext4: &[(usize, &[u8])] = &[(0x38, &[0x53, 0xef]), (4, &[8]), (0x18, &[2])];
        let expected = Found {
            filesystem: Filesystem::Ext4,
            size: 8 * 4096,
            space: 40_000,
        };
        assert_eq!(found(ext4, 40_000), Some(expected));
        let large: &[(usize, &[u8])] = &[
            (0x38, &[0x53, 0xef]),
            (0x60, &[0x80]),
            (0x150, &[1]),
            (0x18, &[2]),
        ];
        assert_eq!(found(large, 40_000).unwrap().size, 1 << 44);
        let erofs: &[(usize, &[u8])] = &[(0, &[0xe2, 0xe1, 0xf5, 0xe0]), (12, &[12]), (36, &[3])];
        let found_erofs = found(erofs, 12_288).unwrap();
        assert_eq!(found_erofs.filesystem, Filesystem::Erofs);
        assert_eq!(found_erofs.size, found_erofs.space);
    }

    #[test]
    fn anything_else_is_not() {
        assert_eq!(found(&[], 4096), None);
        assert_eq!(found(&[], 100), None);
        assert_eq!(found(&[], 0), None);
        // Absurd sizes of blocks.
        assert_eq!(found(&[(0x38, &[0x53, 0xef]), (0x18, &[200])], 4096), None);
        let erofs: &[(usize, &[u8])] = &[(0, &[0xe2, 0xe1, 0xf5, 0xe0]), (12, &[63])];
        assert_eq!(found(erofs, 4096), None);
    }
}
