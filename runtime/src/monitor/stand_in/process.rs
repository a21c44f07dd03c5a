//! The process itself.

use std::{
    env, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

use rustix::{
    event::{PollFd, PollFlags},
    fs::{Mode, OFlags, open},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use super::{
    super::{
        View,
        line::{self, Lines, Received},
    },
    MARK, Namespaces, Said, Task,
};
use crate::{error, stdio::Signals, wait::poll};

/// As if by SIGKILL: the monitor is gone, and with it the container.
const KILLED: u8 = 128 + 9;

/// Whether the program is to stand in.
pub fn is_called() -> bool {
    env::var_os(MARK).is_some()
}

/// Stands in until told to end.
pub fn stand() -> ExitCode {
    // Nobody would read what has failed: the monitor finds the socket closed.
    ExitCode::from(serve().unwrap_or(KILLED))
}

fn serve() -> io::Result<u8> {
    // Otherwise it is called "exe", after the link that it was started by.
    rustix::thread::set_name(c"bulkhead")?;
    // As a container's process would: nobody's terminal controls it.
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    let mut signals = Signals::catch()?;
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(io::stdout())?;
    let home = open(
        "/proc/self/ns/mnt",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let mut lines = Lines::new(UnixStream::from(socket));
    loop {
        // Before anything is waited for: several may have come at once.
        let task = match lines.progress()? {
            Received::Line(task) => task,
            Received::Nothing => {
                wait(&lines, &mut signals)?;
                continue;
            }
            Received::End => return Ok(KILLED),
        };
        let done = match task {
            Task::EnterNetwork => enter_network(lines.descriptor()),
            Task::Show { view, namespaces } => show(view, &namespaces),
            Task::Leave => {
                // Root of a user namespace cannot, and does it with its end.
                let _ = move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Mount));
                continue;
            }
            Task::End { status } => return Ok(u8::try_from(status).unwrap_or(255)),
        };
        let said = done.map_or_else(Said::Failed, |()| Said::Done);
        line::send(lines.socket(), &said, &[])?;
    }
}

/// Until something has come; passes signals on.
fn wait(lines: &Lines, signals: &mut Signals) -> io::Result<()> {
    let socket = PollFd::new(lines.socket(), PollFlags::IN);
    let mut descriptors = [signals.poll_fd(), socket];
    poll(&mut descriptors, None)?;
    for caught in signals.caught() {
        line::send(lines.socket(), &Said::Caught(caught), &[])?;
    }
    Ok(())
}

fn enter_network(namespace: Option<OwnedFd>) -> Result<(), String> {
    let namespace = namespace.ok_or("no network namespace has come")?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| format!("cannot stay in the network namespace: {errno}"))
}

fn show(view: View, namespaces: &Namespaces) -> Result<(), String> {
    let failed = |what, error| format!("cannot {what} the container's namespaces: {error}");
    // While paths mean the host's.
    let joined = namespaces.open().map_err(|error| failed("open", error))?;
    view.enter().map_err(|failure| error::chain(&failure))?;
    namespaces
        .enter(joined)
        .map_err(|errno| failed("enter", errno.into()))
}
