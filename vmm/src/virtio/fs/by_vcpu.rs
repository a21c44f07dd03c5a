//! Requests answered on the thread of the vCPU that notifies of them: no other thread has to be woken, and
//! the answer is there when the guest goes on. The guest stands still meanwhile, so this is for
//! what is short; all else is left to the device's thread.

use std::cell::Cell;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::finish::FINISH;
use super::handler::settle;
use super::host::RETURN;
use super::operations::{OPEN, READ, SETATTR};
use super::request::Requests;
use super::service::{By, Service, Stopped};
use super::tree::Tree;
use super::write::WRITE;
use crate::virtio::worker::signal;

/// Bytes of data that are copied at most.
const MOST_BYTES: u32 = 256 << 10;
/// A file that goes or becomes shorter: bytes to be freed at most.
const MOST_FREED: u64 = 16 << 20;
/// A request that takes longer has met a disk or worse.
const SLOW: Duration = Duration::from_micros(500);
/// No vCPU tries again for as long as so many such requests take, but no longer than that.
const WAIT: u32 = 10;
const LONGEST_WAIT: Duration = Duration::from_millis(20);

// Bits in requests.
const SETATTR_SIZE: u32 = 1 << 3;

thread_local! {
    /// Whether this thread has its own working directory and file mode mask.
    static SETTLED: Cell<bool> = const { Cell::new(false) };
}

/// The queue whose requests nobody waits for: nodes that the guest forgets, which may be the end of large
/// files.
const FORGETS: u16 = 0;

/// The driver has notified a queue, on a vCPU's thread. What is not done here is left to who waits
/// for the queue's event.
pub(super) fn notified(service: &Mutex<Service>, event: &EventFd, index: u16) {
    if index == FORGETS || !run(service, index) {
        signal(event);
    }
}

/// Says whether all is done.
fn run(service: &Mutex<Service>, index: u16) -> bool {
    let mut service = match service.try_lock() {
        Ok(service) => service,
        // Another thread serves: it may just have looked for the last time.
        Err(TryLockError::WouldBlock) => return false,
        Err(TryLockError::Poisoned(service)) => service.into_inner(),
    };
    if service.broken {
        return true;
    }
    if !service.patience.begin() || !settled() {
        return false;
    }
    // Of an error the device's thread hears, too, which tells the driver.
    let done = service.serve(By::Vcpu, index).unwrap_or(Stopped::More) == Stopped::Empty;
    done && service.answer_events().is_ok()
}

fn settled() -> bool {
    SETTLED.with(|settled| {
        if !settled.get() {
            settled.set(settle().is_ok());
        }
        settled.get()
    })
}

/// Decides what a vCPU may wait for.
#[derive(Debug)]
pub(super) struct Patience {
    /// When the request at hand began.
    begun: Instant,
    /// No vCPU serves before this.
    again: Option<Instant>,
}

impl Patience {
    /// Requests that a vCPU answers for one notification: others may have added theirs.
    pub(super) const REQUESTS: usize = 8;

    pub(super) fn new() -> Self {
        Self {
            begun: Instant::now(),
            again: None,
        }
    }

    /// Whether a vCPU may serve now.
    fn begin(&mut self) -> bool {
        self.begun = Instant::now();
        match self.again {
            Some(again) if self.begun < again => false,
            _ => {
                self.again = None;
                true
            }
        }
    }

    /// A request is done: notes how long it took.
    pub(super) fn note(&mut self) {
        let now = Instant::now();
        let took = now.duration_since(self.begun);
        if took > SLOW {
            self.rest(now + (took * WAIT).min(LONGEST_WAIT));
        }
        self.begun = now;
    }

    /// No vCPU serves before this.
    pub(super) fn rest(&mut self, until: Instant) {
        self.again = Some(until);
    }

    /// Whether a vCPU may carry the request out.
    pub(super) fn allows(&self, tree: &Tree, requests: &Requests) -> bool {
        if self.again.is_some() || !tree.is_near() {
            return false;
        }
        let freed = || {
            let attributes = tree.attributes(requests.node());
            attributes.is_ok_and(|attributes| attributes.blocks.saturating_mul(512) <= MOST_FREED)
        };
        match requests.opcode() {
            SETATTR => requests.u32_at(0) & SETATTR_SIZE == 0 || freed(),
            OPEN => requests.u32_at(0) & libc::O_TRUNC.unsigned_abs() == 0 || freed(),
            READ | WRITE => requests.u32_at(16) <= MOST_BYTES,
            FINISH => requests.u32_at(44) <= MOST_BYTES,
            // LOOKUP, GETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, STATFS,
            // RELEASE, extended attributes, OPENDIR, READDIR, RELEASEDIR, ACCESS, CREATE, READDIRPLUS,
            // RENAME2, LSEEK, TMPFILE. Not those that wait for a disk or begin and end all.
            1
            | 3
            | 5
            | 6
            | 8..=13
            | 17
            | 18
            | 21..=24
            | 27..=29
            | 34
            | 35
            | 44..=46
            | 51
            | RETURN => true,
            _ => false,
        }
    }
}
