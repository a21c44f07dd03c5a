//! A write, whose answer tells the guest's kernel more than FUSE does, where there is room: how large the file
//! was, and when it was changed last, before and after. So the kernel can tell its own
//! writes from those of others and keeps what it knows of the file (guest-kernel/patches/0006). The answer may
//! also give the file to the guest alone (`delegations`).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use virtiofsd::filesystem::{FileSystem, ZeroCopyReader};
use virtiofsd::oslib::WritevFlags;

use super::request::{Pieces, Requests};
use super::tree::Tree;
use crate::sys::guest_io;
use crate::virtio::chain;

pub(super) const WRITE: u32 = 16;
/// Bytes of `struct fuse_write_out`, of what we add to it.
const PLAIN: usize = 8;
const MORE: usize = 32;
/// Longer writes are no Linux's.
const MOST: u32 = 1 << 20;

/// Pages of the guest's cache that go into one system call. For each page the host's kernel may look at all that
/// are left in the call (fault_in_iov_iter_readable() before 4 KiB at a time): a MiB took five times as long.
const AT_ONCE: usize = 16;

// `write_flags` of `struct fuse_write_in`.
const DELAYED: u32 = 1;
const LOCK_OWNER: u32 = 2;
const KILL_PRIVILEGES: u32 = 4;
/// Flags of a file whose writes must not wait in the guest.
const IMMEDIATE: u32 =
    (libc::O_APPEND | libc::O_DIRECT | libc::O_DSYNC | libc::O_SYNC).unsigned_abs();

/// Carries the request out that is at hand; adds the answer's body to `answer`, which there is so much room
/// for in all.
pub(super) fn carry_out(
    tree: &Tree,
    requests: &Requests,
    data: &Pieces<'_>,
    room: usize,
    answer: &mut Vec<u8>,
) -> io::Result<()> {
    let plain = answer.len() + PLAIN;
    let (node, handle) = (requests.node(), requests.u64_at(0));
    let immediate = requests.u32_at(32) & IMMEDIATE != 0;
    let offerable = room >= plain + MORE && !immediate;
    let offered = offerable && tree.delegations().counts(handle);
    let (count, mut observed) = observe(tree, requests, data, offered)?;
    let mut delegations = tree.delegations();
    let given = match observed.file.take() {
        Some(file) => delegations.offer(node, handle, file),
        None => offerable && delegations.has(handle),
    };
    drop(delegations);
    observed.tell(u32::try_from(count).unwrap_or(u32::MAX), given, answer);
    // Not all writes of Linux want to know more.
    if room < answer.len() {
        answer.truncate(plain);
    }
    Ok(())
}

/// Writes; gives how many bytes, and what was seen.
fn observe<'a, 'm>(
    tree: &Tree,
    requests: &Requests,
    data: &'a Pieces<'m>,
    offered: bool,
) -> io::Result<(usize, Observed<'a, 'm>)> {
    let (size, write_flags) = (requests.u32_at(16), requests.u32_at(20));
    if size > MOST {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    let kill_privileges = write_flags & KILL_PRIVILEGES != 0;
    let append = requests.u32_at(32) & libc::O_APPEND.unsigned_abs() != 0;
    let delayed = write_flags & DELAYED != 0;
    let mut observed = Observed::new(data, kill_privileges && !append, delayed, offered);
    if observed.spares_privileged {
        // To give up a capability takes longer than to write, and hardly a file needs that.
        let written = write(tree, requests, &mut observed, false);
        if !observed.sees_privileged() {
            return Ok((written?, observed));
        }
        // It is one, or has become one meanwhile: then the same again has no other effect.
        observed = Observed::new(data, false, delayed, offered);
    }
    let count = write(tree, requests, &mut observed, kill_privileges)?;
    Ok((count, observed))
}

fn write(
    tree: &Tree,
    requests: &Requests,
    observed: &mut Observed<'_, '_>,
    kill_privileges: bool,
) -> io::Result<usize> {
    let (size, write_flags) = (requests.u32_at(16), requests.u32_at(20));
    tree.write(
        requests.context(),
        requests.node(),
        requests.u64_at(0),
        observed,
        size,
        requests.u64_at(8),
        (write_flags & LOCK_OWNER != 0).then(|| requests.u64_at(24)),
        write_flags & DELAYED != 0,
        kill_privileges,
        requests.u32_at(32),
    )
}

/// What is written, and the file's state around that.
struct Observed<'a, 'm> {
    data: &'a Pieces<'m>,
    before: Option<State>,
    after: Option<State>,
    /// A file with set-user-id or set-group-id bits is not written to.
    spares_privileged: bool,
    /// It comes from the guest's cache: whoever wrote it does not wait.
    delayed: bool,
    /// The file is to be offered to the guest.
    offered: bool,
    /// Then another descriptor of it.
    file: Option<OwnedFd>,
}

#[derive(Clone, Copy)]
struct State {
    size: i64,
    changed: (i64, u64),
    /// Set-user-id or set-group-id.
    privileged: bool,
}

impl State {
    fn of(file: &File) -> Option<Self> {
        let stat = rustix::fs::fstat(file).ok()?;
        Some(Self {
            size: stat.st_size,
            changed: (stat.st_mtime, stat.st_mtime_nsec),
            privileged: stat.st_mode & (libc::S_ISUID | libc::S_ISGID) != 0,
        })
    }
}

impl<'a, 'm> Observed<'a, 'm> {
    fn new(data: &'a Pieces<'m>, spares_privileged: bool, delayed: bool, offered: bool) -> Self {
        Self {
            data,
            before: None,
            after: None,
            spares_privileged,
            delayed,
            offered,
            file: None,
        }
    }

    /// Whether the file was or is one, as far as can be seen.
    fn sees_privileged(&self) -> bool {
        let privileged = |state: Option<State>| state.is_none_or(|state| state.privileged);
        privileged(self.before) || privileged(self.after)
    }

    /// Puts the answer's body together.
    fn tell(&self, count: u32, given: bool, answer: &mut Vec<u8>) {
        let mut body = [0; PLAIN + MORE];
        body[..4].copy_from_slice(&count.to_le_bytes());
        body[4..8].copy_from_slice(&u32::from(given).to_le_bytes());
        let (Some(before), Some(after)) = (self.before, self.after) else {
            answer.extend(&body[..PLAIN]);
            return;
        };
        body[8..16].copy_from_slice(&before.size.to_le_bytes());
        body[16..24].copy_from_slice(&before.changed.0.to_le_bytes());
        body[24..32].copy_from_slice(&after.changed.0.to_le_bytes());
        for (at, nanoseconds) in [(32, before.changed.1), (36, after.changed.1)] {
            let nanoseconds = u32::try_from(nanoseconds).unwrap_or(0);
            body[at..at + 4].copy_from_slice(&nanoseconds.to_le_bytes());
        }
        answer.extend(body);
    }
}

impl ZeroCopyReader for Observed<'_, '_> {
    fn write_to_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        self.before = State::of(file);
        if self.spares_privileged && self.before.is_none_or(|before| before.privileged) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let flags = flags.map_or(0, |flags| flags.bits());
        let mut data = self.data.clone();
        let most = if self.delayed { AT_ONCE } else { usize::MAX };
        let done = chain::transfer(&mut data, count, offset, |pieces, at| {
            let now = pieces.len().min(most);
            guest_io::write_at(file.as_fd(), &pieces[..now], at, flags)
        })?;
        self.after = State::of(file);
        if self.offered {
            // Without a descriptor to spare there is no offer.
            self.file = file.as_fd().try_clone_to_owned().ok();
        }
        Ok(done)
    }
}
