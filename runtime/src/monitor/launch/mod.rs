//! Makes the sandbox of a container: from a configuration that was read to a process that waits
//! to be let run. The VM's program is started first and boots while the rest is prepared. If
//! anything fails the VM is ended; what is on disk is left to the caller to remove.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bulkhead_agent_protocol::{
    Greeting,
    messages::{
        CreateContainerRequest, CreateContainerResponse, SetUpSandboxRequest, SetUpSandboxResponse,
        Stdio,
    },
};
use bulkhead_vmm::config::{VmCommand, VmEvent};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags};
use thiserror::Error;

mod hooks;
mod member;
mod network;

use member::DisksOnTheWay;
pub(super) use network::Wiring;

use super::{
    Namespaces, StandIn, StandInError, View,
    attach::{Attached, HostStdio},
    membership::Membership,
    order::ContainerOrder,
    sandbox::Sandbox,
};
use crate::{
    agent::{
        self, ConnectingStreams,
        connect::{ConnectError, Connecting, ReadyListener},
        rpc::{RpcClient, RpcError},
    },
    cgroup::{Cgroup, CgroupError, Limits},
    disks::{self, Disks},
    hooks::HookError,
    network::{NamespaceError, NetworkError},
    pod::{self, PieceError, PodError},
    share::{self, Share},
    shm,
    spec::{Loaded, SpecError, check::Checked},
    state::{Container, Event, ProcessIdentity, StateError, VMM_LOG},
    stdio::{Relay, Signals},
    timeline::{Moment, Timeline},
    user_namespace,
    vm::{Vm, VmError},
    wait::{Deadline, poll},
};

/// From the start of the VMM until the agent's greeting. A guest is up in a fraction of a second;
/// this is for hosts that are emulated or badly overloaded.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// For one request to the agent.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// A sandbox could not be made.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// The VM failed.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The configuration asks for what cannot be.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The host's cgroup failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The guest could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The network failed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Nobody stands in for the container's process.
    #[error(transparent)]
    StandIn(#[from] StandInError),
    /// Another container cannot be joined.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// Another container's VM does not take this one's files.
    #[error(transparent)]
    Piece(#[from] PieceError),
    /// The VM of another container cannot be reached.
    #[error("cannot join the virtual machine of container {id:?}: it may have ended")]
    Join {
        /// The container.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM would not have a disk.
    #[error("cannot attach the disk {disk:?} to the virtual machine: {message}")]
    Disk {
        /// Its name in the guest.
        disk: String,
        /// In the VMM's words.
        message: String,
    },
    /// The agent refused; the beginning is runc's words, which its callers look for.
    #[error("unable to start container process")]
    Agent(#[source] RpcError),
    /// The VMM does not answer.
    #[error("the virtual machine does not say whether it has the interfaces and disks")]
    Attach,
    /// The agent refused; in its words.
    #[error("cannot set up the network in the guest: {0}")]
    SetNetwork(String),
    /// The guest did not come up.
    #[error(
        "the guest did not come up within {} s; `bulkhead check` tells whether this host can run \
         guests, --guest-log FILE shows what the guest's kernel says", BOOT_LIMIT.as_secs()
    )]
    Boot,
    /// A file of the installation is missing.
    #[error("cannot use the {what} {path}; give its path with {option}")]
    Installation {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: std::path::PathBuf,
        /// The option that names another.
        option: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The user wants to stop.
    #[error("interrupted while the container was being created")]
    Interrupted,
    /// The container was deleted meanwhile.
    #[error("container {0:?} was deleted while it was being created")]
    Deleted(String),
    /// The host's kernel refused something basic.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Starts a VM: given the program and where its log goes.
pub type VmStarter<'s> = &'s dyn Fn(&Path, File) -> Result<Box<dyn Vm>, VmError>;

/// Makes the sandbox, or joins that of another container. Without a stand-in, it has no network: in
/// unit tests, which need no privileges.
pub fn launch<'a>(
    order: &ContainerOrder,
    of: (&Loaded, &Checked),
    container: &'a Container,
    start_vm: VmStarter<'_>,
    signals: &mut Signals,
    host: HostStdio,
    stand_in: Option<StandIn>,
) -> Result<Sandbox<'a>, LaunchError> {
    let mut timeline = Timeline {
        runtime_started: Moment::at(order.began),
        ..Timeline::default()
    };
    if let Some(joined) = &order.joined {
        let places = (container, stand_in);
        return member::launch((order, joined), of, places, timeline, signals, host);
    }
    order.check_installation()?;
    // Every process of the VM holds this file open and by it the lock, recorded or not yet: so
    // that a removal can wait for all of them.
    let vm = start_vm(&order.vmm, container.open_held(VMM_LOG)?)?;
    timeline.vmm_started = Some(Moment::now());
    let sockets = agent::sockets(container)?;
    let (loaded, checked) = of;
    let mut launch = Launch {
        container,
        spec: &loaded.spec,
        vm,
        cgroup: locate_cgroup(order, checked)?,
        membership: Membership::default(),
        limits: Limits::of(&loaded.spec, order.guest),
        signals,
        timeline,
        network: Wiring::None,
        disks: DisksOnTheWay::default(),
        stand_in,
    };
    let mut ready = ReadyListener::bind(sockets.as_fd())?;
    let share = share::collect(&order.id, &loaded.bundle, &checked.rootfs, &loaded.spec)?;
    let disks = disks::collect(&loaded.bundle, &checked.rootfs, &loaded.spec)?;
    launch.make_cgroup(&share)?;
    let mut config = order.vm_config(container.path(), &share, &launch.cgroup);
    config.disks.extend(disks.configs.iter().cloned());
    launch.vm.configure(&config)?;
    match launch.enter_network(checked.network.as_deref()) {
        Ok(()) => {}
        // By a path that names no process.
        Err(LaunchError::Network(NetworkError::Namespace(NamespaceError::Taken(path)))) => {
            let timeline = launch.timeline.clone();
            let places = (container, launch.stand_in.take());
            drop((launch, ready));
            let Some((order, joined)) = order.joining(of, container)? else {
                return Err(NetworkError::from(NamespaceError::Taken(path)).into());
            };
            return member::launch((&order, &joined), of, places, timeline, signals, host);
        }
        Err(error) => return Err(error),
    }
    launch.boot(&mut ready)?;
    if !share.overlays.is_empty()
        && let Some(vmm) = container.record()?.vmm
    {
        pod::add(vmm, &[], &share.overlays)?;
    }
    launch.create_hooks()?;
    launch.attach_interfaces()?;
    let made = Made {
        order,
        loaded,
        checked,
        share,
        disks,
    };
    launch.finish(made, sockets.as_fd(), host)
}

/// What the container is made of.
struct Made<'l> {
    order: &'l ContainerOrder,
    loaded: &'l Loaded,
    checked: &'l Checked,
    share: Share,
    disks: Disks,
}

