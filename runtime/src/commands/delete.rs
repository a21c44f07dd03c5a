//! `delete`: removes what a container holds.

use super::{Context, Error};
use crate::{
    cli::Delete,
    lifecycle,
    state::{ContainerStatus, StateError},
};

pub(super) fn delete(context: &Context, options: &Delete) -> Result<u8, Error> {
    let container = match context.root.open(&options.id) {
        // runc: it is gone, which is what was wanted.
        Err(StateError::Missing(_)) if options.force => return Ok(0),
        container => container?,
    };
    if !options.force {
        let status = container.record()?.current_status();
        // The runtime-spec (lifecycle, delete): anything else has no effect and is an error. runc and crun
        // remove a container that was created, too.
        if status != ContainerStatus::Stopped {
            return Err(Error::NotStopped {
                id: options.id.clone(),
                status,
            });
        }
    }
    lifecycle::destroy(&container)?;
    Ok(0)
}
