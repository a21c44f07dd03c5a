//! The host's cgroup of a container: the VM's process sits in it, so that the host's limits and
//! accounting hold for everything that the guest does. Where a cgroup lies follows the rule that
//! runc has (runtime-spec, config-linux "Cgroups Path" leaves it to the runtime): an absolute path
//! counts from the root of each hierarchy, a relative one from the caller's own cgroup (version 1)
//! or that one's parent (version 2, since a cgroup with processes cannot have children with
//! controllers); without a path the container's id is a relative one.

mod limits;

use std::{
    collections::HashMap,
    fs,
    io::{self, Read, Seek},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags};
use thiserror::Error;

pub use limits::Limits;

use crate::wait::{Deadline, poll};

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
        "config.json: linux.cgroupsPath: {0:?} has the form slice:prefix:name, which needs \
         --systemd-cgroup, which is not supported: use the cgroupfs driver"
    )]
    Systemd(PathBuf),
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

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    mount: PathBuf,
    /// Version 1: its controllers, or `name=…`.
    controllers: Vec<String>,
}

/// A container's cgroup in every hierarchy.
#[derive(Clone, Debug)]
pub struct Cgroup {
    places: Vec<(Hierarchy, PathBuf)>,
}

impl Cgroup {
    /// Finds where the cgroup is to be; makes nothing.
    pub fn locate(path: Option<&Path>, id: &str) -> Result<Self, CgroupError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")
            .map_err(io_error("read", Path::new("/proc/self/mountinfo")))?;
        let own = fs::read_to_string("/proc/self/cgroup")
            .map_err(io_error("read", Path::new("/proc/self/cgroup")))?;
        Self::locate_in(&hierarchies(&mounts), &own, path, id)
    }

    /// No cgroup: every operation on it does nothing.
    pub fn nowhere() -> Self {
        Self { places: Vec::new() }
    }

    fn locate_in(
        hierarchies: &[Hierarchy],
        own: &str,
        path: Option<&Path>,
        id: &str,
    ) -> Result<Self, CgroupError> {
        let path = path
            .filter(|path| !path.as_os_str().is_empty())
            .unwrap_or(Path::new(id));
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(CgroupError::Path(path.to_owned()));
        }
        if path.to_string_lossy().split(':').count() == 3 {
            return Err(CgroupError::Systemd(path.to_owned()));
        }
        if hierarchies.is_empty() {
            return Err(CgroupError::NotMounted);
        }
        let own = own_cgroups(own);
        let places = hierarchies
            .iter()
            .map(|hierarchy| {
                let base = match (path.strip_prefix("/"), hierarchy.version) {
                    (Ok(below), _) => return (hierarchy.clone(), hierarchy.mount.join(below)),
                    (Err(_), Version::One) => hierarchy
                        .controllers
                        .iter()
                        .find_map(|controller| own.get(controller.as_str()).copied()),
                    (Err(_), Version::Two) => own.get("").and_then(|own| Path::new(own).parent()),
                };
                let base = base.unwrap_or(Path::new("/"));
                let below = base.strip_prefix("/").unwrap_or(base);
                (hierarchy.clone(), hierarchy.mount.join(below).join(path))
            })
            .collect();
        Ok(Self { places })
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
            match hierarchy.version {
                Version::Two => set(place, &limits.unified())?,
                Version::One => {
                    for controller in &hierarchy.controllers {
                        set(place, &limits.split(controller))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Limits CPU time. Apart from the rest because it comes later: a guest that boots on a small
    /// quota would take seconds for what is not the container's doing.
    pub fn limit_cpu_time(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (hierarchy, place) in &self.places {
            let files = match hierarchy.version {
                Version::Two => limits.unified_cpu_time(),
                Version::One if hierarchy.controllers.iter().any(|name| name == "cpu") => {
                    limits.split_cpu_time()
                }
                Version::One => continue,
            };
            set(place, &files)?;
        }
        Ok(())
    }

    /// Puts a process into the cgroup.
    pub fn place(&self, pid: u32) -> Result<(), CgroupError> {
        for (_, place) in &self.places {
            let file = place.join("cgroup.procs");
            fs::write(&file, pid.to_string())
                .map_err(io_error("put the virtual machine into the cgroup", &file))?;
        }
        Ok(())
    }
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

fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): fields after " - " are type, source and options.
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let mut before = before.split(' ');
        let (Some(root), Some(mount)) = (before.nth(3), before.next()) else {
            continue;
        };
        let mut after = after.split(' ');
        let version = match after.next() {
            Some("cgroup2") => Version::Two,
            Some("cgroup") => Version::One,
            _ => continue,
        };
        let options = after.nth(1).unwrap_or_default();
        let controllers = match version {
            Version::Two => Vec::new(),
            Version::One => {
                let known = |option: &&str| !matches!(*option, "rw" | "ro" | "xattr");
                options
                    .split(',')
                    .filter(known)
                    .map(str::to_owned)
                    .collect()
            }
        };
        let mount = PathBuf::from(mount.replace("\\040", " "));
        // A part of a hierarchy that is mounted elsewhere, or twice, is not another hierarchy.
        let twice = found
            .iter()
            .any(|other| other.version == version && other.controllers == controllers);
        if root == "/" && !twice {
            found.push(Hierarchy {
                version,
                mount,
                controllers,
            });
        }
    }
    found
}

