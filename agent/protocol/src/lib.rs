//! The ttrpc contract between Bulkhead's host side and the agent in the guest: messages, the
//! client (feature `client`, blocking) and the server (feature `server`, asynchronous), the vsock
//! ports, the greeting, the meaning of error codes, and how OCI documents are read ([`oci`]). Knows
//! neither side's workings.

pub mod oci;
mod unique;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

#[allow(
    missing_docs,
    unreachable_pub,
    unused_mut,
    clippy::all,
    clippy::pedantic
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub use generated::agent as messages;
#[cfg(feature = "client")]
pub use generated::client;
#[cfg(feature = "server")]
pub use generated::server;

/// Guest port on which the agent serves ttrpc.
pub const RPC_PORT: u32 = 1024;
/// Guest port on which the agent accepts stdio streams.
pub const STDIO_PORT: u32 = 1025;
/// Host port to which the agent connects when it is ready; it writes one [`Greeting`] as a line of
/// JSON and closes.
pub const READY_PORT: u32 = 1024;
/// Host port to which the agent connects for each query to the host's name server at
/// [`RESOLVER_ADDRESS`] (agent.proto, `SetNetworkRequest.resolver`).
pub const RESOLVER_PORT: u32 = 1025;
/// Where Docker has a name server for the containers of a network, port 53.
pub const RESOLVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// First byte of a stream to [`RESOLVER_PORT`]: one query that came as a datagram.
pub const RESOLVE_DATAGRAM: u8 = 1;
/// First byte of a stream to [`RESOLVER_PORT`]: a TCP connection.
pub const RESOLVE_STREAM: u8 = 2;
/// virtio-fs tag of the share that holds root filesystems and bind-mount sources.
pub const SHARE_TAG: &str = "share";

/// What the agent says when its ports are open. Times are guest CLOCK_MONOTONIC, microseconds
/// since the guest kernel began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Version of the agent's package.
    pub version: String,
    /// When the agent's `main` began.
    pub started_us: u64,
    /// When the greeting was sent.
    pub ready_us: u64,
}

/// What an error status of the agent means to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The program to run was not found (shells: exit code 127).
    ProgramNotFound,
    /// The program to run may not be executed (shells: exit code 126).
    ProgramNotExecutable,
    /// A field of the spec has a value that cannot be used; the message names the field.
    InvalidSpec,
    /// A field of the spec that is not supported; the message names the field.
    Unsupported,
    /// No such container or process.
    NoSuchProcess,
    /// The container exists already, or is not in a state that allows this.
    WrongState,
    /// Anything else.
    Internal,
}

impl ErrorKind {
    /// The ttrpc code that carries this kind.
    pub fn code(self) -> ttrpc::Code {
        match self {
            Self::ProgramNotFound => ttrpc::Code::NOT_FOUND,
            Self::ProgramNotExecutable => ttrpc::Code::PERMISSION_DENIED,
            Self::InvalidSpec => ttrpc::Code::INVALID_ARGUMENT,
            Self::Unsupported => ttrpc::Code::UNIMPLEMENTED,
            Self::NoSuchProcess => ttrpc::Code::OUT_OF_RANGE,
            Self::WrongState => ttrpc::Code::FAILED_PRECONDITION,
            Self::Internal => ttrpc::Code::INTERNAL,
        }
    }

    /// The kind that a ttrpc code carries.
    pub fn of(code: ttrpc::Code) -> Self {
        match code {
            ttrpc::Code::NOT_FOUND => Self::ProgramNotFound,
            ttrpc::Code::PERMISSION_DENIED => Self::ProgramNotExecutable,
            ttrpc::Code::INVALID_ARGUMENT => Self::InvalidSpec,
            ttrpc::Code::UNIMPLEMENTED => Self::Unsupported,
            ttrpc::Code::OUT_OF_RANGE => Self::NoSuchProcess,
            ttrpc::Code::FAILED_PRECONDITION => Self::WrongState,
            _ => Self::Internal,
        }
    }
}
