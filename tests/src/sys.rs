//! The calls that the compiler cannot check: what a child does between fork and exec, and leaving
//! a namespace.

use std::io;
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

/// The child has no descriptor for a standard stream at all.
pub(crate) fn without_stream(command: &mut Command, stream: i32) {
    // SAFETY: close(2) on a number allocates nothing; nothing in the child owns the descriptor
    // between here and exec.
    unsafe {
        command.pre_exec(move || {
            rustix::io::close(stream);
            Ok(())
        });
    }
}

/// The child finds this end of a pipe at a certain descriptor number.
pub(crate) fn with_descriptor(command: &mut Command, from: i32, to: i32) {
    // SAFETY: two calls that allocate nothing. `from` stays open in the parent until after spawn
    // (the caller holds it), `to` is a number that nothing in the child owns before exec.
    unsafe {
        command.pre_exec(move || {
            let from = std::os::fd::BorrowedFd::borrow_raw(from);
            let mut to = std::mem::ManuallyDrop::new(
                <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(to),
            );
            rustix::io::dup2(from, &mut to)?;
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
