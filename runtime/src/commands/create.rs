//! `create`: makes a container whose process waits for `start`, with a monitor of its own.

use std::{os::fd::AsFd, path::Path};

use super::{Context, Error, write_pid_file};
use crate::{
    cgroup,
    cli::Create,
    guest_size::{self, GuestSize, Host},
    lifecycle,
    monitor::{self, ContainerOrder, Order, stand_in},
    pod::{self, Joined},
    spec::{
        Labels, Loaded,
        check::{self, Checked},
    },
    state::{Container, MONITOR_LOCK, ProcessIdentity, Record},
    stdio::{Console, TerminalError, send_master},
};

pub(super) fn create(context: &Context, options: &Create) -> Result<u8, Error> {
    let plan = prepare(context, options)?;
    let terminal = plan.checked.terminal;
    if terminal && options.console_socket.is_none() {
        return Err(Error::Usage(
            "cannot allocate tty if runc will detach without setting console socket (give \
             --console-socket, or set process.terminal to false)"
                .to_owned(),
        ));
    }
    if !terminal && options.console_socket.is_some() {
        return Err(Error::Usage(
            "cannot use console socket if runc will not detach or allocate tty (process.terminal \
             is false)"
                .to_owned(),
        ));
    }
    create_detached(context, options, &plan)?;
    Ok(0)
}

/// A configuration that was read and judged, and what follows from it.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) loaded: Loaded,
    pub(super) checked: Checked,
    guest: GuestSize,
    joined: Option<Joined>,
}

/// Reads and judges the configuration.
pub(super) fn prepare(context: &Context, options: &Create) -> Result<Plan, Error> {
    if options.preserve_fds > 0 {
        return Err(Error::Option {
            option: "--preserve-fds above 0",
            reason: "a process in a guest cannot use descriptors of the host",
        });
    }
    if options.no_pivot {
        tracing::warn!("--no-pivot is ignored: the root is entered inside the guest");
    }
    let loaded = Loaded::read(&options.bundle)?;
    loaded.judge_unknown(context.unknown_properties())?;
    Labels::of_spec(&loaded.spec).judge(context.config.lsm_labels)?;
    let checked = check::check(&loaded)?;
    cgroup::check_path(
        checked.cgroups_path.as_deref(),
        &options.id,
        context.cgroup_driver(),
    )?;
    let joined = pod::find(&context.root, &checked.paths)?;
    let guest = match &joined {
        Some(joined) => {
            joined.judge(&loaded.spec)?;
            joined.refuse_options(options.guest_log.is_some() || options.guest_debug)?;
            joined.guest
        }
        None => guest_size::of(&loaded.spec, &context.config, Host::this())?,
    };
    Ok(Plan {
        loaded,
        checked,
        guest,
        joined,
    })
}

/// Makes the container's directory with a record in it.
pub(super) fn record(
    context: &Context,
    id: &str,
    plan: &Plan,
    monitor: Option<ProcessIdentity>,
    process: Option<ProcessIdentity>,
) -> Result<Container, Error> {
    let loaded = &plan.loaded;
    let own = ProcessIdentity::own().map_err(|error| Error::Io("read /proc/self/stat", error))?;
    let mut record = Record::new(id, &loaded.bundle, loaded.spec.version(), own);
    record.rootfs.clone_from(&plan.checked.rootfs);
    record.guest = plan.guest;
    record.created = crate::time::now_precise();
    record.owner = owner();
    (record.monitor, record.process) = (monitor, process);
    let annotations = loaded.spec.annotations().clone().unwrap_or_default();
    record.annotations = annotations.into_iter().collect();
    let container = context.root.create(id)?;
    let locked = container.lock()?;
    let kept = locked
        .write(&record)
        .and_then(|()| container.write_config(&loaded.bytes));
    if kept.is_err()
        && let Err(error) = locked.remove()
    {
        tracing::error!("cannot clean up: {}", crate::error::chain(&error));
    }
    kept?;
    drop(locked);
    Ok(container)
}

/// The name of the user who calls, as far as the user database's file tells.
fn owner() -> String {
    let uid = rustix::process::getuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1) == Some(uid.as_str())).then(|| name.to_owned())
    });
    name.unwrap_or(uid)
}

/// What the monitor is told.
pub(super) fn order(
    context: &Context,
    options: &Create,
    plan: &Plan,
    pid: u32,
) -> Result<ContainerOrder, Error> {
    let absolute = |path: &Option<std::path::PathBuf>| {
        path.as_ref()
            .map(std::path::absolute)
            .transpose()
            .map_err(|error| Error::Io("find the current directory", error))
    };
    Ok(ContainerOrder {
        id: options.id.clone(),
        bundle: plan.loaded.bundle.clone(),
        vmm: context.vmm()?,
        kernel: context.kernel()?,
        root_image: context.root_image(options.guest_debug)?,
        guest_log: absolute(&options.guest_log)?,
        debug: context.global.debug,
        timeline: absolute(&options.timeline)?,
        began: context.began.microseconds(),
        no_new_keyring: options.no_new_keyring,
        guest: plan.guest,
        spare_places: context.config.guest.spare_places,
        cgroup_driver: context.cgroup_driver(),
        pid,
        joined: plan.joined.clone(),
    })
}

/// Creates the container with a monitor that outlives this command.
pub(super) fn create_detached(
    context: &Context,
    options: &Create,
    plan: &Plan,
) -> Result<Container, Error> {
    let container = record(context, &options.id, plan, None, None)?;
    let created = hand_over(context, options, plan, &container);
    if created.is_err()
        && let Err(error) = lifecycle::destroy(&container)
    {
        tracing::error!("cannot clean up: {}", crate::error::chain(&error));
    }
    created.map(|()| container)
}

fn hand_over(
    context: &Context,
    options: &Create,
    plan: &Plan,
    container: &Container,
) -> Result<(), Error> {
    let stand_in = stand_in::spawn(&options.id, &plan.loaded.spec)?;
    let order = Order::Container(Box::new(order(context, options, plan, stand_in.pid)?));
    let held = container.open_held(MONITOR_LOCK)?;
    let mut monitor = monitor::spawn(&context.monitor_options()?, Some(held))?;
    let processes = (identity(monitor.pid())?, identity(stand_in.pid)?);
    {
        let locked = container.lock()?;
        let mut record = container.record()?;
        (record.monitor, record.process) = (Some(processes.0), Some(processes.1));
        locked.write(&record)?;
    }
    let console = options.console_socket.as_deref().map(console).transpose()?;
    let mut descriptors = vec![stand_in.socket.as_fd()];
    descriptors.extend(console.as_ref().map(Console::slave));
    monitor.order(&order, &descriptors)?;
    drop(console);
    // From here on it ends with the monitor.
    drop(stand_in.socket);
    monitor.outcome()?;
    if let Some(path) = &options.pid_file {
        write_pid_file(path, stand_in.pid)?;
    }
    Ok(())
}

/// Of a process that was just made.
pub(super) fn identity(pid: u32) -> Result<ProcessIdentity, Error> {
    ProcessIdentity::of(pid).map_err(|error| Error::Io("identify a process", error))
}

/// A terminal whose master goes to the socket at once, so that whoever waits for it can begin.
pub(super) fn console(socket: &Path) -> Result<Console, TerminalError> {
    let (console, master) = Console::make()?;
    send_master(socket, master)?;
    // Kept open by the slave's holder only: the master is the receiver's now.
    let _ = console.slave().as_fd();
    Ok(console)
}
