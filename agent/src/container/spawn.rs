//! Forks the processes of containers: where they are born, and what they run first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    process::Pid,
    thread::{
        LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space,
        move_into_thread_name_spaces,
    },
};

use super::{Surroundings, cgroup, channel};
use crate::{
    error::{Attempt, Result},
    sys::{self, Forked, Never},
};

/// Forks a child that runs `set_up`.
pub(super) fn spawn(
    namespaces: u64,
    cgroup: BorrowedFd<'_>,
    channel: &channel::Child,
    set_up: impl FnOnce(&channel::Child) -> Result<Never>,
) -> std::io::Result<(Pid, OwnedFd)> {
    match sys::fork(namespaces, Some(cgroup))? {
        Forked::Child => channel.run(|| set_up(channel)),
        Forked::Parent(pid, pidfd) => Ok((pid, pidfd)),
    }
}

/// Forks a child into the PID namespace of another process and into a cgroup.
pub(super) fn spawn_in(
    surroundings: &Surroundings,
    pid_namespace_of: Option<BorrowedFd<'_>>,
    first_process: Option<i32>,
    cgroup: Option<BorrowedFd<'_>>,
    channel: &channel::Child,
    set_up: impl FnOnce(&channel::Child) -> Result<Never>,
) -> Result<(Pid, OwnedFd)> {
    // setns(2) of a PID namespace only concerns children: the agent sets it for this fork.
    if let Some(pidfd) = pid_namespace_of {
        move_into_thread_name_spaces(pidfd, ThreadNameSpaceType::PROCESS_ID)
            .or_cannot(|| "enter the container's PID namespace: it may have ended")?;
    }
    let forked = match sys::fork(0, cgroup) {
        // The container has made cgroups below its own, which holds no processes any more: the
        // new one joins its first process.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => first_process
            .ok_or(error)
            .and_then(|pid| cgroup::of_process(surroundings.proc.as_fd(), pid))
            .and_then(|cgroup| sys::fork(0, Some(cgroup.as_fd()))),
        forked => forked,
    };
    if let Ok(Forked::Child) = forked {
        channel.run(|| set_up(channel));
    }
    if pid_namespace_of.is_some() {
        let own = surroundings.pid_namespace.as_fd();
        move_into_link_name_space(own, Some(LinkNameSpaceType::ProcessID))
            .or_cannot(|| "return to the agent's PID namespace")?;
    }
    match forked.or_cannot(|| "fork a process into the container: it may have ended")? {
        Forked::Parent(pid, pidfd) => Ok((pid, pidfd)),
        Forked::Child => sys::exit_now(1),
    }
}
