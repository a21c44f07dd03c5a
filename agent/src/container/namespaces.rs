//! Which namespaces a container has of its own, which it joins, and which are the guest's.

use std::{collections::HashMap, sync::Arc};

use bulkhead_agent_protocol::ErrorKind;
use oci_spec::runtime::{Linux, LinuxNamespaceType};
use rustix::thread::ThreadNameSpaceType;

use super::Container;
use crate::{
    error::{Error, Result},
    network::Network,
};

/// Namespaces that the container has of its own, or shares with another one; the others are the
/// guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Namespaces {
    /// CLONE_NEW* of its own that a process is born into.
    pub(super) at_birth: u64,
    /// CLONE_NEW* of those of other containers.
    pub(super) joined: u64,
    /// A cgroup namespace of its own, entered once the process is in its cgroup.
    pub(super) cgroup: bool,
    /// A time namespace of its own, entered at `execve`.
    pub(super) time: bool,
}

impl Namespaces {
    /// Whether one of those of birth is its own.
    pub(super) fn owns(&self, flag: i32) -> bool {
        self.at_birth & u64::from(flag.unsigned_abs()) != 0
    }

    /// Whether one of those of birth is not the guest's.
    pub(super) fn has(&self, flag: i32) -> bool {
        self.owns(flag) || self.joins(flag)
    }

    /// Whether one is another container's.
    pub(super) fn joins(&self, flag: i32) -> bool {
        self.joined & u64::from(flag.unsigned_abs()) != 0
    }

    /// Whether its cgroup namespace is not the guest's.
    pub(super) fn has_cgroup(&self) -> bool {
        self.cgroup || self.joins(libc::CLONE_NEWCGROUP)
    }

    /// Whether its time namespace is not the guest's.
    pub(super) fn has_time(&self) -> bool {
        self.time || self.joins(libc::CLONE_NEWTIME)
    }
}

/// Containers whose namespaces another one joins, or what they have mounted somewhere.
#[derive(Debug, Default)]
pub(crate) struct Others {
    namespaces: Vec<(Kind, Arc<Container>)>,
    /// By index in the spec's mounts.
    mounts: HashMap<usize, Arc<Container>>,
}

/// A kind of namespace that can be joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    name: &'static str,
    flag: i32,
    kind: ThreadNameSpaceType,
}

const fn kind(name: &'static str, flag: i32, kind: ThreadNameSpaceType) -> Kind {
    Kind { name, flag, kind }
}

const KINDS: [Kind; 6] = [
    kind("pid", libc::CLONE_NEWPID, ThreadNameSpaceType::PROCESS_ID),
    kind(
        "ipc",
        libc::CLONE_NEWIPC,
        ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
    ),
    kind(
        "uts",
        libc::CLONE_NEWUTS,
        ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
    ),
    kind("network", libc::CLONE_NEWNET, ThreadNameSpaceType::NETWORK),
    kind(
        "cgroup",
        libc::CLONE_NEWCGROUP,
        ThreadNameSpaceType::CONTROL_GROUP,
    ),
    kind("time", libc::CLONE_NEWTIME, ThreadNameSpaceType::TIME),
];

/// One to be entered, with the process that has it.
pub(super) struct Entry<'a> {
    /// As in /proc/PID/ns.
    pub(super) file: &'static str,
    pub(super) kind: ThreadNameSpaceType,
    pub(super) of: &'a Container,
}

impl Others {
    /// Finds the containers by the request's `join_namespaces` and `join_mounts`.
    pub(crate) fn find(
        wanted: &HashMap<String, String>,
        mounts: &HashMap<u32, String>,
        container: impl Fn(&str) -> Result<Arc<Container>>,
    ) -> Result<Self> {
        let living = |field: &str, id: &str| {
            let other = container(id).map_err(|error| Error::invalid(field, error.chain()))?;
            if other.init.has_ended() {
                let text = format!("{field}: it has stopped; start it again first");
                return Err(Error::new(ErrorKind::WrongState, text));
            }
            Ok(other)
        };
        let mut found = Vec::with_capacity(wanted.len());
        for (name, id) in wanted {
            let Some(kind) = KINDS.into_iter().find(|kind| kind.name == name) else {
                let reason = format!(
                    "joining the {name} namespace of container {id}: give the container its own"
                );
                return Err(Error::unsupported("linux.namespaces", reason));
            };
            let field = format!("linux.namespaces: the {name} namespace of container {id}");
            found.push((kind, living(&field, id)?));
        }
        let mut of_mounts = HashMap::with_capacity(mounts.len());
        for (index, id) in mounts {
            let field = format!("mounts[{index}]: that of container {id}");
            let other = living(&field, id)?;
            of_mounts.extend(usize::try_from(*index).ok().map(|index| (index, other)));
        }
        // In the order in which they are entered.
        found.sort_by_key(|(kind, _)| KINDS.iter().position(|other| other == kind));
        Ok(Self {
            namespaces: found,
            mounts: of_mounts,
        })
    }

