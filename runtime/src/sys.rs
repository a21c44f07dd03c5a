//! The crate's only unsafe code: system calls that rustix cannot offer as safe functions.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

use rustix::{
    io::Errno,
    ioctl::{Ioctl, IoctlOutput, Opcode, Updater, opcode},
    thread::{UnshareFlags, unshare_unsafe},
};

/// `TUNSETIFF`, `_IOW('T', 202, int)` (linux/if_tun.h), though it reads and writes a `struct ifreq`.
const TUNSETIFF: Opcode = opcode::write::<i32>(b'T', 202);
/// `IFNAMSIZ`, the terminating zero included.
const NAME_LENGTH: usize = 16;

/// `struct ifreq` (linux/if.h) with `ifr_flags`; the rest of its union is not used here, yet copied
/// by the kernel.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_LENGTH],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);

/// Makes the interface of a descriptor of `/dev/net/tun`, with these `IFF_…` flags. In `name`, at
/// most 15 bytes, the kernel replaces `%d` by the first free number. Returns the name.
pub(crate) fn set_interface(tun: impl AsFd, name: &str, flags: u16) -> io::Result<String> {
    let mut request = InterfaceRequest {
        name: [0; NAME_LENGTH],
        flags,
        rest: [0; 22],
    };
    let space = &mut request.name[..NAME_LENGTH - 1];
    space
        .get_mut(..name.len())
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(name.as_bytes());
    // SAFETY: for TUNSETIFF the kernel reads and writes one `struct ifreq`, whose size and layout
    // `InterfaceRequest` has; it is borrowed exclusively for the call. Any bit pattern that the
    // kernel may write is a valid value of its integers.
    unsafe { rustix::ioctl::ioctl(tun, Updater::<TUNSETIFF, _>::new(&mut request)) }?;
    let end = request.name.iter().position(|byte| *byte == 0);
    let name = &request.name[..end.unwrap_or(NAME_LENGTH)];
    String::from_utf8(name.to_vec()).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// `NS_GET_NSTYPE`, `_IO(0xb7, 3)` (linux/nsfs.h), whose result is the return value.
struct NamespaceKind;

// SAFETY: the operation takes no argument, so the null pointer is never read or written.
unsafe impl Ioctl for NamespaceKind {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xb7, 3)
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        core::ptr::null_mut()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// Which kind of namespace a descriptor of nsfs is: the `CLONE_NEW…` constant (ioctl_ns(2)).
pub(crate) fn namespace_kind(namespace: impl AsFd) -> io::Result<i32> {
    // SAFETY: the kernel neither reads nor writes memory of ours for it.
    Ok(unsafe { rustix::ioctl::ioctl(namespace, NamespaceKind) }?)
}

/// unshare(2): gives the calling thread, or process, namespaces or a root and working directory of its
/// own.
pub(crate) fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: descriptors stay shared between the threads, since CLONE_FILES is not asked for.
    unsafe { unshare_unsafe(flags) }
}

/// What is to become of a mount, mount_setattr(2).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MountChange {
    /// Set-user-id programs, devices and execution are forbidden.
    pub(crate) restricted: bool,
    /// Writing is forbidden.
    pub(crate) read_only: bool,
    /// Writing is allowed.
    pub(crate) writable: bool,
    /// It leaves the propagation that it is part of.
    pub(crate) private: bool,
    /// All of it goes for the mounts below, too.
    pub(crate) recursive: bool,
}

/// Changes a mount, given by a descriptor of its root.
pub(crate) fn change_mount(mount: BorrowedFd<'_>, change: MountChange) -> Result<(), Errno> {
    let flags = |flags: &[(bool, u64)]| {
        let asked = flags.iter().filter(|(asked, _)| *asked);
        asked.fold(0, |all, (_, flag)| all | flag)
    };
    let restricted = change.restricted;
    let attributes = libc::mount_attr {
        attr_set: flags(&[
            (restricted, libc::MOUNT_ATTR_NOSUID),
            (restricted, libc::MOUNT_ATTR_NODEV),
            (restricted, libc::MOUNT_ATTR_NOEXEC),
            (change.read_only, libc::MOUNT_ATTR_RDONLY),
        ]),
        attr_clr: flags(&[(change.writable, libc::MOUNT_ATTR_RDONLY)]),
        propagation: flags(&[(change.private, libc::MS_PRIVATE)]),
        userns_fd: 0,
    };
    let recursive = if change.recursive {
        libc::AT_RECURSIVE
    } else {
        0
    };
    // SAFETY: the path is an empty C string, the structure is passed with its own size; both outlive
    // the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL))
}