/// cgroups(7), /proc/pid/cgroup: the caller's cgroup by controller; `""` for version 2.
fn own_cgroups(text: &str) -> HashMap<&str, &Path> {
    let mut own = HashMap::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        if let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        {
            for controller in controllers.split(',') {
                own.insert(controller, Path::new(path));
            }
        }
    }
    own
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

fn set(place: &Path, files: &[(&str, String)]) -> Result<(), CgroupError> {
    for (name, value) in files {
        let path = place.join(name);
        fs::write(&path, value).map_err(|source| CgroupError::Limit {
            value: value.clone(),
            path,
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    const SPLIT: &str = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
        32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
        33 30 0:29 /part /elsewhere rw - cgroup cgroup rw,memory\n\
        34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
        35 30 0:31 / /data rw - ext4 /dev/sda rw\n";

    fn places(mounts: &str, own: &str, path: Option<&str>) -> Vec<String> {
        Cgroup::locate_in(&hierarchies(mounts), own, path.map(Path::new), "one")
            .unwrap()
            .places
            .into_iter()
            .map(|(_, place)| place.display().to_string())
            .collect()
    }

    #[test]
    fn where_cgroups_lie() {
        let own = "0::/user/session\n";
        assert_eq!(places(UNIFIED, own, Some("/a/b")), ["/sys/fs/cgroup/a/b"]);
        assert_eq!(places(UNIFIED, own, Some("b")), ["/sys/fs/cgroup/user/b"]);
        assert_eq!(places(UNIFIED, own, None), ["/sys/fs/cgroup/user/one"]);
        assert_eq!(places(UNIFIED, "0::/\n", Some("")), ["/sys/fs/cgroup/one"]);
        let own = "3:cpu,cpuacct:/c\n1:name=systemd:/s\n0::/u/v\n";
        assert_eq!(
            places(SPLIT, own, None),
            [
                "/sys/fs/cgroup/cpu/c/one",
                "/sys/fs/cgroup/systemd/s/one",
                "/sys/fs/cgroup/unified/u/one"
            ]
        );
    }

    #[test]
    fn paths_that_are_refused() {
        let locate = |mounts: &str, path: &str| {
            Cgroup::locate_in(&hierarchies(mounts), "", Some(Path::new(path)), "one")
        };
        assert!(matches!(
            locate(UNIFIED, "/a/../../b"),
            Err(CgroupError::Path(_))
        ));
        assert!(matches!(
            locate(UNIFIED, "a.slice:b:c"),
            Err(CgroupError::Systemd(_))
        ));
        assert!(matches!(locate("", "/a"), Err(CgroupError::NotMounted)));
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
