//! What is written down about one container, and the view of it that runtime-spec "State" asks
//! for. The status that is written is what was last known: a monitor that has died since could
//! not write, so it is judged together with whether the monitor lives.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{ContainerStatus, Event, ProcessIdentity};
use crate::{guest_size::GuestSize, network::Traces};

/// The record of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The container's id.
    pub id: String,
    /// The configuration's version of the runtime-spec.
    pub oci_version: String,
    /// Absolute path of the bundle.
    pub bundle: PathBuf,
    /// Absolute path of the root filesystem.
    pub rootfs: PathBuf,
    /// When it was created, RFC 3339.
    pub created: String,
    /// The configuration's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The user who created it.
    pub owner: String,
    /// The last known status.
    pub status: ContainerStatus,
    /// Who makes it; matters while `status` is `creating`.
    pub creator: ProcessIdentity,
    /// The monitor, from the moment it may do anything.
    pub monitor: Option<ProcessIdentity>,
    /// The stand-in, whose pid is the container's; from the same moment.
    #[serde(default)]
    pub process: Option<ProcessIdentity>,
    /// The VM, from the moment it may do anything.
    pub vmm: Option<ProcessIdentity>,
    /// Host cgroup directories that belong to the container alone, deepest first.
    pub cgroups: Vec<PathBuf>,
    /// The container's own among them, one a hierarchy.
    pub cgroup: Vec<PathBuf>,
    /// The container whose VM it is in, unless the VM was made for this one.
    #[serde(default)]
    pub sandbox: Option<String>,
    /// Whether other containers have joined its VM, ever.
    #[serde(default)]
    pub shared: bool,
    /// The engine's tmpfs on the host, canonical, in whose place it has a /dev/shm in the guest.
    #[serde(default)]
    pub shared_memory: Option<PathBuf>,
    /// What the monitor has changed in a network namespace that is not its own.
    #[serde(default)]
    pub network: Option<Traces>,
    /// The size that its guest was made with.
    pub guest: GuestSize,
    /// How the container's process ended, once it has.
    pub exit_status: Option<i32>,
}

/// `state`'s output: runtime-spec "State" and runc's additions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs)]
pub struct View {
    pub oci_version: String,
    pub id: String,
    /// The stand-in's; 0 when stopped.
    pub pid: u32,
    pub status: ContainerStatus,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    pub owner: String,
    /// The container whose virtual machine it is in, if that is not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

impl Record {
    /// The container that its VM was made for.
    pub fn sandbox(&self) -> &str {
        self.sandbox.as_ref().unwrap_or(&self.id)
    }

    /// Whether there are, or were, other containers in its VM.
    pub fn is_shared(&self) -> bool {
        self.shared || self.sandbox.is_some()
    }

    /// A container that its creator begins to make.
    pub fn new(id: &str, bundle: &Path, oci_version: &str, creator: ProcessIdentity) -> Self {
        Self {
            id: id.to_owned(),
            oci_version: oci_version.to_owned(),
            bundle: bundle.to_owned(),
            rootfs: PathBuf::new(),
            created: String::new(),
            annotations: BTreeMap::new(),
            owner: String::new(),
            status: ContainerStatus::Creating,
            creator,
            monitor: None,
            process: None,
            vmm: None,
            cgroups: Vec::new(),
            cgroup: Vec::new(),
            sandbox: None,
            shared: false,
            shared_memory: None,
            network: None,
            guest: GuestSize::default(),
            exit_status: None,
        }
    }

    /// The status as it is now.
    pub fn current_status(&self) -> ContainerStatus {
        let maker = match self.status {
            ContainerStatus::Stopped => return ContainerStatus::Stopped,
            // Until the monitor is known, the container's life hangs on its creator.
            ContainerStatus::Creating => self.monitor.unwrap_or(self.creator),
            _ => match self.monitor {
                Some(monitor) => monitor,
                None => return ContainerStatus::Stopped,
            },
        };
        // Whoever kills the stand-in has ended the container: the monitor takes the rest down.
        if maker.is_alive() && self.process.is_none_or(ProcessIdentity::is_alive) {
            self.status
        } else {
            self.status
                .next(Event::Ended)
                .unwrap_or(ContainerStatus::Stopped)
        }
    }

    /// What `state` shows.
    pub fn view(&self) -> View {
        let status = self.current_status();
        View {
            oci_version: self.oci_version.clone(),
            id: self.id.clone(),
            pid: match status {
                ContainerStatus::Stopped => 0,
                _ => self.process.map_or(0, |process| process.pid),
            },
            status,
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            created: self.created.clone(),
            annotations: self.annotations.clone(),
            owner: self.owner.clone(),
            sandbox: self.sandbox.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_monitor_means_stopped() {
        let own = ProcessIdentity::own().unwrap();
        let gone = ProcessIdentity {
            start_time: own.start_time + 1,
            ..own
        };
        let mut record = Record::new("a", Path::new("/b"), "1.0.0", own);
        assert_eq!(record.current_status(), ContainerStatus::Creating);
        record.creator = gone;
        assert_eq!(record.current_status(), ContainerStatus::Stopped);
        (record.monitor, record.process) = (Some(own), Some(own));
        record.status = ContainerStatus::Running;
        assert_eq!(record.view().status, ContainerStatus::Running);
        assert_eq!(record.view().pid, own.pid);
        record.process = Some(gone);
        assert_eq!(record.view().status, ContainerStatus::Stopped);
        (record.monitor, record.process) = (Some(gone), Some(own));
        assert_eq!(record.view().status, ContainerStatus::Stopped);
        assert_eq!(record.view().pid, 0);
    }
}
