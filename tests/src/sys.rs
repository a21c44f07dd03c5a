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

/// Gives the process a mount namespace of its own. To be called before it has threads.
pub(crate) fn leave_mount_namespace() -> io::Result<()> {
    // SAFETY: the process has one thread, so no other loses sight of the file system state that it
    // shares; descriptors are not unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    Ok(())
}