fn locate_cgroup(order: &ContainerOrder, checked: &Checked) -> Result<Cgroup, CgroupError> {
    // Unit tests need neither root nor a host whose cgroups may be changed.
    if cfg!(test) {
        return Ok(Cgroup::nowhere());
    }
    Cgroup::locate(
        checked.cgroups_path.as_deref(),
        &order.id,
        order.cgroup_driver,
    )
}

struct Launch<'l, 'a> {
    container: &'a Container,
    spec: &'l Spec,
    vm: Box<dyn Vm>,
    cgroup: Cgroup,
    membership: Membership,
    limits: Limits,
    signals: &'l mut Signals,
    timeline: Timeline,
    network: Wiring<'a>,
    disks: DisksOnTheWay,
    /// None in unit tests.
    stand_in: Option<StandIn>,
}

impl<'a> Launch<'_, 'a> {
    /// The guest is there, with all that is attached to it: makes the container.
    fn finish(
        mut self,
        made: Made<'_>,
        sockets: BorrowedFd<'_>,
        host: HostStdio,
    ) -> Result<Sandbox<'a>, LaunchError> {
        let (mut rpc, relay) = self.create_container(&made, sockets, &host)?;
        // The agent has made the places of mounts. Others are waited for meanwhile.
        if let Some(stand_in) = &mut self.stand_in {
            let spec = &made.loaded.spec;
            let view = View::of(spec, &made.share, &made.checked.rootfs);
            stand_in.show(view, Namespaces::of(spec))?;
        }
        self.set_network(&mut rpc)?;
        self.container_hooks()?;
        // What hooks have brought.
        self.attach_interfaces()?;
        self.set_network(&mut rpc)?;
        if made.order.joined.is_none() {
            self.vm.command(VmCommand::Booted)?;
        }
        self.cgroup.limit_cpu_time(&self.limits)?;
        self.membership.settle()?;
        self.stand_in_arrives()?;
        let Made { order, disks, .. } = made;
        self.record_created()?;
        self.timeline.container_created = Some(Moment::now());
        Ok(Sandbox {
            container: self.container,
            vm: self.vm,
            process: Attached::new(rpc, &order.id, "", relay, host).map_err(LaunchError::Agent)?,
            timeline: self.timeline,
            timeline_file: order.timeline.clone(),
            has_disks: !disks.configs.is_empty(),
            network: self.network,
            stand_in: self.stand_in,
        })
    }
}

