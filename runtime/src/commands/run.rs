//! `run`: create and start in one, and, unless detached, stand for the process until it ends.

use std::time::Duration;

use super::{Context, Error, create, create::Plan, monitor::START_VM, start, write_pid_file};
use crate::{
    cli::Run,
    lifecycle,
    monitor::{Ended, HostStdio, StandIn, launch, stand_in},
    state::{Container, ProcessIdentity},
    stdio::{RawTerminal, Signals},
    wait::Deadline,
};

pub(super) fn run(context: &Context, options: &Run) -> Result<u8, Error> {
    let plan = create::prepare(context, &options.create)?;
    let terminal = plan.checked.terminal;
    let socket = options.create.console_socket.is_some();
    if options.detach && terminal && !socket {
        return Err(Error::Usage(
            "cannot allocate tty if runc will detach without setting console socket (give \
             --console-socket, or set process.terminal to false)"
                .to_owned(),
        ));
    }
    if socket && !(options.detach && terminal) {
        return Err(Error::Usage(
            "cannot use console socket if runc will not detach or allocate tty".to_owned(),
        ));
    }
    if options.detach {
        let container = create::create_detached(context, &options.create, &plan)?;
        let started = start::start_container(&container, &plan.loaded.spec);
        if started.is_err() {
            clean_up(&container);
        }
        return started.map(|()| 0);
    }
    let own = ProcessIdentity::own().map_err(|error| Error::Io("read /proc/self/stat", error))?;
    let mut signals = Signals::catch().map_err(|error| Error::Io("catch signals", error))?;
    let spawned = stand_in::spawn(&options.create.id, &plan.loaded.spec)?;
    let process = create::identity(spawned.pid)?;
    let stand_in = StandIn::new(spawned.socket, spawned.pid);
    let container = create::record(context, &options.create.id, &plan, Some(own), Some(process))?;
    let result = attached(context, options, &plan, &container, &mut signals, stand_in);
    match &result {
        Ok(ended) if options.keep => ended.record(&container),
        _ => clean_up(&container),
    }
    result.map(|ended| u8::try_from(ended.finish()).unwrap_or(255))
}

/// Being the monitor ourselves.
fn attached(
    context: &Context,
    options: &Run,
    plan: &Plan,
    container: &Container,
    signals: &mut Signals,
    stand_in: StandIn,
) -> Result<Ended, Error> {
    let order = create::order(context, &options.create, plan, stand_in.pid())?;
    let host = match plan.checked.terminal {
        true => HostStdio::Terminal(RawTerminal::enter()?),
        false => HostStdio::Standard,
    };
    let mut sandbox = launch(
        &order,
        (&plan.loaded, &plan.checked),
        container,
        START_VM,
        signals,
        host,
        Some(stand_in),
    )?;
    if let Some(path) = &options.create.pid_file {
        write_pid_file(path, order.pid)?;
    }
    start::record_started(container, || {
        Ok(sandbox.start(Deadline::after(Duration::from_secs(60)))?)
    })?;
    start::poststart(container, &plan.loaded.spec, sandbox.home())?;
    Ok(sandbox.supervise(signals))
}

fn clean_up(container: &Container) {
    if let Err(error) = lifecycle::destroy(container) {
        tracing::error!("cannot clean up: {}", crate::error::chain(&error));
    }
}
