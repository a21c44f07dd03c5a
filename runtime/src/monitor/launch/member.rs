//! Makes a container in the VM of another one: that VM gets its files, disks and interfaces while it
//! runs, and one owner more.

use std::{fs::File, os::fd::AsFd};

use bulkhead_vmm::config::{CONTROL, VmCommand, VmEvent};
use rustix::fs::{AtFlags, Mode, OFlags};

use super::{
    super::{HostStdio, Sandbox, StandIn, membership::Membership, order::ContainerOrder},
    Launch, LaunchError, Made, Wiring, locate_cgroup,
};
use crate::{
    agent,
    cgroup::Limits,
    disks::{self, Disks},
    pod::{self, Joined},
    share,
    spec::{Loaded, SpecError, check::Checked},
    state::{Container, Record, StateError},
    stdio::Signals,
    timeline::Timeline,
    vm::VmProcess,
};

/// The VM's sockets, in the directory of a container's sockets.
const SOCKETS: [&str; 2] = ["vsock.sock", CONTROL];

/// Makes the container.
pub(super) fn launch<'a>(
    (order, joined): (&ContainerOrder, &Joined),
    (loaded, checked): (&Loaded, &Checked),
    (container, stand_in): (&'a Container, Option<StandIn>),
    timeline: Timeline,
    signals: &mut Signals,
    host: HostStdio,
) -> Result<Sandbox<'a>, LaunchError> {
    let record = note(container, joined)?;
    link_sockets(container, joined)?;
    let sockets = agent::sockets(container)?;
    let mut launch = Launch {
        container,
        spec: &loaded.spec,
        vm: Box::new(VmProcess::join(sockets.as_fd(), joined.vmm)?),
        cgroup: locate_cgroup(order, checked)?,
        membership: Membership::default(),
        limits: Limits::of(&loaded.spec, order.guest),
        signals,
        timeline,
        network: Wiring::None,
        disks: DisksOnTheWay::default(),
        stand_in,
    };
    let directory = pod::directory_of(&record);
    let mut share = share::collect(&directory, &loaded.bundle, &checked.rootfs, &loaded.spec)?;
    share.join_memory(
        joined.shared_memory.as_deref(),
        &loaded.bundle,
        &loaded.spec,
    );
    let mut disks = disks::collect(&loaded.bundle, &checked.rootfs, &loaded.spec)?;
    launch.make_cgroup(&share)?;
    pod::add(joined.vmm, &share.entries, &share.overlays)?;
    match &joined.network {
        Some(path) => launch.join_network(path)?,
        None => launch.enter_network(checked.network.as_deref())?,
    }
    launch.attach_disks(&mut disks, &record)?;
    launch.create_hooks()?;
    launch.enter_cgroup()?;
    launch.attach_interfaces()?;
    launch.disks.name(&mut disks);
    let made = Made {
        order,
        loaded,
        checked,
        share,
        disks,
    };
    launch.finish(made, sockets.as_fd(), host)
}

/// Writes down, before anything is done to the VM, that the container is in it, in its own record and
/// in that of the container that the VM was made for: so that whoever removes one looks for others.
fn note(container: &Container, joined: &Joined) -> Result<Record, LaunchError> {
    match container.root().open(&joined.sandbox) {
        Ok(sandbox) => {
            let locked = sandbox.lock()?;
            let mut record = sandbox.record()?;
            // Another one of that name may be there by now.
            if record.vmm == Some(joined.vmm) && !record.shared {
                record.shared = true;
                locked.write(&record)?;
            }
        }
        // Its others keep the VM.
        Err(StateError::Missing(_)) => {}
        Err(error) => return Err(error.into()),
    }
    let locked = container.lock()?;
    let mut record = container.record()?;
    record.vmm = Some(joined.vmm);
    record.sandbox = Some(joined.sandbox.clone());
    locked.write(&record)?;
    Ok(record)
}

/// Gives the VM's sockets a second name in the container's own directory, where everything that asks
/// the guest for something looks, and where they outlive the other container's.
fn link_sockets(container: &Container, joined: &Joined) -> Result<(), LaunchError> {
    let failed = |error: std::io::Error| LaunchError::Join {
        id: joined.through.clone(),
        source: error,
    };
    let own = agent::sockets(container)?;
    let theirs = agent::sockets(&container.root().open(&joined.through)?)?;
    for name in SOCKETS {
        // Of a VM of its own that was begun, if its network namespace turned out to be taken.
        let _ = rustix::fs::unlinkat(&own, name, AtFlags::empty());
        rustix::fs::linkat(&theirs, name, &own, name, AtFlags::empty())
            .map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// Disks that the VMM was asked to attach.
#[derive(Debug, Default)]
pub(super) struct DisksOnTheWay {
    /// By name, and the guest's device once it is there.
    disks: Vec<(String, Option<String>)>,
}

impl DisksOnTheWay {
    /// Whether none is waited for.
    pub(super) fn are_settled(&self) -> bool {
        self.disks.iter().all(|(_, device)| device.is_some())
    }

    /// What the VMM says.
    pub(super) fn on_event(&mut self, event: &VmEvent) -> Result<(), LaunchError> {
        let (VmEvent::Attached { id, .. } | VmEvent::AttachFailed { id, .. }) = event else {
            return Ok(());
        };
        let Some((_, found)) = self.disks.iter_mut().find(|(disk, _)| disk == id) else {
            return Ok(());
        };
        match event {
            VmEvent::Attached { device, .. } => *found = Some(device.clone()),
            VmEvent::AttachFailed { message, .. } => {
                return Err(LaunchError::Disk {
                    disk: id.clone(),
                    message: message.clone(),
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Tells the agent's request where the guest has them.
    fn name(&self, disks: &mut Disks) {
        for (disk, device) in &self.disks {
            if let Some(device) = device {
                disks.at(disk, device);
            }
        }
    }
}

impl Launch<'_, '_> {
    /// Has the VMM attach the container's disks. Their names are the guest's, where others have
    /// disks, too.
    fn attach_disks(&mut self, disks: &mut Disks, record: &Record) -> Result<(), LaunchError> {
        disks.rename(&format!(
            "{}.",
            record.monitor.map_or(0, |monitor| monitor.pid)
        ));
        for disk in &disks.configs {
            let access = if disk.read_only {
                OFlags::RDONLY
            } else {
                // EXCL: as the VMM opens those that a guest begins with.
                OFlags::RDWR | OFlags::EXCL
            };
            let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = rustix::fs::open(&disk.path, flags, Mode::empty()).map_err(|error| {
                SpecError::Path {
                    field: "root.path or mounts[].source".to_owned(),
                    path: disk.path.clone(),
                    source: error.into(),
                }
            })?;
            let id = disk.id.clone().unwrap_or_default();
            let command = VmCommand::AttachDisk {
                id: id.clone(),
                read_only: disk.read_only,
            };
            self.vm.command_with(command, &[File::from(file).as_fd()])?;
            self.disks.disks.push((id, None));
        }
        Ok(())
    }
}
