//! A container's sandbox from the monitor's side once it is there: letting the process run,
//! standing for it, and taking everything down.

use std::{os::fd::BorrowedFd, path::PathBuf, time::Duration};

use bulkhead_agent_protocol::messages::{Empty, RemoveContainerRequest, StartContainerRequest};

use thiserror::Error;

use super::{
    StandIn,
    attach::{Attached, Owned},
    launch::Wiring,
};
use crate::{
    agent::{self, AgentError, rpc::RpcError},
    cgroup::{Cgroup, CgroupError},
    network::NetworkError,
    pod::{self, LeaveError, PodError},
    state::{Container, Event, StateError},
    stdio::Signals,
    timeline::{Moment, Timeline},
    vm::{Stop, Vm},
    wait::Deadline,
};

/// For writing out what a container has on disks: as long as a slow disk may need.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);

/// What is to be done when a container has ended could not be.
#[derive(Debug, Error)]
#[error(transparent)]
enum EndFailure {
    State(StateError),
    Leave(LeaveError),
    Network(NetworkError),
    Pod(PodError),
    Cgroup(CgroupError),
}

fn complain(done: Result<(), EndFailure>) {
    match done {
        // `delete --force` was quicker.
        Ok(()) | Err(EndFailure::State(StateError::Missing(_) | StateError::Incomplete(_))) => {}
        Err(error) => tracing::error!("{}", crate::error::chain(&error)),
    }
}

/// A container whose process waits to be let run, or runs.
pub struct Sandbox<'a> {
    pub(super) container: &'a Container,
    pub(super) vm: Box<dyn Vm>,
    pub(super) process: Attached,
    pub(super) timeline: Timeline,
    pub(super) timeline_file: Option<PathBuf>,
    pub(super) has_disks: bool,
    pub(super) network: Wiring<'a>,
    pub(super) stand_in: Option<StandIn>,
}

impl Sandbox<'_> {
    /// Lets the container's process run; the caller writes down that it does.
    pub fn start(&mut self, deadline: Deadline) -> Result<(), RpcError> {
        let id = self.container.id().to_owned();
        let request = StartContainerRequest {
            container_id: id,
            ..Default::default()
        };
        self.timeline.process_started = Some(Moment::now());
        let rpc = self.process.rpc().ok_or(RpcError::Closed)?;
        let _: Empty = agent::call(rpc, "StartContainer", &request, deadline)?;
        Ok(())
    }

    /// The host's network namespace, if this process has left it.
    pub fn home(&self) -> Option<BorrowedFd<'_>> {
        self.network.home()
    }

    /// Has the guest write out and unmount what the container has on disks.
    fn unmount(&self) -> Result<(), AgentError> {
        let deadline = Deadline::after(UNMOUNT_LIMIT);
        let mut rpc = agent::connect(self.container, deadline)?;
        let request = RemoveContainerRequest {
            container_id: self.container.id().to_owned(),
            force: true,
            ..Default::default()
        };
        let _: Empty = agent::call(&mut rpc, "RemoveContainer", &request, deadline)?;
        Ok(())
    }

    /// The VM goes on for others: nothing of this container is to be left in it.
    fn leave(&mut self) -> Result<(), EndFailure> {
        let record = self.container.record().map_err(EndFailure::State)?;
        pod::leave(self.container, &record).map_err(EndFailure::Leave)?;
        if let Some(network) = self.network.own() {
            network.detach(&mut *self.vm).map_err(EndFailure::Network)?;
        }
        Ok(())
    }

    /// Engines are to find in the host's cgroup what the guest's kernel has done.
    fn report_out_of_memory(&self, stand_in: &StandIn) -> Result<(), EndFailure> {
        let record = self.container.record().map_err(EndFailure::State)?;
        // A machine that goes on does so in another's cgroup.
        let others = pod::others(self.container, &record).map_err(EndFailure::Pod)?;
        pod::move_machine(&record, &others)
            .and_then(|()| Cgroup::at(&record.cgroup)?.report_out_of_memory(stand_in.pid()))
            .map_err(EndFailure::Cgroup)
    }

    /// Stands for the container's process until it has ended, then takes the VM down.
    pub fn supervise(mut self, signals: &mut Signals) -> Ended {
        let owned = Owned {
            vm: &mut *self.vm,
            network: self.network.own(),
            stand_in: self.stand_in.as_mut(),
        };
        let status = self
            .process
            .run(signals, Some(owned))
            .inspect_err(|error| tracing::error!("cannot wait for the container: {error}"))
            .unwrap_or(255);
        self.timeline.process_ended = Some(Moment::now());
        if let Some(stand_in) = &self.stand_in {
            stand_in.leave();
        }
        // Files of the share lie on the host, written through; those on disks are the guest's to
        // save. After that the machine can be switched off.
        if self.has_disks
            && let Err(error) = self.unmount()
        {
            let error = crate::error::chain(&error);
            tracing::warn!("the container's disks are left as by a power failure: {error}");
        }
        match self.vm.stop() {
            Ok(Stop::Ended) => {}
            Ok(Stop::Shared) => complain(self.leave()),
            Err(error) => tracing::error!("{}", crate::error::chain(&error)),
        }
        if let Some(stand_in) = self
            .stand_in
            .as_ref()
            .filter(|_| self.process.out_of_memory())
        {
            complain(self.report_out_of_memory(stand_in));
        }
        Ended {
            status,
            timeline: self.timeline,
            timeline_file: self.timeline_file,
            stand_in: self.stand_in,
        }
    }
}

/// A container whose process and VM are gone.
#[derive(Debug)]
pub struct Ended {
    status: i32,
    timeline: Timeline,
    timeline_file: Option<PathBuf>,
    stand_in: Option<StandIn>,
}

impl Ended {
    /// Writes down how the container ended, for those who ask for it later.
    pub fn record(&self, container: &Container) {
        complain(record_end(container, self.status).map_err(EndFailure::State));
    }

    /// All is done: writes the timeline if one is wanted, and lets the stand-in end. Returns the exit
    /// code.
    pub fn finish(mut self) -> i32 {
        self.timeline.torn_down = Some(Moment::now());
        if let Some(path) = &self.timeline_file
            && let Err(error) = self.timeline.write(path)
        {
            tracing::error!("cannot write the timeline {}: {error}", path.display());
        }
        if let Some(stand_in) = self.stand_in {
            stand_in.end(self.status);
        }
        self.status
    }
}

fn record_end(container: &Container, status: i32) -> Result<(), StateError> {
    let locked = container.lock()?;
    let mut record = container.record()?;
    if let Some(next) = record.status.next(Event::Ended) {
        record.status = next;
    }
    record.exit_status = Some(status);
    locked.write(&record)
}
