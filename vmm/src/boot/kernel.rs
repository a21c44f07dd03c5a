//! The kernel image: an ELF64 `vmlinux`, mapped into guest memory where it can be, else copied.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryMmap};

use crate::sys::guest_io;
use crate::{layout, memory, sys};

const PAGE: u64 = 4096;
/// The machine x86-64.
const EM_X86_64: u16 = 62;
/// Segment type: to be loaded.
const PT_LOAD: u64 = 1;
/// Segment flags: executable, writable.
const PF_X: u64 = 1;
const PF_W: u64 = 2;
/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 64;

/// Why a kernel image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It cannot be opened or read.
    #[error("{what} the guest kernel {}", path.display())]
    Read {
        /// "open" or "read".
        what: &'static str,
        /// The image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// It is not a kernel that boots here.
    #[error("the guest kernel {} is unusable: {why}", path.display())]
    Unusable {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        why: Unusable,
    },
    /// A segment could not be put into guest memory.
    #[error("load the guest kernel {} into guest memory", path.display())]
    Load {
        /// The image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with an image.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// No regular file.
    #[error("it is not a regular file")]
    NotAFile,
    /// No ELF file at all.
    #[error("it is not an ELF file; an uncompressed vmlinux is needed, not a bzImage")]
    NotElf,
    /// ELF, but not for this machine.
    #[error("it is not a 64-bit x86 ELF file")]
    WrongMachine,
    /// Headers or segments point beyond the file's end, or contradict each other.
    #[error("it is truncated or damaged")]
    Damaged,
    /// Nothing to load, or the entry point lies in none of the executable segments.
    #[error("it has no executable segment that holds its entry point {0:#x}")]
    NoEntry(u64),
    /// Loaded below 1 MiB or above the guest's memory.
    #[error("it wants memory from {start:#x} to {end:#x}, the guest has {low:#x} to {high:#x}: give the guest more memory", low = layout::HIGH_MEMORY)]
    DoesNotFit {
        /// First address of the segment.
        start: u64,
        /// Address after the segment.
        end: u64,
        /// End of guest memory.
        high: u64,
    },
}

/// A kernel image, open and checked.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    entry: u64,
    segments: Vec<Segment>,
}

/// A piece of the image and where it goes: guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    executable: bool,
    writable: bool,
}

impl Kernel {
    /// Opens and checks an image.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let read = |what| {
            move |source: io::Error| KernelError::Read {
                what,
                path: path.to_owned(),
                source,
            }
        };
        // NONBLOCK: opening a pipe by mistake must not hang.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| read("open")(error.into()))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(read("read"))?;
        let unusable = |why| KernelError::Unusable {
            path: path.to_owned(),
            why,
        };
        if !metadata.is_file() {
            return Err(unusable(Unusable::NotAFile));
        }
        let (entry, segments) = match parse(&file, metadata.len()).map_err(read("read"))? {
            Ok(parsed) => parsed,
            Err(why) => return Err(unusable(why)),
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            entry,
            segments,
        })
    }

    /// Puts the segments into guest memory and returns the entry point.
    pub fn load(&self, memory: &GuestMemoryMmap) -> Result<u64, KernelError> {
        let high = memory::low_end(memory);
        for segment in &self.segments {
            let end = segment.address + segment.memory_size;
            if segment.address < layout::HIGH_MEMORY || end > high {
                let why = Unusable::DoesNotFit {
                    start: segment.address,
                    end,
                    high,
                };
                return Err(KernelError::Unusable {
                    path: self.path.clone(),
                    why,
                });
            }
        }
        self.expect_writes(memory);
        for segment in &self.segments {
            self.load_segment(memory, *segment)
                .map_err(|source| KernelError::Load {
                    path: self.path.clone(),
                    source,
                })?;
        }
        Ok(self.entry)
    }

    /// Linux has its writable segments one after the other.
    fn expect_writes(&self, memory: &GuestMemoryMmap) {
        let writable = || self.segments.iter().filter(|segment| segment.writable);
        let start = writable().map(|segment| segment.address).min();
        let end = writable().map(|segment| segment.address + segment.memory_size);
        if let (Some(start), Some(end)) = (start, end.max()) {
            memory::expect_writes(memory, GuestAddress(start), end - start);
        }
    }

    /// Maps the whole pages of a segment and copies its ragged ends. The rest, up to
    /// `memory_size`, is fresh guest memory and so zero. A segment that the guest writes to is copied whole:
    /// it writes to nearly all of its pages, each of which would cost a fault to read it and one to write.
    ///
    /// The mapping is private: the guest's writes stay its own, and what it does not write is
    /// shared with every other guest through the page cache. The image must not be cut or
    /// rewritten while guests run, like any program's file.
    fn load_segment(&self, memory: &GuestMemoryMmap, segment: Segment) -> io::Result<()> {
        let end = segment.address + segment.file_size;
        if segment.writable {
            return self.copy(memory, segment, segment.address, end);
        }
        let first = segment.address.next_multiple_of(PAGE);
        let last = end & !(PAGE - 1);
        if segment.offset % PAGE != segment.address % PAGE || first >= last {
            return self.copy(memory, segment, segment.address, end);
        }
        self.copy(memory, segment, segment.address, first)?;
        let offset = segment.offset + (first - segment.address);
        let (region, at) = memory
            .to_region_addr(GuestAddress(first))
            .ok_or(io::ErrorKind::InvalidInput)?;
        sys::map_over(
            region,
            at,
            &self.file,
            i64::try_from(offset).map_err(io::Error::other)?,
            usize::try_from(last - first).map_err(io::Error::other)?,
        )?;
        // As the memory that it replaces.
        sys::advise(region, at.raw_value(), last - first, libc::MADV_DONTDUMP)?;
        self.copy(memory, segment, last, end)
    }

    /// Copies what belongs at guest addresses `start..end` of a segment.
    fn copy(
        &self,
        memory: &GuestMemoryMmap,
        segment: Segment,
        start: u64,
        end: u64,
    ) -> io::Result<()> {
        let mut offset = segment.offset + (start - segment.address);
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        for piece in memory.get_slices(GuestAddress(start), length) {
            let mut left = piece.map_err(io::Error::other)?;
            while !left.is_empty() {
                let at = i64::try_from(offset).map_err(io::Error::other)?;
                let read = guest_io::read_at(self.file.as_fd(), &[left], at, 0)?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                left = left.offset(read).map_err(io::Error::other)?;
                offset += read as u64;
            }
        }
        Ok(())
    }
}

