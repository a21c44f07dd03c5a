//! Frames: directories of the jail's that hold one directory of the host each, under its name
//! (`ShareEntry::name`). The guest is told of a mount where the frame is, in place of where the piece is: so the
//! root of what it mounts from there ends in that name, and frame and piece have one device number.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Dir, FileType, fstat, syncfs};
use virtiofsd::filesystem::{Entry, FileSystem, ROOT_ID};
use virtiofsd::fuse::ATTR_SUBMOUNT;

use super::super::recent::OfJail;
use super::{Tree, of_this_process};
use crate::config::FRAME_MODE;

impl Tree {
    /// Moves the mark of a mount from the piece in a frame to the frame.
    pub(super) fn settle_frame(&self, parent: u64, entry: &mut Entry) {
        let marked = entry.attr.flags & ATTR_SUBMOUNT != 0;
        match self.of_jail(parent) {
            Some(OfJail::Frame) => entry.attr.flags &= !ATTR_SUBMOUNT,
            // What is no mount is the jail's as well.
            Some(OfJail::Directory) if !marked && is_directory(entry.attr.mode) => {
                let kind = if looks_like_frame(entry.attr.mode) {
                    entry.attr.flags |= ATTR_SUBMOUNT;
                    OfJail::Frame
                } else {
                    OfJail::Directory
                };
                self.recent().note_of_jail(entry.inode, kind);
            }
            Some(OfJail::Directory) => {}
            // The host's, or the guest has known it longer than this process.
            None if marked => {
                if self
                    .attributes(parent)
                    .is_ok_and(|known| looks_like_frame(known.mode))
                    && self.frame(parent).is_some()
                {
                    entry.attr.flags &= !ATTR_SUBMOUNT;
                }
            }
            None => {
                if looks_like_frame(entry.attr.mode) && self.frame(entry.inode).is_some() {
                    entry.attr.flags |= ATTR_SUBMOUNT;
                }
            }
        }
    }

    /// Whether a node is known to be a directory of the jail's own file system.
    fn of_jail(&self, node: u64) -> Option<OfJail> {
        if node == ROOT_ID {
            return Some(OfJail::Directory);
        }
        self.recent().of_jail(node)
    }

    /// The directory, if it is a frame. A guest can give any directory of the host the mode of one, but
    /// cannot make one in the jail's own file system.
    pub(super) fn frame(&self, node: u64) -> Option<OwnedFd> {
        let directory = self.open_node(node).ok()?;
        let known = fstat(&directory).ok()?;
        let root = fstat(self.open_node(ROOT_ID).ok()?).ok()?;
        (known.st_dev == root.st_dev && looks_like_frame(known.st_mode)).then_some(directory)
    }

    /// Syncs what the guest takes a frame for: the file system of the directory in it.
    pub(super) fn sync_piece(&self, node: u64, frame: OwnedFd) -> io::Result<()> {
        let context = of_this_process();
        for found in Dir::new(frame)? {
            let name = found?.file_name().to_owned();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let piece = self.files.lookup(context, node, &name)?;
            let opened = self.open_node(piece.inode);
            let synced = opened.and_then(|piece| Ok(syncfs(piece)?));
            // A lookup is a reference, which the guest knows nothing of.
            self.files.forget(context, piece.inode, 1);
            synced?;
        }
        Ok(())
    }
}

fn is_directory(mode: u32) -> bool {
    FileType::from_raw_mode(mode) == FileType::Directory
}

fn looks_like_frame(mode: u32) -> bool {
    is_directory(mode) && mode & 0o7777 == FRAME_MODE
}
