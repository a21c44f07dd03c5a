//! The hooks that run on the host (runtime-spec, config "POSIX-platform Hooks"): prestart,
//! createRuntime, poststart and poststop. Each gets the container's state on its standard input.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use oci_spec::runtime::{Hook, Hooks};
use thiserror::Error;

use crate::{
    state::{ProcessIdentity, View},
    wait::{Deadline, poll},
};

/// How much of what a hook prints is shown when it fails.
const SHOWN: u64 = 2048;

/// A hook failed.
#[derive(Debug, Error)]
pub enum HookError {
    /// It cannot be run as asked.
    #[error("config.json: hooks.{kind}[{index}].{field}: {reason}")]
    Invalid {
        /// Which list.
        kind: &'static str,
        /// Which of the list.
        index: usize,
        /// Which field.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// It could not be run.
    #[error("cannot run hooks.{kind}[{index}], {path}")]
    Run {
        /// Which list.
        kind: &'static str,
        /// Which of the list.
        index: usize,
        /// The program.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It did not succeed.
    #[error("hooks.{kind}[{index}], {path}, failed: {reason}")]
    Failed {
        /// Which list.
        kind: &'static str,
        /// Which of the list.
        index: usize,
        /// The program.
        path: PathBuf,
        /// How it ended, and what it printed.
        reason: String,
    },
}

/// The hooks to run before `createRuntime`: deprecated and still used.
#[allow(deprecated)]
pub fn prestart(hooks: &Hooks) -> Option<&[Hook]> {
    hooks.prestart().as_deref()
}

/// Runs hooks in order, up to the first that fails.
pub fn run(kind: &'static str, hooks: Option<&[Hook]>, state: &View) -> Result<(), HookError> {
    for (index, hook) in hooks.unwrap_or_default().iter().enumerate() {
        run_one(kind, index, hook, state)?;
    }
    Ok(())
}

/// Runs every hook; those that fail are only logged.
pub fn run_all(kind: &'static str, hooks: Option<&[Hook]>, state: &View) {
    for (index, hook) in hooks.unwrap_or_default().iter().enumerate() {
        if let Err(error) = run_one(kind, index, hook, state) {
            tracing::warn!("{}", crate::error::chain(&error));
        }
    }
}

fn run_one(kind: &'static str, index: usize, hook: &Hook, state: &View) -> Result<(), HookError> {
    let invalid = |field, reason: String| HookError::Invalid {
        kind,
        index,
        field,
        reason,
    };
    if !hook.path().is_absolute() {
        return Err(invalid(
            "path",
            format!("{:?} must be an absolute path", hook.path()),
        ));
    }
    let limit = match hook.timeout() {
        None => None,
        Some(seconds) => match u64::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
            _ => return Err(invalid("timeout", format!("{seconds} must be above zero"))),
        },
    };
    let failed = |source| HookError::Run {
        kind,
        index,
        path: hook.path().clone(),
        source,
    };
    // A file, not a pipe: what a hook leaves running may keep it open without being waited for.
    let printed = rustix::fs::memfd_create("hook", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|error| failed(error.into()))?;
    let duplicate = || printed.try_clone().map(Stdio::from).map_err(failed);
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = hook.args().as_deref().unwrap_or_default().split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    command
        .stdin(Stdio::piped())
        .stdout(duplicate()?)
        .stderr(duplicate()?);
    let mut child = command.spawn().map_err(failed)?;
    let state = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not care need not read it.
        let _ = stdin.write_all(&state);
    }
    let reason = match wait(&mut child, limit).map_err(failed)? {
        Some(status) if status.success() => return Ok(()),
        Some(status) => format!("{status}"),
        None => format!("no end after {} s", limit.unwrap_or_default().as_secs()),
    };
    let reason = format!("{reason}{}", tail(printed));
    Err(HookError::Failed {
        kind,
        index,
        path: hook.path().clone(),
        reason,
    })
}

/// How the child ended; `None` when it had to be killed at its time limit.
fn wait(
    child: &mut Child,
    limit: Option<Duration>,
) -> std::io::Result<Option<std::process::ExitStatus>> {
    let Some(limit) = limit else {
        return child.wait().map(Some);
    };
    let ended = match ProcessIdentity::of(child.id())?.open()? {
        None => true,
        Some(process) => {
            let mut descriptors = [rustix::event::PollFd::new(
                &process,
                rustix::event::PollFlags::IN,
            )];
            poll(&mut descriptors, Some(Deadline::after(limit)))? > 0
        }
    };
    if !ended {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(ended.then_some(status))
}

fn tail(printed: OwnedFd) -> String {
    let mut file = File::from(printed);
    let mut bytes = Vec::new();
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    let read = file
        .seek(std::io::SeekFrom::Start(length.saturating_sub(SHOWN)))
        .and_then(|_| file.take(SHOWN).read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes);
    if read.is_err() || text.trim().is_empty() {
        return String::new();
    }
    format!(": {}", text.trim().replace('\n', "; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Record;
    use std::path::Path;

    fn hook(value: serde_json::Value) -> Vec<Hook> {
        vec![serde_json::from_value(value).unwrap()]
    }

    fn view() -> View {
        Record::new(
            "one",
            Path::new("/b"),
            "1.0.0",
            ProcessIdentity::own().unwrap(),
        )
        .view()
    }

    fn shell(script: &str, timeout: Option<i64>) -> Vec<Hook> {
        hook(serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["A=b"], "timeout": timeout}))
    }

    #[test]
    fn state_and_environment_reach_a_hook() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("seen");
        let script = format!("cat > {0}; echo $A >> {0}", file.display());
        run("poststart", Some(&shell(&script, None)), &view()).unwrap();
        let seen = std::fs::read_to_string(file).unwrap();
        assert!(
            seen.contains("\"id\":\"one\"") && seen.ends_with("b\n"),
            "{seen}"
        );
    }

    #[test]
    fn failures_say_what_and_why() {
        let error = run(
            "prestart",
            Some(&shell("echo no luck >&2; exit 3", None)),
            &view(),
        );
        let text = error.unwrap_err().to_string();
        assert!(
            text.contains("hooks.prestart[0]") && text.contains("no luck"),
            "{text}"
        );
        let error = run("prestart", Some(&shell("sleep 100", Some(1))), &view());
        assert!(error.unwrap_err().to_string().contains("no end after 1 s"));
        for bad in [
            serde_json::json!({"path": "bin/sh"}),
            serde_json::json!({"path": "/bin/sh", "timeout": 0}),
            serde_json::json!({"path": "/does/not/exist"}),
        ] {
            assert!(run("prestart", Some(&hook(bad)), &view()).is_err());
        }
    }
}
