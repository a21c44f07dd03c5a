//! `start`: lets the process of a created container run.

use bulkhead_agent_protocol::messages::{Empty, StartContainerRequest};

use super::{CALL_LIMIT, Context, Error};
use crate::{
    agent::{self, AgentError},
    cli::Id,
    hooks, lifecycle,
    monitor::LaunchError,
    spec::Loaded,
    state::{Container, ContainerStatus, Event},
    wait::Deadline,
};

pub(super) fn start(context: &Context, options: &Id) -> Result<u8, Error> {
    start_container(&context.root.open(&options.id)?)?;
    Ok(0)
}

/// Starts a container that another process stands for.
pub(super) fn start_container(container: &Container) -> Result<(), Error> {
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
    poststart(container)
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

/// runtime-spec, "Lifecycle" 9; a container whose hook fails is ended.
pub(super) fn poststart(container: &Container) -> Result<(), Error> {
    let loaded = match container.config() {
        Ok(bytes) => Loaded::parse(container.path().to_owned(), bytes)?,
        // A short-lived container may have been deleted by now.
        Err(_) => return Ok(()),
    };
    let Some(list) = loaded
        .spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().as_deref())
    else {
        return Ok(());
    };
    let view = container.record()?.view();
    hooks::run("poststart", Some(list), &view).inspect_err(|_| {
        if let Err(error) = lifecycle::destroy(container) {
            tracing::error!("cannot clean up: {}", crate::error::chain(&error));
        }
    })?;
    Ok(())
}

impl From<crate::agent::connect::ConnectError> for Error {
    fn from(error: crate::agent::connect::ConnectError) -> Self {
        Self::Agent(AgentError::Connect(error))
    }
}
