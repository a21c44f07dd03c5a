//! User and group ids of a container's user namespace and what they are outside of it
//! (user_namespaces(7)). Without such a namespace an id is itself.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use oci_spec::runtime::{Linux, LinuxIdMapping};
use rustix::{
    fs::{self, Mode, OFlags},
    process::Pid,
};

use crate::error::{Attempt, Error, Result};

/// Lines for `uid_map` and `gid_map`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IdMaps {
    uids: Vec<Range>,
    gids: Vec<Range>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    inside: u32,
    outside: u32,
    size: u32,
}

/// Checks the mappings of a container with a user namespace.
pub(super) fn plan(linux: &Linux) -> Result<IdMaps> {
    Ok(IdMaps {
        uids: ranges("linux.uidMappings", linux.uid_mappings().as_deref())?,
        gids: ranges("linux.gidMappings", linux.gid_mappings().as_deref())?,
    })
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
    // The set-up works as the namespace's root.
    if translate(&ranges, 0).is_none() {
        let problem = "must map container id 0, as the container is set up by it";
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
