//! The requests that come most often, carried out without the library's server: it would walk the guest's
//! buffers through several layers, piece by piece, which took as long as all system calls together. The files
//! themselves are the library's as before, and what is out of the ordinary is left to its server.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use virtiofsd::filesystem::{
    Context, DirectoryIterator, Entry, Extensions, FileSystem, OpenOptions, SetattrValid,
    ZeroCopyWriter,
};
use virtiofsd::fuse::{
    Attr, AttrOut, Dirent, EntryOut, FATTR_FH, GETATTR_FH, OPEN_KILL_SUIDGID, OpenOut,
    READ_LOCKOWNER, RELEASE_FLOCK_UNLOCK, RELEASE_FLUSH, SetattrIn,
};
use virtiofsd::oslib::ReadvFlags;
use vm_memory::{ByteValued, VolatileSlice};

use super::finish::{self, FINISH};
use super::host::RETURN;
use super::request::{Message, Pieces, Requests};
use super::tree::Tree;
use super::unnamed;
use super::write::{self, WRITE};
use crate::sys::guest_io;
use crate::virtio::chain;

/// Bytes of `struct fuse_out_header`: length, error, unique.
pub(super) const OUT_HEADER: usize = 16;
/// Longer answers are no Linux's.
const MOST_ENTRIES: usize = 1 << 20;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
const RELEASE: u32 = 18;
const OPENDIR: u32 = 27;
const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
const TMPFILE: u32 = 51;

/// In a request to create a file: the guest takes it for itself; in the answer: it has it.
const GIVE: u32 = 1 << 31;

/// Carries the request out that is at hand, and puts the answer together but for data that was read, whose
/// length is given. `None` leaves it to the library.
pub(super) fn carry_out(
    tree: &Tree,
    requests: &Requests,
    message: &Message<'_>,
    answer: &mut Vec<u8>,
) -> Option<usize> {
    answer.clear();
    answer.resize(OUT_HEADER, 0);
    let mut read = 0;
    let result = match requests.opcode() {
        FORGET => {
            tree.forget(requests.context(), requests.node(), requests.u64_at(0));
            answer.clear();
            return Some(0);
        }
        BATCH_FORGET => {
            let count = usize::try_from(requests.u32_at(0)).unwrap_or(usize::MAX);
            let nodes = requests.body().get(8..).unwrap_or_default();
            for item in nodes.chunks_exact(16).take(count) {
                let (node, references) = item.split_at(8);
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                tree.forget(requests.context(), number(node), number(references));
            }
            answer.clear();
            return Some(0);
        }
        READ => self::read(tree, requests, &message.room).map(|count| read = count),
        WRITE => {
            let room = chain::length(&message.room);
            write::carry_out(tree, requests, &message.data, room, answer)
        }
        _ => Operation {
            tree,
            requests,
            answer,
        }
        .carry_out(message)?,
    };
    let error = match result {
        Ok(()) => 0,
        Err(error) => {
            answer.truncate(OUT_HEADER);
            error.raw_os_error().unwrap_or(libc::EIO)
        }
    };
    finish(answer, read, error, requests.unique());
    Some(read)
}

/// Fills an answer's header in; `more` bytes are not part of `answer`.
pub(super) fn finish(answer: &mut [u8], more: usize, error: i32, unique: [u8; 8]) {
    let length = u32::try_from(answer.len() + more).unwrap_or(u32::MAX);
    answer[..4].copy_from_slice(&length.to_le_bytes());
    answer[4..8].copy_from_slice(&(-error).to_le_bytes());
    answer[8..OUT_HEADER].copy_from_slice(&unique);
}

struct Operation<'a> {
    tree: &'a Tree,
    requests: &'a Requests,
    answer: &'a mut Vec<u8>,
}

