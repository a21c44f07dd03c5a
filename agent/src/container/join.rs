//! What an additional process of a container (exec) does between its birth and `execve`: it is
//! born in the container's PID namespace and cgroup, joins the other namespaces and becomes what
//! its `process` object says. Also processes of the guest itself, which join nothing.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::{
    fs::{self, Mode, OFlags},
    process::{setsid, umask},
    thread::{
        LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space,
        move_into_thread_name_spaces,
    },
};

use super::{
    channel, id_maps::IdMaps, identity, namespaces::Namespaces, process_io::ChildIo, program,
    seccomp::Filter, terminal,
};
use crate::{
    error::{Attempt, Result},
    sys::{self, Never},
};

/// What the agent gives its child.
pub(super) struct Join<'a> {
    /// The process to become.
    pub(super) process: &'a identity::Plan,
    /// Rows and columns, if it has a terminal.
    pub(super) terminal: Option<(u16, u16)>,
    /// The container to join; none for the guest itself.
    pub(super) container: Option<Target<'a>>,
    /// The agent's procfs.
    pub(super) proc: BorrowedFd<'a>,
    /// Standard streams.
    pub(super) io: ChildIo,
    /// To the agent.
    pub(super) channel: &'a channel::Child,
}

/// The container that a process joins.
pub(super) struct Target<'a> {
    /// Its first process.
    pub(super) pid: i32,
    /// The same.
    pub(super) pidfd: BorrowedFd<'a>,
    /// Namespaces of its own.
    pub(super) namespaces: Namespaces,
    /// Ids of its user namespace.
    pub(super) id_maps: Option<&'a IdMaps>,
    /// Filter of its processes.
    pub(super) seccomp: Option<&'a Filter>,
    /// Its execution domain.
    pub(super) personality: Option<u64>,
    /// Its keyring's name, if it has one of its own.
    pub(super) keyring: Option<&'a std::ffi::CStr>,
}

impl Join<'_> {
    /// Joins the container and runs the program.
    pub(super) fn run(self) -> Result<Never> {
        self.close_the_rest();
        sys::reset_signals();
        umask(Mode::empty());
        setsid().or_cannot(|| "make a session for the process")?;
        let process = self.process;
        process.grant(self.proc, None)?;
        if let Some(target) = &self.container {
            self.join(target)?;
        }
        let console: Option<OwnedFd> = match self.terminal {
            Some(size) => Some(terminal::open_here(size, process.uid, self.channel)?),
            None => None,
        };
        self.io.install(console)?;
        process.apply_limits()?;
        let filter = self.container.as_ref().and_then(|target| target.seccomp);
        let early = !process.no_new_privileges;
        if let Some(filter) = filter.filter(|_| early) {
            filter.install()?;
        }
        if self.container.is_some() {
            process.become_user()?;
        }
        super::enter_directory(&process.directory)?;
        let program = program::find(&process.arguments[0], &process.environment)?;
        let environment = program::with_home(process.environment.clone(), process.uid);
        umask(Mode::from_raw_mode(process.umask));
        if let Some(filter) = filter.filter(|_| !early) {
            filter.install()?;
        }
        program::execute(&program, &process.arguments, &environment)
    }

    fn close_the_rest(&self) {
        let pidfd = self
            .container
            .as_ref()
            .map(|target| target.pidfd.as_raw_fd());
        let mut keep: Vec<RawFd> = [self.proc.as_raw_fd(), self.channel.raw()]
            .into_iter()
            .chain(pidfd)
            .chain(self.io.raw())
            .collect();
        sys::close_all_but(&mut keep);
    }

    fn join(&self, target: &Target<'_>) -> Result<()> {
        if target.namespaces.has_time() {
            // Its "children" namespace, as the first process enters only at `execve`.
            let path = format!("{}/ns/time_for_children", target.pid);
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let action = || "join the container's time namespace";
            let time = fs::openat(self.proc, path, flags, Mode::empty()).or_cannot(action)?;
            let time = std::os::fd::AsFd::as_fd(&time);
            move_into_link_name_space(time, Some(LinkNameSpaceType::Time)).or_cannot(action)?;
        }
        let mut kinds = ThreadNameSpaceType::empty();
        for (flag, kind) in [
            (libc::CLONE_NEWUSER, ThreadNameSpaceType::USER),
            (libc::CLONE_NEWNET, ThreadNameSpaceType::NETWORK),
            (
                libc::CLONE_NEWIPC,
                ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
            ),
            (
                libc::CLONE_NEWUTS,
                ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
            ),
            (libc::CLONE_NEWNS, ThreadNameSpaceType::MOUNT),
        ] {
            kinds.set(kind, target.namespaces.has(flag));
        }
        kinds.set(
            ThreadNameSpaceType::CONTROL_GROUP,
            target.namespaces.has_cgroup(),
        );
        move_into_thread_name_spaces(target.pidfd, kinds)
            .or_cannot(|| "join the container's namespaces: it may have ended")?;
        if kinds.contains(ThreadNameSpaceType::USER) {
            super::become_root()?;
        }
        if let Some(name) = target.keyring {
            sys::join_new_keyring(name).or_cannot(|| "join the container's session keyring")?;
        }
        if let Some(domain) = target.personality {
            sys::set_personality(domain)
                .or_cannot(|| "set the execution domain (linux.personality)")?;
        }
        Ok(())
    }
}
