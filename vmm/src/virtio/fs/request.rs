//! A FUSE request in private memory. The library trusts names: it hands them to system calls that
//! would walk through `/` and `..` out of the share. They are checked here, on a copy that the guest
//! cannot change any more; the bulk of long requests (data to write) stays where it is.

use std::ffi::CString;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::Reader;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::host::CONNECT;
use super::write::WRITE;
use crate::sys::guest_view::{GuestView, PRIVATE};
use crate::virtio::chain::{Chain, ChainError};

/// Bytes of `struct fuse_in_header`.
const HEADER_SIZE: usize = 40;
/// Bytes of a request that are copied. The longest request with names is a symbolic link: two
/// names, its target and extensions.
const COPIED: usize = 8192;
/// Bytes of the header and `struct fuse_write_in`, which the data follows.
const FIXED: usize = 80;
/// Descriptors of the private chain: the copy and what stays in guest memory.
const DESCRIPTORS: u16 = 1024;

// Where things are in private memory.
const TABLE: GuestAddress = PRIVATE;
const AVAILABLE: GuestAddress = GuestAddress(TABLE.0 + 16 * DESCRIPTORS as u64);
const COPY: GuestAddress = GuestAddress(AVAILABLE.0 + 4096);
/// Bytes of private memory that this uses.
pub(super) const PRIVATE_SIZE: usize = 16 * DESCRIPTORS as usize + 4096 + COPIED;

const FLAG_NEXT: u16 = 1;

/// Makes private requests, one at a time.
pub(super) struct Requests {
    queue: PrivateQueue,
    copy: Box<[u8; COPIED]>,
    /// How much of it is the present request's.
    copied: usize,
    /// Its device-readable buffers; kept, as memory is asked for often enough otherwise.
    segments: Vec<(GuestAddress, u32)>,
}

/// Which files a request is about, as far as changes of them go.
#[derive(Debug)]
pub(super) struct Details {
    pub(super) opcode: u32,
    /// The file that it changes.
    pub(super) subject: u64,
    /// The directories that its names are in.
    pub(super) directories: Vec<u64>,
    /// The names that it changes.
    pub(super) names: Vec<CString>,
}

/// A queue in private memory: the way to give the library a reader.
struct PrivateQueue {
    queue: Queue,
    available: u16,
}

/// What is known of a request before the library sees it.
pub(super) struct Request<'m> {
    pub(super) reader: Reader<'m>,
    /// The field `unique`, which the answer repeats.
    pub(super) unique: [u8; 8],
    /// Whether the library may see it.
    pub(super) acceptable: bool,
}

impl Requests {
    pub(super) fn new() -> Result<Self, virtio_queue::Error> {
        let mut queue = Queue::new(DESCRIPTORS)?;
        queue.try_set_desc_table_address(TABLE)?;
        queue.try_set_avail_ring_address(AVAILABLE)?;
        queue.set_ready(true);
        Ok(Self {
            queue: PrivateQueue {
                queue,
                available: 0,
            },
            copy: Box::new([0; COPIED]),
            copied: 0,
            segments: Vec::new(),
        })
    }

    /// What the present request asks for.
    pub(super) fn opcode(&self) -> u32 {
        number(&self.copy[..], 4)
    }

    /// The node that it is about.
    pub(super) fn node(&self) -> u64 {
        wide_number(&self.copy[..], 16)
    }

    /// Its field `unique`, which the answer repeats.
    pub(super) fn unique(&self) -> [u8; 8] {
        wide_number(&self.copy[..], 8).to_le_bytes()
    }

    /// User and group of the process that caused it.
    pub(super) fn user(&self) -> (u32, u32) {
        (number(&self.copy[..], 24), number(&self.copy[..], 28))
    }

    /// What of it was copied, without the header.
    pub(super) fn body(&self) -> &[u8] {
        self.copy[..self.copied]
            .get(HEADER_SIZE..)
            .unwrap_or_default()
    }

    /// A number in its body, 0 where the body does not reach.
    pub(super) fn u32_at(&self, offset: usize) -> u32 {
        number(self.body(), offset)
    }

    /// The same with eight bytes.
    pub(super) fn u64_at(&self, offset: usize) -> u64 {
        wide_number(self.body(), offset)
    }

    /// Which files it is about.
    pub(super) fn details(&self) -> Details {
        let (opcode, node, body) = (self.opcode(), self.node(), self.body());
        let mut details = Details {
            opcode,
            subject: node,
            directories: vec![node],
            names: Vec::new(),
        };
        match opcode {
            // LINK names the file in its body, COPY_FILE_RANGE the one that is written.
            13 => details.subject = wide_number(body, 0),
            47 => details.subject = wide_number(body, 16),
            // RENAME, RENAME2
            12 | 45 => details.directories.push(wide_number(body, 0)),
            _ => {}
        }
        let (fixed, count) = names(opcode);
        let names = body
            .get(fixed..)
            .unwrap_or_default()
            .split(|byte| *byte == 0);
        details.names = names
            .take(count)
            .filter_map(|name| CString::new(name).ok())
            .collect();
        details
    }

