//! `monitor`: the process that the other commands start to stand for a process of a guest.

use std::{io, os::fd::OwnedFd, os::unix::net::UnixStream};

use super::{Context, Error};
use crate::{
    error,
    monitor::{
        self, ContainerOrder, ExecOrder, HostStdio, Order, Outcome, StandIn, VmStarter, launch,
    },
    spec::{Loaded, check},
    stdio::{Console, Signals},
    vm::{Vm, VmProcess},
};

/// Starts a VM that is a process.
pub(super) const START_VM: VmStarter<'static> =
    &|program, log| Ok(Box::new(VmProcess::start(program, log)?) as Box<dyn Vm>);

pub(super) fn monitor(context: &Context) -> Result<u8, Error> {
    let Some(received) = monitor::receive()? else {
        return Ok(0);
    };
    // Otherwise it is called "exe", after the link that it was started by.
    let named = rustix::thread::set_name(c"bulkhead");
    named.map_err(|error| Error::Io("name the process", error.into()))?;
    // As a container's process would: nobody's terminal controls it but the container's own.
    rustix::process::setsid().map_err(|error| Error::Io("make a session", error.into()))?;
    let host = host_stdio(received.terminal)?;
    std::env::set_current_dir("/").map_err(|error| Error::Io("change to /", error))?;
    let mut signals = Signals::catch().map_err(|error| Error::Io("catch signals", error))?;
    let socket = received.socket;
    let result = match received.order {
        Order::Container(order) => {
            let stand_in = received.stand_in;
            let stand_in = stand_in.map(|socket| StandIn::new(socket, order.pid));
            container(context, &order, socket, host, &mut signals, stand_in)
        }
        Order::Exec(order) => exec(context, &order, socket, host, &mut signals),
    };
    result.map(|status| u8::try_from(status).unwrap_or(255))
}

fn host_stdio(terminal: Option<OwnedFd>) -> Result<HostStdio, Error> {
    let Some(slave) = terminal else {
        return Ok(HostStdio::Standard);
    };
    let console = Console::from_slave(slave);
    console.control()?;
    // Everything goes through the terminal. Whoever reads the command's own output must not wait
    // for the end of ours.
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Error::Io("open /dev/null", error))?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .map_err(|error| Error::Io("let the standard streams go", error.into()))?;
    Ok(HostStdio::Console(console))
}

fn container(
    context: &Context,
    order: &ContainerOrder,
    socket: UnixStream,
    host: HostStdio,
    signals: &mut Signals,
    stand_in: Option<StandIn>,
) -> Result<i32, Error> {
    let container = context.root.open(&order.id)?;
    let made = container
        .config()
        .map_err(Error::from)
        .and_then(|bytes| Ok(Loaded::parse(order.bundle.clone(), bytes)?))
        .and_then(|loaded| {
            let checked = check::check(&loaded)?;
            Ok(launch(
                order,
                (&loaded, &checked),
                &container,
                START_VM,
                signals,
                host,
                stand_in,
            )?)
        });
    match made {
        Ok(sandbox) => {
            // A command that is gone was killed: nobody knows of the container, so it ends here.
            monitor::report(socket, &Outcome::Done)
                .map_err(|error| Error::Io("report that the container is created", error))?;
            let ended = sandbox.supervise(signals);
            ended.record(&container);
            Ok(ended.finish())
        }
        Err(error) => failed(socket, &error),
    }
}

fn exec(
    context: &Context,
    order: &ExecOrder,
    socket: UnixStream,
    host: HostStdio,
    signals: &mut Signals,
) -> Result<i32, Error> {
    let container = context.root.open(&order.id)?;
    match monitor::join(&container, order, host) {
        Ok(mut process) => {
            monitor::report(socket, &Outcome::Done)
                .map_err(|error| Error::Io("report that the process runs", error))?;
            process
                .run(signals, None)
                .map_err(|error| Error::Io("wait for the process", error))
        }
        Err(error) => failed(socket, &error.into()),
    }
}

/// The command prints the error; if it is gone, the log has to do.
fn failed(socket: UnixStream, failure: &Error) -> Result<i32, Error> {
    let outcome = Outcome::Failed {
        message: error::chain(failure),
        exit_code: error::exit_code(failure),
    };
    if monitor::report(socket, &outcome).is_err() {
        tracing::error!("{}", error::chain(failure));
    }
    Ok(error::FAILURE.into())
}

/// Whether standard input is a terminal.
pub(super) fn at_terminal() -> bool {
    use io::IsTerminal;
    io::stdin().is_terminal()
}
