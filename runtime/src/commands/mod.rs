//! The commands, a file each, and what they share: the errors in runc's words and where the
//! installation lies.

mod check;
mod console;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod monitor;
mod pause;
mod ps;
mod run;
mod spec;
mod start;
mod state;
mod update;

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

use crate::{
    agent::{self, AgentError, rpc::RpcError},
    cgroup::{CgroupError, Driver},
    cli::{Cli, Command, Global},
    config::Config,
    guest_size::SizeError,
    hooks::HookError,
    lifecycle::DestroyError,
    log::LogFormat,
    monitor::{HandoverError, LaunchError, StandInError},
    pod::PodError,
    signal::UnknownSignal,
    spec::{LabelError, SpecError, UnknownProperties},
    state::{Container, ContainerStatus, Record, StateError, StateRoot},
    stdio::TerminalError,
    timeline::Moment,
    user_namespace,
    wait::Deadline,
};

/// For the agent's answer to a request that does not take long.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// A command failed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Label(#[from] LabelError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Handover(#[from] HandoverError),
    #[error(transparent)]
    Destroy(#[from] DestroyError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Signal(#[from] UnknownSignal),
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("exec failed")]
    Exec(#[source] Box<Error>),
    #[error("{0}")]
    Usage(String),
    #[error("{option} is not supported: {reason}")]
    Option {
        option: &'static str,
        reason: &'static str,
    },
    #[error("container {id:?} is {status}: {wrong}")]
    Status {
        id: String,
        status: ContainerStatus,
        wrong: &'static str,
    },
    #[error(
        "cannot delete container {id} that is not stopped: {status}; kill it first, or give --force"
    )]
    NotStopped { id: String, status: ContainerStatus },
    #[error("cannot {operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    StandIn(#[from] StandInError),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

impl From<RpcError> for Error {
    fn from(error: RpcError) -> Self {
        Self::Agent(error.into())
    }
}

/// What every command works with.
#[derive(Debug)]
pub struct Context {
    global: Global,
    config: Config,
    began: Moment,
    root: StateRoot,
}

/// Where the state is unless somebody says: users who are root in a namespace of their own have no
/// right to /run, but a directory of theirs, as for runc and crun.
fn usual_root(runtime_directory: Option<OsString>, is_somebodys: bool) -> PathBuf {
    match runtime_directory {
        Some(directory) if !directory.is_empty() && is_somebodys => {
            Path::new(&directory).join("bulkhead")
        }
        _ => PathBuf::from("/run/bulkhead"),
    }
}

/// Carries a command out; returns the exit code.
pub fn run(cli: Cli, config: Config, began: Moment) -> Result<u8, Error> {
    let root = cli.global.root.clone().unwrap_or_else(|| {
        let runtime_directory = std::env::var_os("XDG_RUNTIME_DIR");
        usual_root(runtime_directory, user_namespace::is_somebodys())
    });
    let root = std::path::absolute(root)
        .map_err(|error| Error::Io("find the current directory", error))?;
    let context = Context {
        root: StateRoot::new(root),
        global: cli.global,
        config,
        began,
    };
    context.refuse_options()?;
    match cli.command {
        Command::Create(options) => create::create(&context, &options),
        Command::Start(options) => start::start(&context, &options),
        Command::Run(options) => run::run(&context, &options),
        Command::State(options) => state::state(&context, &options),
        Command::Kill(options) => kill::kill(&context, &options),
        Command::Delete(options) => delete::delete(&context, &options),
        Command::Exec(options) => exec::exec(&context, options),
        Command::Ps(options) => ps::ps(&context, &options),
        Command::List(options) => list::list(&context, &options),
        Command::Update(options) => update::update(&context, &options),
        Command::Events(options) => events::events(&context, &options),
        Command::Pause(options) => pause::pause(&context, &options),
        Command::Resume(options) => pause::resume(&context, &options),
        Command::Spec(options) => spec::spec(&options),
        Command::Features => features::features(),
        Command::Check(options) => check::check(&context, &options),
        Command::Console(options) => console::console(&context, &options),
        Command::Monitor => monitor::monitor(&context),
    }
}

impl Context {
    fn refuse_options(&self) -> Result<(), Error> {
        match self.global.rootless.as_str() {
            "auto" | "false" => Ok(()),
            "true" => Err(Error::Option {
                option: "--rootless=true",
                reason: "the virtual machine's jail is set up by root",
            }),
            other => Err(Error::Usage(format!(
                "--rootless: {other:?} is none of true, false and auto"
            ))),
        }
    }

    fn unknown_properties(&self) -> UnknownProperties {
        self.global.unknown_properties.unwrap_or_default()
    }

