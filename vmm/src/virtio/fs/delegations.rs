//! Files that the guest has for itself: nobody else has them open, so that what it writes may wait in its
//! page cache (a write delegation, as NFS calls it, RFC 8881 §10.4). The host's kernel sees to it by a lease: who
//! opens such a file waits, the guest is asked for it, writes back what it has, and returns it.
//! docs/decisions/0010 has the reasons.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fcntl_getfl, fstatvfs};
use rustix::thread::{Pid, gettid};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::warn;

use crate::sys::lease::{self, Asked};
use crate::virtio::worker::{EventSet, Poll};

/// Tokens of the host's kernel that asks for a file, and of a guest that has taken too long to return one.
pub(super) const ASKED: u64 = 17;
pub(super) const OVERDUE: u64 = 18;
/// In the mask of an event: the node is to be returned.
pub(super) const RECALL: u32 = 1 << 31;

/// Files that a guest has at a time.
const MOST: usize = 64;
/// Writes to a file before it is offered: most files see one or two.
const WRITES_BEFORE: u32 = 3;
/// And after it could not be had.
const WRITES_AFTER_REFUSAL: u32 = 1000;
/// Files whose writes are counted.
const CANDIDATES: usize = 8;
/// How long others wait for a guest to return a file.
const PATIENCE: Duration = Duration::from_secs(1);
/// What must be free where the file lies, besides a quarter of the guest's memory: that nothing is left of the
/// disk is told at `close` or `fsync`, not at `write`.
const FREE: u64 = 64 << 20;
/// Of those, files that were given when they were made: most are closed soon.
const MOST_NEW: usize = 32;
/// For so long it is believed that there is enough free: more than the guest writes meanwhile is.
const FREE_FOR: Duration = Duration::from_millis(10);
/// Files opened with these are written at once.
const AT_ONCE: OFlags = OFlags::APPEND
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::DIRECT);

#[derive(Debug)]
pub(super) struct Delegation {
    node: u64,
    handle: u64,
    /// Another descriptor of the handle's file.
    file: OwnedFd,
    /// When it is overdue, once somebody wants it.
    due: Option<Instant>,
    /// It is closed, which ends the lease.
    closed: bool,
}

impl Delegation {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Every other descriptor of it is closed.
    pub(super) fn end_with_file(mut self) {
        self.closed = true;
    }
}

impl Drop for Delegation {
    fn drop(&mut self) {
        if !self.closed {
            lease::give_back(self.file.as_fd());
        }
    }
}

/// A file that is written to.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    handle: u64,
    /// Writes until it is offered.
    left: u32,
}

/// The guest has to read what it writes a part of, and some files are to be written at once.
fn is_fit(file: &OwnedFd) -> bool {
    fcntl_getfl(file).is_ok_and(|flags| flags & OFlags::ACCMODE == OFlags::RDWR && may_wait(flags))
}

