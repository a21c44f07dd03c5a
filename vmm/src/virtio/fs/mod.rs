//! virtio-fs (virtio 1.2 §5.11): a directory tree of the host as the guest's file system, served by
//! virtiofsd's library in this process (docs/decisions/0001-virtio-fs-server.md).
//!
//! - `server`: the file server and its settings; `tree`: its files; `request`: requests in private memory
//! - `operations`: those that come most often, `write` and `finish`; `library`: all others
//! - `unnamed`: files without a name, and what is done with them (`unnamed_file`)
//! - `service`: the queues' requests; `handler`: the device's thread; `by_vcpu`: those of vCPUs
//! - `host`: what goes beyond FUSE: `changes` of watched files, `sockets` of the host
//! - `device`: the device as its transport sees it; `log`: the library's messages

mod by_vcpu;
mod changes;
mod delegations;
mod device;
mod finish;
mod handler;
mod host;
mod library;
mod log;
mod operations;
mod recent;
mod request;
mod server;
mod service;
mod sockets;
#[cfg(test)]
mod tests;
mod tree;
mod unnamed;
mod unnamed_file;
mod write;

pub use device::{Filesystem, FilesystemError};
pub use server::{Share, raise_open_files};
