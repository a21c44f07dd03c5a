//! The driver's side for tests of devices: real queues in guest memory, an interrupt that can be
//! waited for, pseudo-random numbers with a fixed seed, directories that remove themselves.

#![allow(missing_docs)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt, Memory};

/// The longest that anything in a test may take.
pub const DEADLINE: Duration = Duration::from_secs(60);
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Guest memory that is given away from the bottom up.
#[derive(Clone)]
pub struct Space {
    pub memory: Memory,
    next: u64,
}

impl Space {
    pub fn new(bytes: usize) -> Self {
        let regions = [(GuestAddress(0), bytes)];
        let memory = GuestMemoryMmap::from_ranges(&regions).expect("guest memory");
        Self {
            memory: Memory::new(memory),
            next: 0x1000,
        }
    }

    pub fn take(&mut self, bytes: u64) -> GuestAddress {
        let address = GuestAddress(self.next);
        self.next += bytes.next_multiple_of(4096);
        address
    }

    pub fn write(&self, address: GuestAddress, bytes: &[u8]) {
        self.memory
            .memory()
            .write_slice(bytes, address)
            .expect("write");
    }

    pub fn read(&self, address: GuestAddress, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory
            .memory()
            .read_slice(&mut bytes, address)
            .expect("read");
        bytes
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub address: GuestAddress,
    pub length: u32,
    pub writable: bool,
}

/// What the device reads.
pub fn readable(address: GuestAddress, length: u32) -> Piece {
    Piece {
        address,
        length,
        writable: false,
    }
}

/// What the device writes.
pub fn writable(address: GuestAddress, length: u32) -> Piece {
    Piece {
        address,
        length,
        writable: true,
    }
}

/// A queue as its driver sees it.
pub struct DriverQueue {
    memory: Memory,
    size: u16,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    free: Vec<u16>,
    next_available: u16,
    next_used: u16,
    event: EventFd,
}

impl DriverQueue {
    pub fn new(space: &mut Space, size: u16) -> Self {
        let entries = u64::from(size);
        Self {
            memory: space.memory.clone(),
            size,
            descriptors: space.take(16 * entries),
            available: space.take(6 + 2 * entries),
            used: space.take(6 + 8 * entries),
            free: (0..size).rev().collect(),
            next_available: 0,
            next_used: 0,
            event: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// The device's side.
    pub fn active(&self, event_idx: bool) -> ActiveQueue {
        let mut queue = Queue::new(self.size).expect("queue");
        queue
            .try_set_desc_table_address(self.descriptors)
            .expect("address");
        queue
            .try_set_avail_ring_address(self.available)
            .expect("address");
        queue.try_set_used_ring_address(self.used).expect("address");
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        self.attach(queue)
    }

    /// The device's side with a queue that it returned before.
    pub fn attach(&self, queue: Queue) -> ActiveQueue {
        ActiveQueue {
            queue,
            notified: self.event.try_clone().expect("eventfd"),
        }
    }

    /// Makes a chain available; gives its head.
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let indices: Vec<u16> = pieces
            .iter()
            .map(|_| self.free.pop().expect("a free descriptor"))
            .collect();
        for (i, piece) in pieces.iter().enumerate() {
            let next = indices.get(i + 1).copied();
            let flags = if piece.writable { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            self.describe(
                indices[i],
                piece.address,
                piece.length,
                flags,
                next.unwrap_or(0),
            );
        }
        self.offer(indices[0]);
        indices[0]
    }

    /// Writes a descriptor, whatever it says.
    pub fn describe(&self, index: u16, address: GuestAddress, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.0.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(self.descriptors.0 + 16 * u64::from(index));
        self.memory
            .memory()
            .write_slice(&bytes, at)
            .expect("descriptor");
    }

    /// Makes the chain at `head` available, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let memory = self.memory.memory();
        let slot = u64::from(self.next_available % self.size);
        memory
            .write_obj(head, GuestAddress(self.available.0 + 4 + 2 * slot))
            .expect("ring");
        self.next_available = self.next_available.wrapping_add(1);
        memory
            .store(
                self.next_available,
                GuestAddress(self.available.0 + 2),
                Ordering::Release,
            )
            .expect("index");
    }

    /// Claims that as many more chains are available.
    pub fn claim(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_add(count);
        self.memory
            .memory()
            .store(
                self.next_available,
                GuestAddress(self.available.0 + 2),
                Ordering::Release,
            )
            .expect("index");
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.event.write(1).expect("kick");
    }

    /// The next chain that the device used: its head and how many bytes were written. Asks for an
    /// interrupt at the next if there is none.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        let memory = self.memory.memory();
        let event = GuestAddress(self.available.0 + 4 + 2 * u64::from(self.size));
        memory
            .store(self.next_used, event, Ordering::SeqCst)
            .expect("used_event");
        fence(Ordering::SeqCst);
        let index: u16 = memory
            .load(GuestAddress(self.used.0 + 2), Ordering::Acquire)
            .expect("index");
        if index == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let bytes: [u32; 2] = memory
            .read_obj(GuestAddress(self.used.0 + 4 + 8 * slot))
            .expect("element");
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(bytes[0]).expect("a head");
        self.free_chain(head);
        Some((head, bytes[1]))
    }

