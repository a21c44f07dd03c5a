//! `exec`: runs one more process in a container.

use std::path::Path;

use oci_spec::runtime::Process;
use serde_json::{Value, json};

use super::{Context, Error, create::console, require, write_pid_file};
use crate::{
    cli::Exec,
    error,
    monitor::{self, ExecOrder, HostStdio, Order},
    spec::{self, Labels, SpecError},
    state::{
        Container,
        ContainerStatus::{Created, Paused, Running, Stopped},
        ProcessIdentity,
    },
    stdio::{Console, RawTerminal, Signals},
};

/// runc's exit code for an exec that failed before there was a process.
const FAILED: u8 = 255;

pub(super) fn exec(context: &Context, options: Exec) -> Result<u8, Error> {
    match attempt(context, &options) {
        Ok(status) => Ok(status),
        Err(failure) => {
            let failure = Error::Exec(Box::new(failure));
            let code = error::exit_code(&failure);
            error::print(&failure, context.global.log.is_some());
            Ok(if code == error::FAILURE { FAILED } else { code })
        }
    }
}

fn attempt(context: &Context, options: &Exec) -> Result<u8, Error> {
    refuse(options)?;
    Labels::default()
        .with("--apparmor", options.apparmor.as_deref())
        .with("--process-label", options.process_label.as_deref())
        .judge(context.config.lsm_labels)?;
    let container = context.root.open(&options.id)?;
    let record = container.record()?;
    let status = record.current_status();
    if status == Stopped {
        require(
            &container,
            status,
            &[],
            "cannot exec in a stopped container",
        )?;
    }
    if status == Paused && !options.ignore_paused {
        let wrong = "cannot exec in a paused container (use --ignore-paused to override)";
        require(&container, status, &[], wrong)?;
    }
    require(
        &container,
        status,
        &[Created, Running, Paused],
        "container not running",
    )?;
    let version = &record.oci_version;
    let (process, terminal) = process(context, &container, version, options)?;
    let socket = options.console_socket.as_deref();
    if options.detach && terminal && socket.is_none() {
        return Err(Error::Usage(
            "cannot allocate tty if runc will detach without setting console socket (give \
             --console-socket)"
                .to_owned(),
        ));
    }
    if socket.is_some() && !(options.detach && terminal) {
        return Err(Error::Usage(
            "cannot use console socket if runc will not detach or allocate tty".to_owned(),
        ));
    }
    let order = ExecOrder {
        id: options.id.clone(),
        container_id: options.id.clone(),
        exec_id: exec_id()?,
        process,
    };
    if options.detach {
        return detached(context, options, &order, socket);
    }
    if let Some(path) = &options.pid_file {
        write_pid_file(path, std::process::id())?;
    }
    attached(&container, &order, terminal)
}

/// Stands for the process until it ends.
pub(super) fn attached(
    container: &Container,
    order: &ExecOrder,
    terminal: bool,
) -> Result<u8, Error> {
    let mut signals = Signals::catch().map_err(|error| Error::Io("catch signals", error))?;
    let host = match terminal {
        true => HostStdio::Terminal(RawTerminal::enter()?),
        false => HostStdio::Standard,
    };
    let mut process = monitor::join(container, order, host)?;
    let status = process
        .run(&mut signals, None)
        .map_err(|error| Error::Io("wait for the process", error))?;
    Ok(u8::try_from(status).unwrap_or(FAILED))
}

fn detached(
    context: &Context,
    options: &Exec,
    order: &ExecOrder,
    socket: Option<&Path>,
) -> Result<u8, Error> {
    let mut monitor = monitor::spawn(&context.monitor_options()?, None)?;
    let pid = monitor.pid();
    let console = socket.map(console).transpose()?;
    let terminal: Vec<_> = console.as_ref().map(Console::slave).into_iter().collect();
    monitor.order(&Order::Exec(order.clone()), &terminal)?;
    drop(console);
    monitor.outcome()?;
    if let Some(path) = &options.pid_file {
        write_pid_file(path, pid)?;
    }
    Ok(0)
}

fn refuse(options: &Exec) -> Result<(), Error> {
    if options.preserve_fds > 0 {
        return Err(Error::Option {
            option: "--preserve-fds above 0",
            reason: "a process in a guest cannot use descriptors of the host",
        });
    }
    if !options.cgroup.is_empty() {
        return Err(Error::Option {
            option: "--cgroup",
            reason: "processes share the container's cgroup",
        });
    }
    if options.process.is_none() && options.command.is_empty() {
        return Err(Error::Usage(
            "process args cannot be empty: name a program to run".to_owned(),
        ));
    }
    Ok(())
}

/// Unique in the container for as long as the process lives: it is this host's process for it.
pub(super) fn exec_id() -> Result<String, Error> {
    let own = ProcessIdentity::own().map_err(|error| Error::Io("read /proc/self/stat", error))?;
    Ok(format!("exec-{}-{}", own.pid, own.start_time))
}

