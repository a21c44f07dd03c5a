//! virtio-vsock (virtio 1.2 §5.10): stream sockets between the guest and Unix sockets on the host,
//! served in this process.
//!
//! - `packet`: the header; `credit`: flow control; `backlog`: bytes that the host does not
//!   take yet; `connection`: one connection
//! - `host`: the host's sockets and the `CONNECT` line; `muxer`: all connections
//! - `receive`: the driver's receive buffers; `handler`: the thread
//! - `device`: the device as its transport sees it

mod backlog;
mod connection;
mod credit;
mod device;
mod handler;
mod host;
mod muxer;
mod packet;
mod receive;
#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockError};
pub use host::LISTENER_NAME;
