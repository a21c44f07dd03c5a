//! What a runtime may have left behind: processes, mounts, cgroups, sockets, directories.
//!
//! Each test has a process of its own that adopts orphans, and a mount namespace of its own, so
//! what belongs to the test is known for certain.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process::Other;

/// Mount points before the test.
pub(crate) struct Before(BTreeSet<String>);

impl Before {
    pub(crate) fn take() -> Result<Self> {
        Ok(Self(mounts()?))
    }

    /// Checks that nothing is left of any container: `root` is the runtime's state directory,
    /// `prefix` begins the name of every container and cgroup of the test.
    pub(crate) fn check(&self, root: &Path, prefix: &str) -> Result<()> {
        let mut left = Vec::new();
        for pid in descendants()? {
            // A process that has been told to end may need a moment.
            let ended = Other::open(pid).map_or(true, |process| process.wait().is_ok());
            if !ended || alive(pid) {
                left.push(format!("process {pid}: {}", command_line(pid)));
            }
        }
        let now = mounts()?;
        left.extend(
            now.difference(&self.0)
                .map(|mount| format!("mount: {mount}")),
        );
        left.extend(
            cgroups(prefix)
                .iter()
                .map(|path| format!("cgroup {}", path.display())),
        );
        left.extend(
            sockets(prefix)?
                .into_iter()
                .map(|socket| format!("socket: {socket}")),
        );
        for place in [
            root,
            Path::new("/run/bulkhead"),
            Path::new("/run"),
            Path::new("/tmp"),
        ] {
            left.extend(entries(place).into_iter().filter_map(|name| {
                (name.contains(prefix) || place == root)
                    .then(|| format!("in {}: {name}", place.display()))
            }));
        }
        ensure!(left.is_empty(), "left behind: {}", left.join("; "));
        Ok(())
    }
}

/// Ends every process below this one. They are children of this process or of its children, so
/// their ids cannot have been taken by others while they are not waited for.
pub(crate) fn end_descendants() {
    while let Ok(pids) = descendants() {
        let processes: Vec<_> = pids
            .into_iter()
            .filter_map(|pid| Other::open(pid).ok())
            .collect();
        if processes.is_empty() {
            break;
        }
        for process in processes {
            let _ = process.signal(rustix::process::Signal::KILL);
            if process.wait().is_err() {
                return;
            }
        }
    }
}

/// Living processes below this one, zombies left out.
pub(crate) fn descendants() -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some((parent, state)) = parent_and_state(pid) {
            all.push((pid, parent, state));
        }
    }
    let mut found = vec![i32::try_from(std::process::id())?];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            all.iter()
                .filter(|process| process.1 == parent)
                .map(|process| process.0),
        );
        next += 1;
    }
    let living = |pid: &i32| {
        all.iter()
            .any(|process| process.0 == *pid && process.2 != 'Z')
    };
    Ok(found.into_iter().skip(1).filter(living).collect())
}

fn alive(pid: i32) -> bool {
    parent_and_state(pid).is_some_and(|(_, state)| state != 'Z')
}

/// From /proc/PID/stat: the name may hold anything, so the fields count from its last bracket.
fn parent_and_state(pid: i32) -> Option<(i32, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

pub(crate) fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

fn mounts() -> Result<BTreeSet<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("reading the mount table")?;
    // Field 4 is the root, 5 the mount point, then options, and after the dash the type.
    Ok(text
        .lines()
        .map(|line| {
            let place: Vec<_> = line.split(' ').skip(3).take(2).collect();
            let kind = line.split_once(" - ").map_or("", |(_, rest)| rest);
            format!("{} ({kind})", place.join(" at "))
        })
        .collect())
}

/// The cgroups whose name holds `name`, in every hierarchy of the host.
pub(crate) fn cgroups(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut places = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(place) = places.pop() {
        for entry in fs::read_dir(&place).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            }
            places.push(entry.path());
        }
    }
    found
}

fn sockets(prefix: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/net/unix").context("reading the list of sockets")?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|path| path.contains(prefix))
        .map(str::to_owned)
        .collect())
}

pub(crate) fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