    /// The container whose mount this one of the spec is to be.
    pub(super) fn of_mount(&self, index: usize) -> Option<&Arc<Container>> {
        self.mounts.get(&index)
    }

    /// The container whose network is joined.
    pub(super) fn network_of(&self) -> Option<&Arc<Container>> {
        let mut others = self.namespaces.iter();
        others.find_map(|(kind, other)| (kind.flag == libc::CLONE_NEWNET).then_some(other))
    }

    /// The network that is joined.
    pub(super) fn network(&self) -> Option<&Network> {
        self.network_of().map(|other| &*other.network)
    }

    /// CLONE_NEW* of all of them.
    fn flags(&self) -> u64 {
        let flags = self
            .namespaces
            .iter()
            .map(|(kind, _)| kind.flag.unsigned_abs());
        flags.fold(0, |flags, flag| flags | u64::from(flag))
    }

    /// What is to be entered, in order.
    pub(super) fn entries(&self) -> impl Iterator<Item = Entry<'_>> {
        self.namespaces.iter().map(|(kind, of)| Entry {
            file: match kind.name {
                "network" => "net",
                name => name,
            },
            kind: kind.kind,
            of,
        })
    }
}

/// Reads the spec's list.
pub(super) fn plan(linux: &Linux, others: &Others) -> Result<Namespaces> {
    let joined = others.flags();
    let mut found = Namespaces {
        joined,
        ..Namespaces::default()
    };
    let mut seen = Vec::new();
    for (index, namespace) in linux.namespaces().iter().flatten().enumerate() {
        let field = format!("linux.namespaces[{index}]");
        let kind = namespace.typ();
        if seen.contains(&kind) {
            let problem = format!("{kind} is given twice");
            return Err(Error::invalid(format!("{field}.type"), problem));
        }
        seen.push(kind);
        let flag = u64::from(kind as u32);
        if joined & flag != 0 {
            continue;
        }
        let path = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty());
        // With a path, a network namespace of the guest becomes an image of the host's.
        if path.is_some() && kind != LinuxNamespaceType::Network {
            let reason = format!(
                "the host's {kind} namespaces are not in the guest, and it belongs to no container \
                 of this one; leave the path out for a namespace of its own"
            );
            return Err(Error::unsupported(format!("{field}.path"), reason));
        }
        match kind {
            LinuxNamespaceType::Cgroup => found.cgroup = true,
            LinuxNamespaceType::Time => found.time = true,
            _ => found.at_birth |= flag,
        }
    }
    let listed = seen
        .iter()
        .fold(0, |flags, kind| flags | u64::from(*kind as u32));
    if joined & !listed != 0 {
        let problem = "does not list a namespace that is to be joined";
        return Err(Error::invalid("linux.namespaces", problem));
    }
    if !seen.contains(&LinuxNamespaceType::Mount) {
        let reason = "a container needs a mount namespace of its own; add {\"type\": \"mount\"}";
        return Err(Error::unsupported("linux.namespaces without mount", reason));
    }
    if !seen.contains(&LinuxNamespaceType::Network) {
        let reason =
            "the host's network cannot be shared with a microVM; add {\"type\": \"network\"}";
        return Err(Error::unsupported(
            "linux.namespaces without network",
            reason,
        ));
    }
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|m| !m.is_empty());
    let user = seen.contains(&LinuxNamespaceType::User);
    if !user && (mapped(linux.uid_mappings()) || mapped(linux.gid_mappings())) {
        let problem = "needs a user namespace, which linux.namespaces does not list";
        return Err(Error::invalid("linux.uidMappings", problem));
    }
    Ok(found)
}
