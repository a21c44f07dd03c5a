//! The hooks that run on the host (runtime-spec, config "POSIX-platform Hooks"): prestart,
//! createRuntime, createContainer, poststart and poststop. Each gets the container's state on its
//! standard input. startContainer hooks are programs of the container's file system and run in the
//! guest.
//!
//! createContainer hooks are programs of the host that run in the container's namespaces. Those
//! exist in the guest; what stands for them on the host are the network namespace whose interfaces
//! the guest has, and the stand-in, so the hooks run in that network namespace and in the
//! process's IPC and UTS namespaces. Its mounts are out of a hook's reach (the container's mounts
//! exist in the guest only), so the mount namespace stays the runtime's.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use oci_spec::runtime::{Hook, Hooks};
use rustix::{
    fs::MemfdFlags,
    thread::{
        LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space,
        move_into_thread_name_spaces,
    },
};
use thiserror::Error;

use crate::{
    spec::SpecError,
    state::{ProcessIdentity, View},
    wait::{Deadline, poll},
};

/// How much of what a hook prints is shown when it fails.
const SHOWN: u64 = 2048;

/// A hook failed.
#[derive(Debug, Error)]
pub enum HookError {
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

/// The lists of hooks, in the order in which they run.
pub const KINDS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// The hooks to run before `createRuntime`: deprecated and still used.
#[allow(deprecated)]
pub fn prestart(hooks: &Hooks) -> Option<&[Hook]> {
    hooks.prestart().as_deref()
}

/// Judges all hooks, before anything is made that they could fail.
pub fn check(hooks: &Hooks) -> Result<(), SpecError> {
    let lists = [
        ("prestart", prestart(hooks)),
        ("createRuntime", hooks.create_runtime().as_deref()),
        ("createContainer", hooks.create_container().as_deref()),
        ("startContainer", hooks.start_container().as_deref()),
        ("poststart", hooks.poststart().as_deref()),
        ("poststop", hooks.poststop().as_deref()),
    ];
    for (kind, list) in lists {
        for (index, hook) in list.unwrap_or_default().iter().enumerate() {
            let invalid = |field: &str, reason: String| SpecError::Invalid {
                field: format!("hooks.{kind}[{index}].{field}"),
                reason,
            };
            if !hook.path().is_absolute() {
                let reason = format!("{:?} must be an absolute path", hook.path());
                return Err(invalid("path", reason));
            }
            if let Some(seconds) = hook.timeout().filter(|seconds| *seconds <= 0) {
                return Err(invalid("timeout", format!("{seconds} must be above zero")));
            }
            let mut variables = hook.env().iter().flatten();
            if let Some(variable) = variables.find(|variable| !variable.contains('=')) {
                let reason = format!("{variable:?} must have the form NAME=VALUE");
                return Err(invalid("env", reason));
            }
        }
    }
    Ok(())
}

/// The namespaces that hooks run in, where they are not those of the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Namespaces<'n> {
    /// A network namespace.
    pub network: Option<BorrowedFd<'n>>,
    /// A process (pidfd) whose IPC and UTS namespaces they are.
    pub process: Option<BorrowedFd<'n>>,
}

/// Runs hooks in order, up to the first that fails.
pub fn run(
    kind: &'static str,
    hooks: Option<&[Hook]>,
    state: &View,
    namespaces: Namespaces<'_>,
) -> Result<(), HookError> {
    for (index, hook) in hooks.unwrap_or_default().iter().enumerate() {
        run_one(kind, index, hook, state, namespaces)?;
    }
    Ok(())
}

/// Runs every hook; those that fail are only logged.
pub fn run_all(
    kind: &'static str,
    hooks: Option<&[Hook]>,
    state: &View,
    namespaces: Namespaces<'_>,
) {
    for (index, hook) in hooks.unwrap_or_default().iter().enumerate() {
        if let Err(error) = run_one(kind, index, hook, state, namespaces) {
            tracing::warn!("{}", crate::error::chain(&error));
        }
    }
}

