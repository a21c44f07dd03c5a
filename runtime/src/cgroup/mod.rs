//! The host's cgroup of a container: the VM's process sits in it, so that the host's limits and
//! accounting hold for everything that the guest does, and beside it the stand-in, so that whoever
//! looks for the cgroup of the container's process finds it. Where it lies is in `place.rs`, what is
//! written into it in `limits.rs`; here it is made, filled, changed and removed.

mod devices;
mod limits;
pub mod out_of_memory;
mod place;

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};
use thiserror::Error;

pub use limits::Limits;
pub use place::{Driver, check_path};

use limits::Setting;
use place::{Hierarchy, hierarchies};

use crate::{
    state::parent,
    wait::{Deadline, poll},
};

/// How long processes that were killed may stay in a cgroup.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// The host's cgroups could not be used.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The path climbs.
    #[error("config.json: linux.cgroupsPath: {0:?} must not contain \"..\"")]
    Path(PathBuf),
    /// The path is in systemd's form.
    #[error(
        "config.json: linux.cgroupsPath: {0:?} has the form slice:prefix:name, which is meant for \
         --systemd-cgroup: pass that, or give a path"
    )]
    Systemd(PathBuf),
    /// The path is not in systemd's form; the middle is runc's words.
    #[error(
        "config.json: linux.cgroupsPath: expected cgroupsPath to be of format \
         \"slice:prefix:name\" for systemd cgroups, got {0:?} instead; leave --systemd-cgroup out \
         for a plain path"
    )]
    NotSystemd(PathBuf),
    /// The parts of the path are no names of units.
    #[error(
        "config.json: linux.cgroupsPath: {0:?} names no unit of systemd: a slice ends with \
         \".slice\" and has no empty part, a name has no \"/\""
    )]
    Unit(PathBuf),
    /// No hierarchy is mounted.
    #[error("no cgroup file system is mounted; mount cgroup2 at /sys/fs/cgroup")]
    NotMounted,
    /// A file or directory could not be used.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A cgroup does not have a limit.
    #[error(
        "cannot set the limit {value:?}: there is no {path}, since the host's kernel lacks that limit or its \
         controller is not enabled there; enable it, or run the container without that limit"
    )]
    NoSuchLimit {
        /// What was to be written.
        value: String,
        /// Where.
        path: PathBuf,
    },
    /// A limit could not be set.
    #[error("cannot set the limit {value:?} in {path}")]
    Limit {
        /// What was to be written.
        value: String,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    /// Whether this user may not change the host's cgroups there.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
        ))
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io {
        operation,
        path,
        source,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A container's cgroup in every hierarchy.
#[derive(Clone, Debug)]
pub struct Cgroup {
    places: Vec<(Hierarchy, PathBuf)>,
}

impl Cgroup {
    /// Finds where the cgroup is to be; makes nothing.
    pub fn locate(path: Option<&Path>, id: &str, driver: Driver) -> Result<Self, CgroupError> {
        let path = place::resolve(path, id, driver)?;
        if driver == Driver::Disabled {
            return Ok(Self::nowhere());
        }
        let own = Path::new("/proc/self/cgroup");
        let own = fs::read_to_string(own).map_err(io_error("read", own))?;
        let places = mounted()?
            .into_iter()
            .map(|hierarchy| {
                let place = place::locate(&hierarchy, &own, &path);
                (hierarchy, place)
            })
            .collect();
        Ok(Self { places })
    }

    /// The cgroup that was made at these places, [`Cgroup::places`].
    pub fn at(places: &[PathBuf]) -> Result<Self, CgroupError> {
        if places.is_empty() {
            return Ok(Self::nowhere());
        }
        let hierarchies = mounted()?;
        let places = places.iter().filter_map(|place| {
            // One hierarchy may be mounted below another: /sys/fs/cgroup/unified.
            let hierarchy = hierarchies
                .iter()
                .filter(|hierarchy| place.starts_with(&hierarchy.mount))
                .max_by_key(|hierarchy| hierarchy.mount.as_os_str().len())?;
            Some((hierarchy.clone(), place.clone()))
        });
        Ok(Self {
            places: places.collect(),
        })
    }

    /// No cgroup: every operation on it does nothing.
    pub fn nowhere() -> Self {
        Self { places: Vec::new() }
    }

    /// Its directory in each hierarchy.
    pub fn places(&self) -> Vec<PathBuf> {
        self.places.iter().map(|(_, place)| place.clone()).collect()
    }

    /// Its directory, if version 2 is all there is.
    pub fn unified(&self) -> Option<&Path> {
        match self.places.as_slice() {
            [(hierarchy, place)] if hierarchy.version == Version::Two => Some(place),
            _ => None,
        }
    }

    /// For people: which version, and where.
    pub fn describe(&self) -> String {
        let version = |version| {
            self.places
                .iter()
                .find(|(place, _)| place.version == version)
        };
        match (version(Version::One), version(Version::Two)) {
            (None, Some((hierarchy, _))) => {
                format!("version 2 at {}", hierarchy.mount.display())
            }
            _ => format!("version 1, {} hierarchies", self.places.len()),
        }
    }

    /// The directories that belong to the container, to be written down before they are made:
    /// first the container's own, then those above them that do not exist yet.
    pub fn directories(&self) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = Vec::new();
        for (hierarchy, place) in &self.places {
            directories.push(place.clone());
            let missing = place
                .ancestors()
                .skip(1)
                .take_while(|above| *above != hierarchy.mount && !above.exists());
            directories.extend(missing.map(Path::to_owned));
        }
        directories
    }

    /// Makes the cgroup and sets all limits but that of CPU time.
    pub fn make(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (hierarchy, place) in &self.places {
            make_directory(hierarchy, place)?;
        }
        for (place, setting) in
            self.settings(|version, controllers| limits.settings(version, controllers))
        {
            set(place, &setting)?;
        }
        for (_, place) in self.with_controller("devices") {
            devices::write(place, &limits.devices)?;
        }
        limits.warn_of_network(|controller| self.with_controller(controller).next().is_some());
        Ok(())
    }

    /// The cgroups of version 1 that have a controller: one at most.
    fn with_controller<'s>(
        &'s self,
        controller: &'s str,
    ) -> impl Iterator<Item = &'s (Hierarchy, PathBuf)> {
        let has = move |name: &String| name == controller;
        let places = self.places.iter();
        places.filter(move |(hierarchy, _)| hierarchy.controllers.iter().any(has))
    }

    /// Limits CPU time. Apart from the rest because it comes later: a guest that boots on a small
    /// quota would take seconds for what is not the container's doing.
    pub fn limit_cpu_time(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (place, setting) in
            self.settings(|version, controllers| limits.cpu_time(version, controllers))
        {
            set(place, &setting)?;
        }
        Ok(())
    }

    /// Sets all limits; what was set before one that fails is put back. Returns what puts
    /// everything back should it be unwanted after all.
    pub fn change(&self, limits: &Limits) -> Result<Undo, CgroupError> {
        let mut undo = Undo(Vec::new());
        let settings = self.settings(|version, controllers| {
            let mut all = limits.settings(version, controllers);
            all.extend(limits.cpu_time(version, controllers));
            all
        });
        for (place, setting) in settings {
            let Some((path, value)) = choose(place, &setting) else {
                continue;
            };
            let before = before(&path, value);
            if let Err(error) = set(place, &setting) {
                undo.put_back();
                return Err(error);
            }
            undo.0.extend(before.map(|before| (path, before)));
        }
        Ok(undo)
    }

    /// What to write where. In a host that has both versions, each controller is in one of them.
    fn settings(&self, of: impl Fn(Version, &[String]) -> Vec<Setting>) -> Vec<(&Path, Setting)> {
        let split: Vec<&str> = self
            .places
            .iter()
            .filter(|(hierarchy, _)| hierarchy.version == Version::One)
            .flat_map(|(hierarchy, _)| hierarchy.controllers.iter().map(String::as_str))
            .collect();
        let mut found = Vec::new();
        for (hierarchy, place) in &self.places {
            for setting in of(hierarchy.version, &hierarchy.controllers) {
                let elsewhere = hierarchy.version == Version::Two
                    && setting.choices.iter().any(|(name, _)| {
                        let controller = name.split('.').next().unwrap_or(name);
                        split.contains(&if controller == "io" {
                            "blkio"
                        } else {
                            controller
                        })
                    });
                if !elsewhere {
                    found.push((place.as_path(), setting));
                }
            }
        }
        found
    }

    /// Whether a process is in the cgroup, of any hierarchy.
    pub fn holds(&self, pid: u32) -> bool {
        let pid = pid.to_string();
        self.places.iter().any(|(_, place)| {
            let processes = fs::read_to_string(place.join("cgroup.procs"));
            processes.is_ok_and(|processes| processes.lines().any(|line| line == pid))
        })
    }

    /// Puts a process into the cgroup.
    pub fn place(&self, pid: u32) -> Result<(), CgroupError> {
        let mut places = self.places.iter();
        places.try_for_each(|(_, place)| put(pid, place))
    }

    /// Puts a virtual machine's process into the cgroup from another one, if it is there, with the threads that
    /// the host's kernel has for the machine: with version 1 they are where the process was when it made the
    /// machine, and no cgroup can be removed that they are in.
    pub fn take_over(&self, vmm: u32, from: &Self) -> Result<(), CgroupError> {
        if !from.holds(vmm) {
            return Ok(());
        }
        self.place(vmm)?;
        for (hierarchy, place) in &self.places {
            let same = |(other, _): &&(Hierarchy, PathBuf)| other == hierarchy;
            let Some((_, left)) = from.places.iter().find(same) else {
                continue;
            };
            let file = left.join("cgroup.procs");
            let rest = fs::read_to_string(&file).map_err(io_error("read", &file))?;
            for pid in rest.lines().filter_map(|line| line.parse().ok()) {
                if is_kernel_thread(pid) {
                    put(pid, place)?;
                }
            }
        }
        Ok(())
    }
}

