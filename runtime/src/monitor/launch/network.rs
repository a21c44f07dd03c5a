//! The network of a container that is being created: its interfaces are attached while the guest
//! boots, and set up once the container is there.

use std::path::Path;

use bulkhead_agent_protocol::messages::Empty;
use bulkhead_vmm::config::VmEvent;
use rustix::event::{PollFd, PollFlags};

use super::{super::StandIn, CALL_LIMIT, Launch, LaunchError};
use crate::{
    agent::rpc::{RpcClient, RpcError},
    network::Network,
    wait::{Deadline, poll},
};

impl Launch<'_, '_> {
    /// Enters the network namespace at a path, or an empty one that is made; and so does the first
    /// thread, behind which engines and hooks look for it.
    pub(super) fn enter_network(
        &mut self,
        path: Option<&Path>,
        stand_in: Option<&StandIn>,
    ) -> Result<(), LaunchError> {
        if let Some(stand_in) = stand_in {
            let network = Network::enter(self.container, path)?;
            let enter = network.enter_too()?;
            stand_in.run(enter)?;
            self.network = Some(network);
        }
        Ok(())
    }

    /// What the host has by now is attached; an interface that cannot be is an error.
    pub(super) fn refresh_network(&mut self) -> Result<(), LaunchError> {
        let Some(network) = &mut self.network else {
            return Ok(());
        };
        match network.refresh(&mut *self.vm)?.into_iter().next() {
            Some(problem) => Err(problem.into()),
            None => Ok(()),
        }
    }

    pub(super) fn on_network_event(&mut self, event: &VmEvent) -> Result<(), LaunchError> {
        match &mut self.network {
            Some(network) => Ok(network.on_event(event, &mut *self.vm)?),
            None => Ok(()),
        }
    }

    /// Attaches what is there and is not attached, and waits until it is.
    pub(super) fn attach_interfaces(&mut self) -> Result<(), LaunchError> {
        let deadline = Deadline::after(CALL_LIMIT);
        self.refresh_network()?;
        while self
            .network
            .as_ref()
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
                    self.on_network_event(&event)?;
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
        while let Some(request) = self.network.as_ref().and_then(Network::request) {
            let answer = self.call::<Empty>(rpc, "SetNetwork", &request);
            if let Err(LaunchError::Agent(RpcError::Refused { message, .. })) = answer {
                return Err(LaunchError::SetNetwork(message));
            }
            answer?;
            if let Some(network) = &mut self.network {
                network.on_set(request, true, &mut *self.vm)?;
            }
        }
        Ok(())
    }
}
