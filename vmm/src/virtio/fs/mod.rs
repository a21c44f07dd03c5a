//! virtio-fs (virtio 1.2 §5.11): a directory tree of the host as the guest's file system, served by
//! virtiofsd's library in this process (docs/decisions/0001-virtio-fs-server.md).
//!
//! - `server`: the file server and its settings; `request`: requests as it may see them;
//!   `handler`: the thread
//! - `device`: the device as its transport sees it; `log`: the library's messages

mod device;
mod handler;
mod log;
mod request;
mod server;
#[cfg(test)]
mod tests;

pub use device::{Filesystem, FilesystemError};
pub use server::{Share, raise_open_files};