fn put(pid: u32, place: &Path) -> Result<(), CgroupError> {
    let file = place.join("cgroup.procs");
    fs::write(&file, pid.to_string()).map_err(io_error("put a process into the cgroup", &file))
}

/// Its parent is kthreadd, which nobody else's is.
fn is_kernel_thread(pid: u32) -> bool {
    parent(pid).is_ok_and(|parent| parent == 2)
}

/// Removes what [`Cgroup::directories`] named, in that order. What is gone is fine; what is still
/// used by others above the container's own cgroups is left to them.
pub fn remove(directories: &[PathBuf]) -> Result<(), CgroupError> {
    let mut failure = None;
    for directory in directories {
        match remove_one(directory) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy
                    && directories
                        .iter()
                        .any(|other| other != directory && other.starts_with(directory)) => {}
            Err(error) => failure = Some(io_error("remove the cgroup", directory)(error)),
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Removes a cgroup, in version 2 waiting a while for processes in it that are about to be gone.
fn remove_one(directory: &Path) -> io::Result<()> {
    let busy = match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => error,
        result => return result,
    };
    let deadline = Deadline::after(EMPTY_LIMIT);
    let Ok(mut events) = fs::File::open(directory.join("cgroup.events")) else {
        return Err(busy);
    };
    loop {
        // cgroup-v2.rst, "cgroup.events": a change after this read wakes the poll.
        let mut text = String::new();
        events.seek(io::SeekFrom::Start(0))?;
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            return fs::remove_dir(directory);
        }
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(deadline))? == 0 {
            return Err(busy);
        }
    }
}

