//! User and group ids of a container's user namespace and what they are outside of it
//! (user_namespaces(7)). Without such a namespace an id is itself.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use oci_spec::runtime::{Linux, LinuxIdMapping, Mount};
use rustix::{
    fs::{self, Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
    process::Pid,
};

use crate::{
    error::{Attempt, Error, Result},
    sys::{self, Forked},
};

/// Lines for `uid_map` and `gid_map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IdMaps {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

/// Lines in a map, at most.
const MOST_RANGES: usize = 340;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    size: u32,
}

/// Checks the mappings of a container with a user namespace.
pub(super) fn plan(linux: &Linux) -> Result<IdMaps> {
    let maps = IdMaps {
        uids: ranges("linux.uidMappings", linux.uid_mappings().as_deref())?,
        gids: ranges("linux.gidMappings", linux.gid_mappings().as_deref())?,
    };
    for (field, ranges) in [
        ("linux.uidMappings", &maps.uids),
        ("linux.gidMappings", &maps.gids),
    ] {
        // The set-up works as the namespace's root.
        if translate(ranges, 0).is_none() {
            let problem = "must map container id 0, as the container is set up by it";
            return Err(Error::invalid(field, problem));
        }
    }
    Ok(maps)
}

/// Checks the mappings of a mount, if it has any.
pub(super) fn of_mount(field: &str, mount: &Mount) -> Result<Option<IdMaps>> {
    let maps = IdMaps {
        uids: ranges(
            &format!("{field}.uidMappings"),
            mount.uid_mappings().as_deref(),
        )?,
        gids: ranges(
            &format!("{field}.gidMappings"),
            mount.gid_mappings().as_deref(),
        )?,
    };
    match (maps.uids.is_empty(), maps.gids.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(maps)),
        (true, false) => Err(missing_half(field, "uidMappings", "gidMappings")),
        (false, true) => Err(missing_half(field, "gidMappings", "uidMappings")),
    }
}

fn missing_half(field: &str, missing: &str, given: &str) -> Error {
    let problem = format!("is needed together with {given}");
    Error::invalid(format!("{field}.{missing}"), problem)
}

fn ranges(field: &str, mappings: Option<&[LinuxIdMapping]>) -> Result<Vec<Range>> {
    let mut ranges = Vec::new();
    for (index, mapping) in mappings.unwrap_or_default().iter().enumerate() {
        let range = Range {
            inside: mapping.container_id(),
            outside: mapping.host_id(),
            size: mapping.size(),
        };
        let fits = |first: u32| range.size > 0 && first.checked_add(range.size).is_some();
        if !fits(range.inside) || !fits(range.outside) {
            return Err(Error::invalid(
                format!("{field}[{index}].size"),
                "is 0 or too large",
            ));
        }
        ranges.push(range);
    }
    // More than the kernel takes (user_namespaces(7)) would only be found out later.
    if ranges.len() > MOST_RANGES {
        let problem = format!("has more than {MOST_RANGES} entries");
        return Err(Error::invalid(field, problem));
    }
    Ok(ranges)
}

fn translate(ranges: &[Range], inside: u32) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let offset = inside.checked_sub(range.inside)?;
        (offset < range.size).then_some(range.outside + offset)
    })
}

impl IdMaps {
    /// What a user and a group of the container are outside of it.
    pub(super) fn outside(&self, uid: u32, gid: u32) -> Result<(u32, u32)> {
        let missing = |field: &str, id: u32| {
            Error::invalid(field, format!("{id} is not mapped by the user namespace"))
        };
        Ok((
            translate(&self.uids, uid).ok_or_else(|| missing("process.user.uid", uid))?,
            translate(&self.gids, gid).ok_or_else(|| missing("process.user.gid", gid))?,
        ))
    }

