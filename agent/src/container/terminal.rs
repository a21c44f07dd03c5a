//! Opens a terminal in the container's own devpts, in the process that will use it, and hands the
//! master to the agent.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use bulkhead_agent_protocol::ErrorKind;
use rustix::{
    fs::{self, FileType, Mode, OFlags, Uid, fchown, fstat, major, minor},
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::{channel, rootfs::Tree};
use crate::error::{Attempt, Error, Result};

const DIRECTORY: &str = "/dev/pts";

/// Whatever lies there, opening it neither blocks nor makes it this process's terminal.
const FLAGS: OFlags = OFlags::RDWR.union(OFlags::NOCTTY).union(OFlags::CLOEXEC);

/// Opens a terminal of the devpts in a rootfs that is not the root yet.
pub(super) fn open(
    rootfs: &Tree,
    size: (u16, u16),
    owner: u32,
    channel: &channel::Child,
) -> Result<OwnedFd> {
    let master = rootfs
        .open(Path::new(DIRECTORY))
        .and_then(|directory| {
            Ok(fs::openat(
                &directory,
                "ptmx",
                FLAGS | OFlags::NOFOLLOW,
                Mode::empty(),
            )?)
        })
        .or_cannot(missing)?;
    set_up(&master, size, owner, channel)
}

/// Opens a terminal of the devpts in the root of this process.
pub(super) fn open_here(size: (u16, u16), owner: u32, channel: &channel::Child) -> Result<OwnedFd> {
    let path = Path::new(DIRECTORY).join("ptmx");
    let master = fs::open(path, FLAGS, Mode::empty()).or_cannot(missing)?;
    set_up(&master, size, owner, channel)
}

fn missing() -> String {
    format!("open {DIRECTORY}/ptmx (process.terminal needs a devpts at {DIRECTORY})")
}

fn set_up(
    master: &OwnedFd,
    (rows, columns): (u16, u16),
    owner: u32,
    channel: &channel::Child,
) -> Result<OwnedFd> {
    let action = || "open a terminal in the container's devpts";
    let status = fstat(master).or_cannot(action)?;
    let character = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    if !character || (major(status.st_rdev), minor(status.st_rdev)) != (5, 2) {
        let text =
            format!("cannot open a terminal: {DIRECTORY}/ptmx is not the terminal multiplexer");
        return Err(Error::new(ErrorKind::Internal, text));
    }
    unlockpt(master).or_cannot(action)?;
    let slave = ioctl_tiocgptpeer(
        master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .or_cannot(action)?;
    if (rows, columns) != (0, 0) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).or_cannot(|| "set the terminal's size")?;
    }
    fchown(&slave, Some(Uid::from_raw(owner)), None).or_cannot(action)?;
    channel.send_terminal(master.as_fd())?;
    Ok(slave)
}
