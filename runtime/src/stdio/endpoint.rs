//! One end of a flow: a descriptor and how to use it without ever blocking the relay.
//!
//! O_NONBLOCK belongs to the open file, which the runtime's own standard descriptors share with
//! whoever started it: setting it there would break them. So sockets are used with MSG_DONTWAIT,
//! and pipes and terminals are opened once more through /proc, which makes an open file that is
//! ours alone. Where that is not possible, poll(2) says when a short operation goes through.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
    net::{RecvFlags, SendFlags},
};

/// What POSIX promises to fit into a pipe that poll(2) calls writable.
const PIPE_BUF: usize = 4096;

/// Which way an endpoint is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// One end of a flow.
#[derive(Debug)]
pub(super) enum Endpoint {
    Socket(OwnedFd),
    /// An open file of our own with O_NONBLOCK; true for a pipe.
    NonBlocking(OwnedFd, bool),
    /// A regular file or the like, which never blocks for long.
    File(OwnedFd),
    /// A pipe or terminal that could not be opened again.
    Blocking(OwnedFd),
}

impl Endpoint {
    /// An endpoint that uses a descriptor of ours which others share.
    pub(super) fn of_shared(shared: BorrowedFd<'_>, direction: Direction) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(shared)?.st_mode);
        let duplicate = || rustix::io::fcntl_dupfd_cloexec(shared, 3).map_err(io::Error::from);
        let terminal = kind == FileType::CharacterDevice && rustix::termios::isatty(shared);
        match kind {
            FileType::Socket => Ok(Self::Socket(duplicate()?)),
            _ if kind == FileType::Fifo || terminal => {
                let access = match direction {
                    Direction::Read => OFlags::RDONLY,
                    Direction::Write => OFlags::WRONLY,
                };
                let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
                match rustix::fs::open(path, flags, Mode::empty()) {
                    Ok(own) => Ok(Self::NonBlocking(own, kind == FileType::Fifo)),
                    // Also ENXIO, a pipe without a reader: the first write will tell.
                    Err(_) => Ok(Self::Blocking(duplicate()?)),
                }
            }
            _ => Ok(Self::File(duplicate()?)),
        }
    }

    /// Whether splice(2) can use it as the pipe of the two.
    pub(super) fn is_pipe(&self) -> bool {
        matches!(self, Self::NonBlocking(_, true))
    }

    /// Reads what is there; 0 at the end.
    pub(super) fn read(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Socket(socket) => {
                rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT).map(|(count, _)| count)
            }
            Self::NonBlocking(file, _) | Self::File(file) | Self::Blocking(file) => {
                match rustix::io::read(file, buffer) {
                    // A terminal whose other side has gone.
                    Err(Errno::IO) => Ok(0),
                    result => result,
                }
            }
        }
    }

    /// Writes what fits.
    pub(super) fn write(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Socket(socket) => {
                rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Self::NonBlocking(file, _) | Self::File(file) => rustix::io::write(file, bytes),
            Self::Blocking(file) => rustix::io::write(file, &bytes[..bytes.len().min(PIPE_BUF)]),
        }
    }

    /// Tells the other side that nothing more comes, while it may go on sending.
    pub(super) fn end_writing(&self) {
        if let Self::Socket(socket) = self {
            // A peer that is gone already needs not be told.
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Write);
        }
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(fd) | Self::NonBlocking(fd, _) | Self::File(fd) | Self::Blocking(fd) => {
                fd.as_fd()
            }
        }
    }
}
