//! All that a file has gathered in the guest since it was made there: its attributes and the whole of its data, in
//! one request, which also returns the file, and closes it if the guest has closed it
//! (guest-kernel/patches/0012, docs/decisions/0010).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, Timespec, Timestamps, UTIME_OMIT, fchmod, futimens};
use rustix::io::Errno;
use virtiofsd::filesystem::SetattrValid;
use virtiofsd::fuse::Attr;

use super::request::{Pieces, Requests};
use super::tree::Tree;
use crate::sys::guest_io;
use crate::virtio::chain;

pub(super) const FINISH: u32 = 0x4248_0005;
/// Bytes of the request before the file's data.
pub(super) const FIXED: usize = 48;
/// The file is to be closed.
const CLOSE: u32 = 1;

/// Carries the request out that is at hand; gives the file's attributes. Whatever fails, the file is returned, and
/// closed if it is to be.
pub(super) fn carry_out(tree: &Tree, requests: &Requests, data: &Pieces<'_>) -> io::Result<Attr> {
    let (node, handle) = (requests.node(), requests.u64_at(0));
    let size = usize::try_from(requests.u32_at(44)).unwrap_or(usize::MAX);
    if requests.body().len() < FIXED || chain::length(data) != size {
        return Err(Errno::INVAL.into());
    }
    tree.finish(node, handle, requests.u32_at(40) & CLOSE != 0, |file| {
        if size > 0 {
            write(file, data, size)?;
        }
        set_attributes(file, requests)
    })
}

/// The whole file.
fn write(file: BorrowedFd<'_>, data: &Pieces<'_>, size: usize) -> io::Result<()> {
    let written = chain::transfer(&mut data.clone(), size, 0, |pieces, at| {
        guest_io::write_at(file.as_fd(), pieces, at, 0)
    })?;
    if written < size {
        return Err(Errno::IO.into());
    }
    Ok(())
}

fn set_attributes(file: BorrowedFd<'_>, requests: &Requests) -> io::Result<()> {
    let valid = SetattrValid::from_bits_truncate(requests.u32_at(32));
    if valid.contains(SetattrValid::MODE) {
        fchmod(file, Mode::from(requests.u32_at(36) & 0o7777))?;
    }
    let time = |kind, seconds, nanoseconds| Timespec {
        tv_sec: requests.u64_at(seconds).cast_signed(),
        tv_nsec: if valid.contains(kind) {
            requests.u32_at(nanoseconds).into()
        } else {
            UTIME_OMIT
        },
    };
    if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        let times = Timestamps {
            last_access: time(SetattrValid::ATIME, 8, 24),
            last_modification: time(SetattrValid::MTIME, 16, 28),
        };
        futimens(file, &times)?;
    }
    Ok(())
}
