//! Changes that others make to what the guest watches (inotify(7)): the guest's kernel names the
//! nodes, the host's kernel tells what happens to them, and what the guest has done itself is left
//! out, since its own kernel has told it already. Lives on the file server's thread.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tracing::warn;

use super::delegations::RECALL;
use super::finish::FINISH;
use super::request::Details;
use super::sockets::in_directory;
use super::tree::Tree;

/// Nodes watched at a time; the host's own limit is for all its processes together.
const MOST_WATCHES: usize = 16_384;
/// Events that wait for the guest to fetch them.
const MOST_EVENTS: usize = 16_384;
/// Bytes of `struct fuse_host_event` without the name.
const EVENT_HEADER: usize = 24;

// inotify(7). Kernels use the same numbers among themselves.
const MODIFY: u32 = 0x2;
const ATTRIB: u32 = 0x4;
const CLOSE_WRITE: u32 = 0x8;
const MOVED_FROM: u32 = 0x40;
const MOVED_TO: u32 = 0x80;
const CREATE: u32 = 0x100;
const DELETE: u32 = 0x200;
const DELETE_SELF: u32 = 0x400;
const MOVE_SELF: u32 = 0x800;
const QUEUE_OVERFLOW: u32 = 0x4000;
const IGNORED: u32 = 0x8000;
const IS_DIRECTORY: u32 = 0x4000_0000;
/// What is passed on. Others that open and read are left out: the guest's own reading would drown
/// the rest.
const PASSED_ON: u32 = MODIFY
    | ATTRIB
    | CLOSE_WRITE
    | MOVED_FROM
    | MOVED_TO
    | CREATE
    | DELETE
    | DELETE_SELF
    | MOVE_SELF;

/// An event for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    node: u64,
    mask: u32,
    cookie: u32,
    /// In a directory that is watched; else it is about the node itself.
    name: Option<CString>,
}

/// What is watched, and what has happened to it.
#[derive(Debug, Default)]
pub(super) struct Changes {
    inotify: Option<OwnedFd>,
    /// Nodes by the host's watch: one inode may be several of the guest's nodes.
    by_watch: BTreeMap<i32, Vec<(u64, u32)>>,
    by_node: HashMap<u64, i32>,
    events: VecDeque<Event>,
    complained: bool,
}

impl Changes {
    /// Whether anything is watched.
    pub(super) fn watches(&self) -> bool {
        !self.by_node.is_empty()
    }

    /// Becomes readable when something has happened; there once something is watched.
    pub(super) fn readable(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(AsFd::as_fd)
    }

    /// All watches: nodes with masks.
    pub(super) fn list(&self) -> Vec<(u64, u32)> {
        self.by_watch.values().flatten().copied().collect()
    }

    /// The guest watches a node for these events from now on; for none, it does not.
    pub(super) fn watch(
        &mut self,
        tree: &Tree,
        descriptors: BorrowedFd<'_>,
        node: u64,
        mask: u32,
    ) -> io::Result<()> {
        let mask = mask & PASSED_ON;
        if mask == 0 {
            self.forget(node);
            return Ok(());
        }
        if !self.by_node.contains_key(&node) && self.by_node.len() >= MOST_WATCHES {
            self.complain("the guest watches more files than it may");
            return Err(Errno::NOSPC.into());
        }
        let inotify = match &self.inotify {
            Some(inotify) => inotify,
            None => {
                let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
                self.inotify.insert(inotify::init(flags)?)
            }
        };
        let file = tree.open_node(node)?;
        // A file that the guest knows is not gone for the host when its last name is: that its
        // attributes change tells.
        let wanted = if mask & DELETE_SELF != 0 {
            mask | ATTRIB
        } else {
            mask
        };
        // Others of the guest's nodes may be the same inode.
        let flags = WatchFlags::from_bits_retain(wanted) | WatchFlags::MASK_ADD;
        let path = file.as_raw_fd().to_string();
        let watch = in_directory(descriptors, || {
            Ok(inotify::add_watch(inotify, path, flags)?)
        })?;
        let nodes = self.by_watch.entry(watch).or_default();
        nodes.retain(|(known, _)| *known != node);
        nodes.push((node, mask));
        self.by_node.insert(node, watch);
        Ok(())
    }

    fn forget(&mut self, node: u64) {
        let Some(watch) = self.by_node.remove(&node) else {
            return;
        };
        let Some(nodes) = self.by_watch.get_mut(&watch) else {
            return;
        };
        nodes.retain(|(known, _)| *known != node);
        if nodes.is_empty() {
            self.by_watch.remove(&watch);
            if let Some(inotify) = &self.inotify {
                // Fails if the host has ended it meanwhile.
                let _ = inotify::remove_watch(inotify, watch);
            }
        }
        self.events.retain(|event| event.node != node);
    }

    /// Takes what others have done up to now.
    pub(super) fn collect(&mut self, tree: &Tree) {
        self.take(tree, |_| false);
    }

    /// Takes what has happened while a request was carried out, without what the request did.
    pub(super) fn collect_beside(&mut self, tree: &Tree, request: &Details) {
        self.take(tree, |event| is_of(event, tree, request));
    }

