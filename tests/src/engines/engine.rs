//! One engine with one runtime, as a case uses it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::host::Host;
use crate::process::{Output, Process};
use crate::terminal::Terminal;

/// The image that all cases use: busybox.
pub(crate) const IMAGE: &str = "localhost/busybox";

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Podman,
    Docker,
}

impl Kind {
    pub(crate) const ALL: [Self; 2] = [Self::Podman, Self::Docker];

    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Podman => "podman",
            Self::Docker => "docker",
        }
    }

    /// The runtime that it comes with.
    pub(crate) fn own_runtime(self) -> &'static str {
        match self {
            Self::Podman => "crun",
            Self::Docker => "runc",
        }
    }

    pub(crate) fn from_name(name: &str) -> Result<Self> {
        match Self::ALL.into_iter().find(|kind| kind.program() == name) {
            Some(kind) => Ok(kind),
            None => bail!("{name} is no engine that the tests know: use podman or docker"),
        }
    }
}

/// What a case works with.
pub(crate) struct Engine {
    pub(crate) kind: Kind,
    pub(crate) runtime: String,
    /// Of the case's own.
    pub(crate) directory: PathBuf,
    before: Host,
}

impl Engine {
    pub(crate) fn new(kind: Kind, runtime: &str, directory: &Path) -> Result<Self> {
        Ok(Self {
            kind,
            runtime: runtime.to_owned(),
            directory: directory.to_owned(),
            before: Host::look()?,
        })
    }

    pub(crate) fn podman(&self) -> bool {
        self.kind == Kind::Podman
    }

    pub(crate) fn bulkhead(&self) -> bool {
        self.runtime == super::BULKHEAD
    }

    /// A file of the case's own.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.directory.display())
    }

    /// The engine with these arguments; the first one is the engine's verb, which decides where the
    /// runtime is named.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(self.kind.program());
        let (verb, rest) = args
            .split_first()
            .map_or((OsStr::new(""), args), |(first, rest)| {
                (first.as_ref(), rest)
            });
        match self.kind {
            Kind::Podman => {
                command.arg("--runtime").arg(&self.runtime).arg(verb);
            }
            Kind::Docker => {
                command.arg(verb);
                if verb == "run" || verb == "create" {
                    command.arg("--runtime").arg(&self.runtime);
                }
            }
        }
        command.args(rest).current_dir(&self.directory);
        command
    }

    /// Runs the engine to its end; standard input is empty.
    pub(crate) fn call(&self, args: &[&str]) -> Result<Output> {
        self.begin(args)?.finish()
    }

    /// Starts the engine; the streams are the case's.
    pub(crate) fn begin(&self, args: &[&str]) -> Result<Process> {
        Process::spawn(self.command(args))
    }

    /// The same with a terminal.
    pub(crate) fn begin_in_terminal(&self, args: &[&str]) -> Result<(Terminal, Process)> {
        let (terminal, slave) = Terminal::open(33, 111)?;
        let mut command = self.command(args);
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave);
        crate::sys::own_terminal(&mut command);
        Ok((terminal, Process::spawn_as_is(command)?))
    }

    /// `run --rm` without a network, which saves its time where it is not the matter.
    pub(crate) fn run(&self, args: &[&str]) -> Result<Output> {
        self.call(&[&["run", "--rm", "--network", "none"], args].concat())
    }

    /// A shell script in a container of these options.
    pub(crate) fn script(&self, options: &[&str], script: &str) -> Result<Output> {
        self.run(&[options, &[IMAGE, "sh", "-c", script]].concat())
    }

    /// `run --detach` of a named container without a network.
    pub(crate) fn start(&self, name: &str, args: &[&str]) -> Result<()> {
        self.call(
            &[
                &["run", "--detach", "--network", "none", "--name", name],
                args,
            ]
            .concat(),
        )?
        .ok()?;
        Ok(())
    }

    /// `exec` of a shell script.
    pub(crate) fn exec(&self, name: &str, script: &str) -> Result<Output> {
        self.call(&["exec", name, "sh", "-c", script])
    }

    /// `rm --force`, at once.
    pub(crate) fn remove(&self, names: &[&str]) -> Result<()> {
        let force: &[&str] = match self.kind {
            Kind::Podman => &["rm", "--force", "--time", "0"],
            Kind::Docker => &["rm", "--force"],
        };
        self.call(&[force, names].concat())?.ok()?;
        Ok(())
    }

    /// A field of `inspect` by Go template.
    pub(crate) fn field(&self, name: &str, template: &str) -> Result<String> {
        let output = self.call(&["inspect", "--format", template, name])?.ok()?;
        Ok(output.text().trim().to_owned())
    }

    /// Checks a field of `inspect`.
    pub(crate) fn expect_field(&self, name: &str, template: &str, value: &str) -> Result<()> {
        let found = self.field(name, template)?;
        ensure!(
            found == value,
            "{template} of {name}: {found:?}, not {value:?}"
        );
        Ok(())
    }

    /// What `inspect` says.
    pub(crate) fn inspect(&self, name: &str) -> Result<Value> {
        let output = self.call(&["inspect", name])?.ok()?;
        let all: Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("no JSON: {output}"))?;
        Ok(all[0].clone())
    }

    /// Follows the container's log until it holds this text.
    pub(crate) fn wait_for_log(&self, name: &str, text: &str) -> Result<()> {
        let mut log = self.begin(&["logs", "--follow", name])?;
        log.wait_for(text)
    }

    /// Checks that the host is as it was before.
    pub(crate) fn expect_nothing_left(&self) -> Result<()> {
        self.before.expect_same()
    }
}

/// Removes what a case may have left in the engine.
pub(crate) fn clean_up(kind: Kind) {
    let script = match kind {
        Kind::Podman => {
            "podman pod rm --all --force --time 0; podman rm --all --force --time 0; podman volume prune --force; \
             podman network prune --force"
        }
        Kind::Docker => {
            "all=$(docker ps --all --quiet); [ -z \"$all\" ] || docker rm --force $all; docker volume prune --force; \
             docker network prune --force"
        }
    };
    // What cannot be removed shows in the next case.
    let images = format!(
        "{script}; {0} images --format '{{{{.Repository}}}}' | grep made | xargs -r {0} rmi --force",
        kind.program()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &images]);
    let _ = Process::spawn(command).and_then(Process::finish);
}
