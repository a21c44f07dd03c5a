//! What the agent makes for the set-up of a container before it forks it, as it takes the guest's
//! privileges, which the set-up does not have in a user namespace: id-mapped mounts and devices.

use std::{
    collections::HashMap,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use super::{devices, init::open_directory, plan::Plan};
use crate::error::Result;

/// Detached mounts.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// By index in the plan's mounts.
    mounts: HashMap<usize, OwnedFd>,
    /// One for each of the plan's devices; none if the set-up makes them itself.
    pub(super) devices: Option<Vec<OwnedFd>>,
}

impl Prepared {
    /// Makes what the plan asks for.
    pub(super) fn of(plan: &Plan, share: &Path, proc: BorrowedFd<'_>) -> Result<Self> {
        use std::os::fd::AsFd;
        let share = open_directory(share)?;
        let mut mounts = HashMap::new();
        for (index, mount) in plan.mounts.iter().enumerate() {
            if let Some(made) = mount.id_mapped(share.as_fd(), proc, plan.id_maps.as_ref())? {
                mounts.insert(index, made);
            }
        }
        let maps = plan.id_maps.as_ref();
        let devices = maps.map(|maps| devices::for_user_namespace(&plan.devices, maps));
        Ok(Self {
            mounts,
            devices: devices.transpose()?,
        })
    }

    /// The mount of this index, if it was made.
    pub(super) fn take_mount(&mut self, index: usize) -> Option<OwnedFd> {
        self.mounts.remove(&index)
    }

    /// For the list of descriptors that stay open.
    pub(super) fn raw(&self) -> impl Iterator<Item = RawFd> {
        let devices = self.devices.iter().flatten();
        self.mounts.values().chain(devices).map(AsRawFd::as_raw_fd)
    }
}
