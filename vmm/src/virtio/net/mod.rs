//! virtio-net (virtio 1.2 §5.1): an interface of the guest that is a tap of the host. Packets move
//! between guest memory and the tap by one vectored system call each, with no copy in between.
//!
//! - `tap`: the descriptors; `ring`: a queue whose used buffers are published together
//! - `receive`, `transmit`, `control`: what is done with each queue; `handler`: the threads
//! - `device`: the device as its transport sees it; `features`: its bits

mod control;
mod device;
mod features;
mod handler;
mod receive;
mod ring;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

pub use device::{MacAddress, MacError, Net};
pub use tap::{Tap, TapError};

/// Bytes of `struct virtio_net_hdr` before each packet (virtio 1.2 §5.1.6).
const HEADER_SIZE: usize = 12;
/// Where `num_buffers` lies in it.
const NUM_BUFFERS: usize = 10;
/// The largest packet that there is: 64 KiB of IP, with its Ethernet header and two VLAN tags.
const LARGEST_PACKET: usize = 65535 + ETHERNET;
/// Ethernet header and two VLAN tags.
const ETHERNET: usize = 14 + 8;
