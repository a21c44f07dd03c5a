//! The library's own way to carry out a request, for all that `operations` leaves to it. It takes requests from
//! a queue in memory and answers there: it gets a queue and memory of its own, with a copy of the
//! request, and never sees the guest's.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::request::COPIED;
use super::server::FileServer;
use crate::virtio::chain::ChainError;
use crate::virtio::worker::HandlerError;

/// The longest answers are extended attributes (64 KiB) and directories, of which Linux asks for a page.
const ANSWER_SIZE: usize = 128 << 10;

// Where things are in this memory: a descriptor table of two entries, the available ring.
const TABLE: GuestAddress = GuestAddress(0);
const AVAILABLE: GuestAddress = GuestAddress(64);
const REQUEST: GuestAddress = GuestAddress(4096);
const ANSWER: GuestAddress = GuestAddress(REQUEST.0 + COPIED as u64);
const SIZE: usize = 4096 + COPIED + ANSWER_SIZE;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;

/// A queue of one request.
pub(super) struct Library {
    memory: GuestMemoryMmap<BitmapMmapRegion>,
    queue: Queue,
    available: u16,
}

impl Library {
    pub(super) fn new() -> Result<Self, HandlerError> {
        let mut queue = Queue::new(2)?;
        queue.try_set_desc_table_address(TABLE)?;
        queue.try_set_avail_ring_address(AVAILABLE)?;
        queue.set_ready(true);
        Ok(Self {
            memory: GuestMemoryMmap::from_ranges(&[(TABLE, SIZE)])?,
            queue,
            available: 0,
        })
    }

    /// Carries a request out that has room for so long an answer, which it puts in the place of `answer`.
    pub(super) fn answer(
        &mut self,
        server: &FileServer,
        request: &[u8],
        room: usize,
        answer: &mut Vec<u8>,
    ) -> Result<(), HandlerError> {
        self.memory.write_slice(request, REQUEST)?;
        let length = u32::try_from(request.len())?;
        let room = u32::try_from(room.min(ANSWER_SIZE))?;
        for (index, descriptor) in [
            Descriptor::new(REQUEST.0, length, FLAG_NEXT, 1),
            Descriptor::new(ANSWER.0, room, FLAG_WRITE, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let at = GuestAddress(TABLE.0 + 16 * index as u64);
            self.memory.write_obj(RawDescriptor::from(descriptor), at)?;
        }
        // Every entry of the ring names the first descriptor: they are zero from the beginning.
        self.available = self.available.wrapping_add(1);
        self.memory
            .write_obj(self.available, GuestAddress(AVAILABLE.0 + 2))?;
        let chain = self.queue.iter(&self.memory)?.next();
        let chain = chain.ok_or(ChainError::Broken)?;
        let reader = Reader::new(&self.memory, chain.clone())?;
        let writer = Writer::new(&self.memory, chain)?;
        let written = server.handle_message(reader, writer, None::<&mut ()>)?;
        answer.resize(written, 0);
        self.memory.read_slice(answer, ANSWER)?;
        Ok(())
    }
}
