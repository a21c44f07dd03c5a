//! What a monitor is told to make, and the virtual machine that follows from it.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::SHARE_TAG;
use bulkhead_vmm::config::{DiskConfig, ShareConfig, VmConfig, VsockConfig};
use serde::{Deserialize, Serialize};

use super::launch::LaunchError;
use crate::{
    cgroup::{Cgroup, Driver},
    guest_size::GuestSize,
    pod::{self, Joined},
    share::Share,
    spec::{Loaded, check::Checked},
    state::{Container, SOCKETS},
};

/// The program that the guest's kernel starts.
const INIT: &str = "/sbin/bulkhead-agent";
/// Every guest is alone behind its own socket directory, so all have the same context id.
const GUEST_CID: u64 = 3;

/// What a monitor is told to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerOrder {
    /// The container's id.
    pub id: String,
    /// The bundle, absolute.
    pub bundle: PathBuf,
    /// Program of the VMM.
    pub vmm: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Guest root image.
    pub root_image: PathBuf,
    /// File for the guest kernel's log.
    pub guest_log: Option<PathBuf>,
    /// Whether the agent logs everything.
    pub debug: bool,
    /// File for the timeline.
    pub timeline: Option<PathBuf>,
    /// When the runtime began, [`crate::timeline::Moment::microseconds`].
    pub began: u64,
    /// Whether the container gets no session keyring of its own.
    pub no_new_keyring: bool,
    /// The size of the guest.
    pub guest: GuestSize,
    /// Places for devices that are attached while the guest runs.
    pub spare_places: u8,
    /// What form `linux.cgroupsPath` has.
    pub cgroup_driver: Driver,
    /// The pid of the stand-in.
    pub pid: u32,
    /// The VM that it joins, if it gets none of its own.
    pub joined: Option<Joined>,
}

impl ContainerOrder {
    /// Judges the files of the installation.
    pub(super) fn check_installation(&self) -> Result<(), LaunchError> {
        let files = [
            ("guest kernel", &self.kernel, "--kernel"),
            ("guest root image", &self.root_image, "--root-image"),
        ];
        for (what, path, option) in files {
            File::open(path).map_err(|source| LaunchError::Installation {
                what,
                path: path.clone(),
                option,
                source,
            })?;
        }
        Ok(())
    }

    /// The order to join the VM that has the network namespace which the configuration names, if it
    /// is one of ours.
    pub(super) fn joining(
        &self,
        (loaded, checked): (&Loaded, &Checked),
        container: &Container,
    ) -> Result<Option<(Self, Joined)>, LaunchError> {
        let Some(joined) = pod::find_by_network(&container.root(), &checked.paths)? else {
            return Ok(None);
        };
        joined.judge(&loaded.spec)?;
        joined.refuse_options(self.guest_log.is_some())?;
        let order = Self {
            guest: joined.guest,
            joined: Some(joined.clone()),
            ..self.clone()
        };
        Ok(Some((order, joined)))
    }

    /// The VM that follows from it; `directory` is the container's.
    pub(super) fn vm_config(&self, directory: &Path, share: &Share, cgroup: &Cgroup) -> VmConfig {
        VmConfig {
            kernel: self.kernel.clone(),
            kernel_arguments: if self.debug {
                vec!["BULKHEAD_LOG=debug".to_owned()]
            } else {
                Vec::new()
            },
            init: INIT.to_owned(),
            cpus: self.guest.cpus,
            memory_mib: self.guest.memory_mib,
            disks: vec![DiskConfig {
                path: self.root_image.clone(),
                read_only: true,
                id: None,
            }],
            share: Some(ShareConfig {
                tag: SHARE_TAG.to_owned(),
                entries: share.entries.clone(),
            }),
            vsock: Some(VsockConfig {
                guest_cid: GUEST_CID,
                directory: directory.join(SOCKETS),
            }),
            guest_log: self.guest_log.clone(),
            network_namespace: None,
            cgroup: cgroup.unified().map(Path::to_owned),
            spare_slots: self.spare_places,
        }
    }
}
