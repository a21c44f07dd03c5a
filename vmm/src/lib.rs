//! Bulkhead's virtual machine monitor: KVM set-up, direct boot, virtio devices, the jail.
//! Knows KVM and virtio, knows no OCI. Without the feature `monitor` only [`config`] is built.

pub mod config;
#[cfg(feature = "monitor")]
pub mod threads;
#[cfg(feature = "monitor")]
pub mod virtio;
