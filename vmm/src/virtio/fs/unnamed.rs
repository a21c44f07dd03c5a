//! Files without a name (open(2), O_TMPFILE). The library finds files by name alone, so these are made and held
//! here, under numbers of our own, nodes as well as open files, until the guest forgets them. One that
//! is linked is the library's from then on: the guest goes on with our number for it, and with the files that it has
//! opened before.
//!
//! What is done with such a file: `unnamed_file`.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use virtiofsd::filesystem::Context;
use virtiofsd::fuse::Attr;
use virtiofsd::oslib::ScopedUmask;
use virtiofsd::passthrough::credentials::UnixCredentials;
use virtiofsd::soft_idmap::Id;

use super::unnamed_file::{Opened, Unnamed};
use crate::threads::locked;

/// Our numbers begin here; the library counts from 1.
const FIRST: u64 = 1 << 63;
/// Flags of the guest that the host's open gets: the library takes O_DIRECT, O_APPEND and O_NOATIME away, too, and
/// the rest means nothing here.
const PASSED_ON: OFlags = OFlags::ACCMODE.union(OFlags::SYNC).union(OFlags::DSYNC);

/// All files that were made without a name and that the guest knows.
pub(super) struct UnnamedFiles {
    /// /proc/self/fd
    descriptors: Arc<File>,
    /// How many descriptors they may take.
    most: usize,
    table: Mutex<Table>,
}

struct Table {
    next: u64,
    nodes: HashMap<u64, Node>,
    opened: HashMap<u64, (u64, Opened)>,
    /// Our nodes by the library's.
    linked: HashMap<u64, u64>,
}

struct Node {
    place: Place,
    /// Of the guest.
    references: u64,
}

/// Who serves a node.
#[derive(Clone)]
pub(super) enum Place {
    Unnamed(Unnamed),
    /// The library does, under this number. One of ours holds one of the library's references to it.
    Library(u64),
}

/// Who serves an open file.
pub(super) enum Handle {
    Unnamed(Opened),
    /// The library does, with this node.
    Library(u64),
}

/// A file that was just made.
pub(super) struct Made {
    pub(super) node: u64,
    pub(super) handle: u64,
    pub(super) opened: Opened,
    pub(super) attributes: Attr,
}

/// How a file is to be made.
pub(super) struct Request {
    pub(super) context: Context,
    pub(super) flags: u32,
    pub(super) mode: u32,
    pub(super) mask: u32,
}

impl UnnamedFiles {
    pub(super) fn new(descriptors: File, most: usize) -> Self {
        // A guest that goes on with another server still knows numbers of the former.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(0));
        Self {
            descriptors: Arc::new(descriptors),
            most,
            table: Mutex::new(Table {
                next: FIRST | now,
                nodes: HashMap::new(),
                opened: HashMap::new(),
                linked: HashMap::new(),
            }),
        }
    }

    /// The guest starts anew.
    pub(super) fn clear(&self) {
        let mut table = locked(&self.table);
        table.nodes.clear();
        table.opened.clear();
        table.linked.clear();
    }

    /// Makes a file in a directory, as the user who asks for it.
    pub(super) fn make(&self, directory: BorrowedFd<'_>, request: &Request) -> io::Result<Made> {
        let mut table = locked(&self.table);
        table.has_room(self.most, 2)?;
        let opened = make(directory, request)?;
        let unnamed = Unnamed::of(&opened, self.descriptors.clone())?;
        let attributes = unnamed.attributes()?;
        let node = table.number();
        let known = Node {
            place: Place::Unnamed(unnamed),
            references: 1,
        };
        table.nodes.insert(node, known);
        let handle = table.open(node, opened.clone());
        Ok(Made {
            node,
            handle,
            opened,
            attributes,
        })
    }

