//! Takes descriptor chains from a queue and walks them, checked, as pieces of guest memory. What
//! the pieces mean is the device's affair.

use std::io;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice,
};

use super::ring;

/// Bytes of a descriptor (virtio 1.2 §2.7.5).
const DESCRIPTOR_SIZE: usize = 16;

/// A driver's mistake in one chain: the chain can be returned unused, the queue goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's index, table or flags are invalid, or there is none (virtio 1.2 §2.7.5).
    #[error("the descriptor chain is broken off")]
    Broken,
    /// More descriptors than the queue has entries (virtio 1.2 §2.7.5.3.1).
    #[error("the descriptor chain is longer than the queue")]
    TooLong,
    /// A buffer lies outside of guest memory.
    #[error("a buffer of {length} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A device-writable buffer where the device reads, or the other way round.
    #[error("a buffer has the wrong direction")]
    WrongDirection,
    /// Fewer bytes than the device's messages need.
    #[error("the buffers hold fewer bytes than a message needs")]
    TooShort,
}

/// A driver's mistake that leaves the queue unusable: the device needs a reset.
#[derive(Debug, thiserror::Error)]
#[error("queue {index} is broken")]
pub struct QueueError {
    /// The queue's index in its device.
    pub index: u16,
    /// Cause.
    #[source]
    pub source: virtio_queue::Error,
}

/// A chain that the driver made available.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemoryMmap,
    /// The queue's descriptor table, and how many entries it has.
    table: GuestAddress,
    size: u16,
    head: u16,
}

/// Takes the next chain that the driver made available.
pub fn next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<Chain<'m>>, virtio_queue::Error> {
    Ok(ring::next(queue, memory)?.map(|head| Chain {
        memory,
        table: GuestAddress(queue.desc_table()),
        size: queue.size(),
        head,
    }))
}

/// Puts back the last `count` chains taken from a queue.
pub fn put_back(queue: &mut Queue, count: u16) {
    queue.set_next_avail(queue.next_avail().wrapping_sub(count));
}

impl<'m> Chain<'m> {
    /// By which the driver knows it.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    /// Gives each buffer to `each`, in order: its address, its length, and whether the device may write
    /// it. Nothing is known of the address yet.
    pub fn buffers(
        &self,
        mut each: impl FnMut(GuestAddress, u32, bool) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        let mut table = table(self.memory, self.table, u64::from(self.size))?;
        let (mut index, mut count, mut indirect) = (self.head, 0, false);
        loop {
            // Read once: the driver may change it any time.
            let descriptor: RawDescriptor = table
                .read_obj(usize::from(index) * DESCRIPTOR_SIZE)
                .map_err(|_| ChainError::Broken)?;
            let descriptor = Descriptor::from(descriptor);
            if descriptor.refers_to_indirect_table() {
                // virtio 1.2 §2.7.5.3.1: one such table, at the end.
                let (entries, rest) = (descriptor.len() / 16, descriptor.len() % 16);
                if indirect || descriptor.has_next() || rest != 0 {
                    return Err(ChainError::Broken);
                }
                table = self::table(self.memory, descriptor.addr(), u64::from(entries))?;
                (index, indirect) = (0, true);
                continue;
            }
            count += 1;
            if count > self.size {
                return Err(ChainError::TooLong);
            }
            each(
                descriptor.addr(),
                descriptor.len(),
                descriptor.is_write_only(),
            )?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Gives each piece of memory to `each`, in order, with whether the device may write it. A
    /// buffer that crosses regions of guest memory comes as several pieces; empty buffers are left out.
    pub fn walk(
        &self,
        mut each: impl FnMut(VolatileSlice<'m>, bool) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        self.buffers(|address, length, writable| {
            let outside = || ChainError::OutsideMemory {
                address: address.raw_value(),
                length,
            };
            let bytes = usize::try_from(length).map_err(|_| outside())?;
            if bytes == 0 {
                return Ok(());
            }
            if let Some(piece) = one_piece(self.memory, address, bytes) {
                return each(piece, writable);
            }
            for piece in self.memory.get_slices(address, bytes) {
                each(piece.map_err(|_| outside())?, writable)?;
            }
            Ok(())
        })
    }
}

/// A table of so many descriptors.
fn table(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    entries: u64,
) -> Result<VolatileSlice<'_>, ChainError> {
    usize::try_from(entries)
        .ok()
        .and_then(|entries| one_piece(memory, address, entries * DESCRIPTOR_SIZE))
        .ok_or(ChainError::Broken)
}

