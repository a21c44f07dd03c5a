//! The ioctls of a tap device's descriptors (linux/if_tun.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a descriptor of /dev/net/tun belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    /// Name of the network interface, filled up with zeroes.
    pub(crate) name: [libc::c_char; libc::IFNAMSIZ],
    /// `IFF_*`.
    pub(crate) flags: libc::c_int,
}

/// Asks which interface a descriptor belongs to.
pub(crate) fn interface(tap: BorrowedFd<'_>) -> io::Result<Interface> {
    let mut request = request(0);
    // SAFETY: TUNGETIFF fills a whole `ifreq`, and `request` is one.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) })?;
    // SAFETY: the kernel has set this member of the union; every bit pattern is a valid number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(Interface {
        name: request.ifr_name,
        flags: libc::c_int::from(flags) & 0xffff,
    })
}

/// Makes a new descriptor of /dev/net/tun that of an interface.
#[cfg(test)]
pub(crate) fn create(
    tun: impl std::os::fd::AsFd,
    name: &str,
    flags: libc::c_int,
) -> io::Result<()> {
    let mut request = request(flags);
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *place = byte.cast_signed();
    }
    let tun = tun.as_fd().as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, and `request` is one.
    check(unsafe { libc::ioctl(tun, libc::TUNSETIFF as _, &raw mut request) })
}

/// Sets the size of the header before each packet.
pub(crate) fn set_header_size(tap: BorrowedFd<'_>, size: libc::c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) })
}

/// Says what the reader of the packets can take (`TUN_F_*`).
pub(crate) fn set_offloads(tap: BorrowedFd<'_>, offloads: libc::c_uint) -> io::Result<()> {
    let offloads = libc::c_ulong::from(offloads);
    // SAFETY: TUNSETOFFLOAD takes its argument as a number.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as _, offloads) })
}

/// Takes a queue of a tap with several into use, or out of it.
pub(crate) fn use_queue(tap: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let request = request(if on {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    });
    // SAFETY: TUNSETQUEUE reads an `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE as _, &raw const request) })
}

/// A request with flags. They all fit: the constants have 16 bits.
#[allow(clippy::cast_possible_truncation)]
fn request(flags: libc::c_int) -> libc::ifreq {
    libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
