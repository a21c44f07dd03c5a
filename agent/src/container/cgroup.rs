//! A container's cgroup (v2): makes it, applies settings, freezes, kills, reads statistics,
//! removes it. All reads and writes go through a descriptor of its directory.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::{
    fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags},
    io::Errno,
    process::Pid,
};
use tokio::io::Interest;

use super::{
    device_filter,
    resources::{Available, Setting},
};
use crate::{
    error::{Attempt, Error, Result},
    sys,
};
use bulkhead_agent_protocol::ErrorKind;

/// Where cgroup v2 is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// How long the kernel may take to freeze, thaw or empty a cgroup.
const DEADLINE: Duration = Duration::from_secs(10);

/// A cgroup; dropping it removes it, once it is empty.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    removed: AtomicBool,
}

/// Hands every controller that the kernel has to the cgroups of containers.
pub fn delegate_controllers() -> io::Result<()> {
    let root = Path::new(MOUNT_POINT);
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: Vec<_> = controllers
        .split_whitespace()
        .map(|c| format!("+{c}"))
        .collect();
    std::fs::write(root.join("cgroup.subtree_control"), enable.join(" "))
}

/// The guest's CPUs and memory nodes; empty without a cpuset controller, whose settings then fail
/// by name.
pub(super) fn available() -> Available {
    let read = |file| std::fs::read_to_string(Path::new(MOUNT_POINT).join(file));
    Available {
        cpus: read("cpuset.cpus.effective").unwrap_or_default(),
        mems: read("cpuset.mems.effective").unwrap_or_default(),
    }
}

impl Cgroup {
    /// Makes the container's cgroup. Its name has a prefix, so that no container's id is the name
    /// of a file that the kernel keeps there.
    pub fn create(container: &str) -> Result<Self> {
        let path = Path::new(MOUNT_POINT).join(format!("container-{container}"));
        let action = || format!("make the cgroup {}", path.display());
        match fs::mkdir(&path, Mode::from_raw_mode(0o755)) {
            // Left over by an earlier container of this id; it is empty, or this fails.
            Err(Errno::EXIST) => {
                fs::rmdir(&path).or_cannot(action)?;
                fs::mkdir(&path, Mode::from_raw_mode(0o755)).or_cannot(action)?;
            }
            made => made.or_cannot(action)?,
        }
        let directory = open_directory(CWD, &path).or_cannot(action)?;
        let removed = AtomicBool::new(false);
        Ok(Self {
            path,
            directory,
            removed,
        })
    }

    /// Where it is, for mount namespaces other than the agent's.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Writes the settings.
    pub fn apply(&self, settings: &[Setting]) -> Result<()> {
        for setting in settings {
            let Setting { field, file, value } = setting;
            self.write(file, value)
                .map_err(|cause| match Errno::from_io_error(&cause) {
                    Some(Errno::NOENT) => Error::unsupported(
                        field.clone(),
                        format!("the guest kernel has no cgroup file {file}; remove it"),
                    ),
                    Some(Errno::INVAL | Errno::RANGE | Errno::NODEV | Errno::OPNOTSUPP) => {
                        Error::invalid(
                            field.clone(),
                            format!("{file} does not take {value:?}: {cause}"),
                        )
                    }
                    _ => Error::System {
                        action: format!("write {value:?} to {file} ({field})"),
                        cause,
                    },
                })?;
        }
        Ok(())
    }

    /// Confines the cgroup to the devices that the rules allow.
    pub fn filter_devices(&self, rules: &[device_filter::Rule]) -> Result<()> {
        sys::attach_device_filter(self.directory(), &device_filter::program(rules))
            .or_cannot(|| "load the device filter (linux.resources.devices)")
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = fs::openat(&self.directory, file, flags, Mode::empty())?;
        std::fs::File::from(file).write_all(value.as_bytes())
    }

    /// The text of one of its files.
    pub fn read(&self, file: &str) -> io::Result<String> {
        read_at(self.directory(), file)
    }

