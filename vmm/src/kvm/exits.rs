//! What vCPUs do outside of the guest: the bus that their accesses go to, and how a guest ends.

use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

/// Where a vCPU's accesses to devices go. Called from all vCPUs' threads.
pub trait Bus: Send + Sync {
    /// The guest reads memory that is none.
    fn read_memory(&self, address: u64, data: &mut [u8]);
    /// The guest writes memory that is none.
    fn write_memory(&self, address: u64, data: &[u8]);
    /// The guest reads a port. `data` holds one or more accesses of its size.
    fn read_port(&self, port: u16, data: &mut [u8]);
    /// The guest writes a port; says whether that was to end the guest.
    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ending>;
}

/// How a guest ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It reset itself: triple fault, keyboard controller.
    Reset,
    /// KVM could not go on. For people.
    Broken(String),
}

/// Where the first vCPU that cannot go on leaves word.
#[derive(Debug)]
pub struct EndingSlot {
    ending: Mutex<Option<Ending>>,
    event: EventFd,
}

impl EndingSlot {
    /// An empty slot.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        Ok(Self {
            ending: Mutex::new(None),
            event,
        })
    }

    /// Leaves word; only the first counts.
    pub fn put(&self, ending: Ending) {
        let mut slot = self
            .ending
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        slot.get_or_insert(ending);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot signal the end of the guest");
        }
    }

    /// What was left, if anything.
    pub fn get(&self) -> Option<Ending> {
        self.ending
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Readable once there is something.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