    /// A user namespace with these maps, which nobody is in: a process is born there and ends.
    pub(super) fn namespace(&self, proc: BorrowedFd<'_>) -> Result<OwnedFd> {
        let action = || "make a user namespace for id-mapped mounts";
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).or_cannot(action)?;
        let user = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
        let (pid, pidfd) = match sys::fork(user, None).or_cannot(action)? {
            Forked::Parent(pid, pidfd) => (pid, pidfd),
            Forked::Child => {
                // Until it is killed; or the agent ends, and the guest with it.
                drop(writer);
                let _ = rustix::io::read(&reader, &mut [0]);
                sys::exit_now(0)
            }
        };
        let written = self.write(proc, pid);
        let path = format!("{}/ns/user", pid.as_raw_nonzero());
        let namespace = fs::openat(proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        // It may have ended, which is what is wanted.
        let _ = sys::signal(pidfd.as_fd(), libc::SIGKILL);
        written?;
        namespace.or_cannot(action)
    }

    /// Gives the maps to a process that was born in a new user namespace.
    pub(super) fn write(&self, proc: BorrowedFd<'_>, pid: Pid) -> Result<()> {
        for (file, field, ranges) in [
            ("uid_map", "linux.uidMappings", &self.uids),
            ("gid_map", "linux.gidMappings", &self.gids),
        ] {
            let lines = ranges
                .iter()
                .map(|r| format!("{} {} {}\n", r.inside, r.outside, r.size));
            write_of(proc, Some(pid), file, &lines.collect::<String>())
                .or_cannot(|| format!("write the {file} of the container ({field})"))?;
        }
        Ok(())
    }
}

/// Writes a file of a process in procfs.
pub(super) fn write_of(
    proc: BorrowedFd<'_>,
    pid: Option<Pid>,
    file: &str,
    value: &str,
) -> io::Result<()> {
    let path = match pid {
        Some(pid) => format!("{}/{file}", pid.as_raw_nonzero()),
        None => format!("self/{file}"),
    };
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = fs::openat(proc, path, flags, Mode::empty())?;
    rustix::io::write(file.as_fd(), value.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(json: serde_json::Value) -> Result<IdMaps> {
        plan(&serde_json::from_value(json).expect("linux"))
    }

    #[test]
    fn ids_are_translated() {
        let mapping = serde_json::json!([
            {"containerID": 0, "hostID": 1000, "size": 1},
            {"containerID": 1, "hostID": 100_000, "size": 65_535}
        ]);
        let maps = maps(serde_json::json!({"uidMappings": mapping, "gidMappings": mapping}));
        let maps = maps.expect("valid");
        assert_eq!(maps.outside(0, 2).expect("mapped"), (1000, 100_001));
        assert!(maps.outside(65_536, 0).is_err());
    }

    #[test]
    fn mounts_need_both_kinds_of_mappings() {
        let of = |mappings: serde_json::Value| {
            let mut mount = serde_json::json!({"destination": "/x"});
            for (key, value) in mappings.as_object().expect("object") {
                mount[key] = value.clone();
            }
            of_mount("mounts[2]", &serde_json::from_value(mount).expect("mount"))
        };
        let mapping = serde_json::json!([{"containerID": 5, "hostID": 7, "size": 1}]);
        let both = serde_json::json!({"uidMappings": mapping, "gidMappings": mapping});
        assert!(of(both).expect("valid").is_some());
        assert!(
            of(serde_json::json!({"uidMappings": []}))
                .expect("valid")
                .is_none()
        );
        for (one, field) in [
            ("uidMappings", "mounts[2].gidMappings: "),
            ("gidMappings", "mounts[2].uidMappings: "),
        ] {
            let error = of(serde_json::json!({one: mapping})).expect_err("refused");
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }

    #[test]
    fn wrong_mappings_are_named() {
        for (mapping, field) in [
            (serde_json::json!([]), "linux.uidMappings:"),
            (
                serde_json::json!([{"containerID": 1, "hostID": 0, "size": 1}]),
                "linux.uidMappings:",
            ),
            (
                serde_json::json!([{"containerID": 0, "hostID": u32::MAX, "size": 2}]),
                "linux.uidMappings[0].size:",
            ),
        ] {
            let error = maps(serde_json::json!({"uidMappings": mapping})).expect_err("refused");
            assert!(error.to_string().starts_with(field), "{error}");
        }
    }
}
