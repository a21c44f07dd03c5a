//! virtio-blk (virtio 1.2 §5.2): image files and block devices of the host, served with vectored
//! reads and writes straight on guest memory.
//!
//! - `disk`: the file; `request`: what a chain asks for; `handler`: the thread
//! - `device`: the device as its transport sees it

mod device;
mod disk;
mod handler;
mod request;
#[cfg(test)]
mod tests;

pub use device::Block;
pub use disk::{Disk, DiskError, Serial};
