//! Which process a recorded pid means: pids are reused, so a process is known by its pid and the
//! time it started, and signals go through a pidfd that was checked against both.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags},
    process::{Pid, PidfdFlags, Signal},
};
use serde::{Deserialize, Serialize};

/// A process of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks after boot (proc(5), /proc/pid/stat field 22).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The process that has this pid now.
    pub fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_time: read_start_time(pid)?,
        })
    }

    /// The calling process.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())
    }

    /// A handle on the process, if it still lives. A zombie does not: it has ended, its parent
    /// merely has not looked.
    pub fn open(self) -> io::Result<Option<LiveProcess>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let descriptor = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            // EINVAL: the number is still a session's or group's, the process is gone.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // Opened first and compared then: whatever the pid means after this, the descriptor means
        // the process that was compared.
        match read_start_time(self.pid) {
            Ok(start_time) if start_time == self.start_time => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        // Readable once every thread has ended; the state in /proc is the first thread's alone.
        let process = LiveProcess { descriptor };
        Ok((!process.wait(Duration::ZERO)?).then_some(process))
    }

    /// Whether the process lives.
    pub fn is_alive(self) -> bool {
        // When it cannot be told (no more descriptors, say), the safe answer is that it lives:
        // nothing is then taken away from under it.
        self.open().map_or(true, |process| process.is_some())
    }

    /// Whether the process has ended or does so in this time; when it cannot be told, it does not.
    pub fn ends_within(self, limit: Duration) -> bool {
        match self.open() {
            Ok(Some(process)) => process.wait(limit).unwrap_or(false),
            Ok(None) => true,
            Err(_) => false,
        }
    }
}

/// A process that lived when it was opened.
#[derive(Debug)]
pub struct LiveProcess {
    descriptor: OwnedFd,
}

impl LiveProcess {
    /// Kills the process; harmless when it has ended.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.descriptor, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the process has ended; false when it has not in this time.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let mut descriptors = [PollFd::new(&self.descriptor, PollFlags::IN)];
        Ok(crate::wait::poll(&mut descriptors, Some(crate::wait::Deadline::after(limit)))? > 0)
    }
}

impl From<LiveProcess> for OwnedFd {
    fn from(process: LiveProcess) -> Self {
        process.descriptor
    }
}

impl AsFd for LiveProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// The parent of a process.
pub fn parent(pid: u32) -> io::Result<u64> {
    read_field(pid, 4)
}

fn read_start_time(pid: u32) -> io::Result<u64> {
    read_field(pid, 22)
}

/// A number of proc_pid_stat(5), by that page's count.
fn read_field(pid: u32, number: usize) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_field(&stat, number).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/stat is malformed"),
        )
    })
}

fn parse_field(stat: &str, number: usize) -> Option<u64> {
    // The second field is the program's name in parentheses and may hold anything, parentheses
    // and spaces included: the fields are counted from the last one.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    fields.nth(number.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let stat = "12 (a) R 1 (b c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20 21\n";
        assert_eq!(parse_field(stat, 22), Some(4242));
        assert_eq!(parse_field(stat, 4), Some(1));
        assert_eq!(parse_field("12 (a", 22), None);
    }

    #[test]
    fn own_process_lives_and_another_start_time_does_not() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.is_alive());
        assert!(
            !ProcessIdentity {
                start_time: own.start_time + 1,
                ..own
            }
            .is_alive()
        );
        assert!(
            !ProcessIdentity {
                pid: u32::MAX,
                start_time: 0
            }
            .is_alive()
        );
    }

    #[test]
    fn a_dead_leader_of_a_session_that_lives_is_dead() {
        // What stays behind has the leader's number as its session's, and ends with its input.
        let script = "exec 3<&0; cat <&3 >/dev/null & exit 0";
        let mut leader = std::process::Command::new("setsid")
            .args(["sh", "-c", script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let input = leader.stdin.take();
        let identity = ProcessIdentity::of(leader.id()).unwrap();
        leader.wait().unwrap();
        assert!(identity.open().unwrap().is_none());
        drop(input);
    }

    #[test]
    fn a_killed_child_is_dead_even_before_it_is_reaped() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        let process = identity.open().unwrap().unwrap();
        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(10)).unwrap());
        assert!(!identity.is_alive());
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }
}
