//! Buffers that the driver gave for packets to the guest (virtio 1.2 §5.10.6.2), taken several at a
//! time so that one read of a socket fills many packets.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use super::packet::{HEADER_SIZE, Header};
use crate::virtio::chain::{self, Chain, ChainError, QueueError};

/// The receive queue's index.
pub(super) const RECEIVE: u16 = 0;

/// One buffer of a batch.
#[derive(Debug)]
struct Buffer {
    head: u16,
    /// Where its header's pieces end in `Batch::headers`.
    headers_end: usize,
    /// Bytes that it holds beside the header.
    room: usize,
}

/// Buffers taken from the queue. Those not used by `finish` go back.
#[derive(Debug)]
pub(super) struct Batch<'m> {
    memory: &'m GuestMemoryMmap,
    buffers: Vec<Buffer>,
    headers: Vec<VolatileSlice<'m>>,
    /// The rooms for data of all buffers, in order.
    data: Vec<VolatileSlice<'m>>,
    room: usize,
    /// A mistake of the driver's that the caller may log.
    mistake: Option<ChainError>,
}

impl<'m> Batch<'m> {
    pub(super) fn new(memory: &'m GuestMemoryMmap) -> Self {
        Self {
            memory,
            buffers: Vec::new(),
            headers: Vec::new(),
            data: Vec::new(),
            room: 0,
            mistake: None,
        }
    }

    /// Takes up to `most` buffers, until there is room for `bytes`. False if the driver has none.
    /// Malformed ones are returned to the driver empty.
    pub(super) fn take(
        &mut self,
        queue: &mut Queue,
        most: usize,
        bytes: usize,
    ) -> Result<bool, virtio_queue::Error> {
        self.buffers.clear();
        self.headers.clear();
        self.data.clear();
        self.room = 0;
        // The driver can make no more than `size` buffers available at a time, so this ends.
        while self.buffers.len() < most && (self.room < bytes || self.buffers.is_empty()) {
            let Some(chain) = chain::next(queue, self.memory)? else {
                break;
            };
            let head = chain.head_index();
            if let Err(mistake) = self.add(chain) {
                if !self.buffers.is_empty() {
                    // Comes again, as the first: only the last buffers of a batch can go back.
                    chain::put_back(queue, 1);
                    break;
                }
                self.mistake = Some(mistake);
                queue.add_used(self.memory, head, 0)?;
            }
        }
        chain::truncate(&mut self.data, bytes);
        Ok(!self.buffers.is_empty())
    }

    /// What was wrong with a buffer, once.
    pub(super) fn take_mistake(&mut self) -> Option<ChainError> {
        self.mistake.take()
    }

    /// Room for data, no more than asked for.
    pub(super) fn data(&self) -> &[VolatileSlice<'m>] {
        &self.data
    }

    /// Uses the first buffer for a packet without data; all others go back.
    pub(super) fn finish_control(
        &mut self,
        queue: &mut Queue,
        header: &Header,
    ) -> Result<(), virtio_queue::Error> {
        if let Some(buffer) = self.buffers.first() {
            chain::copy_in(&self.headers[..buffer.headers_end], &header.to_bytes());
            queue.add_used(self.memory, buffer.head, HEADER_BYTES)?;
            self.put_back_but(queue, 1);
        }
        Ok(())
    }

    /// Uses buffers for `count` bytes that lie in them, each with the header that `header` makes
    /// for its part; all others go back. Gives how many were used.
    pub(super) fn finish_data(
        &mut self,
        queue: &mut Queue,
        count: usize,
        mut header: impl FnMut(u32) -> Header,
    ) -> Result<usize, virtio_queue::Error> {
        let mut left = count;
        let mut headers_start = 0;
        let mut used = 0;
        for buffer in &self.buffers {
            if left == 0 {
                break;
            }
            let part = buffer.room.min(left);
            left -= part;
            let part = u32::try_from(part).unwrap_or(u32::MAX);
            let pieces = &self.headers[headers_start..buffer.headers_end];
            headers_start = buffer.headers_end;
            chain::copy_in(pieces, &header(part).to_bytes());
            queue.add_used(self.memory, buffer.head, part.saturating_add(HEADER_BYTES))?;
            used += 1;
        }
        self.put_back_but(queue, used);
        Ok(used)
    }

    fn put_back_but(&mut self, queue: &mut Queue, used: usize) {
        let unused = self.buffers.len() - used;
        // A queue has at most 2^15 entries, and a batch no more than those.
        chain::put_back(queue, u16::try_from(unused).unwrap_or(u16::MAX));
        self.buffers.clear();
    }

    /// Splits a chain into room for a header and room for data.
    fn add(&mut self, chain: Chain<'m>) -> Result<(), ChainError> {
        let head = chain.head_index();
        let (headers_start, data_start) = (self.headers.len(), self.data.len());
        let mut missing = HEADER_SIZE;
        let mut room = 0;
        let (headers, data) = (&mut self.headers, &mut self.data);
        let walked = chain.walk(|piece, writable| {
            if !writable {
                return Err(ChainError::WrongDirection);
            }
            let split = missing.min(piece.len());
            if split > 0 {
                headers.push(piece.subslice(0, split).map_err(|_| ChainError::Broken)?);
                missing -= split;
            }
            if split < piece.len() {
                let rest = piece.offset(split).map_err(|_| ChainError::Broken)?;
                room += rest.len();
                data.push(rest);
            }
            Ok(())
        });
        // A buffer without room for a byte would never carry data.
        let checked = walked.and(if room == 0 {
            Err(ChainError::TooShort)
        } else {
            Ok(())
        });
        if let Err(mistake) = checked {
            self.headers.truncate(headers_start);
            self.data.truncate(data_start);
            return Err(mistake);
        }
        self.room += room;
        self.buffers.push(Buffer {
            head,
            headers_end: self.headers.len(),
            room,
        });
        Ok(())
    }
}

const HEADER_BYTES: u32 = 44;

/// Names the queue in an error.
pub(super) fn broken(source: virtio_queue::Error) -> QueueError {
    QueueError {
        index: RECEIVE,
        source,
    }
}
