//! A FUSE request in private memory. Names are handed to system calls that would walk through `/` and
//! `..` out of the share: they are checked here, on a copy that the guest cannot change any more. What is
//! to be written to a file stays where it is.

use std::ffi::{CStr, CString};

use smallvec::SmallVec;
use virtiofsd::filesystem::Context;
use vm_memory::VolatileSlice;

use super::finish::{self, FINISH};
use super::host::CONNECT;
use super::write::WRITE;
use crate::virtio::chain::{self, Chain, ChainError};

/// Bytes of `struct fuse_in_header`.
const HEADER_SIZE: usize = 40;
/// Bytes of a request that are copied. The longest that is not a write sets an extended attribute: its
/// value (64 KiB) and its name.
pub(super) const COPIED: usize = 68 << 10;
/// Bytes of the header and `struct fuse_write_in`, which the data follows.
const FIXED: usize = 80;

/// Buffers of the guest.
pub(super) type Pieces<'m> = SmallVec<[VolatileSlice<'m>; 8]>;

/// Takes requests, one at a time.
pub(super) struct Requests {
    copy: Box<[u8]>,
    /// How much of it is the present request's.
    copied: usize,
}

/// Which files a request is about, as far as changes of them go.
#[derive(Debug)]
pub(super) struct Details {
    pub(super) opcode: u32,
    /// The file that it changes.
    pub(super) subject: u64,
    /// The directories that its names are in.
    pub(super) directories: Vec<u64>,
    /// The names that it changes.
    pub(super) names: Vec<CString>,
}

/// What of a request stays in the guest's memory.
pub(super) struct Message<'m> {
    /// What is to be written to a file.
    pub(super) data: Pieces<'m>,
    /// For the answer.
    pub(super) room: Pieces<'m>,
}

impl Requests {
    pub(super) fn new() -> Self {
        Self {
            copy: vec![0; COPIED].into(),
            copied: 0,
        }
    }

    /// What the present request asks for.
    pub(super) fn opcode(&self) -> u32 {
        number(&self.copy, 4)
    }

    /// The node that it is about.
    pub(super) fn node(&self) -> u64 {
        wide_number(&self.copy, 16)
    }

    /// Its field `unique`, which the answer repeats.
    pub(super) fn unique(&self) -> [u8; 8] {
        wide_number(&self.copy, 8).to_le_bytes()
    }

    /// User and group of the process that caused it.
    pub(super) fn user(&self) -> (u32, u32) {
        (number(&self.copy, 24), number(&self.copy, 28))
    }

    /// The same for the file system.
    pub(super) fn context(&self) -> Context {
        let (uid, gid) = self.user();
        Context {
            uid: uid.into(),
            gid: gid.into(),
            pid: 0,
        }
    }

    /// What of it was copied.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.copy[..self.copied]
    }

    /// The same without the header, no longer than the header says.
    pub(super) fn body(&self) -> &[u8] {
        let length = usize::try_from(number(&self.copy, 0)).unwrap_or(usize::MAX);
        self.copy[..self.copied.min(length)]
            .get(HEADER_SIZE..)
            .unwrap_or_default()
    }

    /// The name that its body ends with, from this offset on; `None` if more follows.
    pub(super) fn last_name(&self, offset: usize) -> Option<&CStr> {
        CStr::from_bytes_with_nul(self.body().get(offset..)?).ok()
    }

    /// A number in its body, 0 where the body does not reach.
    pub(super) fn u32_at(&self, offset: usize) -> u32 {
        number(self.body(), offset)
    }

    /// The same with eight bytes.
    pub(super) fn u64_at(&self, offset: usize) -> u64 {
        wide_number(self.body(), offset)
    }

    /// Which files it is about.
    pub(super) fn details(&self) -> Details {
        let (opcode, node, body) = (self.opcode(), self.node(), self.body());
        let mut details = Details {
            opcode,
            subject: node,
            directories: vec![node],
            names: Vec::new(),
        };
        match opcode {
            // LINK names the file in its body, COPY_FILE_RANGE the one that is written.
            13 => details.subject = wide_number(body, 0),
            47 => details.subject = wide_number(body, 16),
            // RENAME, RENAME2
            12 | 45 => details.directories.push(wide_number(body, 0)),
            _ => {}
        }
        let (fixed, count) = names(opcode);
        let names = body
            .get(fixed..)
            .unwrap_or_default()
            .split(|byte| *byte == 0);
        details.names = names
            .take(count)
            .filter_map(|name| CString::new(name).ok())
            .collect();
        details
    }

    /// Copies a request of the guest, each byte once.
    pub(super) fn take<'m>(&mut self, chain: Chain<'m>) -> Result<Message<'m>, ChainError> {
        self.copied = 0;
        let (mut data, mut room) = (Pieces::new(), Pieces::new());
        chain.walk(|piece, writable| {
            if writable {
                room.push(piece);
            } else {
                data.push(piece);
            }
            Ok(())
        })?;
        self.copied = chain::copy_out(&data, &mut self.copy[..FIXED]);
        if self.copied < HEADER_SIZE {
            return Err(ChainError::TooShort);
        }
        if self.copied < FIXED {
            data.clear();
            return Ok(Message { data, room });
        }
        skip(&mut data, self.copied);
        let end = match self.opcode() {
            WRITE => FIXED,
            FINISH => HEADER_SIZE + finish::FIXED,
            _ => COPIED,
        };
        if end > FIXED {
            let more = chain::copy_out(&data, &mut self.copy[FIXED..end]);
            skip(&mut data, more);
            self.copied += more;
        }
        Ok(Message { data, room })
    }

    /// Whether the request is all there, and every name in it the name of an entry of a directory: no
    /// path, not `.` or `..`.
    pub(super) fn is_acceptable(&self) -> bool {
        let length = usize::try_from(number(&self.copy, 0));
        let whole = length.is_ok_and(|length| length <= self.copied);
        let (fixed, count) = names(self.opcode());
        if count == 0 {
            return whole || matches!(self.opcode(), WRITE | FINISH);
        }
        let body = self.body().get(fixed..).unwrap_or_default();
        let mut names = body.split(|byte| *byte == 0);
        whole
            && (0..count).all(|_| {
                names.next().is_some_and(|name| {
                    !name.is_empty() && !name.contains(&b'/') && name != b"." && name != b".."
                })
            })
    }
}

/// Leaves the first bytes out.
fn skip(pieces: &mut Pieces<'_>, bytes: usize) {
    let whole = chain::pass(pieces, bytes);
    pieces.drain(..whole);
}

/// Bytes between the header and the first name, and how many names follow.
fn names(opcode: u32) -> (usize, usize) {
    match opcode {
        // LOOKUP, SYMLINK (whose target may be anything), UNLINK, RMDIR
        1 | 6 | 10 | 11 | CONNECT => (0, 1),
        // MKNOD, CREATE
        8 | 35 => (16, 1),
        // MKDIR, LINK
        9 | 13 => (8, 1),
        // RENAME, RENAME2
        12 => (8, 2),
        45 => (16, 2),
        // No names, or ones that no system call takes for a path (extended attributes; that of TMPFILE is none).
        _ => (0, 0),
    }
}

/// A number of a message, 0 beyond its end.
fn number(bytes: &[u8], offset: usize) -> u32 {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_le_bytes)
}

fn wide_number(bytes: &[u8], offset: usize) -> u64 {
    let bytes = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u64::from_le_bytes)
}
