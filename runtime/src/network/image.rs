//! Keeps the guest's image of a network namespace. The course of an interface:
//!
//! ```text
//! seen ─tap, redirection─▶ Attaching ─Attached─▶ Attached ─gone from the host─▶ Leaving
//!                              │                    ▲                             │ the agent let go
//!                              ▼ AttachFailed       └ SetNetwork names it         ▼
//!                            Refused                               Detaching ─Detached─▶ forgotten
//! ```

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use bulkhead_agent_protocol::messages::{NetworkInterface, SetNetworkRequest};
use bulkhead_vmm::config::{VmCommand, VmEvent};

use super::{
    NetworkError, Traces,
    namespace::Namespace,
    netlink::{Changes, Netlink},
    redirect::{self, Tie},
    resolver,
    routes::mac_text,
    scan::{self, Link, View},
    tap::{self, Tap},
};
use crate::{
    agent::rpc::{CallId, RpcClient, RpcError},
    state::Container,
    vm::Vm,
};

#[derive(Debug)]
enum Stage {
    /// The VMM was asked.
    Attaching,
    /// The guest has it by this name of a device.
    Attached(String),
    /// The VMM has none for it.
    Refused,
    /// Gone from the host; the agent is to let this device go, if it has it.
    Leaving(String),
    /// The VMM is to let it go.
    Detaching,
}

#[derive(Debug)]
struct Interface {
    /// The VMM's name for it.
    id: String,
    name: String,
    tie: Tie,
    tap: u32,
    /// The largest MTU that the guest's device can have.
    largest_mtu: u16,
    /// The tap's.
    mtu: u16,
    /// What the namespace's own name server is answered comes to that.
    admits_answers: bool,
    stage: Stage,
}

impl Interface {
    fn is_of(&self, link: &Link) -> bool {
        self.tie.index == link.index && !matches!(self.stage, Stage::Leaving(_) | Stage::Detaching)
    }
}

/// A container's network. The thread that makes it is in the namespace until it is dropped; then
/// the manager's interfaces are as they were found.
#[derive(Debug)]
pub struct Network<'a> {
    container: &'a Container,
    namespace: Namespace,
    netlink: Netlink,
    changes: Changes,
    /// As it was at the last look, if there was one.
    view: Option<View>,
    interfaces: Vec<Interface>,
    /// How many interfaces there have ever been.
    count: u64,
    /// Whether the guest's questions to a name server are passed on.
    resolves: bool,
    /// What people were told.
    said: BTreeSet<String>,
    /// What the guest's namespace is.
    set: SetNetworkRequest,
    /// What the agent was asked to make it.
    asked: Option<(CallId, SetNetworkRequest)>,
    /// What the agent would not do; asking again is of no use.
    refused: Option<SetNetworkRequest>,
}

impl<'a> Network<'a> {
    /// Enters the namespace at a path, or an empty one that is made. Nothing is attached yet.
    pub fn enter(container: &'a Container, path: Option<&Path>) -> Result<Self, NetworkError> {
        let namespace = Namespace::enter(path)?;
        // Before the first look, so that nothing is missed between the two.
        let changes = Changes::watch().map_err(NetworkError::Look)?;
        Ok(Self {
            container,
            namespace,
            netlink: Netlink::open().map_err(NetworkError::Look)?,
            changes,
            view: None,
            interfaces: Vec::new(),
            count: 0,
            resolves: false,
            said: BTreeSet::new(),
            set: SetNetworkRequest {
                container_id: container.id().to_owned(),
                ..Default::default()
            },
            asked: None,
            refused: None,
        })
    }

    /// The namespace that the thread is in.
    pub fn here(&self) -> Result<OwnedFd, NetworkError> {
        Ok(self.namespace.here()?)
    }

