//! Runs `startContainer` hooks (runtime-spec config.md "POSIX-platform Hooks"): in the container,
//! as its process, with the container's state on standard input.

use std::{
    io::Write,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bulkhead_agent_protocol::ErrorKind;
use oci_spec::runtime::Hook;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::plan::Plan;
use crate::error::{Attempt, Error, Result};

/// Runs the hooks in order; the first that fails ends it.
pub(super) fn run_all(hooks: &[Hook], plan: &Plan) -> Result<()> {
    if hooks.is_empty() {
        return Ok(());
    }
    let state = serde_json::json!({
        "ociVersion": plan.oci_version,
        "id": plan.id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": plan.annotations,
    })
    .to_string();
    for (index, hook) in hooks.iter().enumerate() {
        run(&format!("hooks.startContainer[{index}]"), hook, &state)?;
    }
    Ok(())
}

fn run(field: &str, hook: &Hook, state: &str) -> Result<()> {
    let action = || format!("run {} ({field})", hook.path().display());
    let mut command = Command::new(hook.path());
    command
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[_]>::split_first) {
        command.arg0(name).args(arguments);
    }
    for entry in hook.env().iter().flatten() {
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        command.env(name, value);
    }
    let mut child = command.spawn().or_cannot(action)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its state.
        let _ = stdin.write_all(state.as_bytes());
    }
    if !ends_in_time(&child, hook.timeout()).or_cannot(action)? {
        let _ = child.kill();
        let _ = child.wait();
        let text = format!("cannot {}: it took longer than its timeout", action());
        return Err(Error::new(ErrorKind::Internal, text));
    }
    let status = child.wait().or_cannot(action)?;
    if status.success() {
        return Ok(());
    }
    let text = format!("{} ({field}) failed: {status}", hook.path().display());
    Err(Error::new(ErrorKind::Internal, text))
}

fn ends_in_time(child: &Child, timeout: Option<i64>) -> std::io::Result<bool> {
    let Some(seconds) = timeout.and_then(|t| u64::try_from(t).ok()) else {
        return Ok(true);
    };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(std::io::ErrorKind::InvalidData)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(Duration::from_secs(seconds))
        .map_err(|_| std::io::ErrorKind::InvalidInput)?;
    Ok(poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&timeout))? > 0)
}
