//! What the agent makes for the set-up of a container before it forks it, as it takes the guest's
//! privileges, which the set-up does not have in a user namespace: id-mapped mounts, filesystems of
//! disks and devices.

use std::{
    collections::HashMap,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
};

use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};

use super::{
    Surroundings, devices,
    disks::DisksInUse,
    init::open_directory,
    mounts::With,
    namespaces::Others,
    plan::{Plan, Rootfs},
};
use crate::error::{Attempt, Result};

/// Detached mounts.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// By index in the plan's mounts.
    mounts: HashMap<usize, OwnedFd>,
    /// Of mounts that are another container's: that one's first process, by index.
    joined: HashMap<usize, OwnedFd>,
    /// The root filesystem, if it is on a disk.
    pub(super) rootfs: Option<OwnedFd>,
    /// One for each of the plan's devices; none if the set-up makes them itself.
    pub(super) devices: Option<Vec<OwnedFd>>,
}

impl Prepared {
    /// Makes what the plan asks for.
    pub(super) fn of(
        plan: &Plan,
        share: &Path,
        surroundings: &Surroundings,
        others: &Others,
        disks: &mut DisksInUse,
    ) -> Result<Self> {
        let share = open_directory(share)?;
        let with = With {
            share: share.as_fd(),
            surroundings,
            id_maps: plan.id_maps.as_ref(),
            network: others.network(),
        };
        let mut mounts = HashMap::new();
        let mut joined = HashMap::new();
        for (index, mount) in plan.mounts.iter().enumerate() {
            if let Some(other) = others.of_mount(index).filter(|_| mount.is_joined()) {
                let process = other.pidfd().try_clone_to_owned();
                joined.insert(index, process.or_cannot(|| "keep a process's descriptor")?);
            }
            let made = mount.prepare(&with, disks)?;
            mounts.extend(made.map(|made| (index, made)));
        }
        let rootfs = match &plan.rootfs {
            Rootfs::Share(_) => None,
            Rootfs::Disk(mount) => mount.prepare(&with, disks)?,
        };
        let maps = plan.id_maps.as_ref();
        let devices = maps.map(|maps| devices::for_user_namespace(&plan.devices, maps));
        Ok(Self {
            mounts,
            joined,
            rootfs,
            devices: devices.transpose()?,
        })
    }

    /// The mount of this index, if it was made.
    pub(super) fn take_mount(&mut self, index: usize) -> Option<OwnedFd> {
        self.mounts.remove(&index)
    }

    /// In the set-up: clones what other containers have, in whose mount namespaces this process is for
    /// a moment. `own` is its own.
    pub(super) fn join(
        &mut self,
        plan: &Plan,
        own: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<()> {
        if self.joined.is_empty() {
            return Ok(());
        }
        let own = own()?;
        for (index, process) in self.joined.drain() {
            let mount = &plan.mounts[index];
            let place = mount.destination.display();
            let action = || format!("get {place} of the container that is joined");
            move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT)
                .or_cannot(action)?;
            self.mounts
                .insert(index, mount.clone_here().or_cannot(action)?);
        }
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Mount))
            .or_cannot(|| "return to the container's mount namespace")
    }

    /// For the list of descriptors that stay open.
    pub(super) fn raw(&self) -> impl Iterator<Item = RawFd> {
        let devices = self.devices.iter().flatten();
        let mounts = self.mounts.values().chain(&self.rootfs);
        let mounts = mounts.chain(self.joined.values());
        mounts.chain(devices).map(AsRawFd::as_raw_fd)
    }
}