/// Whether writes to a file that was opened so may wait.
pub(super) fn may_wait(flags: OFlags) -> bool {
    flags & OFlags::ACCMODE != OFlags::RDONLY && !flags.intersects(AT_ONCE)
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Delegations {
    given: Vec<Delegation>,
    candidates: [Option<Candidate>; CANDIDATES],
    /// The candidate that gives way to the next.
    oldest: usize,
    /// Nodes that the guest has to be asked for.
    recalls: Vec<u64>,
    listening: Option<Listening>,
    guest_memory: u64,
    /// A directory where files are made, and until when enough is free there.
    free: Option<(u64, Instant)>,
}

/// The thread that hears of those who want a file.
#[derive(Debug)]
struct Listening {
    thread: Pid,
    asked: Asked,
    timer: OwnedFd,
}

impl Delegations {
    /// The calling thread hears from now on who wants a file. Until then none is offered.
    pub(super) fn listen(&mut self, poll: &Poll, guest_memory: u64) -> io::Result<()> {
        let listening = Listening {
            thread: gettid(),
            asked: Asked::new()?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
            )?,
        };
        poll.add(listening.asked.as_fd(), ASKED, EventSet::IN)?;
        poll.add(listening.timer.as_fd(), OVERDUE, EventSet::IN)?;
        for delegation in &self.given {
            lease::tell(delegation.file.as_fd(), listening.thread)?;
        }
        self.listening = Some(listening);
        self.guest_memory = guest_memory;
        // An earlier thread may have been told.
        self.asked();
        Ok(())
    }

    /// The driver starts anew, or its queues are taken away.
    pub(super) fn clear(&mut self) {
        self.given.clear();
        self.candidates = Default::default();
        self.recalls.clear();
        self.free = None;
    }

    /// Nodes that the guest has, for a saved state.
    pub(super) fn list(&self) -> Vec<u64> {
        self.given.iter().map(|given| given.node).collect()
    }

    /// After a state was restored: whoever had these files open since was not held up, so the guest
    /// has to return them.
    pub(super) fn recall(&mut self, nodes: Vec<u64>) {
        self.recalls.extend(nodes);
    }

    /// Whether the guest has the file of this handle.
    pub(super) fn has(&self, handle: u64) -> bool {
        self.given.iter().any(|given| given.handle == handle)
    }

    /// Counts a write to a handle; says whether its file is to be offered.
    pub(super) fn counts(&mut self, handle: u64) -> bool {
        if self.listening.is_none() || self.given.len() >= MOST || self.has(handle) {
            return false;
        }
        if let Some(candidate) = self.candidate(handle) {
            candidate.left = candidate.left.saturating_sub(1);
            return candidate.left == 0;
        }
        self.candidates[self.oldest] = Some(Candidate {
            handle,
            left: WRITES_BEFORE,
        });
        self.oldest = (self.oldest + 1) % CANDIDATES;
        false
    }

    fn candidate(&mut self, handle: u64) -> Option<&mut Candidate> {
        let mut candidates = self.candidates.iter_mut().flatten();
        candidates.find(|candidate| candidate.handle == handle)
    }

    /// Gives the file to the guest if nobody else has it open.
    pub(super) fn offer(&mut self, node: u64, handle: u64, file: OwnedFd) -> bool {
        if let Some(candidate) = self.candidate(handle) {
            candidate.left = WRITES_AFTER_REFUSAL;
        }
        is_fit(&file) && self.has_room(&file) && self.lend(node, handle, file)
    }

    /// The same for a file that was just made in a directory.
    pub(super) fn give(&mut self, directory: u64, node: u64, handle: u64, file: OwnedFd) -> bool {
        if self.given.len() >= MOST_NEW {
            return false;
        }
        let now = Instant::now();
        let is_known = |(known, until)| known == directory && now < until;
        if !self.free.is_some_and(is_known) {
            if !self.has_room(&file) {
                return false;
            }
            self.free = Some((directory, now + FREE_FOR));
        }
        self.lend(node, handle, file)
    }

    fn lend(&mut self, node: u64, handle: u64, file: OwnedFd) -> bool {
        let Some(listening) = &self.listening else {
            return false;
        };
        if lease::take(file.as_fd(), listening.thread).is_err() {
            return false;
        }
        self.given.push(Delegation {
            node,
            handle,
            file,
            due: None,
            closed: false,
        });
        true
    }

    /// What was written must find room.
    fn has_room(&self, file: &OwnedFd) -> bool {
        let room = self.guest_memory / 4 + FREE;
        fstatvfs(file).is_ok_and(|at| at.f_bavail.saturating_mul(at.f_frsize) >= room)
    }

    /// The guest is about to return the file of a handle: gives it out, and leaves the lease to who gets it.
    pub(super) fn take(&mut self, node: u64, handle: u64) -> Option<Delegation> {
        let is_it = |given: &Delegation| given.node == node && given.handle == handle;
        let at = self.given.iter().position(is_it)?;
        Some(self.given.swap_remove(at))
    }

    /// The handle is being closed.
    pub(super) fn closed(&mut self, handle: u64) {
        self.given.retain(|given| given.handle != handle);
    }

    /// The guest returns the file.
    pub(super) fn returned(&mut self, node: u64) {
        self.given.retain(|given| given.node != node);
    }

    /// The server is about to open a node by itself, which must not wait for the guest.
    pub(super) fn take_back(&mut self, node: u64) {
        if self.given.iter().any(|given| given.node == node) {
            self.returned(node);
            self.recalls.push(node);
        }
    }

    /// The server has tried to open a file without waiting, and was told to wait: takes back what that
    /// was.
    pub(super) fn take_back_wanted(&mut self) {
        let Self { given, recalls, .. } = self;
        given.retain(|given| {
            let wanted = lease::is_wanted(given.file.as_fd());
            if wanted {
                recalls.push(given.node);
            }
            !wanted
        });
    }

    /// Whether the guest has any file.
    pub(super) fn are_given(&self) -> bool {
        !self.given.is_empty()
    }

    /// The host's kernel asks for files.
    pub(super) fn asked(&mut self) {
        let Some(listening) = &self.listening else {
            return;
        };
        listening.asked.clear();
        for given in &mut self.given {
            if given.due.is_none() && lease::is_wanted(given.file.as_fd()) {
                given.due = Some(Instant::now() + PATIENCE);
                self.recalls.push(given.node);
            }
        }
        self.wait_for_next();
    }

    /// Some file is overdue.
    pub(super) fn overdue(&mut self) {
        if let Some(listening) = &self.listening {
            // Fails if it was set anew meanwhile.
            let _ = rustix::io::read(&listening.timer, &mut [0; 8]);
        }
        let (before, now) = (self.given.len(), Instant::now());
        self.given
            .retain(|given| given.due.is_none_or(|due| due > now));
        if self.given.len() < before {
            warn!(
                "others have opened a file that the guest has not returned in time: they may not see what it wrote last"
            );
        }
        self.wait_for_next();
    }

    /// Sets the timer for the file that is overdue first.
    fn wait_for_next(&self) {
        let next = self.given.iter().filter_map(|given| given.due).min();
        let (Some(next), Some(listening)) = (next, &self.listening) else {
            return;
        };
        // Nothing at all would stop it.
        let left = next
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let once = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        let set = timerfd_settime(&listening.timer, TimerfdTimerFlags::empty(), &once);
        if let Err(error) = set {
            // Then the kernel's own patience ends the wait (/proc/sys/fs/lease-break-time).
            warn!(%error, "cannot limit how long others wait for a file of the guest");
        }
    }

    /// Whether the guest has to be asked for anything.
    pub(super) fn has_recalls(&self) -> bool {
        !self.recalls.is_empty()
    }

    /// The next node to be asked for.
    pub(super) fn next_recall(&mut self) -> Option<u64> {
        self.recalls.pop()
    }
}
