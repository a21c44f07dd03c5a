//! Forks the processes of containers: where they are born, and what they run first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags, openat},
    process::Pid,
    thread::{
        LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space,
        move_into_thread_name_spaces,
    },
};

use super::{
    Surroundings, cgroup, channel,
    namespaces::{Entry, Others},
};
use crate::{
    error::{Attempt, Result},
    sys::{self, Forked, Never},
};

/// Forks a child that runs `set_up` in new namespaces and in those of other containers.
pub(super) fn spawn(
    proc: BorrowedFd<'_>,
    namespaces: u64,
    others: &Others,
    cgroup: BorrowedFd<'_>,
    channel: &channel::Child,
    set_up: impl FnOnce(&channel::Child) -> Result<Never>,
) -> Result<(Pid, OwnedFd)> {
    // Entered here rather than in the child: root of a new user namespace has no right to.
    let mut way = WayBack::default();
    let forked = others
        .entries()
        .try_for_each(|entry| way.enter(proc, &entry))
        .and_then(|()| {
            sys::fork(namespaces, Some(cgroup)).or_cannot(|| "fork the container's first process")
        });
    if let Ok(Forked::Child) = forked {
        channel.run(|| set_up(channel));
    }
    way.back()?;
    match forked? {
        Forked::Parent(pid, pidfd) => Ok((pid, pidfd)),
        Forked::Child => sys::exit_now(1),
    }
}

/// The agent's own namespaces, while it is in others.
#[derive(Default)]
struct WayBack(Vec<OwnedFd>);

impl WayBack {
    fn enter(&mut self, proc: BorrowedFd<'_>, entry: &Entry<'_>) -> Result<()> {
        let Entry { file, kind, of } = entry;
        let action = || {
            let id = of.id();
            format!("enter the {file} namespace of container {id}: it may have ended")
        };
        let open = |path: String| {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            openat(proc, path, flags, Mode::empty()).or_cannot(action)
        };
        let own = open(format!("self/ns/{file}"))?;
        if *kind == ThreadNameSpaceType::TIME {
            // A process that is yet to be executed is in its time namespace only afterwards.
            let pid = of.pid().as_raw_nonzero();
            let namespace = open(format!("{pid}/ns/time_for_children"))?;
            // It was that process's if the process is still there.
            sys::signal(of.pidfd(), 0).or_cannot(action)?;
            let kind = Some(LinkNameSpaceType::Time);
            move_into_link_name_space(namespace.as_fd(), kind).or_cannot(action)?;
        } else {
            move_into_thread_name_spaces(of.pidfd(), *kind).or_cannot(action)?;
        }
        self.0.push(own);
        Ok(())
    }

    fn back(self) -> Result<()> {
        let mut own = self.0.iter().rev();
        own.try_for_each(|own| {
            move_into_link_name_space(own.as_fd(), None)
                .or_cannot(|| "return to the agent's own namespaces")
        })
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
