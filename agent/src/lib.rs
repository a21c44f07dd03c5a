//! Bulkhead's agent: PID 1 of the guest. It serves the contract of `bulkhead-agent-protocol`, sets
//! containers up and reaps processes. [`guest`] makes the guest ready, [`service`] answers
//! requests, [`container`] holds what a container is. The library exists for the program and for
//! tests that serve it over Unix sockets.

mod bpf;
pub mod container;
pub mod error;
pub mod guest;
pub mod network;
pub mod process;
pub mod reaper;
pub mod sandbox;
pub mod service;
pub mod sockets;
pub mod stdio;
mod sys;
