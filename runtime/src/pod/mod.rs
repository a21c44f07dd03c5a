//! Several containers in one VM. A container whose configuration names a namespace of another one
//! (runtime-spec, config-linux "Namespaces", `path`) shares that one's VM: a namespace of a guest
//! cannot be entered from elsewhere. Here is which VM that is; `pieces` puts files into it.

mod leave;
mod pieces;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use leave::{LeaveError, leave, move_machine, pass_on};
pub use pieces::{PieceError, add, directory_of};

use crate::{
    guest_size::{ANNOTATIONS, GuestSize, memory_limit},
    spec::check::NamespacePath,
    state::{Container, ContainerStatus, ProcessIdentity, Record, StateError, StateRoot},
};

/// A container cannot join another one.
#[derive(Debug, Error)]
pub enum PodError {
    /// The namespace is none that a guest has.
    #[error(
        "config.json: {field} is not supported: {} is no namespace of a Bulkhead container below {} \
         (/proc/PID/ns/{kind} of one that runs), and a container in a virtual machine cannot join the \
         host's; leave the path out for one of its own", path.display(), root.display()
    )]
    Foreign {
        /// The field.
        field: String,
        /// As in /proc/PID/ns.
        kind: &'static str,
        /// What it names.
        path: PathBuf,
        /// Where the containers are that were looked at.
        root: PathBuf,
    },
    /// Namespaces of different VMs.
    #[error(
        "config.json: {field}: container {other:?} is in another virtual machine than container \
         {first:?}, whose namespaces are named, too; a container can be in one of them only"
    )]
    Several {
        /// The field.
        field: String,
        /// The container of the field.
        other: String,
        /// That of an earlier one.
        first: String,
    },
    /// A path of one kind for another.
    #[error("config.json: {field}: {} is not a namespace of type {kind}", path.display())]
    Kind {
        /// The field.
        field: String,
        /// As in /proc/PID/ns.
        kind: &'static str,
        /// What it names.
        path: PathBuf,
    },
    /// Kinds that cannot be shared.
    #[error(
        "config.json: {field} is not supported: containers of one virtual machine cannot share their \
         {kind} namespace; leave the path out for one of its own"
    )]
    Unshared {
        /// The field.
        field: String,
        /// As in the configuration.
        kind: String,
    },
    /// The other one is not there yet or no longer.
    #[error("config.json: {field}: container {id:?} is {status}, its namespaces cannot be joined")]
    Status {
        /// The field.
        field: String,
        /// The other container.
        id: String,
        /// What it is.
        status: ContainerStatus,
    },
    /// A limit beyond the machine.
    #[error(
        "config.json: linux.resources.memory.limit: {limit_mib} MiB do not fit into the virtual machine \
         of container {sandbox:?}, which has {guest_mib} MiB and does not grow; make that container \
         with a larger limit of its own, or see \"The size of the machine\" in docs/pods.md"
    )]
    Memory {
        /// What is wanted.
        limit_mib: u64,
        /// What there is.
        guest_mib: u32,
        /// Whose VM it is.
        sandbox: String,
    },
    /// Options for another VM.
    #[error(
        "--guest-log and --guest-debug are not possible here: the container joins the virtual machine \
         of container {0:?}, which runs already; give them to that one"
    )]
    Option(String),
    /// The state of others cannot be read.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The VM that a container joins, and what it shares there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joined {
    /// The container that the VM was made for.
    pub sandbox: String,
    /// A container in it whose namespace is joined, and through whose directory the VM is reached.
    pub through: String,
    /// The VM.
    pub vmm: ProcessIdentity,
    /// The VM's size.
    pub guest: GuestSize,
    /// Whose namespace, by its type as the agent knows it.
    pub namespaces: BTreeMap<String, String>,
    /// Where the network namespace is on the host, if it is joined.
    pub network: Option<PathBuf>,
    /// What the host's tmpfs for /dev/shm is of the container whose IPC namespace is joined, if
    /// the guest has one in its place.
    pub shared_memory: Option<PathBuf>,
}

