//! The calls that the compiler cannot check: what a child does between fork and exec, leaving a
//! namespace, locks of the second kind, mapped files.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::UnshareFlags;

/// The child starts a session of its own whose controlling terminal is its standard input.
pub(crate) fn own_terminal(command: &mut Command) {
    // SAFETY: the closure makes two system calls and allocates nothing, so it is safe between fork
    // and exec of a process with several threads.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
}

/// Gives the process a mount namespace of its own. To be called before it has threads.
pub(crate) fn leave_mount_namespace() -> io::Result<()> {
    // SAFETY: the process has one thread, so no other loses sight of the file system state that it
    // shares; descriptors are not unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(())
}

/// Whom a lock on a part of a file belongs to (fcntl_locking(2)).
#[derive(Clone, Copy)]
pub(crate) enum LockOf {
    Process,
    OpenFile,
}

/// Takes (or gives up) a write lock on bytes of a file; does not wait.
pub(crate) fn lock(file: impl AsFd, of: LockOf, lock: bool, bytes: (i64, i64)) -> io::Result<()> {
    let command = match of {
        LockOf::Process => libc::F_SETLK,
        LockOf::OpenFile => libc::F_OFD_SETLK,
    };
    // SAFETY: zero is a valid value of every field.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    let kind = if lock { libc::F_WRLCK } else { libc::F_UNLCK };
    wanted.l_type = i16::try_from(kind).map_err(io::Error::other)?;
    (wanted.l_start, wanted.l_len) = bytes;
    // SAFETY: the command reads the structure, which outlives it.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), command, &wanted) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A file in memory, `length` bytes from its beginning on.
pub(crate) struct Mapped {
    start: *mut u8,
    length: usize,
}

impl Mapped {
    pub(crate) fn new(file: impl AsFd, length: usize, shared: bool) -> io::Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        let flags = if shared {
            MapFlags::SHARED
        } else {
            MapFlags::PRIVATE
        };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses a place where nothing is.
        let start = unsafe { mmap(std::ptr::null_mut(), length, protection, flags, file, 0) }?;
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    pub(crate) fn read(&self, index: usize) -> u8 {
        assert!(index < self.length);
        // SAFETY: inside of the mapping, which nobody else in this process refers to.
        unsafe { self.start.add(index).read_volatile() }
    }

    pub(crate) fn write(&self, index: usize, byte: u8) {
        assert!(index < self.length);
        // SAFETY: inside of the mapping, which nobody else in this process refers to.
        unsafe { self.start.add(index).write_volatile(byte) };
    }

    /// Writes what was changed to the file.
    pub(crate) fn sync(&self) -> io::Result<()> {
        use rustix::mm::{MsyncFlags, msync};
        // SAFETY: the range is that of the mapping.
        Ok(unsafe { msync(self.start.cast(), self.length, MsyncFlags::SYNC) }?)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range is that of the mapping, to which no reference is left. Fails for no
        // mapping that there is.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.length) };
    }
}