impl Launch<'_, '_> {
    /// The stand-in is where the container's process would be after this.
    fn stand_in_arrives(&mut self) -> Result<(), LaunchError> {
        let stand_in = self.stand_in.as_mut();
        Ok(stand_in.map_or(Ok(()), StandIn::arrive)?)
    }

    /// Changes the record, unless the container has been deleted meanwhile.
    fn record(&self, change: impl FnOnce(&mut crate::state::Record)) -> Result<(), LaunchError> {
        let deleted = |error| match error {
            StateError::Missing(id) | StateError::Incomplete(id) => LaunchError::Deleted(id),
            error => LaunchError::State(error),
        };
        let locked = self.container.lock().map_err(deleted)?;
        let mut record = self.container.record().map_err(deleted)?;
        change(&mut record);
        locked.write(&record)?;
        Ok(())
    }

    /// Makes the cgroup. Users without a right to that do without: their limits hold in the guest.
    fn make_cgroup(&mut self, share: &Share) -> Result<(), LaunchError> {
        self.record_cgroup(share)?;
        match self.cgroup.make(&self.limits) {
            Err(error) if error.is_denied() && user_namespace::is_somebodys() => {
                tracing::debug!("no cgroup on the host: {}", crate::error::chain(&error));
                self.cgroup = Cgroup::nowhere();
                self.record_cgroup(share)
            }
            made => Ok(made?),
        }
    }

    /// Begins to move the stand-in into the cgroup. While this waits nobody forks or starts a thread, so
    /// what does is to have been done.
    fn enter_cgroup(&mut self) -> Result<(), LaunchError> {
        let Some(stand_in) = &self.stand_in else {
            return Ok(());
        };
        let begun = self.membership.begin(&self.cgroup, stand_in.pid());
        begun.map_err(|error| LaunchError::Io("start a thread", error))
    }

    fn record_cgroup(&self, share: &Share) -> Result<(), LaunchError> {
        let (directories, own) = (self.cgroup.directories(), self.cgroup.places());
        self.record(|record| {
            (record.cgroups, record.cgroup) = (directories, own);
            record.shared_memory.clone_from(&share.memory_source);
        })
    }

    fn record_created(&self) -> Result<(), LaunchError> {
        self.record(|record| {
            if let Some(next) = record.status.next(Event::Created) {
                record.status = next;
            }
        })
    }

    /// From the configured VM to the agent's greeting.
    fn boot(&mut self, ready: &mut ReadyListener) -> Result<(), LaunchError> {
        let deadline = Deadline::after(BOOT_LIMIT);
        let mut greeting: Option<Greeting> = None;
        let mut running = false;
        while !(running && greeting.is_some()) {
            let control = self.vm.control();
            let mut descriptors = [
                PollFd::new(&control, PollFlags::IN),
                self.signals.poll_fd(),
                ready.poll_fd(),
            ];
            let failed = |error| LaunchError::Io("wait for the guest", error);
            if poll(&mut descriptors, Some(deadline)).map_err(failed)? == 0 {
                return Err(LaunchError::Boot);
            }
            let [event, signal, greeted] = descriptors.map(|fd| !fd.revents().is_empty());
            if signal {
                self.judge_signals()?;
            }
            // Before the VM's events: its end must not hide that the guest was there.
            if greeted && greeting.is_none() {
                greeting = ready.progress()?;
                if greeting.is_some() {
                    self.timeline.greeted = Some(Moment::now());
                }
            }
            if event {
                while let Some(event) = self.vm.next_event()? {
                    running |= self.on_event(event)?;
                }
            }
        }
        self.timeline.greeting = greeting;
        Ok(())
    }

    /// True when the VM runs.
    fn on_event(&mut self, event: VmEvent) -> Result<bool, LaunchError> {
        match event {
            VmEvent::Forked { pid, in_cgroup } => {
                if !in_cgroup {
                    self.cgroup.place(pid)?;
                }
                let identity = ProcessIdentity::of(pid)
                    .map_err(|error| LaunchError::Io("identify the VM's process", error))?;
                self.record(|record| record.vmm = Some(identity))?;
                self.vm.command(VmCommand::Go)?;
                Ok(false)
            }
            VmEvent::Running { timeline } => {
                self.timeline.vm_running = Some(Moment::at(timeline.running_us));
                // While the guest boots.
                self.refresh_network()?;
                self.enter_cgroup()?;
                Ok(true)
            }
            event => self.on_device_event(&event).map(|()| false),
        }
    }

    /// Until there is a process, a signal that asks to end is meant for the creation.
    fn judge_signals(&mut self) -> Result<(), LaunchError> {
        if self
            .signals
            .caught()
            .into_iter()
            .any(crate::stdio::Caught::asks_to_end)
        {
            return Err(LaunchError::Interrupted);
        }
        Ok(())
    }