/// The kinds that can be joined: as in /proc/PID/ns and as the agent knows them.
fn kind_names(kind: LinuxNamespaceType) -> Option<(&'static str, &'static str)> {
    Some(match kind {
        LinuxNamespaceType::Network => ("net", "network"),
        LinuxNamespaceType::Pid => ("pid", "pid"),
        LinuxNamespaceType::Ipc => ("ipc", "ipc"),
        LinuxNamespaceType::Uts => ("uts", "uts"),
        LinuxNamespaceType::Cgroup => ("cgroup", "cgroup"),
        LinuxNamespaceType::Time => ("time", "time"),
        LinuxNamespaceType::User | LinuxNamespaceType::Mount => return None,
    })
}

/// Finds the VM that the containers are in whose namespaces these are; `None` where only network
/// namespaces are named, and none of them is a container's.
pub fn find(root: &StateRoot, paths: &[NamespacePath]) -> Result<Option<Joined>, PodError> {
    let mut joined: Option<Joined> = None;
    // Read once, and not at all where no path is that of a process.
    let mut containers: Option<Vec<(Container, Record)>> = None;
    for path in paths {
        let network = path.kind == LinuxNamespaceType::Network;
        let Some((file, name)) = kind_names(path.kind) else {
            return Err(PodError::Unshared {
                field: path.field.clone(),
                kind: format!("{:?}", path.kind).to_lowercase(),
            });
        };
        let process = process_of(&path.path);
        if process.is_some() && containers.is_none() {
            containers = Some(living(root)?);
        }
        let of_process = |record: &Record| {
            let (pid, own) = (process.as_ref().map(|(pid, _)| *pid), record.process);
            pid.is_some() && own.map(|own| own.pid) == pid
        };
        let mut living = containers.iter().flatten();
        let found = living.find(|(_, record)| of_process(record));
        let Some((_, record)) = found else {
            // Any other network namespace is the host's affair.
            if network {
                continue;
            }
            return Err(PodError::Foreign {
                field: path.field.clone(),
                kind: file,
                path: path.path.clone(),
                root: root.path().to_owned(),
            });
        };
        if process.is_some_and(|(_, named)| named != file) {
            return Err(PodError::Kind {
                field: path.field.clone(),
                kind: file,
                path: path.path.clone(),
            });
        }
        add_namespace(&mut joined, path, name, record)?;
    }
    Ok(joined)
}

/// The same for a network namespace that was found to be taken, and whose path names no process: it
/// is known by its number.
pub fn find_by_network(
    root: &StateRoot,
    paths: &[NamespacePath],
) -> Result<Option<Joined>, PodError> {
    let identity = |path: &Path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let mut networks = paths.iter();
    let network = networks.rfind(|path| path.kind == LinuxNamespaceType::Network);
    let Some((path, wanted)) = network.and_then(|path| Some((path, identity(&path.path)?))) else {
        return Ok(None);
    };
    let mut joined = find(root, paths)?;
    for (_, record) in living(root)? {
        let is_its = record.process.is_some_and(|process| {
            let own = format!("/proc/{}/ns/net", process.pid);
            // Looked at while it lives, so that the number means it.
            identity(Path::new(&own)) == Some(wanted) && process.is_alive()
        });
        let status = record.current_status();
        if is_its && status != ContainerStatus::Creating {
            add_namespace(&mut joined, path, "network", &record)?;
            return Ok(joined);
        }
    }
    Ok(None)
}