    /// Whether the device used a chain that was not looked at yet.
    pub fn has_used(&self) -> bool {
        let index: u16 = self
            .memory
            .memory()
            .load(GuestAddress(self.used.0 + 2), Ordering::Acquire)
            .expect("index");
        index != self.next_used
    }

    fn free_chain(&mut self, head: u16) {
        let mut index = head;
        for _ in 0..self.size {
            let at = GuestAddress(self.descriptors.0 + 16 * u64::from(index));
            let words: [u16; 8] = self.memory.memory().read_obj(at).expect("descriptor");
            if !self.free.contains(&index) {
                self.free.push(index);
            }
            if words[6] & NEXT == 0 || words[7] >= self.size {
                return;
            }
            index = words[7];
        }
    }
}

/// What the device told its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Used(u16),
    Configuration,
    NeedsReset,
}

struct Line(Mutex<Sender<Told>>);

impl Line {
    fn send(&self, told: Told) -> io::Result<()> {
        // A test that no longer listens does not mind.
        let _ = self.0.lock().expect("lock").send(told);
        Ok(())
    }
}

impl Interrupt for Line {
    fn used_buffers(&self, queue: u16) -> io::Result<()> {
        self.send(Told::Used(queue))
    }
    fn configuration_changed(&self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        self.send(Told::Configuration)
    }
    fn device_needs_reset(&self) -> io::Result<()> {
        self.send(Told::NeedsReset)
    }
}

/// An interrupt and where it arrives.
pub fn interrupt() -> (Arc<dyn Interrupt>, Receiver<Told>) {
    let (sender, receiver) = channel();
    (Arc::new(Line(Mutex::new(sender))), receiver)
}

/// All queues of a driver, with the interrupt's end.
pub struct Driver {
    pub space: Space,
    pub queues: Vec<DriverQueue>,
    pub told: Receiver<Told>,
    interrupt: Arc<dyn Interrupt>,
}

impl Driver {
    pub fn new(bytes: usize, sizes: &[u16]) -> Self {
        let mut space = Space::new(bytes);
        let queues = sizes
            .iter()
            .map(|size| DriverQueue::new(&mut space, *size))
            .collect();
        let (interrupt, told) = interrupt();
        Self {
            space,
            queues,
            told,
            interrupt,
        }
    }

    /// What a device is activated with the first time.
    pub fn activation(&self, features: u64) -> Activation {
        let queues = self
            .queues
            .iter()
            .map(|queue| queue.active(features & 1 << 29 != 0))
            .collect();
        self.with_queues(features, queues)
    }

    /// What it is activated with when it gave its queues back.
    pub fn again(&self, features: u64, queues: Vec<Queue>) -> Activation {
        let queues = std::iter::zip(&self.queues, queues)
            .map(|(driver, queue)| driver.attach(queue))
            .collect();
        self.with_queues(features, queues)
    }

    fn with_queues(&self, features: u64, queues: Vec<ActiveQueue>) -> Activation {
        Activation {
            memory: self.space.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
        }
    }

    /// Waits for the device to use a chain of a queue.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let end = Instant::now() + DEADLINE;
        loop {
            if let Some(used) = self.queues[queue].used() {
                return used;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.told.recv_timeout(left) {
                Ok(Told::Used(_)) => {}
                other => panic!("no used buffer in queue {queue}: {other:?}"),
            }
        }
    }
}

/// Pseudo-random numbers (xorshift64*), the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.max(1))
    }

    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.number().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Raises the limit on open files as far as it goes; says whether that is enough.
pub fn may_open(files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).is_ok()
        && limit.maximum.is_none_or(|maximum| maximum >= files)
}

/// A directory of a test's own.
pub struct Directory(PathBuf);

impl Directory {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "bulkhead-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("create a directory");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