    /// A number in a file of "key value" lines.
    pub fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        keyed_value(&self.read(file).ok()?, key)
    }

    /// Whether the kernel has ended a process here for want of memory.
    pub fn out_of_memory(&self) -> bool {
        self.keyed("memory.events", "oom_kill")
            .is_some_and(|kills| kills > 0)
    }

    /// Stops or continues all processes; returns when that is so.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        let action = if frozen {
            "pause the container"
        } else {
            "resume the container"
        };
        self.write("cgroup.freeze", value).or_cannot(|| action)?;
        let expected = u64::from(frozen);
        let reached = self
            .wait_for("frozen", expected)
            .await
            .or_cannot(|| action)?;
        if !reached && frozen {
            let _ = self.write("cgroup.freeze", "0");
        }
        reached.then_some(()).ok_or_else(|| {
            let seconds = DEADLINE.as_secs();
            let text = format!("cannot {action}: its processes did not follow within {seconds} s");
            Error::new(ErrorKind::Internal, text)
        })
    }

    /// Kills every process of the cgroup and of those below it, and waits until they are gone.
    pub async fn kill(&self) -> Result<()> {
        let action = || format!("kill what runs in {}", self.path.display());
        self.write("cgroup.kill", "1").or_cannot(action)?;
        let reached = self.wait_for("populated", 0).await.or_cannot(action)?;
        reached.then_some(()).ok_or_else(|| {
            let text = format!("cannot {}: some of it is still alive", action());
            Error::new(ErrorKind::Internal, text)
        })
    }

    /// Waits until `cgroup.events` shows the value; false if that takes too long.
    async fn wait_for(&self, key: &str, value: u64) -> io::Result<bool> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let events = fs::openat(&self.directory, "cgroup.events", flags, Mode::empty())?;
        let events = sys::watch(events, Interest::PRIORITY)?;
        let reached = async {
            loop {
                // The first poll reports what changed before the file was opened; a change after
                // this read raises a new event.
                let mut buffer = [0; 256];
                let length = rustix::io::pread(&events, &mut buffer, 0)?;
                let text = String::from_utf8_lossy(&buffer[..length]);
                if keyed_value(&text, key) == Some(value) {
                    return Ok(true);
                }
                events.ready(Interest::PRIORITY).await?.clear_ready();
            }
        };
        tokio::time::timeout(DEADLINE, reached)
            .await
            .unwrap_or(Ok(false))
    }

    /// Every process in the cgroup and below, in the agent's PID namespace.
    pub fn processes(&self) -> Result<Vec<Pid>> {
        let mut found = Vec::new();
        collect_processes(self.directory(), &mut found)
            .or_cannot(|| format!("list the processes of {}", self.path.display()))?;
        Ok(found)
    }
}

impl Cgroup {
    /// Removes it, with those that the container has made below it. All must be empty.
    pub fn remove(&self) -> Result<()> {
        if self.removed.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        remove_below(self.directory())
            .and_then(|()| Ok(fs::rmdir(&self.path)?))
            .or_cannot(|| format!("remove the cgroup {}", self.path.display()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(error = %error.chain(), "a cgroup stays behind");
        }
    }
}

/// The cgroup that a process is in.
pub(super) fn of_process(proc: BorrowedFd<'_>, pid: i32) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut text = String::new();
    std::fs::File::from(fs::openat(
        proc,
        format!("{pid}/cgroup"),
        flags,
        Mode::empty(),
    )?)
    .read_to_string(&mut text)?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = Path::new(MOUNT_POINT).join(path.ok_or(io::ErrorKind::NotFound)?);
    open_directory(CWD, &path)
}

fn open_directory(at: BorrowedFd<'_>, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(fs::openat(at, path, flags, Mode::empty())?)
}

fn read_at(directory: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let mut text = String::new();
    std::fs::File::from(fs::openat(directory, file, flags, Mode::empty())?)
        .read_to_string(&mut text)?;
    Ok(text)
}

fn directories(directory: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && name != c"." && name != c".." {
            match open_directory(directory, name) {
                Ok(below) => found.push(below),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(found)
}

fn collect_processes(directory: BorrowedFd<'_>, found: &mut Vec<Pid>) -> io::Result<()> {
    // A threaded cgroup refuses to list processes: its threads are of processes listed above.
    match read_at(directory, "cgroup.procs") {
        Ok(text) => found.extend(text.lines().filter_map(|l| Pid::from_raw(l.parse().ok()?))),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(error) => return Err(error),
    }
    for below in directories(directory)? {
        collect_processes(below.as_fd(), found)?;
    }
    Ok(())
}

fn remove_below(directory: BorrowedFd<'_>) -> io::Result<()> {
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && name != c"." && name != c".." {
            remove_below(open_directory(directory, name)?.as_fd())?;
            fs::unlinkat(directory, name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(())
}

/// The number after `key` in lines of "key value".
pub(super) fn keyed_value(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.strip_prefix(' '))?;
    line.trim().parse().ok()
}