fn run_one(
    kind: &'static str,
    index: usize,
    hook: &Hook,
    state: &View,
    namespaces: Namespaces<'_>,
) -> Result<(), HookError> {
    let failed = |source| HookError::Run {
        kind,
        index,
        path: hook.path().clone(),
        source,
    };
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map(Duration::from_secs);
    // Files, not pipes: a hook need not read, and what it leaves running may keep its output open
    // without being waited for.
    let printed = memory_file().map_err(failed)?;
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
        .stdin(input(state).map_err(failed)?)
        .stdout(duplicate()?)
        .stderr(duplicate()?);
    let mut child = spawn(&mut command, namespaces).map_err(failed)?;
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

fn memory_file() -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC)?)
}

/// The state, from its beginning.
fn input(state: &View) -> std::io::Result<Stdio> {
    let mut file = File::from(memory_file()?);
    file.write_all(&serde_json::to_vec(state)?)?;
    file.rewind()?;
    Ok(Stdio::from(file))
}

/// Starts a program; in other namespaces by way of a thread, whose namespaces a child inherits: a
/// process of many threads may not change its own at once.
fn spawn(command: &mut Command, namespaces: Namespaces<'_>) -> std::io::Result<Child> {
    if namespaces.network.is_none() && namespaces.process.is_none() {
        return command.spawn();
    }
    let kinds = ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    thread::scope(|scope| {
        let spawned = scope.spawn(|| {
            if let Some(process) = namespaces.process {
                move_into_thread_name_spaces(process, kinds)?;
            }
            if let Some(network) = namespaces.network {
                move_into_link_name_space(network, Some(LinkNameSpaceType::Network))?;
            }
            command.spawn()
        });
        spawned
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread ended unexpectedly")))
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
        run(
            "poststart",
            Some(&shell(&script, None)),
            &view(),
            Namespaces::default(),
        )
        .unwrap();
        let seen = std::fs::read_to_string(file).unwrap();
        assert!(
            seen.contains("\"id\":\"one\"") && seen.ends_with("b\n"),
            "{seen}"
        );
    }

    #[test]
    fn a_hook_need_not_read_its_state() {
        let mut view = view();
        let long = "x".repeat(1 << 20);
        view.annotations.insert("long".to_owned(), long);
        let hooks = shell("exec <&-; echo to nobody >&2; exit 0", Some(10));
        run("prestart", Some(&hooks), &view, Namespaces::default()).unwrap();
        let hooks = shell("read line; test ${#line} -gt 1048576", Some(10));
        run("prestart", Some(&hooks), &view, Namespaces::default()).unwrap();
    }

    #[test]
    fn failures_say_what_and_why() {
        let hooks = shell("echo no luck >&2; exit 3", None);
        let text = run("prestart", Some(&hooks), &view(), Namespaces::default())
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("hooks.prestart[0]") && text.contains("no luck"),
            "{text}"
        );
        let hooks = shell("exec sleep 100", Some(1));
        let error = run("prestart", Some(&hooks), &view(), Namespaces::default()).unwrap_err();
        assert!(error.to_string().contains("no end after 1 s"), "{error}");
        let hooks = hook(serde_json::json!({"path": "/does/not/exist"}));
        assert!(run("prestart", Some(&hooks), &view(), Namespaces::default()).is_err());
    }

    #[test]
    fn hooks_of_every_kind_are_judged() {
        for kind in KINDS {
            for (bad, field) in [
                (serde_json::json!({"path": "bin/sh"}), "path"),
                (serde_json::json!({"path": "/a", "timeout": 0}), "timeout"),
                (serde_json::json!({"path": "/a", "timeout": -1}), "timeout"),
                (serde_json::json!({"path": "/a", "env": ["A"]}), "env"),
            ] {
                let hooks = serde_json::from_value(serde_json::json!({kind: [bad]})).unwrap();
                let error = check(&hooks).unwrap_err().to_string();
                let named = format!("hooks.{kind}[0].{field}: ");
                assert!(error.contains(&named), "{error}");
            }
        }
    }
}
