//! The program's course: read the configuration, open what it names, fork into a PID namespace,
//! enter the jail, put the machine together, run it until it ends or is ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tracing::{debug, info};

use crate::attached::Attached;
use crate::boot::command_line;
use crate::config::{Timeline, VmCommand, VmConfig, VmEvent};
use crate::control::ControlError;
use crate::jail::{self, Contents, JailError};
use crate::kvm::exits::Ending;
use crate::machine::{Assembly, Machine, MachineError};
use crate::opened::{OpenError, Opened, Sockets};
use crate::owners::Owners;
use crate::sys;
use crate::virtio::blk::Block;
use crate::virtio::fs::{self, Filesystem, FilesystemError, Share};
use crate::virtio::host_connections::HostConnections;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};

/// Why there is no VM, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The conversation with the runtime.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// What the configuration names.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A part of the process.
    #[error("{0}")]
    Process(&'static str, #[source] io::Error),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The virtio-fs device.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// KVM could not go on with the guest.
    #[error("the guest was ended: {0}")]
    Broken(String),
}

/// How this process ends, if well.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// Another process has taken over.
    HandedOver,
    /// The runtime has ended the VM.
    Stopped,
    /// The guest has ended.
    Exited,
}

/// Runs the VM that its owner describes. `started_us` is when the program began.
pub fn run(owners: &mut Owners, started_us: u64) -> Result<End, MonitorError> {
    let control = owners.starter();
    let mut timeline = Timeline {
        started_us,
        ..Timeline::default()
    };
    let config = control.read_config()?;
    let opened = Opened::new(&config)?;
    timeline.opened_us = now_us();
    jail::unshare_pids()?;
    let (forked, in_cgroup) = fork(opened.cgroup.as_ref())?;
    if let Some(pid) = forked {
        control.send(&VmEvent::Forked { pid, in_cgroup })?;
        return Ok(End::HandedOver);
    }
    if !control.wait_for_go()? {
        return Ok(End::Stopped);
    }
    timeline.released_us = now_us();
    let (machine, listener) = build(&config, opened, &mut timeline)?;
    machine.run()?;
    timeline.running_us = now_us();
    info!(?timeline, "the guest runs");
    control.send(&VmEvent::Running { timeline })?;
    if let Some(listener) = listener {
        let failed = |error| MonitorError::Process("listen at the control socket", error);
        owners.listen(listener).map_err(failed)?;
    }
    let attached = Attached::after(config.disks.len());
    let end = wait(owners, &machine, attached);
    // The process ends now, and the kernel takes it all apart at once, threads included.
    std::mem::forget(machine);
    end
}

/// Forks, into the cgroup if that can be; `None` in the child.
fn fork(cgroup: Option<&OwnedFd>) -> Result<(Option<u32>, bool), MonitorError> {
    if let Some(cgroup) = cgroup {
        match sys::fork_into(cgroup.as_fd()) {
            Ok(forked) => return Ok((forked, true)),
            // The runtime moves the process, and tells why if it cannot.
            Err(error) => debug!(%error, "cannot fork into the cgroup"),
        }
    }
    let forked = sys::fork().map_err(|error| MonitorError::Process("fork", error))?;
    Ok((forked, false))
}

/// Enters the jail and puts the machine together. Gives the socket where others join the owner.
fn build(
    config: &VmConfig,
    opened: Opened,
    timeline: &mut Timeline,
) -> Result<(Machine, Option<UnixListener>), MonitorError> {
    let Opened {
        kvm,
        kernel,
        disks,
        log,
        share,
        sockets,
        network,
        cgroup: _,
    } = opened;
    let (sockets, control, mount) = match sockets {
        Some(Sockets {
            guest_cid,
            listener,
            control,
            mount,
        }) => (Some((guest_cid, listener)), Some(control), Some(mount)),
        None => (None, None, None),
    };
    fs::raise_open_files()
        .map_err(|error| MonitorError::Process("raise the limit on open files", error))?;
    let descriptors = jail::enter(Contents {
        share,
        sockets: mount,
        network,
    })?;
    timeline.jailed_us = now_us();
    let mut assembly = Assembly::new(kvm, config.cpus, config.memory_mib)?;
    if let Some(log) = log {
        assembly.add_serial(log)?;
    }
    for (index, (serial, disk)) in (0..).zip(disks) {
        assembly.add_device(Box::new(Block::new(index, serial, disk)))?;
    }
    let connections = HostConnections::default();
    if let Some(config) = &config.share {
        let root = jail::SHARE.into();
        let share = Share {
            root,
            proc_self_fd: descriptors,
            connections: connections.clone(),
        };
        assembly.add_device(Box::new(Filesystem::new(&config.tag, share)?))?;
    }
    if let Some((guest_cid, listener)) = sockets {
        let vsock = Vsock::new(guest_cid, listener, Path::new(jail::SOCKETS), connections)?;
        assembly.add_device(Box::new(vsock))?;
    }
    assembly.add_device(Box::new(Rng::default()))?;
    assembly.add_spare_places(config.spare_slots)?;
    timeline.machine_us = now_us();
    let command_line = command_line::compose(config, &assembly.device_interrupts())
        .map_err(|error| MachineError::Boot(error.into()))?;
    debug!(command_line);
    let machine = assembly.boot(&kernel, &command_line)?;
    timeline.loaded_us = now_us();
    Ok((machine, control))
}

/// Does as it is told until the end, from either side.
fn wait(
    owners: &mut Owners,
    machine: &Machine,
    mut attached: Attached,
) -> Result<End, MonitorError> {
    let failed = |error: Errno| MonitorError::Process("wait for events", error.into());
    loop {
        // What came together with an earlier line is here already.
        while let Some((owner, received)) = owners.next_command()? {
            match attached.carry_out(machine, owner, received) {
                Ok(event) => owners.answer(owner, &event)?,
                Err(VmCommand::Booted) => machine.settle(),
                Err(VmCommand::Stop) if owners.is_last(owner) => return Ok(End::Stopped),
                Err(VmCommand::Stop) => owners.answer(owner, &VmEvent::Shared)?,
                Err(command) => owners.part(owner, ControlError::Unexpected(command))?,
            }
        }
        attached.sweep(machine, owners);
        let ending = sys::event_fd(machine.ending().event());
        let mut events: Vec<_> = std::iter::once(ending)
            .chain(owners.descriptors())
            .map(|descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN))
            .collect();
        match poll(&mut events, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
        let readable: Vec<bool> = events
            .iter()
            .skip(1)
            .map(|event| !event.revents().is_empty())
            .collect();
        match machine.ending().get() {
            None => {}
            Some(Ending::Reset) => return Ok(End::Exited),
            Some(Ending::Broken(what)) => return Err(MonitorError::Broken(what)),
        }
        match owners.serve(&readable) {
            Ok(()) => {}
            Err(ControlError::Closed) => return Ok(End::Stopped),
            Err(error) => return Err(error.into()),
        }
    }
}

/// CLOCK_MONOTONIC in microseconds.
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let micros = now
        .tv_sec
        .saturating_mul(1_000_000)
        .saturating_add(now.tv_nsec / 1000);
    u64::try_from(micros).unwrap_or(0)
}
