//! One more process in a container: started through the agent, then carried like any other.

use std::{io, os::fd::AsFd, time::Duration};

use bulkhead_agent_protocol::messages::{ExecProcessRequest, ExecProcessResponse, Stdio};
use serde::{Deserialize, Serialize};

use super::{
    attach::{Attached, Screen},
    launch::LaunchError,
};
use crate::{
    agent::{self, ConnectingStreams, connect::Connecting, rpc::RpcClient},
    state::Container,
    stdio::Relay,
    wait::Deadline,
};

/// For the connections and the agent's answer.
const LIMIT: Duration = Duration::from_secs(60);

/// A process to be run in a container that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecOrder {
    /// The container.
    pub id: String,
    /// The container as the agent knows it; empty for the guest itself.
    pub container_id: String,
    /// Tells the process from others of the container.
    pub exec_id: String,
    /// An OCI `process` object.
    pub process: String,
}

/// Starts the process.
pub fn join(
    container: &Container,
    order: &ExecOrder,
    screen: Option<Screen>,
) -> Result<Attached, LaunchError> {
    let deadline = Deadline::after(LIMIT);
    let sockets = agent::sockets(container)?;
    let rpc = Connecting::rpc(sockets.as_fd())?;
    let streams = ConnectingStreams::begin(sockets.as_fd(), screen.is_some())?;
    let mut rpc = RpcClient::new(rpc.finish(deadline)?)
        .map_err(|error| LaunchError::Io("use the connection to the agent", error))?;
    let (streams, stdio) = streams.finish(deadline)?;
    let (rows, columns) = screen.as_ref().map_or((0, 0), Screen::size);
    let request = ExecProcessRequest {
        container_id: order.container_id.clone(),
        exec_id: order.exec_id.clone(),
        process: order.process.clone().into_bytes(),
        stdio: Some(Stdio {
            rows,
            columns,
            ..stdio
        })
        .into(),
        ..Default::default()
    };
    let _: ExecProcessResponse =
        agent::call(&mut rpc, "ExecProcess", &request, deadline).map_err(LaunchError::Agent)?;
    let relay = relay(streams, screen.as_ref())
        .map_err(|error| LaunchError::Io("use the standard streams", error))?;
    Attached::new(rpc, &order.container_id, &order.exec_id, relay, screen)
        .map_err(LaunchError::Agent)
}

/// Between a process's streams and what it is to be shown on.
pub(super) fn relay(streams: agent::Streams, screen: Option<&Screen>) -> io::Result<Relay> {
    match (screen, streams.stdin) {
        (Some(Screen::Own(_)), Some(stream)) => {
            Relay::terminal(io::stdin().as_fd(), io::stdout().as_fd(), stream)
        }
        (Some(Screen::Console(console)), Some(stream)) => {
            Relay::terminal(console.slave(), console.slave(), stream)
        }
        (None, stdin) => Relay::standard(agent::Streams { stdin, ..streams }),
        (Some(_), None) => Ok(Relay::default()),
    }
}
