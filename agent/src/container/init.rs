//! What a container's first process does between its birth in new namespaces and `execve`. All of
//! it runs in that process, which is a fork of the agent; `docs` of each step say what it relies on.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::{
    fs::{self, Mode, OFlags},
    mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount},
    process::{DumpableBehavior, fchdir, pivot_root, set_dumpable_behavior, setsid, umask},
    system::{setdomainname, sethostname},
};

use super::{
    channel, covers, devices,
    hooks::Hooks,
    id_maps::write_of,
    mounts::{self, Sources},
    plan::{Plan, Rootfs},
    prepared::Prepared,
    process_io::ChildIo,
    program,
    rootfs::{Missing, Tree},
    sysctl, terminal,
};
use crate::{
    error::{Attempt, Result},
    sys::{self, MountAttributes, Never},
};

/// What the agent gives its child.
pub(super) struct Init<'a> {
    /// What to do.
    pub plan: &'a Plan,
    /// Where the share is mounted. A path: mounts can be cloned only from the mount namespace of
    /// this process, which the agent's descriptors do not lead to.
    pub share: &'a Path,
    /// The agent's procfs.
    pub proc: BorrowedFd<'a>,
    /// What the agent has made.
    pub prepared: Prepared,
    /// Where the container's cgroup is, in which this process was born.
    pub cgroup: &'a Path,
    /// Standard streams.
    pub io: ChildIo,
    /// To the agent.
    pub channel: &'a channel::Child,
}

