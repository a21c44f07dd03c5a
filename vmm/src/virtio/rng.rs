//! virtio-rng (virtio 1.2 §5.4): random bytes from the host.

use std::io;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use tracing::debug;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;

use super::chain::{self, Chain, ChainError, QueueError};
use super::worker::{EventSet, Handler, HandlerError, Poll, Worker};
use super::{
    ActivateError, Activation, ActiveQueue, DeviceKind, DeviceState, Interrupt, Memory, StateError,
    VirtioDevice,
};
use crate::threads::Role;

/// Size of the one queue.
const QUEUE_SIZE: u16 = 32;
/// Bytes given for one buffer; the driver asks again for more.
const AT_ONCE: usize = 256;

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker<Server>>,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queue = activation
            .queues
            .pop()
            .ok_or_else(|| ActivateError::Backend {
                what: "the request queue".into(),
                source: io::ErrorKind::NotFound.into(),
            })?;
        let interrupt = activation.interrupt;
        let server = Server {
            queue,
            memory: activation.memory,
            interrupt: interrupt.clone(),
        };
        self.worker = Some(Worker::spawn(Role::Entropy, server, interrupt)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let server = self.worker.take().and_then(Worker::stop);
        server
            .map(|server| server.queue.queue)
            .into_iter()
            .collect()
    }

    fn save(&mut self) -> Result<DeviceState, StateError> {
        Ok(DeviceState::Entropy)
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Entropy => Ok(()),
            other => Err(StateError::WrongDevice {
                expected: self.kind(),
                found: other.kind(),
            }),
        }
    }
}

/// What the thread owns.
struct Server {
    queue: ActiveQueue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
}

impl Handler for Server {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add_event(&self.queue.notified, 0)
    }

    fn handle(&mut self, _poll: &Poll, _token: u64, _events: EventSet) -> Result<(), HandlerError> {
        let memory = self.memory.memory();
        let queue = &mut self.queue.queue;
        let broken = |source| QueueError { index: 0, source };
        let mut used = false;
        while let Some(chain) = chain::next(queue, &memory).map_err(broken)? {
            let head = chain.head_index();
            let count = fill(chain).unwrap_or_else(|error| {
                debug!(%error, "the driver's buffer cannot be filled");
                0
            });
            queue.add_used(&*memory, head, count).map_err(broken)?;
            used = true;
        }
        if used && queue.needs_notification(&*memory).map_err(broken)? {
            self.interrupt.used_buffers(0)?;
        }
        Ok(())
    }
}

/// Fills the first buffer of a chain; gives the number of bytes written.
fn fill(chain: Chain<'_>) -> Result<u32, ChainError> {
    let mut first = None;
    chain.walk(|piece, writable| {
        // §5.4.6.2: buffers are for the device to write.
        if !writable {
            return Err(ChainError::WrongDirection);
        }
        first.get_or_insert(piece);
        Ok(())
    })?;
    let piece = first.ok_or(ChainError::TooShort)?;
    let mut bytes = [0; AT_ONCE];
    let wanted = &mut bytes[..piece.len().min(AT_ONCE)];
    // Does not block: the host's generator is ready long before anything of ours runs.
    let count = getrandom(&mut *wanted, GetRandomFlags::empty()).unwrap_or(0);
    piece.copy_from(&wanted[..count]);
    Ok(u32::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::state::VsockState;
    use crate::virtio::testing::{DEADLINE, Driver, Told, readable, writable};

    struct Guest {
        device: Rng,
        driver: Driver,
        buffer: GuestAddress,
    }

    impl Guest {
        fn new() -> Self {
            let mut device = Rng::default();
            let mut driver = Driver::new(1 << 20, device.queue_sizes());
            let buffer = driver.space.take(8192);
            device.activate(driver.activation(0)).expect("activate");
            Self {
                device,
                driver,
                buffer,
            }
        }

        fn request(&mut self) -> u32 {
            let head = self.driver.queues[0].add(&[writable(self.buffer, 64)]);
            self.driver.queues[0].kick();
            let (used, length) = self.driver.wait_used(0);
            assert_eq!(used, head);
            length
        }
    }

    #[test]
    fn fills_buffers() {
        let mut guest = Guest::new();
        assert_eq!(guest.request(), 64);
        let first = guest.driver.space.read(guest.buffer, 65);
        assert_ne!(first[..64], [0; 64]);
        assert_eq!(first[64], 0, "no byte beyond the buffer");
        assert_eq!(guest.request(), 64);
        assert_ne!(guest.driver.space.read(guest.buffer, 64), first[..64]);
    }

    #[test]
    fn gives_no_more_than_it_wants() {
        let mut guest = Guest::new();
        guest.driver.queues[0].add(&[writable(guest.buffer, 8192)]);
        guest.driver.queues[0].kick();
        assert_eq!(guest.driver.wait_used(0).1, 256);
    }

    #[test]
    fn wrong_buffers_come_back_empty() {
        let mut guest = Guest::new();
        for piece in [
            readable(guest.buffer, 64),
            writable(guest.buffer, 0),
            writable(GuestAddress(1 << 40), 64),
            writable(GuestAddress(u64::MAX - 3), 64),
        ] {
            guest.driver.queues[0].add(&[piece]);
            guest.driver.queues[0].kick();
            assert_eq!(guest.driver.wait_used(0).1, 0, "{piece:?}");
        }
        assert_eq!(guest.request(), 64, "the device goes on");
    }

    #[test]
    fn chains_in_a_circle_come_back_empty() {
        let mut guest = Guest::new();
        let queue = &mut guest.driver.queues[0];
        queue.describe(0, guest.buffer, 4, 1 | 2, 0);
        queue.offer(0);
        queue.kick();
        assert_eq!(guest.driver.wait_used(0), (0, 0));
    }

    #[test]
    fn an_impossible_index_needs_a_reset() {
        let mut guest = Guest::new();
        guest.driver.queues[0].claim(QUEUE_SIZE + 1);
        guest.driver.queues[0].kick();
        let told = guest.driver.told.recv_timeout(DEADLINE);
        assert_eq!(told, Ok(Told::NeedsReset));
        assert_eq!(guest.device.deactivate().len(), 1);
    }

    #[test]
    fn goes_on_after_a_stop() {
        let mut guest = Guest::new();
        guest.request();
        let queues = guest.device.deactivate();
        assert_eq!(queues.len(), 1);
        assert!(guest.device.deactivate().is_empty());
        let mut second = Rng::default();
        second
            .restore(guest.device.save().expect("save"))
            .expect("restore");
        second
            .activate(guest.driver.again(0, queues))
            .expect("activate");
        guest.device = second;
        assert_eq!(guest.request(), 64);
    }

    #[test]
    fn refuses_another_devices_state() {
        let state = DeviceState::Vsock(VsockState { guest_cid: 3 });
        assert!(Rng::default().restore(state).is_err());
    }
}