/// The process as JSON, and whether it has a terminal.
fn process(
    context: &Context,
    container: &Container,
    version: &str,
    options: &Exec,
) -> Result<(String, bool), Error> {
    if let Some(file) = &options.process {
        let rule = context.unknown_properties();
        let (bytes, process) = spec::read_process(file, version, rule)?;
        check(&process, file)?;
        Labels::of_process(&process).judge(context.config.lsm_labels)?;
        let text = String::from_utf8(bytes).map_err(|_| SpecError::Read {
            path: file.clone(),
            source: std::io::ErrorKind::InvalidData.into(),
        })?;
        return Ok((text, process.terminal().unwrap_or(false)));
    }
    let config: Value = serde_json::from_slice(&container.config()?)
        .map_err(|error| Error::Io("read the container's configuration", error.into()))?;
    let mut process = config.get("process").cloned().unwrap_or_else(|| json!({}));
    change(&mut process, options)?;
    Ok((process.to_string(), options.tty))
}

fn check(process: &Process, file: &Path) -> Result<(), Error> {
    let failed = |what: &str| {
        Error::Spec(SpecError::Parse {
            file: file.to_owned(),
            field: String::new(),
            cause: what.to_owned(),
        })
    };
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(failed("args must not be empty"));
    }
    if !process.cwd().is_absolute() {
        return Err(failed("cwd must be an absolute path"));
    }
    Ok(())
}

/// Lays the options over the container's own process, as runc does.
fn change(process: &mut Value, options: &Exec) -> Result<(), Error> {
    process["args"] = json!(options.command);
    process["terminal"] = json!(options.tty);
    if let Some(cwd) = &options.cwd {
        process["cwd"] = json!(cwd);
    }
    if options.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    extend(
        process,
        "env",
        options.env.iter().map(|variable| json!(variable)),
    );
    for set in ["bounding", "effective", "permitted"] {
        if !options.cap.is_empty() {
            if !process["capabilities"].is_object() {
                process["capabilities"] = json!({});
            }
            extend(
                &mut process["capabilities"],
                set,
                options.cap.iter().map(|cap| json!(cap)),
            );
        }
    }
    if let Some(user) = &options.user {
        let (uid, gid) = parse_user(user)?;
        process["user"]["uid"] = json!(uid);
        if let Some(gid) = gid {
            process["user"]["gid"] = json!(gid);
        }
    }
    if !options.additional_gids.is_empty() {
        if !process["user"].is_object() {
            process["user"] = json!({"uid": 0, "gid": 0});
        }
        let groups = options.additional_gids.iter().map(|group| json!(group));
        extend(&mut process["user"], "additionalGids", groups);
    }
    Ok(())
}

fn extend(object: &mut Value, field: &str, values: impl Iterator<Item = Value>) {
    let mut list = object[field].as_array().cloned().unwrap_or_default();
    list.extend(values);
    if !list.is_empty() {
        object[field] = Value::Array(list);
    }
}

/// `UID[:GID]`.
fn parse_user(user: &str) -> Result<(u32, Option<u32>), Error> {
    let wrong = || {
        Error::Usage(format!(
            "--user: {user:?} must have the form UID[:GID], numbers"
        ))
    };
    let (uid, gid) = match user.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (user, None),
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    Ok((number(uid)?, gid.map(number).transpose()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn options(line: &str) -> Exec {
        let Command::Exec(options) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
            panic!("not exec")
        };
        options
    }

    #[test]
    fn options_lie_over_the_containers_process() {
        let mut process = json!({
            "args": ["sh"], "cwd": "/w", "env": ["A=1"], "terminal": true,
            "user": {"uid": 5, "gid": 6}, "capabilities": {"bounding": ["CAP_KILL"]}});
        let options = options(
            "bulkhead exec -e B=2 --env C=3 -u 7:8 -g 9 --cap CAP_CHOWN --no-new-privs one ls -l",
        );
        change(&mut process, &options).unwrap();
        assert_eq!(
            process,
            json!({
                "args": ["ls", "-l"], "cwd": "/w", "env": ["A=1", "B=2", "C=3"],
                "terminal": false, "noNewPrivileges": true,
                "user": {"uid": 7, "gid": 8, "additionalGids": [9]},
                "capabilities": {"bounding": ["CAP_KILL", "CAP_CHOWN"],
                    "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}})
        );
    }

    #[test]
    fn users() {
        assert_eq!(parse_user("5").unwrap(), (5, None));
        assert_eq!(parse_user("5:6").unwrap(), (5, Some(6)));
        for bad in ["", "root", "5:", ":6", "5:6:7", "-1", "4294967296"] {
            assert!(parse_user(bad).is_err(), "{bad}");
        }
    }
}