/// Values to put back, last first.
#[derive(Debug)]
#[must_use]
pub struct Undo(Vec<(PathBuf, String)>);

impl Undo {
    /// Puts them back, as far as the kernel lets us.
    pub fn put_back(&self) {
        for (path, value) in self.0.iter().rev() {
            if let Err(error) = fs::write(path, value) {
                tracing::warn!("cannot put {value:?} back into {}: {error}", path.display());
            }
        }
    }
}

/// What a file holds, in the form that writing `value` would replace.
fn before(path: &Path, value: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let name = path.file_name()?.to_str()?;
    // A file with a line a device (or `default`): the one that is written.
    let device = value.split_once(' ').map(|(device, _)| device);
    let (Some(device), true) = (
        device,
        name.starts_with("io.") || name.starts_with("blkio."),
    ) else {
        // An empty cpuset is put back by an empty line, an empty write would be none.
        return Some(format!("{}\n", text.trim_end()));
    };
    let line = text
        .lines()
        .find(|line| line.split(' ').next() == Some(device));
    Some(line.map_or_else(
        || match name {
            "io.max" => format!("{device} rbps=max wbps=max riops=max wiops=max"),
            "io.weight" | "io.bfq.weight" => format!("{device} default"),
            _ => format!("{device} 0"),
        },
        str::to_owned,
    ))
}