impl Init<'_> {
    /// Sets the container up, waits for its start and runs its program.
    pub(super) fn run(mut self) -> Result<Never> {
        self.close_the_rest();
        sys::reset_signals();
        umask(Mode::empty());
        setsid().or_cannot(|| "make a session for the container")?;
        self.become_root_of_user_namespace()?;
        self.enter_namespaces()?;
        self.leave_mounts_of_guest()?;
        let proc = self.proc;
        self.prepared.join(self.plan, || {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            fs::openat(proc, "self/ns/mnt", flags, Mode::empty())
                .or_cannot(|| "open the container's mount namespace")
        })?;
        let share = open_directory(self.share)?;
        let (rootfs, mounts) = self.set_up_rootfs(share.as_fd())?;
        let process = &self.plan.process;
        let console = self.plan.terminal.map(|size| {
            let slave = terminal::open(&rootfs, size, process.uid, self.channel)?;
            devices::bind_console(&rootfs, &slave)?;
            Ok(slave)
        });
        let console = console.transpose()?;
        self.set_kernel_parameters()?;
        if self.plan.id_maps.is_none() {
            process.grant(self.proc, None)?;
        }
        self.protect(&rootfs)?;
        self.enter_rootfs(&rootfs, &mounts)?;
        self.io.install(console)?;
        self.become_process()
    }

    /// The agent's descriptors are of no concern here, and keeping streams of other containers
    /// open would hide their ends.
    fn close_the_rest(&self) {
        let mut keep: Vec<RawFd> = [self.proc.as_raw_fd(), self.channel.raw()]
            .into_iter()
            .chain(self.io.raw())
            .chain(self.prepared.raw())
            .collect();
        sys::close_all_but(&mut keep);
    }

    fn become_root_of_user_namespace(&self) -> Result<()> {
        if self.plan.id_maps.is_none() {
            return Ok(());
        }
        self.channel.wait()?;
        super::become_root()?;
        // The change of user has made this process undumpable, and its files in /proc root's of
        // the guest. Nobody else is in its PID namespace yet.
        set_dumpable_behavior(DumpableBehavior::Dumpable)
            .or_cannot(|| "keep access to the own files in /proc")
    }

    fn enter_namespaces(&self) -> Result<()> {
        let plan = self.plan;
        if plan.new_keyring {
            let name = CString::new(format!("_ses.{}", plan.id)).unwrap_or_default();
            sys::join_new_keyring(&name).or_cannot(|| "join a session keyring")?;
        }
        if plan.namespaces.cgroup {
            sys::unshare(libc::CLONE_NEWCGROUP).or_cannot(|| "make a cgroup namespace")?;
        }
        if plan.namespaces.time {
            sys::unshare(libc::CLONE_NEWTIME).or_cannot(|| "make a time namespace")?;
            for line in &plan.time_offsets {
                write_of(self.proc, None, "timens_offsets", line)
                    .or_cannot(|| format!("set {} (linux.timeOffsets)", line.trim_end()))?;
            }
        }
        if plan.namespaces.owns(libc::CLONE_NEWNET) {
            sys::raise_loopback().or_cannot(|| "raise the loopback interface")?;
        }
        if let Some(name) = &plan.hostname {
            sethostname(name.as_bytes())
                .or_cannot(|| format!("set the host name {name:?} (hostname)"))?;
        }
        if let Some(name) = &plan.domainname {
            setdomainname(name.as_bytes())
                .or_cannot(|| format!("set the domain name {name:?} (domainname)"))?;
        }
        Ok(())
    }

    /// Nothing that is mounted here may be seen by the agent.
    fn leave_mounts_of_guest(&self) -> Result<()> {
        let above = if self.plan.propagation.0 == libc::MS_PRIVATE {
            MountPropagationFlags::PRIVATE
        } else {
            MountPropagationFlags::DOWNSTREAM
        };
        mount_change("/", above | MountPropagationFlags::REC)
            .or_cannot(|| "detach the container's mounts from the guest's")
    }

    /// Mounts the rootfs and all that goes into it.
    fn set_up_rootfs(&mut self, share: BorrowedFd<'_>) -> Result<(Tree, Vec<OwnedFd>)> {
        let rootfs = match &self.plan.rootfs {
            Rootfs::Share(path) => {
                let action = || format!("mount the rootfs {path} of the share (root.path)");
                // Its mount of its own, or whatever binds the root gets that as a second mount on
                // top.
                let place = mounts::open_shared_mount(share, path).or_cannot(action)?;
                mounts::mount_over(&place).or_cannot(action)?
            }
            Rootfs::Disk(_) => {
                let action = || "mount the rootfs of a disk (root.path)";
                let mount = self.prepared.rootfs.take();
                let mount = mount.ok_or(io::ErrorKind::NotFound).or_cannot(action)?;
                // Anywhere will do: the directory is reached by its descriptor only.
                let place = open_directory(self.share)?;
                mounts::attach(&mount, &place).or_cannot(action)?;
                mount
            }
        };
        let rootfs = Tree::new(rootfs);
        let mounts = self.fill_rootfs(&rootfs, share)?;
        Ok((rootfs, mounts))
    }

    /// Returns the mounts of the plan.
    fn fill_rootfs(&mut self, rootfs: &Tree, share: BorrowedFd<'_>) -> Result<Vec<OwnedFd>> {
        // With a namespace of its own, a new mount shows the container its cgroup as the root.
        let shared = !self.plan.namespaces.has_cgroup();
        let control_group = shared.then(|| open_directory(self.cgroup)).transpose()?;
        let sources = Sources {
            share,
            control_group: control_group.as_ref().map(AsFd::as_fd),
        };
        let mut made = Vec::with_capacity(self.plan.mounts.len());
        for (index, mount) in self.plan.mounts.iter().enumerate() {
            made.push(mount.mount(rootfs, &sources, self.prepared.take_mount(index))?);
        }
        rootfs
            .lookup(&self.plan.process.directory, Missing::Directory)
            .or_cannot(|| "create the working directory (process.cwd)")?;
        // A /dev that the host gives is used as it is.
        if self.plan.mounts.iter().any(mounts::MountPlan::binds_dev) {
            return Ok(made);
        }
        for (index, device) in self.plan.devices.iter().enumerate() {
            match self.prepared.devices.as_ref().map(|made| &made[index]) {
                Some(made) => device.place(rootfs, made)?,
                None => device.create(rootfs)?,
            }
        }
        devices::create_links(rootfs)?;
        Ok(made)
    }

    /// Through the agent's procfs: the container may have none, or may have made its own read-only.
    fn set_kernel_parameters(&self) -> Result<()> {
        for (path, value) in &self.plan.sysctls {
            sysctl::write(self.proc, path, value)?;
        }
        Ok(())
    }

    fn protect(&self, rootfs: &Tree) -> Result<()> {
        for path in &self.plan.read_only_paths {
            covers::make_read_only(rootfs, path)?;
        }
        for path in &self.plan.masked_paths {
            covers::mask(rootfs, path)?;
        }
        if self.plan.read_only {
            let read_only = MountAttributes {
                set: libc::MOUNT_ATTR_RDONLY,
                ..Default::default()
            };
            sys::set_mount_attributes(rootfs.root(), false, read_only)
                .or_cannot(|| "make the rootfs read-only (root.readonly)")?;
        }
        Ok(())
    }

    /// Makes the rootfs the root, and nothing else reachable.
    fn enter_rootfs(&self, rootfs: &Tree, mounts: &[OwnedFd]) -> Result<()> {
        let action = || "make the rootfs the root";
        fchdir(rootfs.root()).or_cannot(action)?;
        // Old and new root on one another (pivot_root(2), NOTES): no directory for the old one is
        // needed in the rootfs.
        pivot_root(".", ".").or_cannot(action)?;
        unmount(".", UnmountFlags::DETACH).or_cannot(|| "let go of the guest's root")?;
        let (propagation, recursive) = self.plan.propagation;
        let change = MountAttributes {
            propagation,
            ..Default::default()
        };
        sys::set_mount_attributes(rootfs.root(), recursive, change)
            .or_cannot(|| "set the propagation of the root (linux.rootfsPropagation)")?;
        let mut mounts = self.plan.mounts.iter().zip(mounts);
        mounts.try_for_each(|(plan, mount)| plan.propagate(mount))
    }

    fn become_process(&self) -> Result<Never> {
        let plan = self.plan;
        let process = &plan.process;
        if let Some(domain) = plan.personality {
            sys::set_personality(domain)
                .or_cannot(|| "set the execution domain (linux.personality)")?;
        }
        process.apply_limits()?;
        let hooks = Hooks::of(plan)?;
        // Without no_new_privs, installing a filter takes a privilege that the process is about
        // to lose.
        let early = !process.no_new_privileges;
        let filter = plan.seccomp.as_ref();
        if let Some(filter) = filter.filter(|_| early) {
            filter.install()?;
        }
        process.become_user()?;
        super::enter_directory(&process.directory)?;
        let program = program::find(&process.arguments[0], &process.environment)?;
        let environment = program::with_home(process.environment.clone(), process.uid);
        umask(Mode::from_raw_mode(process.umask));
        self.channel.wait_to_proceed()?;
        hooks.map_or(Ok(()), |mut hooks| hooks.run())?;
        if let Some(filter) = filter.filter(|_| !early) {
            filter.install()?;
        }
        program::execute(&program, &process.arguments, &environment)
    }
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    fs::open(path, flags, Mode::empty()).or_cannot(|| format!("open {}", path.display()))
}