    fn cgroup_driver(&self) -> Driver {
        if self.global.systemd_cgroup {
            Driver::Systemd
        } else {
            self.global.cgroup_manager.unwrap_or_default()
        }
    }

    /// A file of the installation: the one given on the command line or in the configuration file,
    /// or where it lies relative to this program.
    fn installed(
        &self,
        given: &Option<PathBuf>,
        configured: &Option<PathBuf>,
        beside: &str,
    ) -> Result<PathBuf, Error> {
        let failed = |error| Error::Io("find this program", error);
        if let Some(path) = given.as_ref().or(configured.as_ref()) {
            return std::path::absolute(path).map_err(failed);
        }
        let own = std::env::current_exe().map_err(failed)?;
        let directory = own.parent().unwrap_or(Path::new("/"));
        Ok(match beside.strip_prefix("../") {
            Some(beside) => directory.parent().unwrap_or(directory).join(beside),
            None => directory.join(beside),
        })
    }

    fn vmm(&self) -> Result<PathBuf, Error> {
        let paths = &self.config.paths;
        self.installed(&self.global.vmm, &paths.vmm, "bulkhead-vmm")
    }

    fn kernel(&self) -> Result<PathBuf, Error> {
        let beside = "../share/bulkhead/vmlinux";
        self.installed(&self.global.kernel, &self.config.paths.kernel, beside)
    }

    fn root_image(&self, debug: bool) -> Result<PathBuf, Error> {
        let paths = &self.config.paths;
        let (configured, beside) = if debug {
            (
                &paths.debug_root_image,
                "../share/bulkhead/rootfs-debug.erofs",
            )
        } else {
            (&paths.root_image, "../share/bulkhead/rootfs.erofs")
        };
        self.installed(&self.global.root_image, configured, beside)
    }

    /// The global options that a monitor of this command gets.
    fn monitor_options(&self) -> Result<Vec<OsString>, Error> {
        let mut options = vec!["--root".into(), self.root.path().into()];
        if let Some(log) = &self.global.log {
            let log = std::path::absolute(log)
                .map_err(|error| Error::Io("find the current directory", error))?;
            options.extend(["--log".into(), log.into()]);
        }
        if self.global.log_format == Some(LogFormat::Json) {
            options.extend(["--log-format".into(), "json".into()]);
        }
        if self.global.debug {
            options.push("--debug".into());
        }
        Ok(options)
    }
}

/// Refuses what is not so without --force; the words of the runtime-spec's callers.
fn require(
    container: &Container,
    status: ContainerStatus,
    allowed: &[ContainerStatus],
    wrong: &'static str,
) -> Result<(), Error> {
    if allowed.contains(&status) {
        return Ok(());
    }
    Err(Error::Status {
        id: container.id().to_owned(),
        status,
        wrong,
    })
}

/// A container that has processes, and what is written down of it.
fn living(context: &Context, id: &str) -> Result<(Container, Record), Error> {
    let container = context.root.open(id)?;
    let record = container.record()?;
    let alive = [
        ContainerStatus::Created,
        ContainerStatus::Running,
        ContainerStatus::Paused,
    ];
    let status = record.current_status();
    require(&container, status, &alive, "container not running")?;
    Ok((container, record))
}

/// Asks the agent of a container one question.
fn ask<R: protobuf::Message>(
    container: &Container,
    method: &'static str,
    request: &impl protobuf::Message,
) -> Result<R, Error> {
    let deadline = Deadline::after(CALL_LIMIT);
    let mut rpc = agent::connect(container, deadline)?;
    Ok(agent::call(&mut rpc, method, request, deadline)?)
}

/// Writes a pid file, whole or not at all.
fn write_pid_file(path: &Path, pid: u32) -> Result<(), Error> {
    let failed = |source| Error::File {
        operation: "write the pid file",
        path: path.to_owned(),
        source,
    };
    let mut name = OsString::from(".");
    name.push(
        path.file_name()
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?,
    );
    let new = path.with_file_name(name);
    fs::write(&new, pid.to_string())
        .and_then(|()| fs::rename(&new, path))
        .map_err(failed)
}

/// Prints a line that someone may have stopped listening to.
fn print(text: &str) -> Result<(), Error> {
    use io::Write;
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::Io("write to standard output", error))
}

/// Columns as runc shows them: at least 12 wide, 3 apart.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let longest = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        longest.max().unwrap_or(0).max(9) + 3
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}"));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_a_directory_of_their_own() {
        let there = || Some(OsString::from("/run/user/1000"));
        assert_eq!(
            usual_root(there(), true),
            Path::new("/run/user/1000/bulkhead")
        );
        for (directory, is_somebodys) in [(there(), false), (None, true), (Some("".into()), true)] {
            assert_eq!(
                usual_root(directory, is_somebodys),
                Path::new("/run/bulkhead")
            );
        }
    }
}
