//! A container in the guest: its set-up from an OCI spec, its processes, its end.
//!
//! States: *created* (the first process waits on its channel), *running*, *stopped* (the first
//! process has been reaped). Each container has a cgroup; everything else of it belongs to the
//! namespaces of its processes and goes with them.

mod capabilities;
mod cgroup;
mod channel;
mod copy_up;
mod covers;
mod device_filter;
mod devices;
mod disks;
mod exec;
mod hooks;
mod id_maps;
mod identity;
mod init;
mod join;
mod mount_options;
mod mounts;
mod namespaces;
mod plan;
mod prepared;
mod process_io;
mod process_list;
mod program;
mod resources;
mod rootfs;
mod seccomp;
mod spawn;
mod stats;
pub(crate) mod sysctl;
mod terminal;

use std::{
    collections::HashMap,
    ffi::CString,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{
        CreateContainerRequest, Process as ProcessLine, SetNetworkRequest, StatsResponse, Stdio,
    },
    oci,
};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    process::Pid,
};

pub use cgroup::{Cgroup, MOUNT_POINT as CGROUP_MOUNT_POINT, delegate_controllers};
pub use disks::Disks;
pub use exec::exec_in_guest;
pub(crate) use namespaces::Others;
pub use process_io::ChildIo;

use self::{
    channel::Progress, disks::DisksInUse, id_maps::IdMaps, init::Init, join::Target,
    namespaces::Namespaces, plan::Plan, prepared::Prepared, spawn::spawn,
};
use crate::{
    error::{Attempt, Error, Result},
    network::{self, Network, Parameters},
    process::{Process, Started},
    reaper::Reaper,
    stdio::{self, Streams},
    sys,
};

/// What set-ups use of the guest.
#[derive(Debug)]
pub struct Surroundings {
    /// Where the share is mounted, or why it is not.
    pub share: Result<PathBuf>,
    /// A procfs of the agent's PID namespace.
    pub proc: OwnedFd,
    /// The agent's own PID namespace.
    pub pid_namespace: OwnedFd,
    /// What their networks are made with.
    pub network: network::Host,
    /// Where filesystems on disks are found.
    pub disks: Disks,
    /// Where ends of processes are reported.
    pub reaper: Arc<Reaper>,
    /// Streams that the host has connected.
    pub streams: Arc<Streams>,
}