/// The process and the file of a path like `/proc/PID/ns/net`, symbolic links followed. Which
/// container that is, the identity says that was recorded of its process.
fn process_of(path: &Path) -> Option<(u32, String)> {
    /// `PROC_SUPER_MAGIC`, statfs(2).
    const PROC: i64 = 0x9fa0;
    let directory = fs::canonicalize(path.parent()?).ok()?;
    let place = directory.strip_prefix("/proc").ok()?.to_str()?;
    let pid = place.strip_suffix("/ns")?.parse().ok()?;
    let is_proc = rustix::fs::statfs(&directory).is_ok_and(|found| found.f_type == PROC);
    is_proc.then_some((pid, path.file_name()?.to_str()?.to_owned()))
}

/// The containers whose monitor lives.
fn living(root: &StateRoot) -> Result<Vec<(Container, Record)>, PodError> {
    let mut living = Vec::new();
    for container in root.list()? {
        // One that was cut short, or is being deleted, is nobody's neighbour.
        let Ok(record) = container.record() else {
            continue;
        };
        if record.monitor.is_some_and(ProcessIdentity::is_alive) {
            living.push((container, record));
        }
    }
    Ok(living)
}

fn add_namespace(
    joined: &mut Option<Joined>,
    path: &NamespacePath,
    name: &'static str,
    record: &Record,
) -> Result<(), PodError> {
    let status = record.current_status();
    let alive = matches!(
        status,
        ContainerStatus::Created | ContainerStatus::Running | ContainerStatus::Paused
    );
    let (Some(vmm), true) = (record.vmm, alive) else {
        return Err(PodError::Status {
            field: path.field.clone(),
            id: record.id.clone(),
            status,
        });
    };
    let joined = joined.get_or_insert_with(|| Joined {
        sandbox: record.sandbox().to_owned(),
        through: record.id.clone(),
        vmm,
        guest: record.guest,
        namespaces: BTreeMap::new(),
        network: None,
        shared_memory: None,
    });
    if joined.vmm != vmm {
        return Err(PodError::Several {
            field: path.field.clone(),
            other: record.id.clone(),
            first: joined.through.clone(),
        });
    }
    joined.namespaces.insert(name.to_owned(), record.id.clone());
    match path.kind {
        LinuxNamespaceType::Network => joined.network = Some(path.path.clone()),
        LinuxNamespaceType::Ipc => joined.shared_memory.clone_from(&record.shared_memory),
        _ => {}
    }
    Ok(())
}

