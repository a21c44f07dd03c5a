//! The crate's only unsafe code: system calls that rustix cannot offer as safe functions.
#![allow(unsafe_code)]

use rustix::{
    io::Errno,
    thread::{UnshareFlags, unshare_unsafe},
};

/// Moves the calling thread into a mount namespace of its own, a copy of the present one, and gives
/// it a root and a working directory of its own.
pub(crate) fn unshare_mounts() -> Result<(), Errno> {
    // SAFETY: descriptors stay shared between the threads, since CLONE_FILES is not asked for.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}
