//! Being there for one process of a guest: its stdio, its signals, its terminal's size and its
//! end, in one poll loop. The same for a container's process and for `exec`.

use std::{io, os::fd::AsFd, time::Duration};

use bulkhead_agent_protocol::messages::{
    ResizeTerminalRequest, SignalProcessRequest, WaitProcessRequest, WaitProcessResponse,
};
use rustix::event::{PollFd, PollFlags};

use super::StandIn;
use crate::{
    agent::{
        self, Streams,
        rpc::{CallId, RpcClient, RpcError},
    },
    network::{Network, NetworkError},
    stdio::{Caught, Console, RawTerminal, Relay, Signals},
    vm::Vm,
    wait::{Deadline, poll},
};

/// How a process ends whose VM was lost: as if by SIGKILL.
const KILLED: i32 = 128 + 9;
/// Once a process has ended and the agent has said that its output is written out, a stream that
/// nevertheless stays open and silent for so long is given up.
const SILENCE: Duration = Duration::from_secs(2);

/// What a process's stdio is on the host.
#[derive(Debug)]
pub enum HostStdio {
    /// This process's standard descriptors.
    Standard,
    /// The user's own terminal.
    Terminal(RawTerminal),
    /// A terminal whose master was given away.
    Console(Console),
    /// What a test gives: standard input, output and error.
    #[cfg(test)]
    Given([std::os::fd::OwnedFd; 3]),
}

impl HostStdio {
    /// Whether the process has a terminal.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_) | Self::Console(_))
    }

    /// Rows and columns of the terminal, zeros without one.
    pub fn size(&self) -> (u32, u32) {
        match self {
            Self::Terminal(_) => crate::stdio::size(io::stdin().as_fd()),
            Self::Console(console) => crate::stdio::size(console.slave()),
            _ => (0, 0),
        }
    }

    /// Joins it to the process's streams.
    pub fn relay(&self, streams: Streams) -> io::Result<Relay> {
        let (input, output) = (io::stdin(), io::stdout());
        match self {
            Self::Standard => Relay::standard(streams),
            Self::Terminal(_) => Relay::terminal(input.as_fd(), output.as_fd(), streams),
            Self::Console(console) => Relay::terminal(console.slave(), console.slave(), streams),
            #[cfg(test)]
            Self::Given([input, output, error]) => {
                Relay::between(input.as_fd(), output.as_fd(), Some(error.as_fd()), streams)
            }
        }
    }
}

/// What a monitor owns of a process's sandbox.
pub struct Owned<'s, 'a> {
    /// The virtual machine.
    pub vm: &'s mut dyn Vm,
    /// The network.
    pub network: Option<&'s mut Network<'a>>,
    /// Who engines send signals to.
    pub stand_in: Option<&'s mut StandIn>,
}

/// A process that this one stands for.
#[derive(Debug)]
pub struct Attached {
    rpc: Option<RpcClient>,
    container_id: String,
    exec_id: String,
    relay: Relay,
    host: HostStdio,
    wait: CallId,
    status: Option<i32>,
    out_of_memory: bool,
}

