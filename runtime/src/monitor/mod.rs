//! The host process that stands for a container's process (design, decision 6): it makes the
//! sandbox, carries stdio or the terminal, forwards signals, and ends with the process's status.
//!
//! ```text
//! create:  bulkhead create ──spawns──▶ bulkhead monitor ──spawns──▶ bulkhead-vmm
//!             (records the monitor's pid, lets it go on, waits until the container is created)
//! run:     bulkhead run is itself the monitor
//! exec:    bulkhead exec carries the process itself, or with --detach spawns a monitor for it
//! ```
//!
//! A container's monitor has two threads: one works, the other is what engines find behind the
//! container's pid ([`StandIn`], [`View`]).

mod attach;
mod exec;
mod handover;
mod launch;
mod membership;
mod order;
mod sandbox;
mod stand_in;
#[cfg(test)]
mod tests;
mod view;

pub use attach::{Attached, HostStdio};
pub use exec::{ExecOrder, join};
pub use handover::{HandoverError, Order, Outcome, Waiting, receive, report, spawn};
pub use launch::{LaunchError, VmStarter, launch};
pub use order::ContainerOrder;
pub use sandbox::{Ended, Sandbox};
pub use stand_in::{StandIn, beside};
pub use view::{View, ViewError};
