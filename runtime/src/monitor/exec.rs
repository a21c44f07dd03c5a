//! One more process in a container: started through the agent, then carried like any other.

use std::{os::fd::AsFd, time::Duration};

use bulkhead_agent_protocol::messages::{ExecProcessRequest, ExecProcessResponse, Stdio};
use serde::{Deserialize, Serialize};

use super::{
    attach::{Attached, HostStdio},
    launch::LaunchError,
};
use crate::{
    agent::{self, ConnectingStreams, connect::Connecting, rpc::RpcClient},
    state::Container,
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
    host: HostStdio,
) -> Result<Attached, LaunchError> {
    let deadline = Deadline::after(LIMIT);
    let sockets = agent::sockets(container)?;
    let rpc = Connecting::rpc(sockets.as_fd())?;
    let streams = ConnectingStreams::begin(sockets.as_fd(), host.is_terminal())?;
    let mut rpc = RpcClient::new(rpc.finish(deadline)?)
        .map_err(|error| LaunchError::Io("use the connection to the agent", error))?;
    let (streams, stdio) = streams.finish(deadline)?;
    let (rows, columns) = host.size();
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
    let relay = host
        .relay(streams)
        .map_err(|error| LaunchError::Io("use the standard streams", error))?;
    Attached::new(rpc, &order.container_id, &order.exec_id, relay, host).map_err(LaunchError::Agent)
}