fn mounted() -> Result<Vec<Hierarchy>, CgroupError> {
    let mounts = Path::new("/proc/self/mountinfo");
    let mounts = fs::read_to_string(mounts).map_err(io_error("read", mounts))?;
    let hierarchies = hierarchies(&mounts);
    if hierarchies.is_empty() {
        return Err(CgroupError::NotMounted);
    }
    Ok(hierarchies)
}

fn make_directory(hierarchy: &Hierarchy, place: &Path) -> Result<(), CgroupError> {
    let mut levels: Vec<_> = place
        .ancestors()
        .take_while(|above| *above != hierarchy.mount)
        .collect();
    levels.reverse();
    let mut above = hierarchy.mount.as_path();
    for level in levels {
        if hierarchy.version == Version::Two {
            delegate(above);
        }
        match fs::create_dir(level) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io_error("make the cgroup", level)(error)),
        }
        if hierarchy.controllers.iter().any(|name| name == "cpuset") {
            inherit_cpuset(above, level)?;
        }
        above = level;
    }
    Ok(())
}

/// Hands every controller down. One that cannot be is missed only by a limit that needs it, and
/// that one says so: hence no error here.
fn delegate(directory: &Path) {
    let Ok(available) = fs::read_to_string(directory.join("cgroup.controllers")) else {
        return;
    };
    let control = directory.join("cgroup.subtree_control");
    let handed = fs::read_to_string(&control).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        if !handed
            .split_ascii_whitespace()
            .any(|name| name == controller)
        {
            let _ = fs::write(&control, format!("+{controller}"));
        }
    }
}

/// cpusets(7): a new cpuset of version 1 is empty, and takes no process until it is filled.
fn inherit_cpuset(above: &Path, level: &Path) -> Result<(), CgroupError> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = level.join(name);
        let current = fs::read_to_string(&file).map_err(io_error("read", &file))?;
        if current.trim().is_empty() {
            let from = above.join(name);
            let value = fs::read_to_string(&from).map_err(io_error("read", &from))?;
            fs::write(&file, value.trim()).map_err(io_error("write", &file))?;
        }
    }
    Ok(())
}

/// The file of a setting and its value; `None` where there is nothing to be set.
fn choose<'s>(place: &Path, setting: &'s Setting) -> Option<(PathBuf, &'s str)> {
    let mut choices = setting
        .choices
        .iter()
        .map(|(name, value)| (place.join(name), value.as_str()));
    let there = choices.clone().find(|(path, _)| path.exists());
    there.or_else(|| choices.next_back().filter(|_| !setting.optional))
}

