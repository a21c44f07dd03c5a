//! The container's network: a network namespace of the host, and its image in the guest.
//!
//! ```text
//! host's network namespace                    │ guest
//!   eth0 ◀──traffic control──▶ tap ◀── VMM ──▶│ virtio-net = eth0 in the container's namespace
//!   addresses, routes, neighbours ──agent's SetNetwork──▶ the same
//! ```
//!
//! The monitor stays in the namespace that the configuration names, or in an empty one of its own.
//! Each Ethernet interface there gets a tap (`tap`) that traffic control ties it to
//! (`redirect`) and a device in the guest; the agent is told the whole wanted state (`scan`)
//! and told again whenever the kernel announces a change (`netlink`). `image` has the course
//! of an interface.

mod image;
mod namespace;
mod netlink;
mod redirect;
mod resolver;
mod routes;
mod scan;
mod tap;
#[cfg(test)]
mod tests;

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use image::Network;
pub use namespace::{Joined, NamespaceError, open};
pub use netlink::NetlinkError;
pub use redirect::Tie;
pub use scan::Unfit;

use crate::{state::StateError, vm::VmError};
use namespace::Identity;

/// The container's network failed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The namespace cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The namespace cannot be looked at.
    #[error("cannot look at the container's network namespace")]
    Look(#[source] NetlinkError),
    /// An interface that the guest cannot have.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// No tap.
    #[error("cannot {0}")]
    Tap(&'static str, #[source] io::Error),
    /// The kernel would not change an interface.
    #[error("cannot {what} {interface}")]
    Change {
        /// What was tried.
        what: &'static str,
        /// Name or index.
        interface: String,
        /// Why not.
        #[source]
        source: NetlinkError,
    },
    /// Docker's name server cannot be offered to the guest.
    #[error("cannot offer the network's name server at 127.0.0.11 to the guest")]
    Resolver(#[source] io::Error),
    /// The VMM would not have it.
    #[error("cannot attach interface {interface:?} to the virtual machine: {message}")]
    Attach {
        /// Its name.
        interface: String,
        /// In the VMM's words.
        message: String,
    },
    /// The VMM cannot be told.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// What will have to be undone cannot be written down.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What a monitor has changed in a namespace of others, for whoever must clean up after one that
/// was killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Traces {
    /// Where the namespace is.
    path: PathBuf,
    /// Which one it is.
    namespace: Identity,
    /// Its interfaces that were tied to taps.
    ties: Vec<Tie>,
}

impl Traces {
    /// Undoes what is still there. A namespace that is gone, or in the hands of another container
    /// by now, is left alone.
    pub fn undo(&self) -> Result<(), NetworkError> {
        let Some(_held) = namespace::Namespace::again(&self.path, self.namespace)? else {
            return Ok(());
        };
        let mut netlink = netlink::Netlink::open().map_err(NetworkError::Look)?;
        for tie in &self.ties {
            tie.undo(&mut netlink)?;
        }
        Ok(())
    }
}
