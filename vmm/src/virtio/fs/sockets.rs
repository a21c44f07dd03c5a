//! Connects to sockets of the host that lie in the share, for a guest: its kernel asks for the
//! connection when a process connects to the socket's path (guest-kernel/patches), and the guest
//! comes for it over vsock. A guest reaches what it sees in the share and nothing else, as whom it
//! says it is: to the host its requests on files are no different.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Gid, Uid, fchdir, getgid, getuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_res_gid,
    set_thread_res_uid,
};

/// Connects to the socket of this name in a directory, as this user; never waits. The calling
/// thread has a working directory of its own, which ends up as it was; `descriptors` is its
/// /proc/self/fd.
pub(super) fn connect_to(
    directory: &OwnedFd,
    name: &CStr,
    (uid, gid): (u32, u32),
    descriptors: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
        return Err(Errno::CONNREFUSED.into());
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let address = SocketAddrUnix::new(file.as_raw_fd().to_string())?;
    in_directory(descriptors, || {
        as_user(uid, gid, || Ok(connect(&socket, &address)?))
    })?;
    Ok(socket)
}

/// Does something with this working directory.
pub(super) fn in_directory<T>(
    directory: BorrowedFd<'_>,
    task: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let former = rustix::fs::open(".", flags, Mode::empty())?;
    fchdir(directory)?;
    let result = task();
    fchdir(former.as_fd())?;
    result
}

/// Does something with this effective user and group, whom the other end of a connection gets to
/// see (SO_PEERCRED), but with root's access to files: the guest's kernel has checked who may
/// write to the socket, and knows all groups of the process.
fn as_user<T>(uid: u32, gid: u32, task: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let root = (getuid(), getgid());
    set_effective(root, Uid::from_raw(uid), Gid::from_raw(gid))?;
    let result = override_access().and_then(|()| task());
    set_effective(root, root.0, root.1)?;
    result
}

/// Leaves what the thread was started as to come back to.
fn set_effective((own_user, own_group): (Uid, Gid), user: Uid, group: Gid) -> io::Result<()> {
    // Back: the user first, who may change the group.
    if user == own_user {
        set_thread_res_uid(own_user, user, own_user)?;
        set_thread_res_gid(own_group, group, own_group)?;
    } else {
        set_thread_res_gid(own_group, group, own_group)?;
        set_thread_res_uid(own_user, user, own_user)?;
    }
    Ok(())
}

fn override_access() -> io::Result<()> {
    let have = capabilities(None)?;
    let wanted = CapabilitySet::DAC_OVERRIDE & have.permitted;
    set_capabilities(
        None,
        CapabilitySets {
            effective: have.effective | wanted,
            ..have
        },
    )?;
    Ok(())
}
