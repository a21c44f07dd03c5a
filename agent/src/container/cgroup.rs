//! A container's cgroup (v2): makes it, applies settings, freezes, kills, reads statistics,
//! removes it. All reads and writes go through a descriptor of its directory.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
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
    resources::{Present, Setting},
};
use crate::{
    error::{Attempt, Error, Result},
    sys::{self, BpfHook},
};
use bulkhead_agent_protocol::ErrorKind;

/// Where cgroup v2 is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// Names of the files that go with a cgroup to whom it is delegated.
const DELEGATED: &str = "/sys/kernel/cgroup/delegate";

/// How long the kernel may take to freeze, thaw or empty a cgroup.
const DEADLINE: Duration = Duration::from_secs(10);

/// A cgroup; dropping it removes it, once it is empty.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    /// The program that decides about devices.
    device_filter: Mutex<Option<OwnedFd>>,
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

/// What a new cgroup is like. CPUs and memory nodes are empty without a cpuset controller, whose
/// settings then fail by name.
pub(super) fn pristine() -> Present {
    let read = |file| std::fs::read_to_string(Path::new(MOUNT_POINT).join(file));
    Present {
        cpus: read("cpuset.cpus.effective").unwrap_or_default(),
        mems: read("cpuset.mems.effective").unwrap_or_default(),
        ..Present::default()
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
        Ok(Self {
            path,
            directory,
            device_filter: Mutex::default(),
            removed: AtomicBool::new(false),
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

    /// What it is like now.
    pub(super) fn present(&self) -> Present {
        let text = |file: &str| self.read(file).unwrap_or_default();
        let number = |file: &str| text(file).trim().parse().ok();
        let bandwidth = text("cpu.max");
        let (quota, period) = bandwidth.trim().split_once(' ').unwrap_or_default();
        let pristine = pristine();
        Present {
            quota: if quota.is_empty() { "max" } else { quota }.to_owned(),
            period: period.parse().unwrap_or(pristine.period),
            burst: text("cpu.max.burst").trim().parse().unwrap_or(0),
            memory: number("memory.max"),
            swap: number("memory.swap.max"),
            usage: number("memory.current").unwrap_or(0),
            ..pristine
        }
    }

    /// Writes the settings.
    pub fn apply(&self, settings: &[Setting]) -> Result<()> {
        settings.iter().try_for_each(|setting| self.set(setting))
    }

    /// Writes the settings; if one fails, those before it are put back.
    pub(super) fn change(&self, settings: &[Setting]) -> Result<()> {
        let mut former: Vec<(&Setting, String)> = Vec::with_capacity(settings.len());
        for setting in settings {
            let value = self.read(&setting.file).unwrap_or_default();
            if let Err(error) = self.set(setting) {
                for (setting, value) in former.into_iter().rev() {
                    if let Err(error) = self.write_lines(&setting.file, &value) {
                        tracing::warn!(%error, "{} keeps its new value", setting.file);
                    }
                }
                return Err(error);
            }
            former.push((setting, value));
        }
        Ok(())
    }

    fn set(&self, setting: &Setting) -> Result<()> {
        let Setting {
            field, file, value, ..
        } = setting;
        let Err(cause) = self.write_lines(file, value) else {
            return Ok(());
        };
        Err(match Errno::from_io_error(&cause) {
            Some(Errno::NOENT) if setting.holds_without_file => return Ok(()),
            Some(Errno::NOENT) => Error::unsupported(
                field.clone(),
                format!("the guest kernel has no cgroup file {file}; remove it"),
            ),
            Some(Errno::INVAL | Errno::RANGE | Errno::NODEV | Errno::OPNOTSUPP | Errno::ACCESS) => {
                Error::invalid(
                    field.clone(),
                    format!("{file} does not take {value:?}: {cause}"),
                )
            }
            _ => Error::System {
                action: format!("write {value:?} to {file} ({field})"),
                cause,
            },
        })
    }

    /// Confines the cgroup to the devices that the rules allow, in place of earlier rules.
    pub fn filter_devices(&self, rules: &[device_filter::Rule]) -> Result<()> {
        let program = device_filter::program(rules);
        let mut present = self
            .device_filter
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let replaced = present.as_ref().map(AsFd::as_fd);
        let program = sys::attach_program(BpfHook::DEVICE, self.directory(), &program, replaced)
            .or_cannot(|| "load the device filter (linux.resources.devices)")?;
        *present = Some(program);
        Ok(())
    }

    /// Makes a user (id of the guest) its owner, so that the container can make cgroups below it
    /// (runtime-spec config-linux.md "Cgroup ownership"). Limits stay the agent's.
    pub(super) fn give_to(&self, uid: u32) -> Result<()> {
        let action = || format!("give the cgroup {} to user {uid}", self.path.display());
        let owner = Some(fs::Uid::from_raw(uid));
        fs::fchown(&self.directory, owner, None).or_cannot(action)?;
        let files = std::fs::read_to_string(DELEGATED).or_cannot(action)?;
        for file in files.lines() {
            match fs::chownat(
                &self.directory,
                file,
                owner,
                None,
                AtFlags::SYMLINK_NOFOLLOW,
            ) {
                // Of a controller that the guest does not have.
                Err(Errno::NOENT) => {}
                given => given.or_cannot(action)?,
            }
        }
        Ok(())
    }

    /// The kernel takes one line of a file per write. Writing an empty one resets a list.
    fn write_lines(&self, file: &str, value: &str) -> io::Result<()> {
        if value.trim().is_empty() {
            return self.write(file, "\n");
        }
        value.lines().try_for_each(|line| self.write(file, line))
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

    /// Names of its files.
    pub(super) fn files(&self) -> io::Result<Vec<String>> {
        let entries = Dir::read_from(&self.directory)?;
        let name = |entry: rustix::io::Result<fs::DirEntry>| {
            Ok(entry?.file_name().to_string_lossy().into_owned())
        };
        entries.map(name).collect()
    }

    /// A number in a file of "key value" lines.
    pub fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        keyed_value(&self.read(file).ok()?, key)
    }

    /// How many processes the kernel has ended here for want of memory.
    pub fn out_of_memory_kills(&self) -> u64 {
        self.keyed("memory.events", "oom_kill").unwrap_or(0)
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
        let reached = self.watch("cgroup.events", key, |found| found == value);
        match tokio::time::timeout(DEADLINE, reached).await {
            Ok(reached) => reached.map(|_| true),
            Err(_late) => Ok(false),
        }
    }

    /// Waits until the kernel has ended more than `seen` processes here for want of memory, and
    /// returns how many.
    pub(super) async fn out_of_memory_above(&self, seen: u64) -> Result<u64> {
        self.watch("memory.events", "oom_kill", |kills| kills > seen)
            .await
            .or_cannot(|| format!("watch memory.events of {}", self.path.display()))
    }

    /// Waits until a file of "key value" lines shows a wanted number, and returns it.
    async fn watch(&self, file: &str, key: &str, wanted: impl Fn(u64) -> bool) -> io::Result<u64> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let events = fs::openat(&self.directory, file, flags, Mode::empty())?;
        let events = sys::watch(events, Interest::PRIORITY)?;
        loop {
            // The first poll reports what changed before the file was opened; a change after
            // this read raises a new event.
            let mut buffer = [0; 256];
            let length = rustix::io::pread(&events, &mut buffer, 0)?;
            let text = String::from_utf8_lossy(&buffer[..length]);
            if let Some(found) = keyed_value(&text, key).filter(|found| wanted(*found)) {
                return Ok(found);
            }
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
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
