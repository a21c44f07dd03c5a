//! What was used last and is likely to be used next, at hand: the library finds a file by its path in /proc, and
//! looks a name up before it removes it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Files, and directories, that are remembered.
const FILES: usize = 8;
const DIRECTORIES: usize = 2;

#[derive(Debug, Default)]
pub(super) struct Recent {
    /// Files open for writing: node and handle.
    files: VecDeque<(u64, u64)>,
    /// Directories that names were removed from.
    directories: VecDeque<(u64, Arc<OwnedFd>)>,
    /// A directory on a local file system.
    local: Option<u64>,
    /// Directories of the jail that the guest has asked for.
    of_jail: HashMap<u64, OfJail>,
}

/// A directory of the jail's own file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OfJail {
    /// Which holds others of the kind, and mounts.
    Directory,
    /// Which gives a name to what is in it, `tree/frames.rs`.
    Frame,
}

impl Recent {
    /// A file was opened for writing.
    pub(super) fn opened(&mut self, node: u64, handle: u64) {
        self.files.truncate(FILES - 1);
        self.files.push_front((node, handle));
    }

    pub(super) fn closed(&mut self, handle: u64) {
        self.files.retain(|(_, known)| *known != handle);
    }

    /// A handle of a node.
    pub(super) fn handle(&self, node: u64) -> Option<u64> {
        let found = self.files.iter().find(|(known, _)| *known == node);
        found.map(|(_, handle)| *handle)
    }

    pub(super) fn keep_directory(&mut self, node: u64, directory: Arc<OwnedFd>) {
        self.directories.truncate(DIRECTORIES - 1);
        self.directories.push_front((node, directory));
    }

    pub(super) fn directory(&self, node: u64) -> Option<Arc<OwnedFd>> {
        let found = self.directories.iter().find(|(known, _)| *known == node);
        found.map(|(_, directory)| directory.clone())
    }

    pub(super) fn is_local(&self, directory: u64) -> bool {
        self.local == Some(directory)
    }

    pub(super) fn note_local(&mut self, directory: u64) {
        self.local = Some(directory);
    }

    pub(super) fn of_jail(&self, directory: u64) -> Option<OfJail> {
        self.of_jail.get(&directory).copied()
    }

    pub(super) fn note_of_jail(&mut self, directory: u64, kind: OfJail) {
        self.of_jail.insert(directory, kind);
    }

    /// The guest knows the node no longer.
    pub(super) fn forgotten(&mut self, node: u64) {
        self.of_jail.remove(&node);
        self.directories.retain(|(known, _)| *known != node);
        if self.local == Some(node) {
            self.local = None;
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
