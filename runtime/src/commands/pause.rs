//! `pause` and `resume`: freeze and thaw the processes of a container.

use bulkhead_agent_protocol::messages::{ContainerRequest, Empty};

use super::{Context, Error, ask};
use crate::{cli::Id, state::Event};

pub(super) fn pause(context: &Context, options: &Id) -> Result<u8, Error> {
    change(
        context,
        options,
        "PauseContainer",
        Event::Paused,
        "container not running",
    )
}

pub(super) fn resume(context: &Context, options: &Id) -> Result<u8, Error> {
    change(
        context,
        options,
        "ResumeContainer",
        Event::Resumed,
        "container not paused",
    )
}

fn change(
    context: &Context,
    options: &Id,
    method: &'static str,
    event: Event,
    wrong: &'static str,
) -> Result<u8, Error> {
    let container = context.root.open(&options.id)?;
    let locked = container.lock()?;
    let mut record = container.record()?;
    let status = record.current_status();
    let next = status.next(event).ok_or_else(|| Error::Status {
        id: options.id.clone(),
        status,
        wrong,
    })?;
    let request = ContainerRequest {
        container_id: options.id.clone(),
        ..Default::default()
    };
    let _: Empty = ask(&container, method, &request)?;
    record.status = next;
    locked.write(&record)?;
    Ok(0)
}