    /// The host's network namespace.
    pub fn home(&self) -> BorrowedFd<'_> {
        self.namespace.home()
    }

    /// Readable when the kernel has announced a change.
    pub fn changes(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// Looks at the namespace, if it may have changed, and has the VMM attach what is new. What
    /// cannot be done to single interfaces is returned.
    pub fn refresh(&mut self, vm: &mut dyn Vm) -> Result<Vec<NetworkError>, NetworkError> {
        // The first look needs no announcement.
        if !self.changes.happened().map_err(NetworkError::Look)? && self.view.is_some() {
            return Ok(Vec::new());
        }
        let view = scan::scan(&mut self.netlink).map_err(NetworkError::Look)?;
        for text in &view.left_out {
            if self.said.insert(text.clone()) {
                tracing::warn!("{text}");
            }
        }
        let mut problems = Vec::new();
        for unfit in &view.unfit {
            if self.said.insert(unfit.to_string()) {
                problems.push(unfit.clone().into());
            }
        }
        self.let_go(&view);
        self.release(vm)?;
        problems.extend(self.follow_mtu(&view));
        self.attach_new(&view, vm, &mut problems)?;
        if view.resolver {
            problems.extend(self.resolve().err());
        }
        self.view = Some(view);
        Ok(problems)
    }

    /// Passes the guest's questions to the name server, and servers' answers to that.
    fn resolve(&mut self) -> Result<(), NetworkError> {
        if !self.resolves {
            resolver::serve(self.container).map_err(NetworkError::Resolver)?;
            self.resolves = true;
        }
        for interface in &mut self.interfaces {
            if interface.tap != 0 && !interface.admits_answers {
                interface
                    .tie
                    .admit_answers(&mut self.netlink, interface.tap)?;
                interface.admits_answers = true;
            }
        }
        Ok(())
    }

    /// Marks what is gone from the host, or needs another device.
    fn let_go(&mut self, view: &View) {
        let keeps = |interface: &Interface| {
            let link = view.links.iter().find(|link| interface.is_of(link));
            link.is_some_and(|link| link.mtu <= interface.largest_mtu)
        };
        self.interfaces
            .retain(|interface| !matches!(interface.stage, Stage::Refused) || keeps(interface));
        for interface in &mut self.interfaces {
            // What is being attached is looked at again when it is.
            if !keeps(interface)
                && let Stage::Attached(device) = &interface.stage
            {
                interface.stage = Stage::Leaving(device.clone());
            }
        }
    }

    /// Has the VMM let go what the agent does not hold.
    fn release(&mut self, vm: &mut dyn Vm) -> Result<(), NetworkError> {
        let asked = self.asked.as_ref().map(|(_, request)| request);
        let held: BTreeSet<&str> = [Some(&self.set), asked]
            .into_iter()
            .flatten()
            .flat_map(|request| &request.interfaces)
            .map(|interface| interface.device.as_str())
            .collect();
        for interface in &mut self.interfaces {
            if let Stage::Leaving(device) = &interface.stage
                && !held.contains(device.as_str())
            {
                let id = interface.id.clone();
                vm.command(VmCommand::Detach { id })?;
                interface.stage = Stage::Detaching;
            }
        }
        Ok(())
    }

    fn follow_mtu(&mut self, view: &View) -> Vec<NetworkError> {
        let mut problems = Vec::new();
        for interface in &mut self.interfaces {
            let Some(link) = view.links.iter().find(|link| interface.is_of(link)) else {
                continue;
            };
            interface.name.clone_from(&link.name);
            if link.mtu != interface.mtu && interface.tap != 0 {
                interface.mtu = link.mtu;
                problems.extend(tap::set_mtu(&mut self.netlink, interface.tap, link.mtu).err());
            }
        }
        problems
    }

    fn attach_new(
        &mut self,
        view: &View,
        vm: &mut dyn Vm,
        problems: &mut Vec<NetworkError>,
    ) -> Result<(), NetworkError> {
        let known = |link: &&Link| {
            !self
                .interfaces
                .iter()
                .any(|interface| interface.is_of(link))
        };
        let new: Vec<&Link> = view.links.iter().filter(known).collect();
        if new.is_empty() {
            return Ok(());
        }
        let disciplines = redirect::disciplines(&mut self.netlink).map_err(NetworkError::Look)?;
        let mut ties = Vec::with_capacity(new.len());
        for link in &new {
            // One that gets another device has been tied before.
            let tied = self.interfaces.iter().map(|interface| interface.tie);
            let mut tied = tied.filter(|tie| tie.index == link.index);
            ties.push(match tied.next() {
                Some(tie) => tie,
                None => Tie {
                    index: link.index,
                    discipline: !disciplines.contains(&link.index)
                        || redirect::is_abandoned(&mut self.netlink, link.index)
                            .map_err(NetworkError::Look)?,
                    all_multicast: link.filters_multicast && !link.all_multicast,
                },
            });
        }
        self.write_down(&ties)?;
        for (link, tie) in new.into_iter().zip(ties) {
            if let Err(problem) = self.attach(link, tie, vm) {
                problems.push(problem);
            }
        }
        Ok(())
    }

    /// Before it is done: what must be undone if this process is killed. A namespace of our own
    /// ends with what was done in it.
    fn write_down(&self, new: &[Tie]) -> Result<(), NetworkError> {
        let Some(path) = self.namespace.path() else {
            return Ok(());
        };
        let ties = self.interfaces.iter().map(|interface| interface.tie);
        let traces = Traces {
            path: path.to_owned(),
            namespace: self.namespace.identity(),
            ties: ties.chain(new.iter().copied()).collect(),
        };
        let locked = self.container.lock()?;
        let mut record = self.container.record()?;
        record.network = Some(traces);
        locked.write(&record)?;
        Ok(())
    }

    fn attach(&mut self, link: &Link, tie: Tie, vm: &mut dyn Vm) -> Result<(), NetworkError> {
        self.count += 1;
        // Kept in any case, so that what was half done is undone and is not tried for ever.
        self.interfaces.push(Interface {
            id: format!("net{}", self.count),
            name: link.name.clone(),
            tie,
            tap: 0,
            largest_mtu: link.mtu,
            mtu: link.mtu,
            admits_answers: false,
            stage: Stage::Refused,
        });
        let tap = Tap::make(&mut self.netlink, link.mtu)?;
        tie.make(&mut self.netlink, tap.index)?;
        let Some(interface) = self.interfaces.last_mut() else {
            return Ok(());
        };
        interface.tap = tap.index;
        vm.command_with(
            VmCommand::AttachNetwork {
                id: interface.id.clone(),
                mac: mac_text(&link.mac),
                mtu: link.mtu,
            },
            &[tap.descriptor.as_fd()],
        )?;
        interface.stage = Stage::Attaching;
        Ok(())
    }

    /// Has the VMM let all interfaces go, which the agent has done before: for a VM that goes on
    /// without this container. Nobody waits until it is done.
    pub fn detach(&mut self, vm: &mut dyn Vm) -> Result<(), NetworkError> {
        for interface in &self.interfaces {
            if matches!(interface.stage, Stage::Attached(_) | Stage::Leaving(_)) {
                let id = interface.id.clone();
                vm.command(VmCommand::Detach { id })?;
            }
        }
        Ok(())
    }

    /// Ends as a process that is killed does.
    #[cfg(test)]
    pub(super) fn abandon(mut self) {
        self.interfaces.clear();
    }

    /// Takes note of what the VM says. Returns what went wrong.
    pub fn on_event(&mut self, event: &VmEvent, vm: &mut dyn Vm) -> Result<(), NetworkError> {
        let (VmEvent::Attached { id, .. }
        | VmEvent::AttachFailed { id, .. }
        | VmEvent::Detached { id }) = event
        else {
            return Ok(());
        };
        let Some(place) = self.interfaces.iter().position(|known| known.id == *id) else {
            return Ok(());
        };
        let interface = &mut self.interfaces[place];
        match event {
            VmEvent::Attached { device, .. } => {
                interface.stage = Stage::Attached(device.clone());
                // It may have left meanwhile.
                if let Some(view) = self.view.take() {
                    self.let_go(&view);
                    self.view = Some(view);
                }
                self.release(vm)?;
            }
            VmEvent::AttachFailed { message, .. } => {
                // The VMM has let the tap go: what comes in would lead nowhere.
                interface.stage = Stage::Refused;
                let problem = NetworkError::Attach {
                    interface: interface.name.clone(),
                    message: message.clone(),
                };
                let tie = interface.tie;
                tie.undo(&mut self.netlink)?;
                return Err(problem);
            }
            _ => {
                self.interfaces.remove(place);
            }
        }
        Ok(())
    }

    /// Whether nothing is to be waited for before the guest's namespace can be set.
    pub fn is_settled(&self) -> bool {
        let waits = |interface: &Interface| matches!(interface.stage, Stage::Attaching);
        !self.interfaces.iter().any(waits)
    }

    /// What the agent is to be asked now, if anything.
    pub fn request(&self) -> Option<SetNetworkRequest> {
        let wanted = self.wanted();
        let known = wanted == self.set || self.refused.as_ref() == Some(&wanted);
        (!known && self.asked.is_none() && self.is_settled()).then_some(wanted)
    }

    fn wanted(&self) -> SetNetworkRequest {
        let mut request = SetNetworkRequest {
            container_id: self.container.id().to_owned(),
            ..Default::default()
        };
        let Some(view) = &self.view else {
            return request;
        };
        if !view.loopback.is_empty() {
            request.interfaces.push(NetworkInterface {
                name: "lo".to_owned(),
                up: true,
                addresses: view.loopback.clone(),
                ..Default::default()
            });
        }
        for link in &view.links {
            let interface = self.interfaces.iter().find(|known| known.is_of(link));
            if let Some(Stage::Attached(device)) = interface.map(|interface| &interface.stage) {
                request.interfaces.push(NetworkInterface {
                    device: device.clone(),
                    name: link.name.clone(),
                    mac: mac_text(&link.mac),
                    mtu: link.mtu.into(),
                    addresses: link.addresses.clone(),
                    up: link.up,
                    ..Default::default()
                });
            }
        }
        let there = |name: &str| {
            matches!(name, "" | "lo") || request.interfaces.iter().any(|known| known.name == name)
        };
        let routes = view.routes.iter().filter(|route| {
            there(&route.device) && route.next_hops.iter().all(|hop| there(&hop.device))
        });
        let neighbours = view.neighbours.iter().filter(|one| there(&one.device));
        (request.routes, request.neighbours) =
            (routes.cloned().collect(), neighbours.cloned().collect());
        request.resolver = view.resolver && self.resolves;
        request
    }

    /// Asks the agent for what is to be asked now.
    pub fn ask(&mut self, rpc: &mut RpcClient) -> Result<(), RpcError> {
        if let Some(request) = self.request() {
            let call = rpc.send("SetNetwork", &request)?;
            self.asked = Some((call, request));
        }
        Ok(())
    }

    /// Whether this call's answer is for the network.
    pub fn awaits(&self, call: CallId) -> bool {
        self.asked.as_ref().is_some_and(|(asked, _)| *asked == call)
    }

    /// The agent has answered what was asked.
    pub fn on_answer(&mut self, done: bool, vm: &mut dyn Vm) -> Result<(), NetworkError> {
        let Some((_, request)) = self.asked.take() else {
            return Ok(());
        };
        self.on_set(request, done, vm)
    }

    /// The guest's namespace is what a request has said, or could not be made so.
    pub fn on_set(
        &mut self,
        request: SetNetworkRequest,
        done: bool,
        vm: &mut dyn Vm,
    ) -> Result<(), NetworkError> {
        if !done {
            self.refused = Some(request);
            return Ok(());
        }
        (self.set, self.refused) = (request, None);
        // The agent has let go what was not named.
        self.release(vm)
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        for interface in &self.interfaces {
            if let Err(error) = interface.tie.undo(&mut self.netlink) {
                tracing::warn!("{}", crate::error::chain(&error));
            }
        }
    }
}
