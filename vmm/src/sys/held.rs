//! Buffers of guest memory that are kept ready for the next reads from a descriptor, so that a
//! buffer is looked up once, not for every packet that it might be needed for.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::guest_memory;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::guest_io::retry;

/// Pieces that one read can fill (UIO_MAXIOV).
pub(crate) const MOST_PIECES: usize = 1024;
/// Pieces at the front that are done with and not yet removed.
const SPENT: usize = 256;

/// Pieces of guest memory in order, the next to be filled first.
pub(crate) struct HeldBuffers {
    vectors: Vec<libc::iovec>,
    /// Those before it are done with.
    first: usize,
    /// Keeps the mappings alive that the vectors lead to.
    memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the vectors' pointers lead into mappings that this value keeps alive itself, which belong
// to no thread.
unsafe impl Send for HeldBuffers {}

impl HeldBuffers {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            vectors: Vec::new(),
            first: 0,
            memory,
        }
    }

    /// Guest memory.
    pub(crate) fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Appends a range of guest memory; gives the number of pieces that it makes. On an error some
    /// of them may have been appended: [`Self::forget_last`].
    pub(crate) fn push(
        &mut self,
        address: GuestAddress,
        length: usize,
    ) -> Result<usize, guest_memory::Error> {
        let before = self.vectors.len();
        for piece in self.memory.get_slices(address, length) {
            let piece = piece?;
            self.vectors.push(libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            });
        }
        Ok(self.vectors.len() - before)
    }

    /// Pieces held.
    pub(crate) fn len(&self) -> usize {
        self.vectors.len() - self.first
    }

    /// Takes back what was pushed last, down to `len` pieces.
    pub(crate) fn forget_last(&mut self, len: usize) {
        self.vectors.truncate(self.first + len);
    }

    /// Is done with the first `count` pieces.
    pub(crate) fn forget_first(&mut self, count: usize) {
        self.first = (self.first + count).min(self.vectors.len());
        if self.first >= SPENT || self.first == self.vectors.len() {
            self.vectors.drain(..self.first);
            self.first = 0;
        }
    }

    /// Reads from a descriptor into the first `count` pieces.
    pub(crate) fn read(&self, file: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        let vectors = self.held();
        let vectors = &vectors[..count.min(vectors.len()).min(MOST_PIECES)];
        let count = libc::c_int::try_from(vectors.len()).map_err(io::Error::other)?;
        // SAFETY: each vector covers guest memory that was mapped when it was made, and `memory`
        // keeps it so; only the kernel writes there, as it may at any time for all who look.
        retry(|| unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count) })
    }

    /// Writes bytes at an offset of what the pieces hold together.
    pub(crate) fn write_at(&self, mut offset: usize, mut bytes: &[u8]) {
        for vector in self.held() {
            if bytes.is_empty() {
                return;
            }
            if offset >= vector.iov_len {
                offset -= vector.iov_len;
                continue;
            }
            // SAFETY: as in `read`: the range is mapped as long as `memory` lives, which is longer
            // than the slice.
            let piece = unsafe { VolatileSlice::new(vector.iov_base.cast(), vector.iov_len) };
            let count = bytes.len().min(piece.len() - offset);
            if let Ok(room) = piece.subslice(offset, count) {
                room.copy_from(&bytes[..count]);
            }
            bytes = &bytes[count..];
            offset = 0;
        }
    }

    fn held(&self) -> &[libc::iovec] {
        &self.vectors[self.first..]
    }
}
