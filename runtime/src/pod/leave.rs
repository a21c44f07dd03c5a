//! Takes a container out of a VM that others keep, so that nothing of it is left there.

use std::{io, os::fd::AsFd, time::Duration};

use bulkhead_agent_protocol::{
    ErrorKind,
    messages::{Empty, RemoveContainerRequest},
};
use thiserror::Error;

use super::pieces::{self, PieceError, directory_of};
use crate::{
    agent::{self, AgentError, connect::ConnectError, rpc::RpcError},
    cgroup::{Cgroup, CgroupError},
    state::{Container, Record},
    vm::VmProcess,
    wait::Deadline,
};

/// For the agent to end what still runs of the container, and to write out what it has on disks.
const REMOVE_LIMIT: Duration = Duration::from_secs(30);

/// For a VM whose last owner has gone.
const END_LIMIT: Duration = Duration::from_secs(3);

/// Something of the container is left in the VM.
#[derive(Debug, Error)]
pub enum LeaveError {
    /// In the guest.
    #[error("cannot remove container {id:?} from the virtual machine that it shares")]
    Guest {
        /// The container.
        id: String,
        /// Why not.
        #[source]
        source: AgentError,
    },
    /// In the share.
    #[error(transparent)]
    Piece(#[from] PieceError),
}

/// Removes the container from the guest, then its files from the share. What is gone is fine.
pub fn leave(container: &Container, record: &Record) -> Result<(), LeaveError> {
    let Some(vmm) = record.vmm.filter(|vmm| vmm.is_alive()) else {
        return Ok(());
    };
    let removed = remove_from_guest(container).map_err(|source| LeaveError::Guest {
        id: record.id.clone(),
        source,
    });
    // Its files go from the guest in any case.
    let taken = pieces::remove(vmm, &directory_of(record)).map_err(LeaveError::from);
    match removed.and(taken) {
        // The others have left meanwhile, and what fails does because the VM ends.
        Err(_) if vmm.ends_within(END_LIMIT) => Ok(()),
        left => left,
    }
}

fn remove_from_guest(container: &Container) -> Result<(), AgentError> {
    let deadline = Deadline::after(REMOVE_LIMIT);
    let mut rpc = match agent::connect(container, deadline) {
        // Its way to the guest was never made, and so nothing was asked for there.
        Err(AgentError::Connect(ConnectError::Socket(error)))
            if error.kind() == io::ErrorKind::NotFound =>
        {
            return Ok(());
        }
        connected => connected?,
    };
    let request = RemoveContainerRequest {
        container_id: container.id().to_owned(),
        force: true,
        ..Default::default()
    };
    match agent::call::<Empty>(&mut rpc, "RemoveContainer", &request, deadline) {
        Ok(_) => Ok(()),
        // The agent has done it when the monitor was killed, or there never was one.
        Err(RpcError::Refused {
            kind: ErrorKind::NoSuchProcess,
            ..
        }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// After a container has left whose monitor could not do it: the VMM lets go the devices that it had,
/// and sits in the cgroup of one of those who keep it.
pub fn pass_on(
    container: &Container,
    record: &Record,
    others: &[Record],
) -> Result<(), CgroupError> {
    let Some(vmm) = record.vmm else {
        return Ok(());
    };
    // It looks for what was left behind whenever somebody comes.
    if let Ok(sockets) = agent::sockets(container) {
        drop(VmProcess::join(sockets.as_fd(), vmm));
    }
    move_machine(record, others)
}

/// Of a container that has left: the VMM is in the cgroup of one of those who keep it after this.
pub fn move_machine(record: &Record, others: &[Record]) -> Result<(), CgroupError> {
    let (Some(vmm), Some(heir)) = (record.vmm, others.first()) else {
        return Ok(());
    };
    let (left, kept) = (Cgroup::at(&record.cgroup)?, Cgroup::at(&heir.cgroup)?);
    match kept.take_over(vmm.pid, &left) {
        Err(error) if !vmm.ends_within(END_LIMIT) => Err(error),
        _ => Ok(()),
    }
}
