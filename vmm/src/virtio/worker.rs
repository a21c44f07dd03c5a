//! A device's thread: an epoll loop around a handler value that owns the device's active queues.
//!
//! The loop ends by an event, and the handler comes back to whoever ends it, so that the queues
//! survive a stop. A handler that fails is not called again until the driver resets the device.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use tracing::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::{ActivateError, Interrupt};
use crate::threads::{self, Role};

pub use vmm_sys_util::epoll::EventSet;

/// Events taken from the kernel at a time.
const BATCH: usize = 16;
/// The token of the event that ends the loop; handlers may not use it.
const STOP: u64 = u64::MAX;

/// Has the thread that waits for the event look for something to do.
pub fn signal(event: &EventFd) {
    if let Err(error) = event.write(1) {
        // It refuses only an overflowing count, which single signals cannot reach.
        warn!(%error, "cannot signal a device");
    }
}

/// Why a handler cannot go on; the driver must reset the device. Its text is for the log.
pub type HandlerError = Box<dyn std::error::Error + Send + Sync>;

/// What runs on a device's thread.
pub trait Handler: Send + 'static {
    /// Names what to wait for. Called once, on the thread that spawns the worker.
    fn register(&mut self, poll: &Poll) -> io::Result<()>;
    /// One event has come. Level-triggered unless registered otherwise, so what is not consumed
    /// comes again. Must not block: `stop` waits for it.
    fn handle(&mut self, poll: &Poll, token: u64, events: EventSet) -> Result<(), HandlerError>;
}

/// The set of file descriptors that a worker waits for, each with a token of the handler's choice.
pub struct Poll(Epoll);

impl Poll {
    /// Starts to watch a descriptor. It must be removed before it is closed if a duplicate of it
    /// stays open elsewhere.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)
    }

    /// Starts to watch an event, such as a queue's notification. It comes once for each time that
    /// it is signalled (or fewer, if that is faster than we are), without being read.
    pub fn add_event(&self, event: &EventFd, token: u64) -> io::Result<()> {
        if token == STOP {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let watched = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        self.0
            .ctl(ControlOperation::Add, event.as_raw_fd(), watched)
    }

    /// Changes what a watched descriptor is watched for.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, events: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    /// Ends watching.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        )
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: BorrowedFd<'_>,
        token: u64,
        events: EventSet,
    ) -> io::Result<()> {
        if token == STOP {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.0
            .ctl(operation, fd.as_raw_fd(), EpollEvent::new(events, token))
    }
}

/// A running device thread.
pub struct Worker<H> {
    thread: JoinHandle<H>,
    stop: EventFd,
}

impl<H: Handler> Worker<H> {
    /// Starts a thread that serves `handler`. `role` names the thread and, one day, picks its
    /// seccomp filter; `interrupt` tells the driver when the handler fails.
    pub fn spawn(
        role: Role,
        mut handler: H,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, ActivateError> {
        let poll = Poll(Epoll::new().map_err(ActivateError::Thread)?);
        let stop = EventFd::new(EFD_CLOEXEC).map_err(ActivateError::Thread)?;
        poll.0
            .ctl(
                ControlOperation::Add,
                stop.as_raw_fd(),
                EpollEvent::new(EventSet::IN, STOP),
            )
            .and_then(|()| handler.register(&poll))
            .map_err(ActivateError::Thread)?;
        let ended = stop.try_clone().map_err(ActivateError::Thread)?;
        let thread = threads::spawn(role, move || {
            serve(&poll, &mut handler, interrupt.as_ref(), &ended);
            handler
        })
        .map_err(ActivateError::Thread)?;
        Ok(Self { thread, stop })
    }

    /// Ends the thread and gives the handler back, after the event that it is at. Gives nothing if
    /// the thread panicked (tests only: the program aborts on a panic).
    pub fn stop(self) -> Option<H> {
        signal(&self.stop);
        self.thread.join().ok()
    }
}

fn serve<H: Handler>(poll: &Poll, handler: &mut H, interrupt: &dyn Interrupt, stop: &EventFd) {
    let Err(error) = handle_events(poll, handler) else {
        return;
    };
    warn!(%error, "the device needs a reset by its driver");
    if let Err(error) = interrupt.device_needs_reset() {
        warn!(%error, "cannot tell the driver");
    }
    // Whatever still fires must not run the handler again: wait for the stop event alone.
    while let Err(error) = stop.read() {
        if error.kind() != io::ErrorKind::Interrupted {
            warn!(%error, "a device thread cannot wait for its end");
            return;
        }
    }
}

/// Runs until the stop event; fails as the handler does.
fn handle_events<H: Handler>(poll: &Poll, handler: &mut H) -> Result<(), HandlerError> {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match poll.0.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return Ok(());
            }
            handler.handle(poll, event.data(), event.event_set())?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Mutex;
    use std::sync::mpsc;

    use super::*;

    struct Fake(Mutex<Option<mpsc::Sender<()>>>);

    impl Interrupt for Fake {
        fn used_buffers(&self, _queue: u16) -> io::Result<()> {
            Ok(())
        }
        fn configuration_changed(&self, _: u64, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn device_needs_reset(&self) -> io::Result<()> {
            drop(self.0.lock().expect("lock").take());
            Ok(())
        }
    }

    /// Counts; fails at `limit`.
    struct Counter {
        read: io::PipeReader,
        seen: Vec<u8>,
        told: mpsc::Sender<u8>,
        limit: u8,
    }

    impl Handler for Counter {
        fn register(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(self.read.as_fd(), 7, EventSet::IN)
        }
        fn handle(&mut self, _: &Poll, token: u64, _: EventSet) -> Result<(), HandlerError> {
            assert_eq!(token, 7);
            let mut byte = [0];
            io::Read::read_exact(&mut self.read, &mut byte)?;
            if byte[0] == self.limit {
                return Err("limit".into());
            }
            self.seen.push(byte[0]);
            self.told.send(byte[0])?;
            Ok(())
        }
    }

    #[test]
    fn gives_the_handler_back() {
        let (read, mut write) = io::pipe().expect("pipe");
        let (told, heard) = mpsc::channel();
        let counter = Counter {
            read,
            seen: vec![],
            told,
            limit: 255,
        };
        let worker =
            Worker::spawn(Role::Entropy, counter, Arc::new(Fake(Mutex::default()))).expect("spawn");
        io::Write::write_all(&mut write, &[1, 2]).expect("write");
        assert_eq!(heard.recv(), Ok(1));
        assert_eq!(heard.recv(), Ok(2));
        assert_eq!(worker.stop().expect("handler").seen, [1, 2]);
    }

    #[test]
    fn failure_asks_for_a_reset_and_stops_serving() {
        let (read, mut write) = io::pipe().expect("pipe");
        let (told, _heard) = mpsc::channel();
        let (alive, reset) = mpsc::channel();
        let counter = Counter {
            read,
            seen: vec![],
            told,
            limit: 1,
        };
        let worker = Worker::spawn(
            Role::Entropy,
            counter,
            Arc::new(Fake(Mutex::new(Some(alive)))),
        )
        .expect("spawn");
        io::Write::write_all(&mut write, &[1, 2]).expect("write");
        // Ends when the fake drops its sender.
        reset.recv().expect_err("asked for a reset");
        assert!(worker.stop().expect("handler").seen.is_empty());
    }
}