impl Surroundings {
    /// Where the share is mounted, if it is.
    fn share(&self) -> Result<&Path> {
        match &self.share {
            Ok(share) => Ok(share),
            Err(error) => Err(Error::Reported(error.report())),
        }
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Arc<Cgroup>,
    namespaces: Namespaces,
    seccomp: Option<seccomp::Filter>,
    personality: Option<u64>,
    id_maps: Option<IdMaps>,
    keyring: Option<CString>,
    network: Arc<Network>,
    /// The container whose network it is, unless it is its own.
    network_of: Option<String>,
    /// Kernel parameters of interfaces, by path below /proc/sys, that were not set yet: interfaces
    /// come after the container was made.
    parameters: Mutex<Parameters>,
    disks: Mutex<DisksInUse>,
    init: Arc<Process>,
    /// Held while the container is created and not started.
    waiting: Mutex<Option<channel::Parent>>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

/// Processes ended and waited for that are remembered before the oldest are forgotten.
const REMEMBERED: usize = 64;

impl Container {
    /// Sets a container up to the point where its program only has to be executed.
    pub(crate) async fn create(
        surroundings: &Surroundings,
        request: &CreateContainerRequest,
        others: &Others,
    ) -> Result<Self> {
        let plan = plan::plan(request, &cgroup::pristine(), others)?;
        let share = surroundings.share()?;
        let (child_io, agent_io) = stdio::connect(
            &surroundings.streams,
            &request.stdio,
            plan.terminal.is_some(),
        )
        .await?;
        let owner = outside(plan.id_maps.as_ref(), &plan.process)?;
        child_io.give_to(owner)?;
        let cgroup = Arc::new(Cgroup::create(&plan.id)?);
        if owner.0 != 0 && plan.may_change_cgroup() {
            cgroup.give_to(owner.0)?;
        }
        cgroup.apply(&plan.settings)?;
        cgroup.filter_devices(&plan.device_rules)?;
        let mut disks = DisksInUse::default();
        let prepared = Prepared::of(&plan, share, surroundings, others, &mut disks)?;
        let (parent, child) = channel::pair()?;
        let spawned = spawn(
            surroundings.proc.as_fd(),
            plan.namespaces.at_birth,
            others,
            cgroup.directory(),
            &child,
            |channel| {
                Init {
                    plan: &plan,
                    share,
                    proc: surroundings.proc.as_fd(),
                    prepared,
                    cgroup: cgroup.path(),
                    io: child_io,
                    channel,
                }
                .run()
            },
        );
        let (pid, pidfd) = spawned?;
        let ended = surroundings.reaper.expect(pid);
        drop(child);
        let kill_all = !plan.namespaces.owns(libc::CLONE_NEWPID);
        let mut master = None;
        let set_up = async {
            if let Some(maps) = &plan.id_maps {
                maps.write(surroundings.proc.as_fd(), pid)?;
                parent.proceed()?;
            }
            let progress = parent.progress(|terminal| master = Some(terminal)).await;
            progress.and_then(expect_ready)?;
            // Root of a user namespace cannot grant it to itself.
            if plan.id_maps.is_some() {
                plan.process.grant(surroundings.proc.as_fd(), Some(pid))?;
            }
            network_namespace(surroundings.proc.as_fd(), pid)
        };
        let keyring = keyring_name(&plan);
        let network = match set_up.await {
            Ok(namespace) => match others.network_of() {
                Some(other) => other.network.clone(),
                None => Arc::new(Network::new(namespace)),
            },
            Err(error) => {
                cgroup.kill().await?;
                return Err(error);
            }
        };
        let started = Started { pid, pidfd, ended };
        let init = Process::new(
            started,
            agent_io.with_terminal(master)?,
            Some((cgroup.clone(), kill_all)),
        );
        Ok(Self {
            namespaces: plan.namespaces,
            personality: plan.personality,
            network,
            network_of: others.network_of().map(|other| other.id.clone()),
            parameters: Mutex::new(plan.interface_sysctls),
            disks: Mutex::new(disks),
            keyring,
            id: plan.id,
            seccomp: plan.seccomp,
            id_maps: plan.id_maps,
            cgroup,
            init,
            waiting: Mutex::new(Some(parent)),
            execs: Mutex::default(),
        })
    }

    /// Lets the created container's process run; returns when it does.
    pub async fn start(&self, surroundings: &Surroundings) -> Result<()> {
        let waiting = lock(&self.waiting).take();
        let channel = waiting.filter(|_| !self.init.has_ended()).ok_or_else(|| {
            let state = if self.init.has_ended() {
                "has stopped"
            } else {
                "runs already"
            };
            wrong_state(&self.id, state, "only a created one can be started")
        })?;
        self.set_parameters(surroundings)?;
        if let Some((path, _)) = lock(&self.parameters).first() {
            let field = format!("linux.sysctl {}", path.display());
            let problem = "no interface of the container has this parameter";
            return Err(Error::invalid(field, problem));
        }
        channel.proceed()?;
        match channel.progress(drop).await? {
            Progress::Running => Ok(()),
            Progress::Ready => Err(Error::new(
                ErrorKind::Internal,
                "the container waits once more",
            )),
        }
    }

    /// Makes its network namespace what the request says.
    pub fn set_network(
        &self,
        surroundings: &Surroundings,
        request: &SetNetworkRequest,
    ) -> Result<()> {
        if let Some(other) = &self.network_of {
            let state = format!("is on the network of container {other}");
            return Err(wrong_state(&self.id, &state, "set that container's"));
        }
        let proc = surroundings.proc.as_fd();
        self.network.set(&surroundings.network, proc, request)?;
        self.set_parameters(surroundings)
    }

    /// Sets those parameters of interfaces that are there.
    fn set_parameters(&self, surroundings: &Surroundings) -> Result<()> {
        let proc = surroundings.proc.as_fd();
        let parameters = &mut lock(&self.parameters);
        self.network
            .set_parameters(&surroundings.network, proc, parameters)
    }

    /// Runs one more process in the container; returns when its program runs.
    pub async fn exec(
        &self,
        surroundings: &Surroundings,
        id: &str,
        process: &[u8],
        stdio: &Stdio,
    ) -> Result<Pid> {
        if self.init.has_ended() {
            return Err(wrong_state(
                &self.id,
                "has stopped",
                "nothing can run in it",
            ));
        }
        self.make_room_for(id)?;
        let target = Target {
            pid: self.init.pid().as_raw_nonzero().get(),
            pidfd: self.init.pidfd(),
            namespaces: self.namespaces,
            seccomp: self.seccomp.as_ref(),
            personality: self.personality,
            keyring: self.keyring.as_deref(),
            id_maps: self.id_maps.as_ref(),
        };
        let cgroup = Some(self.cgroup.directory());
        let process = exec::exec(surroundings, process, stdio, Some(target), cgroup).await?;
        let pid = process.pid();
        lock(&self.execs).insert(id.to_owned(), process);
        Ok(pid)
    }

    fn make_room_for(&self, id: &str) -> Result<()> {
        let mut execs = lock(&self.execs);
        if id.is_empty() {
            return Err(Error::invalid("exec id", "is empty"));
        }
        if execs.get(id).is_some_and(|process| !process.has_ended()) {
            let text = format!("a process {id} runs in container {} already", self.id);
            return Err(Error::new(ErrorKind::WrongState, text));
        }
        if execs.len() >= REMEMBERED {
            execs.retain(|_, process| !process.was_waited_for());
        }
        Ok(())
    }

    /// The container's own process (empty id) or one that was added.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        lock(&self.execs).get(exec_id).cloned().ok_or_else(|| {
            let text = format!("container {} has no process {exec_id}", self.id);
            Error::new(ErrorKind::NoSuchProcess, text)
        })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The first process.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.init.pidfd()
    }

    /// Pid of the first process.
    pub fn pid(&self) -> Pid {
        self.init.pid()
    }

    /// Sends a signal to every process.
    pub async fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return self.cgroup.kill().await;
        }
        for pid in self.cgroup.processes()? {
            match sys::kill(pid, signal) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => {
                    let action = || format!("send a signal to process {}", pid.as_raw_nonzero());
                    return Err(error).or_cannot(action);
                }
            }
        }
        Ok(())
    }

    /// Stops (true) or continues all processes.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        if self.init.has_ended() {
            return Err(wrong_state(
                &self.id,
                "has stopped",
                "it cannot be paused or resumed",
            ));
        }
        self.cgroup.freeze(frozen).await
    }

    /// Changes the limits that the resources (JSON) name.
    pub fn update(&self, resources: &[u8]) -> Result<()> {
        if self.init.has_ended() {
            let rule = "its limits cannot be changed";
            return Err(wrong_state(&self.id, "has stopped", rule));
        }
        let resources = plan::read("linux.resources", oci::resources(resources))?;
        let settings = resources::settings(&resources, &self.cgroup.present())?;
        let rules = resources.devices().as_deref().filter(|r| !r.is_empty());
        let rules = rules.map(device_filter::rules).transpose()?;
        self.cgroup.change(&settings)?;
        // Last, as it has no former state to be put back.
        rules.map_or(Ok(()), |rules| self.cgroup.filter_devices(&rules))
    }

    /// Waits until the kernel has ended more than `seen` of its processes for want of memory, or
    /// its first process has ended. Returns how many, and whether the container has ended.
    pub async fn wait_out_of_memory(&self, seen: u64) -> Result<(u64, bool)> {
        tokio::select! {
            biased;
            kills = self.cgroup.out_of_memory_above(seen) => Ok((kills?, self.init.has_ended())),
            kills = self.init.reaped() => Ok((kills, true)),
        }
    }

    /// Resource usage.
    pub fn stats(&self) -> Result<StatsResponse> {
        stats::read(&self.cgroup)
    }

    /// All processes.
    pub fn processes(&self, proc: BorrowedFd<'_>) -> Result<Vec<ProcessLine>> {
        process_list::read(proc, &self.cgroup.processes()?)
    }

    /// Ends what runs in it, if `force`, and removes what it has in the guest.
    pub async fn remove(&self, surroundings: &Surroundings, force: bool) -> Result<()> {
        if !self.init.has_ended() && !force {
            return Err(wrong_state(
                &self.id,
                "is not stopped",
                "stop it, or use force",
            ));
        }
        self.end().await?;
        if self.network_of.is_none() {
            self.network.clear(&surroundings.network)?;
        }
        Ok(())
    }

    /// Ends what runs in it. Its interfaces stay: for a guest that is about to end, too.
    pub async fn end(&self) -> Result<()> {
        self.cgroup.kill().await?;
        self.init.wait().await;
        lock(&self.disks).release()?;
        self.cgroup.remove()
    }
}

