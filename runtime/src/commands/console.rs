//! `console`: a shell in the guest itself, beside the container, for finding out what is wrong
//! there. Needs the debug root image; the ordinary one has no shell.

use serde_json::json;

use super::{
    Context, Error,
    exec::{attached, exec_id},
    monitor::at_terminal,
    require,
};
use crate::{
    cli::Id,
    monitor::ExecOrder,
    state::ContainerStatus::{Created, Paused, Running},
};

pub(super) fn console(context: &Context, options: &Id) -> Result<u8, Error> {
    let container = context.root.open(&options.id)?;
    let status = container.record()?.current_status();
    require(
        &container,
        status,
        &[Created, Running, Paused],
        "its guest does not run",
    )?;
    let terminal = at_terminal();
    let process = json!({
        "terminal": terminal,
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sh"],
        "env": ["PATH=/bin:/sbin:/usr/bin:/usr/sbin", "TERM=xterm", "HOME=/"],
        "cwd": "/",
    });
    let order = ExecOrder {
        id: options.id.clone(),
        container_id: String::new(),
        exec_id: exec_id()?,
        process: process.to_string(),
    };
    attached(&container, &order, terminal).inspect_err(|_| {
        tracing::warn!("a console needs a container that was made with --guest-debug");
    })
}
