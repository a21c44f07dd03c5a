//! What `ps` shows of a container's processes, from procfs.

use std::{
    io::{self, Read},
    os::fd::BorrowedFd,
};

use bulkhead_agent_protocol::messages::Process;
use rustix::{
    fs::{self, Mode, OFlags},
    param::clock_ticks_per_second,
    process::Pid,
    time::{ClockId, clock_gettime},
};

use crate::error::{Attempt, Result};

/// Most of a command line that is told.
const COMMAND_LIMIT: u64 = 4096;

/// Describes the processes; those that end meanwhile are left out.
pub(super) fn read(proc: BorrowedFd<'_>, pids: &[Pid]) -> Result<Vec<Process>> {
    let mut processes = Vec::with_capacity(pids.len());
    for pid in pids {
        match read_one(proc, *pid) {
            Ok(process) => processes.extend(process),
            Err(error) if gone(&error) => {}
            Err(error) => {
                return Err(error)
                    .or_cannot(|| format!("read about process {}", pid.as_raw_nonzero()));
            }
        }
    }
    Ok(processes)
}

fn gone(error: &io::Error) -> bool {
    [Some(libc::ENOENT), Some(libc::ESRCH)].contains(&error.raw_os_error())
}

fn read_one(proc: BorrowedFd<'_>, pid: Pid) -> io::Result<Option<Process>> {
    let number = pid.as_raw_nonzero().get();
    let file = |name: &str| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        fs::openat(proc, format!("{number}/{name}"), flags, Mode::empty())
            .map(std::fs::File::from)
            .map_err(io::Error::from)
    };
    let mut stat = String::new();
    let stat_file = file("stat")?;
    // The directory of a process belongs to its user, unless it is undumpable; its status tells.
    let mut status = String::new();
    file("status")?.read_to_string(&mut status)?;
    (&stat_file).take(4096).read_to_string(&mut stat)?;
    let mut arguments = Vec::new();
    file("cmdline")?
        .take(COMMAND_LIMIT)
        .read_to_end(&mut arguments)?;
    let boot = clock_gettime(ClockId::Realtime).tv_sec - clock_gettime(ClockId::Boottime).tv_sec;
    Ok(parse(
        number,
        &stat,
        &status,
        &arguments,
        boot,
        clock_ticks_per_second(),
    ))
}

/// Puts together proc_pid_stat(5), proc_pid_status(5) and proc_pid_cmdline(5).
fn parse(
    pid: i32,
    stat: &str,
    status: &str,
    arguments: &[u8],
    boot: i64,
    ticks: u64,
) -> Option<Process> {
    // The name may hold anything, parentheses and spaces too: the last one closes it.
    let (head, rest) = stat.rsplit_once(") ")?;
    let name = head.split_once('(')?.1;
    let fields: Vec<&str> = rest.split(' ').collect();
    // Field 3 of the manual page is the first here.
    let field = |number: usize| fields.get(number - 3)?.trim().parse::<u64>().ok();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let command = if arguments.is_empty() {
        format!("[{name}]")
    } else {
        let text = String::from_utf8_lossy(arguments);
        text.trim_end_matches('\0').replace('\0', " ")
    };
    Some(Process {
        pid,
        parent_pid: fields.get(1)?.parse().ok()?,
        uid: uid.split_whitespace().next()?.parse().ok()?,
        start_time: boot + i64::try_from(field(22)? / ticks).ok()?,
        cpu_time_us: (field(14)? + field(15)?) * (1_000_000 / ticks),
        terminal: terminal_name(field(7)?),
        command,
        ..Default::default()
    })
}

fn terminal_name(number: u64) -> String {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    match (major, minor) {
        (0, 0) => "?".to_owned(),
        (136..=143, _) => format!("pts/{}", (major - 136) * 256 + minor),
        (4, 0..=63) => format!("tty{minor}"),
        (4, _) => format!("ttyS{}", minor - 64),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_hostile_name() {
        let stat = "42 (a) (b) S 7 42 42 34816 42 4194304 1 2 3 4 150 50 7 8 20 0 1 0 3000 1 2\n";
        let process = parse(
            42,
            stat,
            "Name:\tx\nUid:\t5\t6\t7\t8\n",
            b"sh\0-c\0ls\0",
            1000,
            100,
        )
        .expect("parsed");
        assert_eq!(process.parent_pid, 7);
        assert_eq!(process.uid, 5);
        assert_eq!(process.cpu_time_us, 2_000_000);
        assert_eq!(process.start_time, 1030);
        assert_eq!(process.terminal, "pts/0");
        assert_eq!(process.command, "sh -c ls");
        let thread = parse(2, stat, "Uid:\t0\t0\t0\t0\n", b"", 0, 100).expect("parsed");
        assert_eq!(thread.command, "[a) (b]");
    }

    #[test]
    fn nonsense_is_left_out() {
        assert!(parse(1, "", "", b"", 0, 100).is_none());
        assert!(parse(1, "1 (x) S", "Uid:\t0", b"", 0, 100).is_none());
    }
}
