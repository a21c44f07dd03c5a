//! Runs `startContainer` hooks (runtime-spec config.md "POSIX-platform Hooks"): in the container,
//! as its process, with the container's state on standard input.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bulkhead_agent_protocol::ErrorKind;
use oci_spec::runtime::Hook;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::plan::Plan;
use crate::error::{Attempt, Error, Result};

/// Most of a failed hook's words that an error repeats.
const WORDS: u64 = 300;

/// Hooks that are ready to run: made before the container's system call filter is, which may not
/// allow to make the files.
pub(super) struct Hooks<'a> {
    hooks: &'a [Hook],
    /// Files rather than pipes: a hook may leave its state unread and print what it likes, and
    /// nobody waits for the other.
    state: File,
    errors: File,
}

impl<'a> Hooks<'a> {
    /// The container's hooks, if it has any.
    pub(super) fn of(plan: &'a Plan) -> Result<Option<Self>> {
        if plan.start_hooks.is_empty() {
            return Ok(None);
        }
        let action = || "write the state for hooks.startContainer";
        let file = || memfd_create("hook", MemfdFlags::CLOEXEC).map(File::from);
        let mut state = file().or_cannot(action)?;
        state
            .write_all(state_of(plan).as_bytes())
            .or_cannot(action)?;
        Ok(Some(Self {
            hooks: &plan.start_hooks,
            state,
            errors: file().or_cannot(action)?,
        }))
    }

    /// Runs them in order; the first that fails ends it.
    pub(super) fn run(&mut self) -> Result<()> {
        for (index, hook) in self.hooks.iter().enumerate() {
            self.run_one(&format!("hooks.startContainer[{index}]"), hook)?;
        }
        Ok(())
    }

    fn run_one(&mut self, field: &str, hook: &Hook) -> Result<()> {
        let action = || format!("run {} ({field})", hook.path().display());
        self.state.rewind().or_cannot(action)?;
        let state = self.state.try_clone().or_cannot(action)?;
        let errors = self.errors.try_clone().or_cannot(action)?;
        let mut command = Command::new(hook.path());
        command
            .env_clear()
            .stdin(state)
            .stdout(Stdio::null())
            .stderr(errors);
        if let Some((name, arguments)) = hook.args().as_deref().and_then(<[_]>::split_first) {
            command.arg0(name).args(arguments);
        }
        for entry in hook.env().iter().flatten() {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            command.env(name, value);
        }
        let mut child = command.spawn().or_cannot(action)?;
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
        let said = self.said().unwrap_or_default();
        let text = format!("{} ({field}) failed: {status}{said}", hook.path().display());
        Err(Error::new(ErrorKind::Internal, text))
    }

    /// The beginning of what the hook has printed, on one line.
    fn said(&mut self) -> io::Result<String> {
        let mut said = Vec::new();
        self.errors.rewind()?;
        (&self.errors).take(WORDS).read_to_end(&mut said)?;
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<_> = said.lines().map(str::trim).collect();
        let line = lines.join("; ");
        Ok(if line.is_empty() {
            line
        } else {
            format!(": {line}")
        })
    }
}

/// runtime-spec runtime.md "State". To whom is in the container, the container's own ids count.
fn state_of(plan: &Plan) -> String {
    let bundle = Some(plan.bundle.as_str()).filter(|bundle| !bundle.is_empty());
    serde_json::json!({
        "ociVersion": plan.oci_version,
        "id": plan.id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": bundle.unwrap_or("/"),
        "annotations": plan.annotations,
    })
    .to_string()
}

fn ends_in_time(child: &Child, timeout: Option<i64>) -> io::Result<bool> {
    let Some(seconds) = timeout.and_then(|t| u64::try_from(t).ok()) else {
        return Ok(true);
    };
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidData)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(Duration::from_secs(seconds))
        .map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&timeout))? > 0)
}
