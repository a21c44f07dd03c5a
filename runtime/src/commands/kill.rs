//! `kill`: sends a signal to the container's process, or to all.

use bulkhead_agent_protocol::messages::{Empty, SignalProcessRequest};

use super::{Context, Error, ask, living};
use crate::{cli::Kill, signal, state::ContainerStatus};

pub(super) fn kill(context: &Context, options: &Kill) -> Result<u8, Error> {
    let signal = signal::parse(&options.signal)?;
    // runc: all processes of a container that has stopped are none, and that is no error.
    if options.all {
        let record = context.root.open(&options.id)?.record()?;
        if record.current_status() == ContainerStatus::Stopped {
            return Ok(0);
        }
    }
    let (container, _) = living(context, &options.id)?;
    let request = SignalProcessRequest {
        container_id: options.id.clone(),
        signal,
        all: options.all,
        ..Default::default()
    };
    let _: Empty = ask(&container, "SignalProcess", &request)?;
    Ok(0)
}