/// Memory that lies in one region: quicker to find than any.
pub(super) fn one_piece(
    memory: &GuestMemoryMmap,
    address: GuestAddress,
    bytes: usize,
) -> Option<VolatileSlice<'_>> {
    let region = memory.find_region(address)?;
    let offset = region.to_region_addr(address)?;
    region.get_slice(offset, bytes).ok()
}

/// How many pieces the first `count` bytes fill, and how many bytes of the next they reach into.
fn split(pieces: &[VolatileSlice<'_>], count: usize) -> (usize, usize) {
    let mut left = count;
    for (index, piece) in pieces.iter().enumerate() {
        match left.checked_sub(piece.len()) {
            Some(rest) => left = rest,
            None => return (index, left),
        }
    }
    (pieces.len(), left)
}

/// Shortens a list of pieces to `limit` bytes.
pub fn truncate(pieces: &mut Vec<VolatileSlice<'_>>, limit: usize) {
    let count = shorten(pieces, limit);
    pieces.truncate(count);
}

/// The same in place: gives how many pieces are left.
pub fn shorten(pieces: &mut [VolatileSlice<'_>], limit: usize) -> usize {
    let (whole, left) = split(pieces, limit);
    match pieces.get_mut(whole) {
        Some(piece) if left > 0 => {
            if let Ok(part) = piece.subslice(0, left) {
                *piece = part;
            }
            whole + 1
        }
        _ => whole,
    }
}

/// Drops the first `count` bytes of a list of pieces.
pub fn advance(pieces: &mut Vec<VolatileSlice<'_>>, count: usize) {
    let whole = pass(pieces, count);
    pieces.drain(..whole);
}

/// The same in place: gives how many pieces are to be left out.
pub fn pass(pieces: &mut [VolatileSlice<'_>], count: usize) -> usize {
    let (whole, left) = split(pieces, count);
    if left > 0
        && let Some(first) = pieces.get_mut(whole)
        && let Ok(rest) = first.offset(left)
    {
        *first = rest;
    }
    whole
}

/// Moves `limit` bytes between the pieces and a file from `offset` on, by a system call that may do less;
/// gives how many it has moved when it ends, or fails.
pub fn transfer(
    mut pieces: &mut [VolatileSlice<'_>],
    limit: usize,
    offset: u64,
    mut call: impl FnMut(&[VolatileSlice<'_>], i64) -> io::Result<usize>,
) -> io::Result<usize> {
    let count = shorten(pieces, limit);
    pieces = &mut pieces[..count];
    let mut done = 0;
    while !pieces.is_empty() {
        let at = offset.checked_add(done as u64);
        let at = at.and_then(|at| i64::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        match call(pieces, at) {
            Ok(0) => break,
            Ok(moved) => {
                done += moved;
                let whole = pass(pieces, moved);
                pieces = &mut pieces[whole..];
            }
            // What was moved before counts.
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Bytes that a list of pieces holds.
pub fn length(pieces: &[VolatileSlice<'_>]) -> usize {
    pieces.iter().map(VolatileSlice::len).sum()
}

/// Copies from the start of the pieces; gives how many bytes there were for `bytes`.
pub fn copy_out(pieces: &[VolatileSlice<'_>], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        done += piece.copy_to(&mut bytes[done..]);
    }
    done
}

/// Copies to the start of the pieces; gives how many of `bytes` they took.
pub fn copy_in(pieces: &[VolatileSlice<'_>], bytes: &[u8]) -> usize {
    let mut done = 0;
    for piece in pieces {
        let count = piece.len().min(bytes.len() - done);
        piece.copy_from(&bytes[done..done + count]);
        done += count;
    }
    done
}
