//! A write, whose answer tells the guest's kernel more than FUSE does, where there is room: how large the file
//! was, and when it was changed last, before and after. So the kernel can tell its own
//! writes from those of others and keeps what it knows of the file (guest-kernel/patches/0006).

use std::fs::File;
use std::io::{self, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, FileSystem, ZeroCopyReader};
use virtiofsd::oslib::WritevFlags;

use super::request::Requests;
use super::tree::Tree;
use crate::virtio::worker::HandlerError;

pub(super) const WRITE: u32 = 16;
/// Bytes of `struct fuse_in_header` and `struct fuse_write_in`.
const BEFORE_DATA: usize = 80;
/// Bytes of `struct fuse_out_header`, of `struct fuse_write_out`, of what we add to it.
const HEADER: usize = 16;
const PLAIN: usize = 8;
const MORE: usize = 32;
/// Longer writes are no Linux's.
const MOST: u32 = 1 << 20;

// `write_flags` of `struct fuse_write_in`.
const DELAYED: u32 = 1;
const LOCK_OWNER: u32 = 2;
const KILL_PRIVILEGES: u32 = 4;

/// Carries the request out that is at hand; gives the length of the answer.
pub(super) fn answer(
    tree: &Tree,
    requests: &Requests,
    mut reader: Reader<'_>,
    mut writer: Writer<'_>,
) -> Result<usize, HandlerError> {
    let data = reader.split_at(BEFORE_DATA)?;
    let mut answer = [0; HEADER + PLAIN + MORE];
    let (header, body) = answer.split_at_mut(HEADER);
    let (error, told) = match carry_out(tree, requests, &data) {
        Ok((count, observed)) => (0, observed.tell(u32::try_from(count)?, body)),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), 0),
    };
    let room = writer.available_bytes().saturating_sub(HEADER);
    let length = HEADER + if room < told { told.min(PLAIN) } else { told };
    header[..4].copy_from_slice(&u32::try_from(length)?.to_le_bytes());
    header[4..8].copy_from_slice(&(-error).to_le_bytes());
    header[8..].copy_from_slice(&requests.unique());
    writer.write_all(&answer[..length])?;
    Ok(length)
}

/// Writes; gives how many bytes, and what was seen.
fn carry_out<'a>(
    tree: &Tree,
    requests: &Requests,
    data: &Reader<'a>,
) -> io::Result<(usize, Observed<'a>)> {
    let (size, write_flags) = (requests.u32_at(16), requests.u32_at(20));
    if size > MOST {
        return Err(io::Error::from_raw_os_error(libc::ENOMEM));
    }
    let kill_privileges = write_flags & KILL_PRIVILEGES != 0;
    let append = requests.u32_at(32) & libc::O_APPEND.unsigned_abs() != 0;
    let mut observed = Observed::new(data, kill_privileges && !append);
    if observed.spares_privileged {
        // To give up a capability takes longer than to write, and hardly a file needs that.
        let written = write(tree, requests, &mut observed, false);
        if !observed.sees_privileged() {
            return Ok((written?, observed));
        }
        // It is one, or has become one meanwhile: then the same again has no other effect.
        observed = Observed::new(data, false);
    }
    let count = write(tree, requests, &mut observed, kill_privileges)?;
    Ok((count, observed))
}

fn write(
    tree: &Tree,
    requests: &Requests,
    observed: &mut Observed<'_>,
    kill_privileges: bool,
) -> io::Result<usize> {
    let (uid, gid) = requests.user();
    let context = Context {
        uid: uid.into(),
        gid: gid.into(),
        pid: 0,
    };
    let (size, write_flags) = (requests.u32_at(16), requests.u32_at(20));
    tree.write(
        context,
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
struct Observed<'a> {
    data: Reader<'a>,
    before: Option<State>,
    after: Option<State>,
    /// A file with set-user-id or set-group-id bits is not written to.
    spares_privileged: bool,
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

impl<'a> Observed<'a> {
    fn new(data: &Reader<'a>, spares_privileged: bool) -> Self {
        Self {
            data: data.clone(),
            before: None,
            after: None,
            spares_privileged,
        }
    }

    /// Whether the file was or is one, as far as can be seen.
    fn sees_privileged(&self) -> bool {
        let privileged = |state: Option<State>| state.is_none_or(|state| state.privileged);
        privileged(self.before) || privileged(self.after)
    }

    /// Puts the answer's body together; gives its length.
    fn tell(&self, count: u32, body: &mut [u8]) -> usize {
        body[..4].copy_from_slice(&count.to_le_bytes());
        let (Some(before), Some(after)) = (self.before, self.after) else {
            return PLAIN;
        };
        body[8..16].copy_from_slice(&before.size.to_le_bytes());
        body[16..24].copy_from_slice(&before.changed.0.to_le_bytes());
        body[24..32].copy_from_slice(&after.changed.0.to_le_bytes());
        for (at, nanoseconds) in [(32, before.changed.1), (36, after.changed.1)] {
            let nanoseconds = u32::try_from(nanoseconds).unwrap_or(0);
            body[at..at + 4].copy_from_slice(&nanoseconds.to_le_bytes());
        }
        PLAIN + MORE
    }
}

impl ZeroCopyReader for Observed<'_> {
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
        let mut done = 0;
        while done < count {
            let at = offset
                .checked_add(done as u64)
                .ok_or(io::ErrorKind::InvalidInput)?;
            let written = self.data.write_to_file_at(file, count - done, at, flags)?;
            if written == 0 {
                break;
            }
            done += written;
        }
        self.after = State::of(file);
        Ok(done)
    }
}
