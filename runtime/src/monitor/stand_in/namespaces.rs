//! The namespaces that the stand-in has because the container has them in the guest: new ones of the
//! kinds that the configuration asks for, another container's where it names that. Its mount and
//! network namespaces are made otherwise ([`View`](super::View), `network`).

use std::{
    fmt::Write,
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::PathBuf,
};

use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use serde::{Deserialize, Serialize};

use crate::{sys, user_namespace};

/// Those of one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespaces {
    /// Each with the path of the one to share, if it is not to be a new one.
    kinds: Vec<(Kind, Option<PathBuf>)>,
    host_name: Option<String>,
    domain_name: Option<String>,
    map: Option<Map>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Ipc,
    Uts,
    Cgroup,
    // The last: without rights in the first one, no other can be made.
    User,
}

impl Kind {
    fn of(kind: LinuxNamespaceType) -> Option<Self> {
        Some(match kind {
            LinuxNamespaceType::Ipc => Self::Ipc,
            LinuxNamespaceType::Uts => Self::Uts,
            LinuxNamespaceType::Cgroup => Self::Cgroup,
            LinuxNamespaceType::User => Self::User,
            // A time namespace is for processes that are yet to be made.
            LinuxNamespaceType::Time
            | LinuxNamespaceType::Pid
            | LinuxNamespaceType::Network
            | LinuxNamespaceType::Mount => return None,
        })
    }

    fn flags(self) -> (UnshareFlags, LinkNameSpaceType) {
        match self {
            Self::Ipc => (
                UnshareFlags::NEWIPC,
                LinkNameSpaceType::InterProcessCommunication,
            ),
            Self::Uts => (
                UnshareFlags::NEWUTS,
                LinkNameSpaceType::HostNameAndNISDomainName,
            ),
            Self::Cgroup => (UnshareFlags::NEWCGROUP, LinkNameSpaceType::ControlGroup),
            Self::User => (UnshareFlags::NEWUSER, LinkNameSpaceType::User),
        }
    }
}

fn listed(spec: &Spec) -> impl Iterator<Item = &LinuxNamespace> {
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten()
}

impl Namespaces {
    /// What a configuration asks for.
    pub fn of(spec: &Spec) -> Self {
        let mut kinds: Vec<_> = listed(spec)
            .filter_map(|listed| Some((Kind::of(listed.typ())?, listed.path().clone())))
            .collect();
        kinds.sort();
        let new = |kind| kinds.contains(&(kind, None));
        let names = new(Kind::Uts);
        Self {
            host_name: spec.hostname().clone().filter(|_| names),
            domain_name: spec.domainname().clone().filter(|_| names),
            map: new(Kind::User).then(|| Map::of(spec)),
            kinds,
        }
    }

    /// What is to be written once its user namespace is there.
    pub(super) fn map(&self) -> Option<Map> {
        self.map.clone()
    }

    /// Moves the calling process, which has one thread, there.
    pub(super) fn enter(&self, opened: Vec<Option<File>>) -> Result<(), Errno> {
        for ((kind, _), opened) in self.kinds.iter().zip(opened) {
            let (new, link) = kind.flags();
            match opened {
                Some(namespace) => move_into_link_name_space(namespace.as_fd(), Some(link))?,
                None => sys::unshare(new)?,
            }
            if *kind == Kind::Uts {
                if let Some(name) = &self.host_name {
                    rustix::system::sethostname(name.as_bytes())?;
                }
                if let Some(name) = &self.domain_name {
                    rustix::system::setdomainname(name.as_bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Opens those of other containers, as long as the paths mean what they did.
    pub(super) fn open(&self) -> io::Result<Vec<Option<File>>> {
        let open = |path: &Option<PathBuf>| path.as_ref().map(File::open).transpose();
        self.kinds.iter().map(|(_, path)| open(path)).collect()
    }
}

/// The mappings of a user namespace, user_namespaces(7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Map {
    users: String,
    groups: String,
}

impl Map {
    fn of(spec: &Spec) -> Self {
        let linux = spec.linux().as_ref();
        let lines = |mappings: Option<&Vec<LinuxIdMapping>>| {
            let mut lines = String::new();
            for mapping in mappings.into_iter().flatten() {
                let (inside, outside) = (mapping.container_id(), mapping.host_id());
                // Writing to a string does not fail.
                let _ = writeln!(lines, "{inside} {outside} {}", mapping.size());
            }
            lines
        };
        Self {
            users: lines(linux.and_then(|linux| linux.uid_mappings().as_ref())),
            groups: lines(linux.and_then(|linux| linux.gid_mappings().as_ref())),
        }
    }

    /// Maps the user namespace of a process.
    pub(super) fn write(&self, pid: u32) -> io::Result<()> {
        for (file, lines) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            if lines.is_empty() {
                continue;
            }
            match fs::write(format!("/proc/{pid}/{file}"), lines) {
                // The guest maps what it likes; who is root in a namespace of his own has those ids that he
                // was given.
                Err(error)
                    if error.kind() == io::ErrorKind::PermissionDenied
                        && user_namespace::is_somebodys() =>
                {
                    tracing::debug!("no mappings in the stand-in's {file}: {error}");
                }
                written => written?,
            }
        }
        Ok(())
    }
}

/// Whether the configuration lists a PID namespace.
pub(in crate::monitor) fn has_pid_namespace(spec: &Spec) -> bool {
    listed(spec).any(|listed| listed.typ() == LinuxNamespaceType::Pid)
}

/// Makes a process in a PID namespace of its own if the configuration lists one. In another container's
/// that one could not end before whoever started this process has looked for its end. The calling process
/// must have one thread.
pub(super) fn in_pid_namespace<R>(spec: &Spec, make: impl FnOnce() -> R) -> io::Result<R> {
    if !has_pid_namespace(spec) {
        return Ok(make());
    }
    let own = File::open("/proc/self/ns/pid")?;
    let return_home = || move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID));
    // Who is root in a namespace of his own could not return to the host's PID namespace.
    if return_home() == Err(Errno::PERM) {
        return Ok(make());
    }
    sys::unshare(UnshareFlags::NEWPID)?;
    let made = make();
    // Who is made after this is in our own again.
    return_home()?;
    Ok(made)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(linux: serde_json::Value) -> Spec {
        let spec = json!({"ociVersion": "1.2.0", "hostname": "inside", "linux": linux});
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn user_namespaces_come_last_and_names_need_their_own() {
        let asked = Namespaces::of(&spec(json!({
            "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
            "namespaces": [{"type": "user"}, {"type": "pid"}, {"type": "uts"}, {"type": "network"},
                {"type": "ipc", "path": "/proc/7/ns/ipc"}, {"type": "mount"}]})));
        let ipc = PathBuf::from("/proc/7/ns/ipc");
        let kinds = [
            (Kind::Ipc, Some(ipc)),
            (Kind::Uts, None),
            (Kind::User, None),
        ];
        assert_eq!(asked.kinds, kinds);
        assert_eq!(asked.host_name.as_deref(), Some("inside"));
        assert_eq!(asked.map().unwrap().users, "0 1000 10\n");
        let joined = json!({"namespaces": [{"type": "uts", "path": "/proc/7/ns/uts"}]});
        let asked = Namespaces::of(&spec(joined));
        assert_eq!((asked.host_name, asked.map), (None, None));
    }
}
