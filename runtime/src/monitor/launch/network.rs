//! The network of a container that is being created: its interfaces are attached while the guest
//! boots, and set up once the container is there.

use std::{os::fd::AsFd, path::Path};

use bulkhead_agent_protocol::messages::Empty;
use bulkhead_vmm::config::VmEvent;
use rustix::event::{PollFd, PollFlags};

use super::{CALL_LIMIT, Launch, LaunchError};
use crate::{
    agent::rpc::{RpcClient, RpcError},
    network::{Joined, Network, NetworkError},
    wait::{Deadline, poll},
};

/// How a container is connected on the host.
#[derive(Debug)]
pub(in crate::monitor) enum Wiring<'a> {
    /// Not at all: in unit tests.
    None,
    /// By interfaces of its own.
    Own(Box<Network<'a>>),
    /// By those of another container of its VM.
    Joined(Joined),
}

impl<'a> Wiring<'a> {
    /// What is its own.
    pub(in crate::monitor) fn own(&mut self) -> Option<&mut Network<'a>> {
        match self {
            Self::Own(network) => Some(network),
            _ => None,
        }
    }

    /// The host's network namespace, if this process has left it.
    pub(in crate::monitor) fn home(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        match self {
            Self::None => None,
            Self::Own(network) => Some(network.home()),
            Self::Joined(joined) => Some(joined.home()),
        }
    }
}

impl Launch<'_, '_> {
    /// Enters the network namespace at a path, or an empty one that is made; and so does the
    /// stand-in, behind which engines and hooks look for it.
    pub(super) fn enter_network(&mut self, path: Option<&Path>) -> Result<(), LaunchError> {
        if let Some(stand_in) = &mut self.stand_in {
            let network = Network::enter(self.container, path)?;
            stand_in.enter_network(network.here()?.as_fd())?;
            self.network = Wiring::Own(Box::new(network));
        }
        Ok(())
    }

    /// Enters the network namespace of another container, whose interfaces stay that one's affair;
    /// and so does the stand-in.
    pub(super) fn join_network(&mut self, path: &Path) -> Result<(), LaunchError> {
        if let Some(stand_in) = &mut self.stand_in {
            let joined = Joined::enter(path).map_err(NetworkError::from)?;
            let here = joined.here().map_err(NetworkError::from)?;
            stand_in.enter_network(here.as_fd())?;
            self.network = Wiring::Joined(joined);
        }
        Ok(())
    }

    /// What the host has by now is attached; an interface that cannot be is an error.
    pub(super) fn refresh_network(&mut self) -> Result<(), LaunchError> {
        let Some(network) = self.network.own() else {
            return Ok(());
        };
        match network.refresh(&mut *self.vm)?.into_iter().next() {
            Some(problem) => Err(problem.into()),
            None => Ok(()),
        }
    }

    /// What the VMM says of an interface or a disk.
    pub(super) fn on_device_event(&mut self, event: &VmEvent) -> Result<(), LaunchError> {
        self.disks.on_event(event)?;
        match self.network.own() {
            Some(network) => Ok(network.on_event(event, &mut *self.vm)?),
            None => Ok(()),
        }
    }

    /// Attaches interfaces that are there and are not attached, and waits until they and the disks
    /// are.
    pub(super) fn attach_interfaces(&mut self) -> Result<(), LaunchError> {
        let deadline = Deadline::after(CALL_LIMIT);
        self.refresh_network()?;
        while !self.disks.are_settled()
            || self
                .network
                .own()
                .is_some_and(|network| !network.is_settled())
        {
            let control = self.vm.control();
            let mut descriptors = [PollFd::new(&control, PollFlags::IN), self.signals.poll_fd()];
            let failed = |error| LaunchError::Io("wait for the virtual machine", error);
            if poll(&mut descriptors, Some(deadline)).map_err(failed)? == 0 {
                return Err(LaunchError::Attach);
            }
            let [event, signal] = descriptors.map(|fd| !fd.revents().is_empty());
            if event {
                while let Some(event) = self.vm.next_event()? {
                    self.on_device_event(&event)?;
                }
            }
            if signal {
                self.judge_signals()?;
            }
        }
        Ok(())
    }

    /// Has the agent make the container's network namespace what the host's is.
    pub(super) fn set_network(&mut self, rpc: &mut RpcClient) -> Result<(), LaunchError> {
        while let Some(request) = self.network.own().and_then(|network| network.request()) {
            let answer = self.call::<Empty>(rpc, "SetNetwork", &request);
            if let Err(LaunchError::Agent(RpcError::Refused { message, .. })) = answer {
                return Err(LaunchError::SetNetwork(message));
            }
            answer?;
            if let Some(network) = self.network.own() {
                network.on_set(request, true, &mut *self.vm)?;
            }
        }
        Ok(())
    }
}
