//! Write leases on files (fcntl(2), F_SETLEASE): nobody else has the file open, and who opens it waits until
//! the lease is given back. The kernel asks for that by SIGIO to one thread.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::thread::Pid;

/// `struct f_owner_ex`, fcntl(2).
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// fcntl(2); the `libc` crate lacks them.
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// Takes a lease on a file that this descriptor alone has open; `thread` hears when it is wanted back.
pub(crate) fn take(file: BorrowedFd<'_>, thread: Pid) -> io::Result<()> {
    tell(file, thread)?;
    // SAFETY: the argument is a number, no memory is touched.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) }).map(drop)
}

/// Another thread hears from now on.
pub(crate) fn tell(file: BorrowedFd<'_>, thread: Pid) -> io::Result<()> {
    let owner = Owner {
        kind: F_OWNER_TID,
        id: thread.as_raw_nonzero().get(),
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    check(unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) }).map(drop)
}

/// Gives the lease back. Fails only where there is none any more.
pub(crate) fn give_back(file: BorrowedFd<'_>) {
    // SAFETY: as in `take`.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Whether somebody waits for the lease, or has got it after too long a wait.
pub(crate) fn is_wanted(file: BorrowedFd<'_>) -> bool {
    // SAFETY: there is no argument.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) != libc::F_WRLCK }
}

/// Becomes readable when the thread that made it is asked for a lease.
#[derive(Debug)]
pub(crate) struct Asked(OwnedFd);

impl Asked {
    /// For the calling thread, which SIGIO does not end any more.
    pub(crate) fn new() -> io::Result<Self> {
        let signals = vmm_sys_util::signal::create_sigset(&[libc::SIGIO])
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // SAFETY: the set is read, and outlives the call.
        let blocked = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut())
        };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: as before.
        let fd = check(unsafe {
            libc::signalfd(
                -1,
                &raw const signals,
                libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
            )
        })?;
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes note; to be called by the thread that made it.
    pub(crate) fn clear(&self) {
        let mut signal = [0; size_of::<libc::signalfd_siginfo>()];
        // Fails when there is no more: the signal does not queue.
        while rustix::io::read(&self.0, &mut signal).is_ok() {}
    }
}

impl AsFd for Asked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