    /// Copies a request of the guest. Each descriptor is read once.
    pub(super) fn take<'m>(
        &mut self,
        memory: &'m GuestView,
        chain: Chain<'_>,
        queue_size: u16,
    ) -> Result<Request<'m>, TakeError> {
        list_segments(memory.original(), chain, queue_size, &mut self.segments)?;
        let (fixed, more) = self.copy.split_at_mut(FIXED);
        let (mut copied, rest) = copy_out(memory.original(), &mut self.segments, fixed)?;
        let mut rest = &mut self.segments[rest..];
        // Data to write stays where it is.
        if number(fixed, 4) != WRITE && copied == FIXED {
            let (count, left) = copy_out(memory.original(), rest, more)?;
            copied += count;
            rest = &mut rest[left..];
        }
        self.copied = copied;
        let copy = &self.copy[..copied];
        let header = copy
            .first_chunk::<HEADER_SIZE>()
            .ok_or(ChainError::TooShort)?;
        let reader = self.queue.reader(memory.with_private(), copy, rest)?;
        Ok(Request {
            reader,
            unique: std::array::from_fn(|i| header[8 + i]),
            acceptable: names_are_plain(header, copy),
        })
    }
}

impl PrivateQueue {
    /// A reader of the copy and then of what stays in guest memory.
    fn reader<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap<BitmapMmapRegion>,
        copy: &[u8],
        rest: &[(GuestAddress, u32)],
    ) -> Result<Reader<'m>, TakeError> {
        memory.write_slice(copy, COPY)?;
        let length = u32::try_from(copy.len()).map_err(|_| ChainError::TooLong)?;
        let all = std::iter::once((COPY, length)).chain(rest.iter().copied());
        for (index, (address, length)) in (0u16..).zip(all) {
            let more = usize::from(index) < rest.len();
            let flags = if more { FLAG_NEXT } else { 0 };
            let next = if more { index + 1 } else { 0 };
            let descriptor = Descriptor::new(address.raw_value(), length, flags, next);
            let at = TABLE.unchecked_add(16 * u64::from(index));
            memory.write_obj(RawDescriptor::from(descriptor), at)?;
        }
        // Every entry of the ring names the first descriptor: they are zero from the beginning.
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, AVAILABLE.unchecked_add(2))?;
        let chain = self.queue.iter(memory)?.next();
        let chain = chain.ok_or(ChainError::Broken)?;
        Ok(Reader::new(memory, chain)?)
    }
}

/// Why a request could not be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("copy a request")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("make the private queue")]
    Queue(#[from] virtio_queue::Error),
    #[error("read a request")]
    Reader(#[from] virtiofsd::descriptor_utils::Error),
}

/// Lists the device-readable buffers of a chain, each in guest memory.
fn list_segments(
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    queue_size: u16,
    segments: &mut Vec<(GuestAddress, u32)>,
) -> Result<(), ChainError> {
    segments.clear();
    let mut count = 0;
    for descriptor in chain {
        count += 1;
        if count > queue_size {
            return Err(ChainError::TooLong);
        }
        if descriptor.is_write_only() || descriptor.len() == 0 {
            continue;
        }
        let (address, length) = (descriptor.addr(), descriptor.len());
        let inside = usize::try_from(length).is_ok_and(|size| memory.check_range(address, size));
        if !inside {
            return Err(ChainError::OutsideMemory {
                address: address.raw_value(),
                length,
            });
        }
        segments.push((address, length));
    }
    Ok(())
}

/// Copies the first bytes; gives how many, and where in the segments what is left begins: the first of
/// those is shortened to that.
fn copy_out(
    memory: &GuestMemoryMmap,
    segments: &mut [(GuestAddress, u32)],
    copy: &mut [u8],
) -> Result<(usize, usize), vm_memory::GuestMemoryError> {
    let mut done = 0;
    for (index, (address, length)) in segments.iter_mut().enumerate() {
        let room = u32::try_from(copy.len() - done).unwrap_or(u32::MAX);
        let part = room.min(*length);
        let end = done + usize::try_from(part).unwrap_or(0);
        memory.read_slice(&mut copy[done..end], *address)?;
        done = end;
        if part < *length {
            *address = address.unchecked_add(u64::from(part));
            *length -= part;
            return Ok((done, index));
        }
    }
    Ok((done, segments.len()))
}

/// Whether every name in the request is the name of an entry of a directory: no path, not `.` or
/// `..`. A request whose names are not in the copy is not acceptable either.
fn names_are_plain(header: &[u8; HEADER_SIZE], copy: &[u8]) -> bool {
    let opcode = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    let (fixed, count) = names(opcode);
    if count == 0 {
        return true;
    }
    let mut names = copy
        .get(HEADER_SIZE + fixed..)
        .unwrap_or_default()
        .split(|byte| *byte == 0);
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    // The library takes as much as the header says.
    let whole = usize::try_from(length).is_ok_and(|length| length <= copy.len());
    whole
        && (0..count).all(|_| {
            names.next().is_some_and(|name| {
                !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b".."
            })
        })
}

/// Bytes between the header and the first name, and how many names follow.
fn names(opcode: u32) -> (usize, usize) {
    match opcode {
        // LOOKUP, SYMLINK (whose target may be anything), UNLINK, RMDIR
        1 | 6 | 10 | 11 | CONNECT => (0, 1),
        // MKNOD, CREATE
        8 | 35 => (16, 1),
        // MKDIR, LINK
        9 | 13 => (8, 1),
        // RENAME, RENAME2
        12 => (8, 2),
        45 => (16, 2),
        // No names, or ones that no system call takes for a path (TMPFILE, extended attributes).
        _ => (0, 0),
    }
}

/// A number of a message, 0 beyond its end.
fn number(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_le_bytes)
}

fn wide_number(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u64::from_le_bytes)
}
