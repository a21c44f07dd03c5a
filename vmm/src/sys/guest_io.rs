//! System calls that move bytes between file descriptors and pieces of guest memory without a copy
//! in between. The guest may change its memory at any time; here only the kernel touches it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Pieces handed to one system call (the kernel takes up to 1024); the rest makes a short count.
pub(crate) const PIECES: usize = 256;

/// Receives from a stream socket, never waiting, at most what the pieces hold. 0 is the end of the
/// stream. File descriptors that the sender attached are dropped by the kernel.
pub(crate) fn receive(socket: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = Vectors::new(pieces);
    let mut message = vectors.message();
    // SAFETY: `message` names no address and no control buffer, and vectors that `Vectors` made.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

/// Sends to a stream socket, never waiting; a closed peer is an error, not a signal.
pub(crate) fn send(socket: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = Vectors::new(pieces);
    let message = vectors.message();
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the kernel only reads.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// Reads at an offset of a file, with flags of preadv2(2).
pub(crate) fn read_at(
    file: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_>],
    offset: i64,
    flags: i32,
) -> io::Result<usize> {
    let vectors = Vectors::new(pieces);
    let (pointer, count) = vectors.parts();
    // SAFETY: `pointer` leads to `count` vectors that `Vectors` made.
    retry(|| unsafe { libc::preadv64v2(file.as_raw_fd(), pointer, count, offset, flags) })
}

/// Writes at an offset of a file, with flags of pwritev2(2).
pub(crate) fn write_at(
    file: BorrowedFd<'_>,
    pieces: &[VolatileSlice<'_>],
    offset: i64,
    flags: i32,
) -> io::Result<usize> {
    let vectors = Vectors::new(pieces);
    let (pointer, count) = vectors.parts();
    // SAFETY: `pointer` leads to `count` vectors that `Vectors` made; the kernel only reads.
    retry(|| unsafe { libc::pwritev64v2(file.as_raw_fd(), pointer, count, offset, flags) })
}

/// Writes a packet, all of it or nothing; at most [`PIECES`] pieces make one.
pub(crate) fn write(file: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let vectors = Vectors::new(pieces);
    let (pointer, count) = vectors.parts();
    // SAFETY: `pointer` leads to `count` vectors that `Vectors` made; the kernel only reads.
    retry(|| unsafe { libc::writev(file.as_raw_fd(), pointer, count) })
}

/// What the kernel takes: each vector covers one piece, which borrows mapped guest memory for as
/// long as this lives.
struct Vectors<'p> {
    vectors: [MaybeUninit<libc::iovec>; PIECES],
    count: usize,
    _pieces: std::marker::PhantomData<VolatileSlice<'p>>,
}

impl<'p> Vectors<'p> {
    fn new(pieces: &'p [VolatileSlice<'p>]) -> Self {
        let mut vectors = [const { MaybeUninit::uninit() }; PIECES];
        for (vector, piece) in vectors.iter_mut().zip(pieces) {
            vector.write(libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            });
        }
        Self {
            vectors,
            count: pieces.len().min(PIECES),
            _pieces: std::marker::PhantomData,
        }
    }

    /// The first vector and how many there are, all of them initialised.
    fn parts(&self) -> (*const libc::iovec, libc::c_int) {
        let count = libc::c_int::try_from(self.count).expect("at most PIECES");
        (self.vectors.as_ptr().cast(), count)
    }

    fn message(&mut self) -> libc::msghdr {
        libc::msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: self.vectors.as_mut_ptr().cast(),
            msg_iovlen: self.count,
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }
}

/// Repeats a call that a signal interrupted; a negative result is `errno`.
pub(super) fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