fn set(place: &Path, setting: &Setting) -> Result<(), CgroupError> {
    let Some((path, value)) = choose(place, setting) else {
        return Ok(());
    };
    // Not made where it is missing: that would be refused as if the right to were.
    let open = OpenOptions::new().write(true).truncate(true).open(&path);
    let value = value.to_owned();
    match open.and_then(|mut file| file.write_all(value.as_bytes())) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && place.is_dir() => {
            Err(CgroupError::NoSuchLimit { value, path })
        }
        Err(source) => Err(CgroupError::Limit {
            value,
            path,
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cgroup(version: Version, place: &Path) -> Cgroup {
        let hierarchy = Hierarchy {
            version,
            mount: place.to_owned(),
            controllers: Vec::new(),
        };
        Cgroup {
            places: vec![(hierarchy, place.to_owned())],
        }
    }

    fn limits(resources: serde_json::Value) -> Limits {
        let guest = crate::guest_size::GuestSize {
            cpus: 1,
            memory_mib: 256,
        };
        Limits::from_resources(&serde_json::from_value(resources).unwrap(), guest)
    }

    #[test]
    fn a_change_can_be_put_back() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        for (name, text) in [
            ("memory.max", "max\n"),
            ("cpuset.cpus", "\n"),
            ("io.max", "8:0 rbps=5 wbps=max riops=max wiops=max\n"),
            ("cpu.max", "max 100000\n"),
        ] {
            fs::write(place.join(name), text).unwrap();
        }
        let changed = limits(json!({
            "memory": {"limit": 1 << 20}, "cpu": {"cpus": "0", "quota": 5000},
            "blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}]}}));
        let undo = cgroup(Version::Two, place).change(&changed).unwrap();
        let read = |name: &str| fs::read_to_string(place.join(name)).unwrap();
        assert_eq!(read("memory.max"), "335544320");
        assert_eq!(read("cpu.max"), "5000 100000");
        undo.put_back();
        assert_eq!(read("memory.max"), "max\n");
        assert_eq!(read("cpuset.cpus"), "\n");
        assert_eq!(read("cpu.max"), "max 100000\n");
        assert_eq!(read("io.max"), "8:0 rbps=5 wbps=max riops=max wiops=max");
    }

    #[test]
    fn a_change_that_fails_half_way_is_put_back() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.max"), "max").unwrap();
        fs::create_dir(directory.path().join("pids.max")).unwrap();
        let changed = limits(json!({"memory": {"limit": 1 << 20}, "pids": {"limit": 5}}));
        let error = cgroup(Version::Two, directory.path())
            .change(&changed)
            .unwrap_err();
        assert!(error.to_string().contains("pids.max"), "{error}");
        let memory = fs::read_to_string(directory.path().join("memory.max")).unwrap();
        assert_eq!(memory.trim(), "max");
    }

    #[test]
    fn a_limit_that_the_kernel_lacks_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let wanted = limits(json!({"blockIO": {"weight": 500}}));
        let error = cgroup(Version::Two, directory.path())
            .change(&wanted)
            .unwrap_err();
        let file = directory.path().join("io.weight");
        let text = error.to_string();
        assert!(
            text.contains(&format!("there is no {}", file.display())),
            "{text}"
        );
        assert!(!file.exists());
    }

    #[test]
    fn with_both_versions_each_controller_is_in_one() {
        let directory = tempfile::tempdir().unwrap();
        let mut both = cgroup(Version::Two, &directory.path().join("unified"));
        both.places.push((
            Hierarchy {
                version: Version::One,
                mount: directory.path().to_owned(),
                controllers: vec!["memory".to_owned(), "blkio".to_owned()],
            },
            directory.path().join("memory"),
        ));
        let limits = limits(json!({"memory": {"limit": 1 << 20}, "pids": {"limit": 5},
            "blockIO": {"weight": 10}}));
        let names: Vec<_> = both
            .settings(|version, controllers| limits.settings(version, controllers))
            .iter()
            .map(|(place, setting)| {
                let place = place.file_name().unwrap().to_str().unwrap();
                format!("{place}/{}", setting.choices[0].0)
            })
            .collect();
        assert_eq!(
            names,
            [
                "unified/pids.max",
                "memory/memory.limit_in_bytes",
                "memory/blkio.weight"
            ]
        );
    }

    #[test]
    fn removal_takes_what_is_there_and_is_repeatable() {
        let directory = tempfile::tempdir().unwrap();
        let (above, own) = (directory.path().join("a"), directory.path().join("a/b"));
        fs::create_dir_all(&own).unwrap();
        let directories = [own.clone(), above.clone()];
        remove(&directories).unwrap();
        assert!(!above.exists());
        remove(&directories).unwrap();
    }
}
