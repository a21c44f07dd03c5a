//! The network namespace of a container as the host describes it: [`Network::set`] brings what a
//! request names and takes back what an earlier one has brought. [`wanted`] checks requests,
//! [`apply`] makes the difference, [`netlink`] speaks to the kernel, [`bus`] finds the devices. What
//! the container's processes have made themselves is left alone.

mod apply;
mod bus;
mod messages;
mod netlink;
mod wanted;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use bulkhead_agent_protocol::messages::SetNetworkRequest;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub use bus::Bus;

use self::apply::{Applied, Change};
use crate::{
    container::sysctl,
    error::{Attempt, Error, Result},
};

/// What networks use of the guest.
#[derive(Debug)]
pub struct Host {
    /// The agent's own network namespace, in which devices appear.
    pub namespace: OwnedFd,
    /// Where devices are.
    pub bus: Bus,
}

/// A network namespace.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    applied: Mutex<Applied>,
    /// Kernel parameters of interfaces, by path below /proc/sys, that were not set yet: interfaces
    /// come after the container was made.
    parameters: Mutex<Vec<(PathBuf, String)>>,
}

impl Network {
    /// The namespace of a descriptor, as new. `parameters` are those of its interfaces.
    pub(crate) fn new(namespace: OwnedFd, parameters: Vec<(PathBuf, String)>) -> Self {
        Self {
            namespace,
            applied: Mutex::default(),
            parameters: Mutex::new(parameters),
        }
    }

    /// The namespace.
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Makes the namespace what the request says. After an error a part of it may be made, which
    /// the next request goes on from.
    pub(crate) fn set(
        &self,
        host: &Host,
        proc: BorrowedFd<'_>,
        request: &SetNetworkRequest,
    ) -> Result<()> {
        let wanted = wanted::read(request)?;
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        let change = Change {
            host,
            namespace: self.namespace.as_fd(),
            proc,
            wanted: &wanted,
        };
        change.run(&mut applied)?;
        drop(applied);
        self.set_parameters(host, proc, true)
    }

    /// Takes the devices of the namespace back.
    pub(crate) fn clear(&self, host: &Host) -> Result<()> {
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.clear(host)
    }

    /// Sets the kernel parameters of interfaces. Those of interfaces that are not there wait if
    /// more may come, and else are an error.
    pub(crate) fn set_parameters(
        &self,
        host: &Host,
        proc: BorrowedFd<'_>,
        more_may_come: bool,
    ) -> Result<()> {
        let mut parameters = self
            .parameters
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if parameters.is_empty() {
            return Ok(());
        }
        within(self.namespace(), host, || {
            let mut missing = Vec::new();
            for (path, value) in parameters.drain(..) {
                if is_there(proc, &path) {
                    sysctl::write(proc, &path, &value)?;
                } else {
                    missing.push((path, value));
                }
            }
            *parameters = missing;
            Ok(())
        })?;
        match parameters.first() {
            Some((path, _)) if !more_may_come => {
                let field = format!("linux.sysctl {}", path.display());
                let problem = "no interface of the container has this parameter";
                Err(Error::invalid(field, problem))
            }
            _ => Ok(()),
        }
    }
}

fn is_there(proc: BorrowedFd<'_>, path: &Path) -> bool {
    rustix::fs::statat(
        proc,
        Path::new("sys").join(path),
        rustix::fs::AtFlags::empty(),
    )
    .is_ok()
}

/// Runs a step inside of a network namespace. The agent has one thread: nothing else runs there
/// meanwhile, as long as the step waits for nothing.
fn within<T>(
    namespace: BorrowedFd<'_>,
    host: &Host,
    step: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(namespace, kind)
        .or_cannot(|| "enter the container's network namespace")?;
    let result = step();
    move_into_link_name_space(host.namespace.as_fd(), kind)
        .or_cannot(|| "return to the agent's network namespace")?;
    result
}
