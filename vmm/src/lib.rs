//! Bulkhead's virtual machine monitor: KVM set-up, direct boot, virtio devices, the jail.
//! Knows KVM and virtio, knows no OCI. Without the feature `monitor` only [`config`] is built.

pub mod config;

#[cfg(feature = "monitor")]
pub mod attached;
#[cfg(feature = "monitor")]
pub mod boot;
#[cfg(feature = "monitor")]
pub mod control;
#[cfg(feature = "monitor")]
pub mod failure;
#[cfg(feature = "monitor")]
pub mod jail;
#[cfg(feature = "monitor")]
pub mod kvm;
#[cfg(feature = "monitor")]
pub mod layout;
#[cfg(feature = "monitor")]
pub mod machine;
#[cfg(feature = "monitor")]
pub mod memory;
#[cfg(feature = "monitor")]
pub mod monitor;
#[cfg(feature = "monitor")]
pub mod opened;
#[cfg(feature = "monitor")]
pub mod owners;
#[cfg(feature = "monitor")]
pub mod probe;
#[cfg(feature = "monitor")]
mod sys;
#[cfg(feature = "monitor")]
pub mod threads;
#[cfg(feature = "monitor")]
pub mod virtio;

#[cfg(feature = "monitor")]
pub use sys::close_inherited;
