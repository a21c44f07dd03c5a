//! The network namespace of a container as the host describes it: `Network::set` brings what a
//! request names and takes back what an earlier one has brought. `wanted` checks requests,
//! `apply` makes the difference, `netlink` speaks to the kernel, `bus` finds the devices. What
//! the container's processes have made themselves is left alone.

mod apply;
mod bus;
mod messages;
mod netlink;
mod resolver;
mod wanted;

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use bulkhead_agent_protocol::messages::SetNetworkRequest;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub use bus::Bus;

use self::{
    apply::{Applied, Change},
    resolver::Resolver,
};
use crate::{
    container::sysctl,
    error::{Attempt, Result},
};

/// Kernel parameters, by path below /proc/sys.
pub(crate) type Parameters = Vec<(PathBuf, String)>;

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
    resolver: Mutex<Option<Resolver>>,
}

impl Network {
    /// The namespace of a descriptor, as new.
    pub(crate) fn new(namespace: OwnedFd) -> Self {
        Self {
            namespace,
            applied: Mutex::default(),
            resolver: Mutex::default(),
        }
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
        self.set_resolver(host, request.resolver)
    }

    fn set_resolver(&self, host: &Host, wanted: bool) -> Result<()> {
        let mut resolver = self.resolver.lock().unwrap_or_else(PoisonError::into_inner);
        if !wanted {
            *resolver = None;
        } else if resolver.is_none() {
            *resolver = Some(Resolver::start(self.namespace.as_fd(), host)?);
        }
        Ok(())
    }

    /// Takes the devices of the namespace back.
    pub(crate) fn clear(&self, host: &Host) -> Result<()> {
        self.set_resolver(host, false)?;
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        applied.clear(host)
    }

    /// Runs a step inside of it, which must not wait.
    pub(crate) fn within<T>(&self, host: &Host, step: impl FnOnce() -> Result<T>) -> Result<T> {
        within(self.namespace.as_fd(), host, step)
    }

    /// Sets kernel parameters, and leaves those that do not exist in the list.
    pub(crate) fn set_parameters(
        &self,
        host: &Host,
        proc: BorrowedFd<'_>,
        parameters: &mut Parameters,
    ) -> Result<()> {
        if parameters.is_empty() {
            return Ok(());
        }
        self.within(host, || {
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
        })
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
