//! Takes descriptor chains from a queue and walks them, checked, as pieces of guest memory. What
//! the pieces mean is the device's affair.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, GuestMemory, GuestMemoryMmap, VolatileSlice};

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

/// A chain as the queue yields it.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Takes the next chain that the driver made available.
pub fn next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<Chain<'m>>, virtio_queue::Error> {
    Ok(queue.iter(memory)?.next())
}

/// Puts back the last `count` chains taken from a queue.
pub fn put_back(queue: &mut Queue, count: u16) {
    queue.set_next_avail(queue.next_avail().wrapping_sub(count));
}

/// Gives each piece of the chain to `each`, in order, with whether the device may write it. A
/// buffer that crosses regions of guest memory comes as several pieces; empty buffers are left out.
pub fn walk<'m>(
    memory: &'m GuestMemoryMmap,
    chain: Chain<'m>,
    queue_size: u16,
    mut each: impl FnMut(VolatileSlice<'m>, bool) -> Result<(), ChainError>,
) -> Result<(), ChainError> {
    let mut more = true;
    let mut count = 0u16;
    for descriptor in chain {
        count = count.checked_add(1).ok_or(ChainError::TooLong)?;
        if count > queue_size {
            return Err(ChainError::TooLong);
        }
        more = descriptor.has_next();
        let (address, length) = (descriptor.addr(), descriptor.len());
        let outside = || ChainError::OutsideMemory {
            address: address.raw_value(),
            length,
        };
        let bytes = usize::try_from(length).map_err(|_| outside())?;
        for piece in memory.get_slices(address, bytes) {
            each(piece.map_err(|_| outside())?, descriptor.is_write_only())?;
        }
    }
    // The iterator ends quietly at an invalid descriptor.
    if more {
        return Err(ChainError::Broken);
    }
    Ok(())
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
    let (whole, left) = split(pieces, limit);
    let cut = pieces
        .get(whole)
        .filter(|_| left > 0)
        .and_then(|piece| piece.subslice(0, left).ok());
    pieces.truncate(whole);
    pieces.extend(cut);
}

/// Drops the first `count` bytes of a list of pieces.
pub fn advance(pieces: &mut Vec<VolatileSlice<'_>>, count: usize) {
    let (whole, left) = split(pieces, count);
    pieces.drain(..whole);
    if left > 0
        && let Some(first) = pieces.first_mut()
        && let Ok(rest) = first.offset(left)
    {
        *first = rest;
    }
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
