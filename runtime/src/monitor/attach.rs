//! Being there for one process of a guest: its stdio, its signals, its terminal's size and its
//! end, in one poll loop. The same for a container's process and for `exec`.

use std::{io, os::fd::AsFd, time::Duration};

use bulkhead_agent_protocol::messages::{
    ResizeTerminalRequest, SignalProcessRequest, WaitProcessRequest, WaitProcessResponse,
};
use rustix::event::{PollFd, PollFlags};

use crate::{
    agent::{
        self, Streams,
        rpc::{CallId, RpcClient, RpcError},
    },
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
        })
    }

    /// The connection, for a call of one's own; gone when the VM is.
    pub fn rpc(&mut self) -> Option<&mut RpcClient> {
        self.rpc.as_mut()
    }

    /// Carries on until the process has ended and its output is delivered. Returns its exit code,
    /// or 128 + the signal that ended it.
    pub fn run(&mut self, signals: &mut Signals, mut vm: Option<&mut dyn Vm>) -> io::Result<i32> {
        // An answer may have come while another was waited for.
        self.listen();
        loop {
            if let Some(status) = self.status.filter(|_| self.relay.outputs_ended()) {
                return Ok(status);
            }
            let control = vm
                .as_deref()
                .filter(|_| self.rpc.is_some())
                .map(Vm::control);
            let mut descriptors = vec![signals.poll_fd()];
            let watched = control.is_some();
            if let Some(control) = &control {
                descriptors.push(PollFd::new(control, PollFlags::IN));
            }
            let rpc = self.rpc.as_ref().map(agent::poll_fd);
            let connected = rpc.is_some();
            descriptors.extend(rpc);
            let relayed = descriptors.len();
            descriptors.extend(self.relay.poll_fds());
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
            if watched
                && happened.next() == Some(true)
                && let Some(vm) = vm.as_deref_mut()
            {
                self.watch(vm);
            }
            if connected && happened.next() == Some(true) {
                self.listen();
            }
            if let Err(error) = self.relay.advance(&events[relayed..]) {
                tracing::error!("{}", crate::error::chain(&error));
            }
        }
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

    fn watch(&mut self, vm: &mut dyn Vm) {
        loop {
            match vm.next_event() {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(error) => return self.lost(&error),
            }
        }
    }

    fn listen(&mut self) {
        while let Some(rpc) = &mut self.rpc {
            match rpc.progress() {
                Ok(None) => return,
                Ok(Some((call, answer))) if call == self.wait => {
                    let status = answer.and_then(|payload| {
                        agent::decode::<WaitProcessResponse>("WaitProcess", &payload)
                    });
                    match status {
                        Ok(response) => self.ended(response.status),
                        Err(error) => self.lost(&error),
                    }
                }
                // A signal for a process that has just ended, say.
                Ok(Some((_, Err(error)))) => {
                    tracing::debug!("the agent refused: {}", crate::error::chain(&error));
                }
                Ok(Some((_, Ok(_)))) => {}
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
