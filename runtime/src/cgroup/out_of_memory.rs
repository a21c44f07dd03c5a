//! The host's word for a want of memory that the guest's kernel has ended: engines look for it in the
//! host's cgroup (`oom_kill` in memory.events, or the events of memory.oom_control), and say
//! `OOMKilled`. Nobody can write there but the host's kernel, so it gets something to kill: a process
//! of this program that wants more than the cgroup allows just then. Nobody else is in the cgroup at
//! that time but the one who stands for the container's process, and what is changed is put back.

use std::{
    ffi::OsString,
    fs::{self, File},
    hint::black_box,
    io::{self, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};

use super::{Cgroup, CgroupError, Undo, Version, before, io_error, put};
use crate::wait::{Deadline, poll};

/// The name that the program is called by to be killed.
const NAME: &str = "bulkhead-oom";
/// What the cgroup allows more meanwhile than there is: enough for those who are not to be killed.
const ALLOWED_MIB: usize = 8;
/// Without a limit that holds, no more is taken.
const MOST_MIB: usize = 8 * ALLOWED_MIB;
/// Longer than the kernel puts a notice off.
const NOTICE: Duration = Duration::from_millis(30);

impl Cgroup {
    /// Has the host's kernel count a kill for want of memory here. Does nothing where memory is not
    /// counted, or where processes are that are not the container's own, whose pid is given.
    pub fn report_out_of_memory(&self, own: u32) -> Result<(), CgroupError> {
        let Some((version, place)) = self.memory() else {
            return Ok(());
        };
        let processes = place.join("cgroup.procs");
        let there = fs::read_to_string(&processes).map_err(io_error("read", &processes))?;
        if there.lines().any(|pid| pid != own.to_string()) {
            tracing::debug!("others are in the cgroup, so it does not tell of the want of memory");
            return Ok(());
        }
        let mut victim = Victim::spawn().map_err(io_error("start a process for", place))?;
        put(victim.0.id(), place)?;
        // Only now: should that take a kill, it is to be this one.
        let undo = tighten(version, place);
        let killed = victim
            .wait()
            .map_err(io_error("wait for a process in", place));
        undo.put_back();
        if version == Version::Two {
            wait_for_notice(place);
        }
        if !killed? {
            tracing::warn!(
                "the cgroup {} does not tell of the want of memory",
                place.display()
            );
        }
        Ok(())
    }

    /// Where memory is limited.
    fn memory(&self) -> Option<(Version, &Path)> {
        if let Some((_, place)) = self.with_controller("memory").next() {
            return Some((Version::One, place));
        }
        let unified = self
            .places
            .iter()
            .find(|(hierarchy, _)| hierarchy.version == Version::Two);
        unified
            .map(|(_, place)| (Version::Two, place.as_path()))
            .filter(|(_, place)| place.join("memory.max").exists())
    }
}

/// Until those who watch the file have been told of the last change, which the kernel puts off for a hundredth of a
/// second after the one before (`CGROUP_FILE_NOTIFY_MIN_INTV`): containerd's shim looks no more once the container has ended.
fn wait_for_notice(place: &Path) {
    let mut text = String::new();
    if let Ok(mut events) = File::open(place.join("memory.events"))
        && events.read_to_string(&mut text).is_ok()
    {
        // At the deadline they had been told before this was read.
        let _ = poll(
            &mut [PollFd::new(&events, PollFlags::PRI)],
            Some(Deadline::after(NOTICE)),
        );
    }
}

/// Allows little more than what cannot be reclaimed, and no swap. What cannot be set shows in the victim's end.
fn tighten(version: Version, place: &Path) -> Undo {
    let allowed = (held_for_good(version, place) + (ALLOWED_MIB << 20)).to_string();
    let settings = match version {
        Version::One => [
            ("memory.swappiness", "0"),
            ("memory.limit_in_bytes", allowed.as_str()),
        ],
        Version::Two => [("memory.swap.max", "0"), ("memory.max", allowed.as_str())],
    };
    let changed = settings.into_iter().filter_map(|(name, value)| {
        let path: PathBuf = place.join(name);
        let held = before(&path, value)?;
        fs::write(&path, value).ok()?;
        Some((path, held))
    });
    Undo(changed.collect())
}

/// Bytes of a cgroup that are no copies of files: the memory of a machine that was there, say.
fn held_for_good(version: Version, place: &Path) -> usize {
    let read = |file: &str| fs::read_to_string(place.join(file)).unwrap_or_default();
    let (usage, files) = match version {
        Version::One => ("memory.usage_in_bytes", "cache"),
        Version::Two => ("memory.current", "file"),
    };
    let (usage, details) = (read(usage), read("memory.stat"));
    let detail = |key: &str| {
        let mut lines = details.lines().filter_map(|line| line.split_once(' '));
        let value = lines.find_map(|(name, value)| (name == key).then_some(value));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let usage: usize = usage.trim().parse().unwrap_or(0);
    usage
        .saturating_sub(detail(files))
        .saturating_add(detail("shmem"))
}

/// A process that takes memory once its standard input ends.
struct Victim(Child);

impl Victim {
    fn spawn() -> io::Result<Self> {
        let child = Command::new("/proc/self/exe")
            .arg0(NAME)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Self)?;
        // The first to go, before whoever stands for the container's process.
        fs::write(format!("/proc/{}/oom_score_adj", child.0.id()), "1000")?;
        Ok(child)
    }

    /// Lets it go ahead; says whether it was killed.
    fn wait(&mut self) -> io::Result<bool> {
        let status = self.0.wait()?;
        Ok(status.signal() == Some(libc::SIGKILL))
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether the program is called to be killed.
pub fn is_called(mut arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.next().is_some_and(|name| name == NAME)
}

/// Takes memory until the kernel has none left here.
pub fn take_memory() -> ExitCode {
    // The kernel's log has it.
    let _ = rustix::thread::set_name(c"bulkhead-oom");
    let _ = io::stdin().read(&mut [0]);
    let taken: Vec<_> = (0..MOST_MIB)
        .map(|_| black_box(vec![1_u8; 1 << 20]))
        .collect();
    drop(black_box(taken));
    ExitCode::FAILURE
}
