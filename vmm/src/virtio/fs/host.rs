//! What the guest's kernel asks beyond FUSE (guest-kernel/patches): to be told of changes that
//! others make to files that it watches, and to be connected to sockets of the host.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::changes::{Changes, caused_by};
use super::operations::{self, OUT_HEADER};
use super::request::{Details, Requests};
use super::sockets;
use super::tree::Tree;
use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::host_connections::HostConnections;
use crate::virtio::worker::{EventSet, Poll};

/// For which events a node is watched: mask, padding.
pub(super) const WATCH: u32 = 0x4248_0001;
/// Answered when there are events; or makes the one that waits be answered: whether, padding.
pub(super) const EVENTS: u32 = 0x4248_0002;
/// Connects to the socket of this name in a directory; the answer is a mark, padding.
pub(super) const CONNECT: u32 = 0x4248_0003;

/// The guest returns a file that it had for itself.
pub(super) const RETURN: u32 = 0x4248_0004;

const INIT: u32 = 26;
const DESTROY: u32 = 38;

/// Token of the host's events; those below are queues.
pub(super) const CHANGES: u64 = 16;
/// The guest's request for events, which waits for them.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) queue: u16,
    pub(super) head: u16,
    buffers: Buffers,
    unique: [u8; 8],
}

/// This side of the share.
pub(super) struct HostSide {
    tree: Tree,
    /// /proc/self/fd
    descriptors: File,
    connections: HostConnections,
    changes: Changes,
    waiting: Option<Waiting>,
    /// The guest wants no more events.
    cancelled: bool,
    /// The thread waits for the host's events.
    registered: bool,
    /// Watches of a state that was restored.
    restored: Vec<(u64, u32)>,
}

/// What becomes of a request.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Answered with so many bytes.
    Answered(u32),
    /// To be answered later.
    Waits,
}

impl HostSide {
    pub(super) fn new(tree: Tree, descriptors: File, connections: HostConnections) -> Self {
        Self {
            tree,
            descriptors,
            connections,
            changes: Changes::default(),
            waiting: None,
            cancelled: false,
            registered: false,
            restored: Vec::new(),
        }
    }

    /// The driver starts anew.
    pub(super) fn reset(&mut self) {
        self.changes = Changes::default();
        self.waiting = None;
        self.cancelled = false;
        self.registered = false;
        self.restored.clear();
        self.tree.delegations().clear();
    }

    /// For a saved state.
    pub(super) fn watches(&self) -> Vec<(u64, u32)> {
        self.changes.list()
    }

    /// For a saved state: files that the guest has for itself.
    pub(super) fn delegated(&self) -> Vec<u64> {
        self.tree.delegations().list()
    }

    /// From a saved state.
    pub(super) fn restore(&mut self, watches: Vec<(u64, u32)>, delegated: Vec<u64>) {
        self.restored = watches;
        self.tree.delegations().recall(delegated);
    }

    /// A thread begins to serve.
    pub(super) fn register(&mut self, poll: &Poll) -> io::Result<()> {
        self.registered = false;
        self.listen(poll)
    }

    fn listen(&mut self, poll: &Poll) -> io::Result<()> {
        if !self.registered
            && let Some(inotify) = self.changes.readable()
        {
            poll.add(inotify, CHANGES, EventSet::IN)?;
            self.registered = true;
        }
        Ok(())
    }

    /// On the thread that serves, before the first request: takes up the watches of a state that
    /// was restored. A file that is gone is no longer watched.
    pub(super) fn settle(&mut self, poll: &Poll, guest_memory: u64) -> io::Result<()> {
        self.tree.delegations().listen(poll, guest_memory)?;
        for (node, mask) in std::mem::take(&mut self.restored) {
            let descriptors = self.descriptors.as_fd();
            let _ = self.changes.watch(&self.tree, descriptors, node, mask);
        }
        self.listen(poll)
    }

    /// Something has happened on the host.
    pub(super) fn collect(&mut self) {
        self.changes.collect(&self.tree);
    }

    /// To be called before a request is carried out. Gives what is needed after it, if anything.
    pub(super) fn before(&mut self, requests: &Requests) -> Option<Details> {
        let opcode = requests.opcode();
        if opcode == INIT || opcode == DESTROY {
            self.reset();
        }
        if !self.changes.watches() || caused_by(opcode) == 0 {
            return None;
        }
        self.changes.collect(&self.tree);
        Some(requests.details())
    }

    /// To be called after it.
    pub(super) fn after(&mut self, request: &Details) {
        self.changes.collect_beside(&self.tree, request);
    }