    /// Opens one of these files again.
    pub(super) fn open(
        &self,
        node: u64,
        file: &Unnamed,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<(u64, Opened)> {
        let mut table = locked(&self.table);
        table.has_room(self.most, 1)?;
        let flags = OFlags::from_bits_retain(flags) & (PASSED_ON | OFlags::TRUNC);
        let opened = Opened::new(file.open(flags, kill_privileges)?);
        let handle = table.open(node, opened.clone());
        Ok((handle, opened))
    }

    /// Gives an open file up; says whether it was one of ours.
    pub(super) fn release(&self, node: u64, handle: u64) -> bool {
        let mut table = locked(&self.table);
        let ours = matches!(table.opened.get(&handle), Some((of, _)) if *of == node);
        ours && table.opened.remove(&handle).is_some()
    }

    /// Who serves a node of the guest.
    pub(super) fn place(&self, node: u64) -> io::Result<Place> {
        if !is_ours(node) {
            return Ok(Place::Library(node));
        }
        let table = locked(&self.table);
        let known = table.nodes.get(&node).ok_or(Errno::BADF)?;
        Ok(known.place.clone())
    }

    /// Who serves an open file of the guest.
    pub(super) fn handle(&self, node: u64, handle: u64) -> io::Result<Handle> {
        if is_ours(handle) {
            return match locked(&self.table).opened.get(&handle) {
                Some((of, opened)) if *of == node => Ok(Handle::Unnamed(opened.clone())),
                _ => Err(Errno::BADF.into()),
            };
        }
        match self.place(node)? {
            Place::Library(node) => Ok(Handle::Library(node)),
            Place::Unnamed(_) => Err(Errno::BADF.into()),
        }
    }

    /// The library has found one of our nodes by its first name: takes over its reference to it.
    pub(super) fn has_been_linked(&self, node: u64, library: u64) {
        let mut table = locked(&self.table);
        if let Some(known) = table.nodes.get_mut(&node) {
            known.place = Place::Library(library);
            known.references = known.references.saturating_add(1);
            table.linked.insert(library, node);
        }
    }

    /// What the guest calls a node of the library's.
    pub(super) fn known_as(&self, library: u64) -> u64 {
        let table = locked(&self.table);
        table.linked.get(&library).copied().unwrap_or(library)
    }

    /// The guest gets another reference to a node of the library's. If it is one of ours, gives our number.
    pub(super) fn refer(&self, library: u64) -> Option<u64> {
        let mut table = locked(&self.table);
        let node = *table.linked.get(&library)?;
        let known = table.nodes.get_mut(&node)?;
        known.references = known.references.saturating_add(1);
        Some(node)
    }

    /// The guest gives up so many references to a node. Gives what the library is to be told: the same of a
    /// node of its own, or that one of ours is gone.
    pub(super) fn forget(&self, node: u64, count: u64) -> Option<(u64, u64)> {
        if !is_ours(node) {
            return Some((node, count));
        }
        let mut table = locked(&self.table);
        let known = table.nodes.get_mut(&node)?;
        known.references = known.references.saturating_sub(count);
        if known.references > 0 {
            return None;
        }
        match table.nodes.remove(&node)?.place {
            Place::Unnamed(_) => None,
            Place::Library(library) => {
                table.linked.remove(&library);
                Some((library, 1))
            }
        }
    }
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn open(&mut self, node: u64, opened: Opened) -> u64 {
        let handle = self.number();
        self.opened.insert(handle, (node, opened));
        handle
    }

    fn has_room(&self, most: usize, wanted: usize) -> io::Result<()> {
        if self.nodes.len() + self.opened.len() + wanted > most {
            return Err(Errno::NFILE.into());
        }
        Ok(())
    }
}

/// Whether a node or an open file has a number from here.
pub(super) fn is_ours(number: u64) -> bool {
    number >= FIRST
}

/// Nothing that the guest gives decides what is opened: a path of our own, and O_TMPFILE.
fn make(directory: BorrowedFd<'_>, request: &Request) -> io::Result<Opened> {
    let flags = OFlags::from_bits_retain(request.flags) & (PASSED_ON | OFlags::EXCL);
    let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
    let (uid, gid) = (request.context.uid, request.context.gid);
    // As the library creates files: with the right to write anywhere, since the guest tells no supplementary groups.
    let user = UnixCredentials::new(uid.into_inner().into(), gid.into_inner().into())
        .supplementary_gid(false, Vec::new())
        .set()?;
    // A directory's default ACL comes before the mask. Where the guest's kernel has applied it already, it changes
    // nothing.
    let mask = ScopedUmask::new(request.mask & 0o777);
    let file = openat(directory, c".", flags, Mode::from(request.mode & 0o7777));
    drop((mask, user));
    Ok(Opened::new(file?))
}
