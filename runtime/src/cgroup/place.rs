//! Where a container's cgroup lies in each hierarchy of the host: the hierarchies that are mounted,
//! and the two forms of `linux.cgroupsPath`.
//!
//! A path in the cgroupfs driver's form follows the rule that runc has (runtime-spec, config-linux
//! "Cgroups Path", leaves it to the runtime): an absolute path counts from the root of each
//! hierarchy, a relative one from the caller's own cgroup (version 1) or that one's parent (version
//! 2, since a cgroup with processes cannot have children with controllers); without a path the
//! container's id is a relative one.
//!
//! A path in the systemd driver's form, `slice:prefix:name`, names the cgroup that systemd would
//! make for that scope; it is made directly, without asking systemd.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{CgroupError, Version};

/// The slice of scopes that name none, as in runc run by root.
const DEFAULT_SLICE: &str = "system.slice";
/// The prefix of scopes of containers without a path.
const DEFAULT_PREFIX: &str = "bulkhead";

/// Who is told to make cgroups (runc's --systemd-cgroup, crun's --cgroup-manager), which decides the
/// form of paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The file system's form.
    #[default]
    Cgroupfs,
    /// `slice:prefix:name`.
    Systemd,
    /// Nobody: limits hold in the guest, and the host's process stays where its caller is.
    Disabled,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub(super) version: Version,
    pub(super) mount: PathBuf,
    /// Version 1: its controllers, or `name=…`.
    pub(super) controllers: Vec<String>,
}

/// The hierarchies of /proc/self/mountinfo.
pub(super) fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
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

/// Judges a configuration's path without looking at the host.
pub fn check_path(path: Option<&Path>, id: &str, driver: Driver) -> Result<(), CgroupError> {
    resolve(path, id, driver).map(|_| ())
}

/// The path of a configuration as a path below the hierarchies' roots, or relative to the caller.
pub(super) fn resolve(
    path: Option<&Path>,
    id: &str,
    driver: Driver,
) -> Result<PathBuf, CgroupError> {
    let path = path.filter(|path| !path.as_os_str().is_empty());
    let resolved = match (driver, path) {
        (Driver::Systemd, path) => return scope(path, id),
        (Driver::Cgroupfs | Driver::Disabled, path) => path.unwrap_or(Path::new(id)),
    };
    if resolved
        .components()
        .any(|part| part == Component::ParentDir)
    {
        return Err(CgroupError::Path(resolved.to_owned()));
    }
    if systemd_parts(resolved).is_some() {
        return Err(CgroupError::Systemd(resolved.to_owned()));
    }
    Ok(resolved.to_owned())
}

fn systemd_parts(path: &Path) -> Option<[&str; 3]> {
    let parts: Vec<_> = path.to_str()?.split(':').collect();
    <[&str; 3]>::try_from(parts).ok()
}

/// The cgroup of a scope (systemd.slice(5), systemd.scope(5)), absolute.
fn scope(path: Option<&Path>, id: &str) -> Result<PathBuf, CgroupError> {
    let default = ["", DEFAULT_PREFIX, id];
    let (slice, prefix, name) = match path {
        None => default.into(),
        Some(path) => systemd_parts(path)
            .ok_or_else(|| CgroupError::NotSystemd(path.to_owned()))?
            .into(),
    };
    let wrong = || CgroupError::Unit(path.unwrap_or(Path::new(id)).to_owned());
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    let unit = match (prefix, name) {
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    if name.is_empty() || unit.contains('/') || unit.len() > 255 {
        return Err(wrong());
    }
    Ok(slice_path(slice).ok_or_else(wrong)?.join(unit))
}

/// `a-b.slice` lies in `a.slice`; `-.slice` is the root.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::from("/");
    if stem == "-" {
        return Some(path);
    }
    if stem.contains('/') {
        return None;
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    Some(path)
}

/// Where a path lies in a hierarchy; `own` is /proc/self/cgroup.
pub(super) fn locate(hierarchy: &Hierarchy, own: &str, path: &Path) -> PathBuf {
    let own = own_cgroups(own);
    let base = match (path.strip_prefix("/"), hierarchy.version) {
        (Ok(below), _) => return hierarchy.mount.join(below),
        (Err(_), Version::One) => hierarchy
            .controllers
            .iter()
            .find_map(|controller| own.get(controller.as_str()).copied()),
        (Err(_), Version::Two) => own.get("").and_then(|own| Path::new(own).parent()),
    };
    let base = base.unwrap_or(Path::new("/"));
    let below = base.strip_prefix("/").unwrap_or(base);
    hierarchy.mount.join(below).join(path)
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
        let path = resolve(path.map(Path::new), "one", Driver::Cgroupfs).unwrap();
        hierarchies(mounts)
            .iter()
            .map(|hierarchy| locate(hierarchy, own, &path).display().to_string())
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
    fn scopes_lie_where_systemd_puts_them() {
        for (path, expected) in [
            (
                Some("machine.slice:libpod:abc"),
                "/machine.slice/libpod-abc.scope",
            ),
            (
                Some("kubepods-burstable-pod1.slice:cri-containerd:x"),
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/\
                 cri-containerd-x.scope",
            ),
            (Some("-.slice:a:b"), "/a-b.scope"),
            (Some(":a:b"), "/system.slice/a-b.scope"),
            (Some("a.slice::b"), "/a.slice/b.scope"),
            (Some("a.slice:p:b.slice"), "/a.slice/b.slice"),
            (None, "/system.slice/bulkhead-one.scope"),
            (Some(""), "/system.slice/bulkhead-one.scope"),
        ] {
            let found = resolve(path.map(Path::new), "one", Driver::Systemd).unwrap();
            assert_eq!(found, Path::new(expected));
        }
    }

    #[test]
    fn paths_that_are_refused() {
        let refused =
            |path: &str, driver| resolve(Some(Path::new(path)), "one", driver).unwrap_err();
        let error = refused("/a/../../b", Driver::Cgroupfs);
        assert!(matches!(error, CgroupError::Path(_)));
        let error = refused("a.slice:b:c", Driver::Cgroupfs);
        assert!(matches!(error, CgroupError::Systemd(_)));
        for path in ["/a/b", "a:b", "a:b:c:d"] {
            let error = refused(path, Driver::Systemd);
            assert!(matches!(error, CgroupError::NotSystemd(_)), "{path}");
        }
        for path in [
            "a:b:c",
            "a/b.slice:c:d",
            "a--b.slice:c:d",
            "-a.slice:c:d",
            "..slice/:c:d",
            "a.slice:c:d/e",
            "a.slice:../c:d",
            "a.slice:c:",
        ] {
            let error = refused(path, Driver::Systemd);
            assert!(matches!(error, CgroupError::Unit(_)), "{path}: {error}");
        }
    }
}