impl Joined {
    /// Judges what the container asks for that the VM must have.
    pub fn judge(&self, spec: &Spec) -> Result<(), PodError> {
        for name in spec.annotations().iter().flat_map(|all| all.keys()) {
            if ANNOTATIONS.contains(&name.as_str()) {
                tracing::warn!(
                    "the annotation {name:?} has no effect: the virtual machine is that of \
                     container {:?}, which was made before",
                    self.sandbox
                );
            }
        }
        match memory_limit(spec).map(|limit| limit.div_ceil(1 << 20)) {
            Some(limit_mib) if limit_mib > self.guest.memory_mib.into() => Err(PodError::Memory {
                limit_mib,
                guest_mib: self.guest.memory_mib,
                sandbox: self.sandbox.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses options that are for a VM that is made.
    pub fn refuse_options(&self, guest_log: bool) -> Result<(), PodError> {
        match guest_log {
            true => Err(PodError::Option(self.sandbox.clone())),
            false => Ok(()),
        }
    }
}

/// The others that are in a container's VM and keep it: those whose monitor lives.
pub fn others(container: &Container, record: &Record) -> Result<Vec<Record>, PodError> {
    // A VM that nobody has ever joined has none.
    let (Some(vmm), true) = (record.vmm, record.is_shared()) else {
        return Ok(Vec::new());
    };
    let mut others: Vec<Record> = living(&container.root())?
        .into_iter()
        .map(|(_, other)| other)
        .collect();
    others.retain(|other| other.vmm == Some(vmm) && other.id != record.id);
    Ok(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [(LinuxNamespaceType, &str); 2] = [
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Network, "net"),
    ];

    fn path(kind: LinuxNamespaceType, path: &str) -> NamespacePath {
        NamespacePath {
            field: "linux.namespaces[0].path".to_owned(),
            kind,
            path: path.into(),
        }
    }

    /// A container whose monitor is this process, in a VM that is this process, too.
    fn container(root: &StateRoot, id: &str, change: impl FnOnce(&mut Record)) {
        let own = ProcessIdentity::own().unwrap();
        let container = root.create(id).unwrap();
        let mut record = Record::new(id, Path::new("/b"), "1.2.0", own);
        (record.monitor, record.process, record.vmm) = (Some(own), Some(own), Some(own));
        record.status = ContainerStatus::Running;
        record.guest.memory_mib = 256;
        change(&mut record);
        container.lock().unwrap().write(&record).unwrap();
    }

    fn own(name: &str) -> String {
        format!("/proc/{}/ns/{name}", std::process::id())
    }

    #[test]
    fn a_container_is_found_by_its_process() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path().join("state"));
        // Namespaces of nobody: the network's is the host's affair, the other's is refused.
        let nobodys = find(&root, &[path(KINDS[1].0, &own("net"))]).unwrap();
        assert_eq!(nobodys, None);
        let error = find(&root, &[path(KINDS[0].0, &own("ipc"))]).unwrap_err();
        assert!(matches!(error, PodError::Foreign { .. }), "{error}");
        container(&root, "one", |record| {
            record.sandbox = Some("first".to_owned())
        });
        let paths = KINDS.map(|(kind, file)| path(kind, &own(file)));
        let joined = find(&root, &paths).unwrap().unwrap();
        assert_eq!((&*joined.sandbox, &*joined.through), ("first", "one"));
        assert_eq!(joined.network.as_deref(), Some(Path::new(&own("net"))));
        let names: Vec<_> = joined.namespaces.keys().map(String::as_str).collect();
        assert_eq!(names, ["ipc", "network"]);
        // By a link, which leads to the same process.
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/proc/self/ns", &link).unwrap();
        let linked = link.join("ipc");
        let joined = find(&root, &[path(KINDS[0].0, linked.to_str().unwrap())]).unwrap();
        assert_eq!(joined.unwrap().through, "one");
        // Limits are judged by the machine that is there.
        let limited = |limit: u64| -> Spec {
            serde_json::from_value(serde_json::json!({"ociVersion": "1.0.0",
                "linux": {"resources": {"memory": {"limit": limit}}}}))
            .unwrap()
        };
        let joined = find(&root, &paths).unwrap().unwrap();
        joined.judge(&limited(256 << 20)).unwrap();
        let error = joined.judge(&limited((256 << 20) + 1)).unwrap_err();
        assert!(error.to_string().contains("257 MiB do not fit"), "{error}");
    }

    #[test]
    fn what_cannot_be_joined_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path().join("state"));
        container(&root, "one", |record| {
            record.status = ContainerStatus::Creating
        });
        let refused = |kind, place: &str| {
            let error = find(&root, &[path(kind, place)]).unwrap_err().to_string();
            assert!(error.contains("linux.namespaces[0].path"), "{error}");
            error
        };
        let error = refused(LinuxNamespaceType::Ipc, &own("ipc"));
        assert!(error.contains("is creating"), "{error}");
        let error = refused(LinuxNamespaceType::Ipc, &own("uts"));
        assert!(error.contains("not a namespace of type ipc"), "{error}");
        for place in [
            "/proc/1/ns/ipc",
            "/nowhere/ns/ipc",
            "/etc/passwd",
            "/",
            "relative",
        ] {
            let error = refused(LinuxNamespaceType::Ipc, place);
            assert!(
                error.contains("no namespace of a Bulkhead container"),
                "{error}"
            );
        }
        for kind in [LinuxNamespaceType::User, LinuxNamespaceType::Mount] {
            let error = refused(kind, &own("user"));
            assert!(error.contains("cannot share"), "{error}");
        }
    }
}
