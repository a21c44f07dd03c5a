//! The OCI runtime `bulkhead`: runs every container in its own KVM microVM.
//!
//! This crate knows OCI and the host; it knows no virtio. The virtual machine is a `bulkhead-vmm`
//! process ([`vm`]), the guest is reached through its agent ([`agent`]), and one process of the
//! host stands for each process of a guest ([`monitor`]).

pub mod agent;
pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod config;
pub mod container_id;
pub mod disks;
pub mod error;
pub mod guest_size;
pub mod hooks;
pub mod lifecycle;
pub mod log;
pub mod monitor;
pub mod network;
pub mod pod;
pub mod share;
pub mod shm;
pub mod signal;
pub mod spec;
pub mod state;
pub mod stdio;
mod sys;
pub mod time;
pub mod timeline;
pub mod user_namespace;
pub mod vm;
pub mod wait;
