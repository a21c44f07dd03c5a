//! `start`: lets the process of a created container run.

use std::os::fd::BorrowedFd;

use bulkhead_agent_protocol::messages::{Empty, StartContainerRequest};
use oci_spec::runtime::Spec;

use super::{CALL_LIMIT, Context, Error};
use crate::{
    agent::{self, AgentError},
    cli::Id,
    hooks::{self, Namespaces},
    monitor::LaunchError,
    spec::Loaded,
    state::{Container, ContainerStatus, Event, StateError},
    wait::Deadline,
};

pub(super) fn start(context: &Context, options: &Id) -> Result<u8, Error> {
    let container = context.root.open(&options.id)?;
    let bundle = container.record()?.bundle;
    let loaded = Loaded::parse(bundle, container.config()?)?;
    start_container(&container, &loaded.spec)?;
    Ok(0)
}

/// Starts a container that another process stands for.
pub(super) fn start_container(container: &Container, spec: &Spec) -> Result<(), Error> {
    record_started(container, || {
        let deadline = Deadline::after(CALL_LIMIT);
        let mut rpc = agent::connect(container, deadline)?;
        let request = StartContainerRequest {
            container_id: container.id().to_owned(),
            ..Default::default()
        };
        let _: Empty = agent::call(&mut rpc, "StartContainer", &request, deadline)
            .map_err(LaunchError::Agent)?;
        Ok(())
    })?;
    poststart(container, spec, None)
}

/// Starts, and writes down that it did; a process that ends at once is written down after this.
pub(super) fn record_started(
    container: &Container,
    start: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    let locked = container.lock()?;
    let mut record = container.record()?;
    let status = record.current_status();
    let next = status.next(Event::Started).ok_or_else(|| Error::Status {
        id: container.id().to_owned(),
        status,
        wrong: match status {
            ContainerStatus::Running => "cannot start an already running container",
            ContainerStatus::Stopped => "cannot start a container that has stopped",
            ContainerStatus::Paused => "cannot start a paused container",
            _ => "cannot start a container that is not created",
        },
    })?;
    start()?;
    record.status = next;
    locked.write(&record)?;
    Ok(())
}

/// runtime-spec 1.2, "Lifecycle" 9: a hook that fails is a warning, and everything goes on. `network`
/// is the host's network namespace, if the caller is in another.
pub(super) fn poststart(
    container: &Container,
    spec: &Spec,
    network: Option<BorrowedFd<'_>>,
) -> Result<(), Error> {
    let Some(list) = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().as_deref())
    else {
        return Ok(());
    };
    let view = match container.record() {
        Ok(record) => record.view(),
        // It was short-lived, and has been deleted by now.
        Err(StateError::Incomplete(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let namespaces = Namespaces {
        network,
        ..Namespaces::default()
    };
    hooks::run_all("poststart", Some(list), &view, namespaces);
    Ok(())
}

impl From<crate::agent::connect::ConnectError> for Error {
    fn from(error: crate::agent::connect::ConnectError) -> Self {
        Self::Agent(AgentError::Connect(error))
    }
}