    fn create_container(
        &mut self,
        made: &Made<'_>,
        sockets: BorrowedFd<'_>,
        host: &HostStdio,
    ) -> Result<(RpcClient, Relay), LaunchError> {
        let deadline = Deadline::after(CALL_LIMIT);
        // All connections are asked for before the first is waited for.
        let rpc = Connecting::rpc(sockets)?;
        let streams = ConnectingStreams::begin(sockets, host.is_terminal())?;
        let mut rpc = RpcClient::new(rpc.finish(deadline)?)
            .map_err(|error| LaunchError::Io("use the connection to the agent", error))?;
        if made.order.joined.is_none() {
            let request = SetUpSandboxRequest {
                realtime_ns: realtime_ns(),
                hostname: "bulkhead".to_owned(),
                ..Default::default()
            };
            let _: SetUpSandboxResponse = self.call(&mut rpc, "SetUpSandbox", &request)?;
        }
        let (streams, stdio) = streams.finish(deadline)?;
        let (rows, columns) = host.size();
        let stdio = Stdio {
            rows,
            columns,
            ..stdio
        };
        let request = made.request(stdio)?;
        let _: CreateContainerResponse = self.call(&mut rpc, "CreateContainer", &request)?;
        let relay = host
            .relay(streams)
            .map_err(|error| LaunchError::Io("use the standard streams", error))?;
        Ok((rpc, relay))
    }

    /// Asks the agent, with an eye on the VM and on the user.
    fn call<R: protobuf::Message>(
        &mut self,
        rpc: &mut RpcClient,
        method: &'static str,
        request: &impl protobuf::Message,
    ) -> Result<R, LaunchError> {
        let deadline = Deadline::after(CALL_LIMIT);
        let call = match rpc.send(method, request) {
            Ok(call) => call,
            Err(error) => return Err(self.explain(error)),
        };
        loop {
            loop {
                match rpc.progress() {
                    Ok(Some((id, answer))) if id == call => {
                        let decoded = answer.and_then(|payload| agent::decode(method, &payload));
                        return decoded.map_err(LaunchError::Agent);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => return Err(self.explain(error)),
                }
            }
            let control = self.vm.control();
            let mut descriptors = [
                PollFd::new(&control, PollFlags::IN),
                self.signals.poll_fd(),
                agent::poll_fd(rpc),
            ];
            let failed = |error| LaunchError::Io("wait for the guest's agent", error);
            if poll(&mut descriptors, Some(deadline)).map_err(failed)? == 0 {
                return Err(LaunchError::Agent(RpcError::TimedOut(method)));
            }
            let [event, signal, _] = descriptors.map(|fd| !fd.revents().is_empty());
            if event {
                while let Some(event) = self.vm.next_event()? {
                    self.on_device_event(&event)?;
                }
            }
            if signal {
                self.judge_signals()?;
            }
        }
    }

    /// A connection ends because the VM does: then the VM's own word is the better one.
    fn explain(&mut self, error: RpcError) -> LaunchError {
        let control = self.vm.control();
        let mut descriptors = [PollFd::new(&control, PollFlags::IN)];
        let grace = Deadline::after(Duration::from_secs(1));
        if matches!(poll(&mut descriptors, Some(grace)), Ok(1..)) {
            loop {
                match self.vm.next_event() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(reason) => return reason.into(),
                }
            }
        }
        LaunchError::Agent(error)
    }
}

impl Made<'_> {
    /// What the agent is asked for.
    fn request(&self, stdio: Stdio) -> Result<CreateContainerRequest, LaunchError> {
        let joined = self.order.joined.as_ref();
        let namespaces = joined.map(|joined| joined.namespaces.clone());
        let of_ipc = joined.and_then(|joined| joined.namespaces.get("ipc"));
        let same = self.share.joined_memory.iter();
        Ok(CreateContainerRequest {
            container_id: self.order.id.clone(),
            spec: shm::rewrite(&self.loaded.bytes, &self.share.memory)
                .map_err(|error| LaunchError::Io("read the configuration again", error.into()))?,
            rootfs: self.share.rootfs.clone(),
            bind_sources: self.share.bind_sources.clone(),
            join_namespaces: namespaces.unwrap_or_default().into_iter().collect(),
            join_mounts: same
                .filter_map(|index| Some((*index, of_ipc?.clone())))
                .collect(),
            rootfs_device: self.disks.rootfs.clone().into(),
            block_mounts: self.disks.mounts.clone(),
            stdio: Some(stdio).into(),
            no_new_keyring: self.order.no_new_keyring,
            bundle: self.order.bundle.to_string_lossy().into_owned(),
            ..Default::default()
        })
    }
}

fn realtime_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|time| i64::try_from(time.as_nanos()).ok())
        .unwrap_or_default()
}
