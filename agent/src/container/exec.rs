//! Starts processes besides a container's first one, and processes of the guest itself.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use bulkhead_agent_protocol::{messages::Stdio, oci};

use super::{
    Surroundings, channel, identity,
    join::{Join, Target},
    outside, plan,
    spawn::spawn_in,
};
use crate::{
    error::Result,
    process::{Process, Started},
    stdio,
};

/// Runs a process in the guest itself.
pub async fn exec_in_guest(
    surroundings: &Surroundings,
    process: &[u8],
    stdio: &Stdio,
) -> Result<Arc<Process>> {
    exec(surroundings, process, stdio, None, None).await
}

pub(super) async fn exec(
    surroundings: &Surroundings,
    process: &[u8],
    stdio: &Stdio,
    target: Option<Target<'_>>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Arc<Process>> {
    let spec = plan::read("process", oci::process(process))?;
    let plan = identity::plan(&spec)?;
    let terminal = plan::terminal(&spec, stdio)?;
    let (child_io, agent_io) =
        stdio::connect(&surroundings.streams, stdio, terminal.is_some()).await?;
    let maps = target.as_ref().and_then(|target| target.id_maps);
    child_io.give_to(outside(maps, &plan)?)?;
    let (parent, child) = channel::pair()?;
    let born_in = target
        .as_ref()
        .filter(|t| t.namespaces.has(libc::CLONE_NEWPID));
    let pidfd = born_in.map(|target| target.pidfd);
    let first = target.as_ref().map(|target| target.pid);
    let spawned = spawn_in(surroundings, pidfd, first, cgroup, &child, |channel| {
        Join {
            process: &plan,
            terminal,
            container: target,
            proc: surroundings.proc.as_fd(),
            io: child_io,
            channel,
        }
        .run()
    });
    let (pid, pidfd) = spawned?;
    let ended = surroundings.reaper.expect(pid);
    drop(child);
    let mut master = None;
    parent.progress(|terminal| master = Some(terminal)).await?;
    let started = Started { pid, pidfd, ended };
    Ok(Process::new(started, agent_io.with_terminal(master)?, None))
}