    /// Carries out a request of these.
    pub(super) fn serve(
        &mut self,
        poll: &Poll,
        memory: &GuestMemoryMmap,
        requests: &Requests,
        chain: Chain<'_>,
        queue: u16,
    ) -> Result<Outcome, ChainError> {
        let head = chain.head_index();
        let buffers = Buffers::of(chain)?;
        let unique = requests.unique();
        let answer = match requests.opcode() {
            WATCH => self.watch(poll, requests),
            CONNECT => self.connect(requests),
            _ if requests.u32_at(0) != 0 => {
                self.cancelled = true;
                Ok(Vec::new())
            }
            _ if self.cancelled => Err(Errno::NODEV.into()),
            _ if self.waiting.is_some() => Err(Errno::BUSY.into()),
            _ => {
                self.waiting = Some(Waiting {
                    queue,
                    head,
                    buffers,
                    unique,
                });
                return Ok(Outcome::Waits);
            }
        };
        let written = buffers.answer(memory, unique, answer)?;
        Ok(Outcome::Answered(written))
    }

    fn watch(&mut self, poll: &Poll, requests: &Requests) -> io::Result<Vec<u8>> {
        let descriptors = self.descriptors.as_fd();
        let (node, mask) = (requests.node(), requests.u32_at(0));
        self.changes.watch(&self.tree, descriptors, node, mask)?;
        self.listen(poll)?;
        Ok(Vec::new())
    }

    fn connect(&self, requests: &Requests) -> io::Result<Vec<u8>> {
        let name = CStr::from_bytes_until_nul(requests.body()).map_err(|_| Errno::INVAL)?;
        let directory = self.tree.open_node(requests.node())?;
        let descriptors = self.descriptors.as_fd();
        let connection = sockets::connect_to(&directory, name, requests.user(), descriptors)?;
        let mark = self.connections.put(connection);
        Ok([mark.to_le_bytes(), [0; 4]].concat())
    }

    /// The request that waits for events, if it can be answered now.
    pub(super) fn answerable(&mut self) -> Option<Waiting> {
        if self.cancelled || self.changes.has_events() || self.tree.delegations().has_recalls() {
            return self.waiting.take();
        }
        None
    }

    /// The request that waits, whether there are events or not.
    pub(super) fn give_up_waiting(&mut self) -> Option<Waiting> {
        self.waiting.take()
    }

    /// Answers it, with no events if there are none. Gives the length of the answer.
    pub(super) fn answer(
        &mut self,
        memory: &GuestMemoryMmap,
        waiting: &Waiting,
    ) -> Result<u32, ChainError> {
        let answer = if self.cancelled {
            Err(Errno::NODEV.into())
        } else {
            let room = waiting.buffers.length().saturating_sub(OUT_HEADER);
            let mut delegations = self.tree.delegations();
            let recalls = std::iter::from_fn(|| delegations.next_recall());
            Ok(self.changes.fetch(recalls, room))
        };
        waiting.buffers.answer(memory, waiting.unique, answer)
    }
}

/// The device-writable buffers of a request.
#[derive(Debug)]
struct Buffers(Vec<(GuestAddress, usize)>);

impl Buffers {
    fn of(chain: Chain<'_>) -> Result<Self, ChainError> {
        let mut buffers = Vec::new();
        chain.buffers(|address, length, writable| {
            if writable {
                let length = usize::try_from(length).map_err(|_| ChainError::TooLong)?;
                buffers.push((address, length));
            }
            Ok(())
        })?;
        Ok(Self(buffers))
    }

    fn length(&self) -> usize {
        self.0.iter().map(|(_, length)| length).sum()
    }

    /// Writes a FUSE answer; gives its length.
    fn answer(
        &self,
        memory: &GuestMemoryMmap,
        unique: [u8; 8],
        answer: io::Result<Vec<u8>>,
    ) -> Result<u32, ChainError> {
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let length = u32::try_from(OUT_HEADER + body.len()).map_err(|_| ChainError::TooLong)?;
        let mut message = [&[0; OUT_HEADER][..], &body].concat();
        operations::finish(&mut message, 0, error, unique);
        let mut left = &message[..];
        for (address, room) in &self.0 {
            let (now, later) = left.split_at(left.len().min(*room));
            memory
                .write_slice(now, *address)
                .map_err(|_| ChainError::OutsideMemory {
                    address: address.0,
                    length: u32::try_from(*room).unwrap_or(u32::MAX),
                })?;
            left = later;
        }
        if left.is_empty() {
            Ok(length)
        } else {
            Err(ChainError::TooShort)
        }
    }
}