/// The process's user and group as the guest knows them.
fn outside(maps: Option<&IdMaps>, process: &identity::Plan) -> Result<(u32, u32)> {
    match maps {
        Some(maps) => maps.outside(process.uid, process.gid),
        None => Ok((process.uid, process.gid)),
    }
}

/// Becomes root of the user namespace that this process is in.
fn become_root() -> Result<()> {
    use rustix::{
        process::{Gid, Uid},
        thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
    };
    let action = || "become root of the user namespace";
    set_thread_groups(&[]).or_cannot(action)?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).or_cannot(action)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).or_cannot(action)
}

fn expect_ready(progress: Progress) -> Result<()> {
    match progress {
        Progress::Ready => Ok(()),
        Progress::Running => Err(Error::new(
            ErrorKind::Internal,
            "the container's set-up ended without a word: was it killed for want of memory?",
        )),
    }
}

/// The network namespace of a process.
fn network_namespace(proc: BorrowedFd<'_>, pid: Pid) -> Result<OwnedFd> {
    let path = format!("{}/ns/net", pid.as_raw_nonzero());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::openat(proc, path, flags, Mode::empty())
        .or_cannot(|| "open the container's network namespace: its set-up may have been killed")
}

fn keyring_name(plan: &Plan) -> Option<CString> {
    plan.new_keyring
        .then(|| CString::new(format!("_ses.{}", plan.id)).ok())
        .flatten()
}

fn wrong_state(id: &str, state: &str, rule: &str) -> Error {
    Error::new(
        ErrorKind::WrongState,
        format!("container {id} {state}: {rule}"),
    )
}

/// Changes to the working directory of a process. Going there as its user keeps the agent's
/// privileges out of it; being inside of the root is what getcwd(2) confirms.
fn enter_directory(directory: &Path) -> Result<()> {
    let action = || {
        format!(
            "change to the working directory {} (process.cwd)",
            directory.display()
        )
    };
    rustix::process::chdir(directory).or_cannot(action)?;
    let reached = match rustix::process::getcwd(Vec::new()) {
        // The container's filter forbids the call: whoever wrote that also chose the directory.
        Err(Errno::PERM | Errno::ACCESS | Errno::NOSYS) => return Ok(()),
        reached => reached.or_cannot(action)?,
    };
    if !reached.to_bytes().starts_with(b"/") {
        let text = format!("cannot {}: it lies outside of the container", action());
        return Err(Error::new(ErrorKind::Internal, text));
    }
    Ok(())
}

/// Locks; what a panicking holder may have left is as good as ever, since every use is one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
