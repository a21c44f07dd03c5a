//! The host process that stands for a container's process (design, decision 6): it makes the
//! sandbox, carries stdio or the terminal, forwards signals, and ends with the process's status.
//!
//! ```text
//! create:  bulkhead create ──spawns──▶ bulkhead monitor ──spawns──▶ bulkhead-vmm
//!                          └─spawns──▶ stand-in
//!             (records their pids, lets the monitor go on, waits until the container is created)
//! run:     bulkhead run is itself the monitor
//! exec:    bulkhead exec carries the process itself, or with --detach spawns a monitor for it
//! ```
//!
//! The stand-in has the container's pid, and is where engines look for the container's process
//! ([`StandIn`], [`View`]).

mod attach;
mod exec;
mod handover;
mod launch;
mod line;
mod membership;
mod order;
mod sandbox;
pub mod stand_in;
#[cfg(test)]
mod tests;
mod view;

pub use attach::{Attached, HostStdio};
pub use exec::{ExecOrder, join};
pub use handover::{HandoverError, Instructions, Order, Outcome, Waiting, receive, report, spawn};
pub use launch::{LaunchError, VmStarter, launch};
pub use order::ContainerOrder;
pub use sandbox::{Ended, Sandbox};
pub use stand_in::{Namespaces, StandIn, StandInError};
pub use view::{View, ViewError};