impl Attached {
    /// Begins to wait for the process's end. `exec_id` is empty for the container's own process.
    pub fn new(
        mut rpc: RpcClient,
        container_id: &str,
        exec_id: &str,
        relay: Relay,
        host: HostStdio,
    ) -> Result<Self, RpcError> {
        let request = WaitProcessRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            // A VM may go on without us.
            stands_for_container: exec_id.is_empty(),
            ..Default::default()
        };
        let wait = rpc.send("WaitProcess", &request)?;
        Ok(Self {
            rpc: Some(rpc),
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            relay,
            host,
            wait,
            status: None,
            out_of_memory: false,
        })
    }

    /// The connection, for a call of one's own; gone when the VM is.
    pub fn rpc(&mut self) -> Option<&mut RpcClient> {
        self.rpc.as_mut()
    }

    /// Whether the guest's kernel has ended a process of the container for want of memory; to be asked
    /// once the container's own process has ended.
    pub fn out_of_memory(&self) -> bool {
        self.out_of_memory
    }

    /// Carries on until the process has ended and its output is delivered. Returns its exit code,
    /// or 128 + the signal that ended it. With the sandbox's VM and network if this process has
    /// them.
    pub fn run(
        &mut self,
        signals: &mut Signals,
        mut sandbox: Option<Owned<'_, '_>>,
    ) -> io::Result<i32> {
        // An answer may have come while another was waited for, and a signal.
        self.listen(&mut sandbox);
        let mut signalled = true;
        loop {
            if signalled && !self.heed(&mut sandbox) {
                return Ok(self.status.unwrap_or(KILLED));
            }
            if let Some(status) = self.status.filter(|_| self.relay.outputs_ended()) {
                return Ok(status);
            }
            let watched = sandbox.as_ref().filter(|_| self.rpc.is_some());
            let control = watched.map(|sandbox| sandbox.vm.control());
            let changes = watched.and_then(|sandbox| sandbox.network.as_deref());
            let changes = changes.map(Network::changes);
            let mut descriptors = vec![signals.poll_fd()];
            let (watched, wired) = (control.is_some(), changes.is_some());
            for descriptor in [&control, &changes].into_iter().flatten() {
                descriptors.push(PollFd::new(descriptor, PollFlags::IN));
            }
            let rpc = self.rpc.as_ref().map(agent::poll_fd);
            let connected = rpc.is_some();
            descriptors.extend(rpc);
            let relayed = descriptors.len();
            descriptors.extend(self.relay.poll_fds());
            let stand_in = sandbox.as_ref().and_then(|own| own.stand_in.as_ref());
            let relayed = relayed..descriptors.len();
            descriptors.extend(stand_in.map(|stand_in| stand_in.poll_fd()));
            // Silence counts only while it is the guest's turn.
            let deadline = (self.status.is_some() && self.relay.waits_for_guest())
                .then(|| Deadline::after(SILENCE));
            if poll(&mut descriptors, deadline)? == 0 {
                tracing::warn!("the guest left the process's output open after its end");
                return Ok(self.status.unwrap_or(KILLED));
            }
            let events: Vec<PollFlags> = descriptors.iter().map(PollFd::revents).collect();
            drop(descriptors);
            let mut happened = events.iter().map(|events| !events.is_empty());
            if happened.next() == Some(true) {
                self.forward(signals.caught());
            }
            let event = watched && happened.next() == Some(true);
            let changed = wired && happened.next() == Some(true);
            if let Some(sandbox) = &mut sandbox {
                if event {
                    self.watch(sandbox);
                }
                if changed {
                    self.refresh(sandbox);
                }
            }
            if connected && happened.next() == Some(true) {
                self.listen(&mut sandbox);
            }
            signalled = events[relayed.end..]
                .iter()
                .any(|events| !events.is_empty());
            self.ask_for_network(&mut sandbox);
            if let Err(error) = self.relay.advance(&events[relayed]) {
                tracing::error!("{}", crate::error::chain(&error));
            }
        }
    }

    /// Forwards what was sent to the stand-in. False if that was killed, as one kills a container's
    /// process.
    fn heed(&mut self, sandbox: &mut Option<Owned<'_, '_>>) -> bool {
        let stand_in = sandbox.as_mut().and_then(|own| own.stand_in.as_mut());
        match stand_in.map(|stand_in| stand_in.caught()) {
            Some(Ok(caught)) => self.forward(caught),
            Some(Err(_)) => return false,
            None => {}
        }
        true
    }

    fn forward(&mut self, caught: Vec<Caught>) {
        let Some(rpc) = &mut self.rpc else { return };
        if self.status.is_some() {
            return;
        }
        for signal in caught {
            let result = match signal {
                Caught::Forward(signal) => rpc.send(
                    "SignalProcess",
                    &SignalProcessRequest {
                        container_id: self.container_id.clone(),
                        exec_id: self.exec_id.clone(),
                        signal,
                        ..Default::default()
                    },
                ),
                Caught::Resized if self.host.is_terminal() => {
                    let (rows, columns) = self.host.size();
                    rpc.send(
                        "ResizeTerminal",
                        &ResizeTerminalRequest {
                            container_id: self.container_id.clone(),
                            exec_id: self.exec_id.clone(),
                            rows,
                            columns,
                            ..Default::default()
                        },
                    )
                }
                Caught::Resized => continue,
            };
            if let Err(error) = result {
                self.lost(&error);
                return;
            }
        }
    }

    fn watch(&mut self, sandbox: &mut Owned<'_, '_>) {
        loop {
            match sandbox.vm.next_event() {
                Ok(Some(event)) => {
                    if let Some(network) = &mut sandbox.network {
                        complain(network.on_event(&event, sandbox.vm).err());
                    }
                }
                Ok(None) => return,
                Err(error) => return self.lost(&error),
            }
        }
    }

    /// The host's network namespace has changed. What cannot be followed is told, and the container
    /// goes on with the rest.
    fn refresh(&mut self, sandbox: &mut Owned<'_, '_>) {
        if let Some(network) = &mut sandbox.network {
            match network.refresh(sandbox.vm) {
                Ok(problems) => complain(problems),
                Err(error) => complain([error]),
            }
        }
    }

    fn ask_for_network(&mut self, sandbox: &mut Option<Owned<'_, '_>>) {
        let network = sandbox
            .as_mut()
            .and_then(|sandbox| sandbox.network.as_deref_mut());
        if let (Some(network), Some(rpc)) = (network, &mut self.rpc)
            && let Err(error) = network.ask(rpc)
        {
            self.lost(&error);
        }
    }

    fn listen(&mut self, sandbox: &mut Option<Owned<'_, '_>>) {
        while let Some(rpc) = &mut self.rpc {
            match rpc.progress() {
                Ok(None) => return,
                Ok(Some((call, answer))) if call == self.wait => {
                    let status = answer.and_then(|payload| {
                        agent::decode::<WaitProcessResponse>("WaitProcess", &payload)
                    });
                    match status {
                        Ok(response) => {
                            self.out_of_memory = response.out_of_memory;
                            self.ended(response.status);
                        }
                        Err(error) => self.lost(&error),
                    }
                }
                Ok(Some((call, answer))) => {
                    if let Some(sandbox) = sandbox
                        && let Some(network) = &mut sandbox.network
                        && network.awaits(call)
                    {
                        let done = answer.is_ok();
                        complain(network.on_answer(done, sandbox.vm).err());
                        if let Err(error) = answer {
                            let text = crate::error::chain(&error);
                            tracing::error!("cannot set up the network in the guest: {text}");
                        }
                    } else if let Err(error) = answer {
                        // A signal for a process that has just ended, say.
                        tracing::debug!("the agent refused: {}", crate::error::chain(&error));
                    }
                }
                Err(error) => self.lost(&error),
            }
        }
    }

    fn ended(&mut self, status: i32) {
        self.status = Some(status);
        self.relay.end_input();
        self.rpc = None;
    }

    /// The VM, or the way to it, is gone.
    fn lost(&mut self, error: &dyn std::error::Error) {
        if self.status.is_none() {
            tracing::error!(
                "container {:?}: the process was lost: {}",
                self.container_id,
                crate::error::chain(error)
            );
            self.ended(KILLED);
        }
        self.rpc = None;
    }
}

fn complain(problems: impl IntoIterator<Item = NetworkError>) {
    for problem in problems {
        tracing::error!("{}", crate::error::chain(&problem));
    }
}