type Parsed = (u64, Vec<Segment>);

/// Reads the headers (ELF-64 Object File Format 1.5, and Linux' elf.h).
fn parse(file: &File, size: u64) -> io::Result<Result<Parsed, Unusable>> {
    let mut header = [0; 64];
    let present = usize::try_from(size.min(64)).unwrap_or(64);
    file.read_exact_at(&mut header[..present], 0)?;
    let Header {
        entry,
        table,
        entry_size,
        count,
    } = match Header::parse(&header) {
        Ok(header) => header,
        Err(why) => return Ok(Err(why)),
    };
    let table_end = table.checked_add(u64::from(entry_size) * u64::from(count));
    if entry_size != 56 || count > MAX_SEGMENTS || table_end.is_none_or(|end| end > size) {
        return Ok(Err(Unusable::Damaged));
    }
    let mut segments = Vec::with_capacity(usize::from(count));
    for index in 0..u64::from(count) {
        let mut bytes = [0; 56];
        file.read_exact_at(&mut bytes, table + index * 56)?;
        match Segment::parse(&bytes, size) {
            Ok(segment) => segments.extend(segment),
            Err(why) => return Ok(Err(why)),
        }
    }
    let holds_entry = |segment: &Segment| {
        segment.executable
            && (segment.address..segment.address + segment.file_size).contains(&entry)
    };
    if !segments.iter().any(holds_entry) {
        return Ok(Err(Unusable::NoEntry(entry)));
    }
    Ok(Ok((entry, segments)))
}

/// What the ELF header says that matters here.
struct Header {
    entry: u64,
    table: u64,
    entry_size: u16,
    count: u16,
}

impl Header {
    fn parse(bytes: &[u8; 64]) -> Result<Self, Unusable> {
        if bytes[..4] != *b"\x7fELF" {
            return Err(Unusable::NotElf);
        }
        // EI_CLASS 2 is 64 bits, EI_DATA 1 little endian.
        if bytes[4] != 2 || bytes[5] != 1 || half(bytes, 18) != EM_X86_64 {
            return Err(Unusable::WrongMachine);
        }
        Ok(Self {
            entry: word(bytes, 24),
            table: word(bytes, 32),
            entry_size: half(bytes, 54),
            count: half(bytes, 56),
        })
    }
}

impl Segment {
    /// `None` if there is nothing to load.
    fn parse(bytes: &[u8; 56], size: u64) -> Result<Option<Self>, Unusable> {
        let kind_and_flags = word(bytes, 0);
        let segment = Self {
            offset: word(bytes, 8),
            // The physical address; the virtual one means nothing before paging.
            address: word(bytes, 24),
            file_size: word(bytes, 32),
            memory_size: word(bytes, 40),
            executable: kind_and_flags >> 32 & PF_X != 0,
            writable: kind_and_flags >> 32 & PF_W != 0,
        };
        if kind_and_flags & 0xffff_ffff != PT_LOAD || segment.memory_size == 0 {
            return Ok(None);
        }
        let file_end = segment.offset.checked_add(segment.file_size);
        let memory_end = segment.address.checked_add(segment.memory_size);
        if file_end.is_none_or(|end| end > size)
            || memory_end.is_none()
            || segment.file_size > segment.memory_size
        {
            return Err(Unusable::Damaged);
        }
        Ok(Some(segment))
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
pub(crate) mod tests;