    fn take(&mut self, tree: &Tree, own: impl Fn(&Event) -> bool) {
        let Some(inotify) = &self.inotify else {
            return;
        };
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut reader = Reader::new(inotify, &mut buffer);
        let mut found = Vec::new();
        let mut ended = Vec::new();
        let mut lost = false;
        // What is left comes next time.
        while found.len() < MOST_EVENTS || !reader.is_buffer_empty() {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::INTR) => continue,
                // Nothing more, for now.
                Err(_) => break,
            };
            let mask = event.events().bits();
            lost |= mask & QUEUE_OVERFLOW != 0;
            if mask & IGNORED != 0 {
                ended.push(event.wd());
                continue;
            }
            for (node, wanted) in self.by_watch.get(&event.wd()).into_iter().flatten() {
                found.push((
                    *wanted,
                    Event {
                        node: *node,
                        mask: mask & (PASSED_ON | IS_DIRECTORY),
                        cookie: event.cookie(),
                        name: event.file_name().map(CStr::to_owned),
                    },
                ));
            }
        }
        for (wanted, event) in found {
            if own(&event) {
                continue;
            }
            if event.name.is_none() && event.mask & ATTRIB != 0 && wanted & DELETE_SELF != 0 {
                let gone = tree.attributes(event.node).is_ok_and(|a| a.nlink == 0);
                if gone {
                    lost |= !self.push(Event {
                        mask: DELETE_SELF,
                        ..event.clone()
                    });
                }
            }
            if event.mask & wanted != 0 {
                lost |= !self.push(event);
            }
        }
        for watch in ended {
            for (node, _) in self.by_watch.remove(&watch).into_iter().flatten() {
                self.by_node.remove(&node);
            }
        }
        if lost {
            self.complain(
                "more happens to files that the guest watches than it takes: some is lost",
            );
        }
    }

    /// False if there is no room.
    fn push(&mut self, event: Event) -> bool {
        if self.events.back() == Some(&event) {
            return true;
        }
        let room = self.events.len() < MOST_EVENTS;
        if room {
            self.events.push_back(event);
        }
        room
    }

    /// Once for each guest: it can provoke this.
    fn complain(&mut self, what: &'static str) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!("{what}");
        }
    }

    /// Takes as many events as fit into so many bytes, as the guest's kernel reads them: node,
    /// mask, cookie, length of the name, padding, and the name filled up to eight bytes. Files that the guest has
    /// to return come first.
    pub(super) fn fetch(&mut self, mut recalls: impl Iterator<Item = u64>, room: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() + EVENT_HEADER <= room
            && let Some(node) = recalls.next()
        {
            bytes.extend(node.to_le_bytes());
            bytes.extend(RECALL.to_le_bytes());
            bytes.resize(bytes.len() + EVENT_HEADER - 12, 0);
        }
        while let Some(event) = self.events.front() {
            let name = event.name.as_deref().map_or(&[][..], CStr::to_bytes);
            let filled = name.len().next_multiple_of(8);
            if bytes.len() + EVENT_HEADER + filled > room {
                break;
            }
            bytes.extend(event.node.to_le_bytes());
            bytes.extend(event.mask.to_le_bytes());
            bytes.extend(event.cookie.to_le_bytes());
            bytes.extend(u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
            bytes.resize(bytes.len() + filled - name.len(), 0);
            self.events.pop_front();
        }
        bytes
    }

    /// Whether there is something to fetch.
    pub(super) fn has_events(&self) -> bool {
        !self.events.is_empty()
    }
}

/// Whether the request has caused the event. Only events of the time in which it was carried out
/// are asked about; others may have come in between, even alike ones (which inotify itself would
/// have made one of).
fn is_of(event: &Event, tree: &Tree, request: &Details) -> bool {
    if event.mask & caused_by(request.opcode) == 0 {
        return false;
    }
    match &event.name {
        // What happens to names: in a directory of the request, to a name of the request.
        Some(name) if event.mask & (CREATE | DELETE | MOVED_FROM | MOVED_TO) != 0 => {
            request.directories.contains(&event.node) && request.names.contains(name)
        }
        // What happens to a file that the request is about, seen from its directory.
        Some(name) => request.names.contains(name) || tree.is_at(request.subject, event.node, name),
        // Names that go or come change the attributes of their files, which the request need not
        // know.
        None => request.subject == event.node || !request.names.is_empty(),
    }
}

/// The events that a request of this kind may cause.
pub(super) fn caused_by(opcode: u32) -> u32 {
    match opcode {
        // SETATTR, OPEN (which may truncate)
        4 | 14 | FINISH => ATTRIB | MODIFY | CLOSE_WRITE,
        // SYMLINK, MKNOD, MKDIR, LINK
        6 | 8 | 9 | 13 => CREATE | ATTRIB,
        // CREATE
        35 => CREATE | ATTRIB | MODIFY | CLOSE_WRITE,
        // UNLINK, RMDIR
        10 | 11 => DELETE | ATTRIB | DELETE_SELF,
        // RENAME, RENAME2
        12 | 45 => MOVED_FROM | MOVED_TO | MOVE_SELF | ATTRIB | DELETE_SELF,
        // WRITE, FALLOCATE, COPY_FILE_RANGE
        16 | 43 | 47 => MODIFY | ATTRIB,
        // RELEASE
        18 => CLOSE_WRITE,
        // SETXATTR, REMOVEXATTR
        21 | 24 => ATTRIB,
        _ => 0,
    }
}
