//! `kill`: sends a signal to the container's process, or to all.

use bulkhead_agent_protocol::messages::{Empty, SignalProcessRequest};

use super::{CALL_LIMIT, Context, Error, require};
use crate::{
    agent,
    cli::Kill,
    signal,
    state::ContainerStatus::{Created, Paused, Running},
    wait::Deadline,
};

pub(super) fn kill(context: &Context, options: &Kill) -> Result<u8, Error> {
    let signal = signal::parse(&options.signal)?;
    let container = context.root.open(&options.id)?;
    let status = container.record()?.current_status();
    // runc: all processes of a container that has stopped are none, and that is no error.
    if options.all && status == crate::state::ContainerStatus::Stopped {
        return Ok(0);
    }
    require(
        &container,
        status,
        &[Created, Running, Paused],
        "container not running",
    )?;
    let deadline = Deadline::after(CALL_LIMIT);
    let mut rpc = agent::connect(&container, deadline)?;
    let request = SignalProcessRequest {
        container_id: container.id().to_owned(),
        signal,
        all: options.all,
        ..Default::default()
    };
    let _: Empty = agent::call(&mut rpc, "SignalProcess", &request, deadline)?;
    Ok(0)
}