impl Operation<'_> {
    fn carry_out(&mut self, message: &Message<'_>) -> Option<io::Result<()>> {
        let (tree, requests, context) = (self.tree, self.requests, self.requests.context());
        let node = requests.node();
        Some(match requests.opcode() {
            LOOKUP => {
                let name = requests.last_name(0)?;
                let entry = tree.lookup(context, node, name);
                entry.map(|entry| self.entry(entry))
            }
            GETATTR => {
                let handle = (requests.u32_at(0) & GETATTR_FH != 0).then(|| requests.u64_at(8));
                let known = tree.getattr(context, node, handle);
                known.map(|known| self.attributes(known))
            }
            SETATTR => {
                let mut wanted = SetattrIn::default();
                let given = requests.body().get(..size_of::<SetattrIn>())?;
                wanted.as_mut_slice().copy_from_slice(given);
                let handle = (wanted.valid & FATTR_FH != 0).then_some(wanted.fh);
                let valid = SetattrValid::from_bits_truncate(wanted.valid);
                let known = tree.setattr(context, node, wanted, handle, valid);
                known.map(|known| self.attributes(known))
            }
            READLINK => tree
                .readlink(context, node)
                .map(|target| self.answer.extend(target)),
            MKDIR => {
                let name = requests.last_name(8)?;
                let (mode, mask) = (requests.u32_at(0), requests.u32_at(4));
                let entry = tree.mkdir(context, node, name, mode, mask, Extensions::default());
                entry.map(|entry| self.entry(entry))
            }
            UNLINK => tree.unlink(context, node, requests.last_name(0)?),
            RMDIR => tree.rmdir(context, node, requests.last_name(0)?),
            OPEN => {
                let kill = requests.u32_at(4) & OPEN_KILL_SUIDGID != 0;
                let opened = tree.open(context, node, kill, requests.u32_at(0));
                opened.map(|opened| self.opened(opened, 0))
            }
            OPENDIR => {
                let opened = tree.opendir(context, node, requests.u32_at(0));
                opened.map(|opened| self.opened(opened, 0))
            }
            RELEASE => {
                let flags = requests.u32_at(12);
                let (flush, unlock) = (
                    flags & RELEASE_FLUSH != 0,
                    flags & RELEASE_FLOCK_UNLOCK != 0,
                );
                let owner = (flush || unlock).then(|| requests.u64_at(16));
                let (handle, flags) = (requests.u64_at(0), requests.u32_at(8));
                tree.release(context, node, flags, handle, flush, unlock, owner)
            }
            RELEASEDIR => tree.releasedir(context, node, requests.u32_at(8), requests.u64_at(0)),
            CREATE => {
                // Extensions may follow, which the library reads.
                let name = requests.last_name(16)?;
                self.create(name)
            }
            TMPFILE => self.create_unnamed(),
            READDIRPLUS => self.entries(context, chain::length(&message.room)),
            FINISH => finish::carry_out(tree, requests, &message.data)
                .map(|known| self.attributes((known, tree.validity()))),
            RETURN => {
                tree.delegations().returned(node);
                Ok(())
            }
            _ => return None,
        })
    }

    fn create(&mut self, name: &CStr) -> io::Result<()> {
        let (tree, requests) = (self.tree, self.requests);
        let (context, directory) = (requests.context(), requests.node());
        let wishes = requests.u32_at(12);
        let kill = wishes & OPEN_KILL_SUIDGID != 0;
        let (flags, mode) = (requests.u32_at(0), requests.u32_at(4));
        let (mask, none) = (requests.u32_at(8), Extensions::default());
        let (entry, handle, options) =
            tree.create(context, directory, name, mode, kill, flags, mask, none)?;
        let is_local = options.contains(OpenOptions::NOFLUSH);
        let given = wishes & GIVE != 0
            && flags & libc::O_EXCL.unsigned_abs() != 0
            && is_local
            && handle.is_some_and(|handle| tree.give(directory, entry.inode, handle, flags));
        self.entry(entry);
        self.opened((handle, options), if given { GIVE } else { 0 });
        Ok(())
    }

    /// As CREATE, but that the name is no name. It ends the request: no extensions are agreed on.
    fn create_unnamed(&mut self) -> io::Result<()> {
        let requests = self.requests;
        if requests.last_name(16).is_none() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let request = unnamed::Request {
            context: requests.context(),
            flags: requests.u32_at(0),
            mode: requests.u32_at(4),
            mask: requests.u32_at(8),
        };
        let (entry, handle, options) = self.tree.create_unnamed(requests.node(), &request)?;
        self.entry(entry);
        self.opened((handle, options), 0);
        Ok(())
    }

    fn entry(&mut self, entry: Entry) {
        self.answer.extend(EntryOut::from(entry).as_slice());
    }

    fn attributes(&mut self, (attr, valid): (Attr, std::time::Duration)) {
        let out = AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            attr,
            ..AttrOut::default()
        };
        self.answer.extend(out.as_slice());
    }

    fn opened(&mut self, (handle, options): (Option<u64>, OpenOptions), more: u32) {
        let out = OpenOut {
            fh: handle.unwrap_or(0),
            open_flags: options.bits() | more,
            ..OpenOut::default()
        };
        self.answer.extend(out.as_slice());
    }

    /// The names in a directory, each with what a lookup of it gives.
    fn entries(&mut self, context: Context, room: usize) -> io::Result<()> {
        let (tree, requests, node) = (self.tree, self.requests, self.requests.node());
        let (handle, offset, size) = (requests.u64_at(0), requests.u64_at(8), requests.u32_at(16));
        let wanted = usize::try_from(size).unwrap_or(usize::MAX);
        let end = room.min(OUT_HEADER + wanted.min(MOST_ENTRIES));
        let mut names = tree.readdir(context, node, handle, size, offset)?;
        while let Some(found) = names.next() {
            let name = found.name.to_bytes();
            let padded = (size_of::<Dirent>() + name.len()).next_multiple_of(8);
            let place = self.answer.len() + size_of::<EntryOut>() + padded;
            // Before the lookup, which would have to be taken back.
            if place > end {
                break;
            }
            let entry = if name == b"." || name == b".." {
                // No node: the guest knows these two.
                EntryOut {
                    attr: Attr {
                        ino: found.ino,
                        mode: found.type_ << 12,
                        ..Attr::default()
                    },
                    ..EntryOut::default()
                }
            } else {
                match tree.lookup(context, node, found.name) {
                    Ok(entry) => entry.into(),
                    // Gone since.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                    // What is told already must reach the guest, which holds a reference to it.
                    Err(_) if self.answer.len() > OUT_HEADER => break,
                    Err(error) => return Err(error),
                }
            };
            let dirent = Dirent {
                ino: found.ino,
                off: found.offset,
                namelen: u32::try_from(name.len()).unwrap_or(0),
                type_: found.type_,
            };
            self.answer.extend(entry.as_slice());
            self.answer.extend(dirent.as_slice());
            self.answer.extend(name);
            self.answer.resize(place, 0);
        }
        Ok(())
    }
}

/// Reads into the guest's buffers, behind the header; gives how much.
fn read(tree: &Tree, requests: &Requests, room: &Pieces<'_>) -> io::Result<usize> {
    let owner = (requests.u32_at(20) & READ_LOCKOWNER != 0).then(|| requests.u64_at(24));
    let mut room = room.clone();
    let whole = chain::pass(&mut room, OUT_HEADER);
    tree.read(
        requests.context(),
        requests.node(),
        requests.u64_at(0),
        Target(&mut room[whole..]),
        requests.u32_at(16),
        requests.u64_at(8),
        owner,
        requests.u32_at(32),
    )
}

/// Where data goes that is read from a file.
struct Target<'a, 'm>(&'a mut [VolatileSlice<'m>]);

impl ZeroCopyWriter for Target<'_, '_> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        count: usize,
        offset: u64,
        flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        let flags = flags.map_or(0, |flags| flags.bits());
        chain::transfer(self.0, count, offset, |pieces, at| {
            guest_io::read_at(file.as_fd(), pieces, at, flags)
        })
    }
}
