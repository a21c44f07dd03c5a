//! The virtual machine as the monitor drives it. How its events become a running sandbox is the
//! monitor's business.

#[cfg(test)]
pub mod fake;
mod process;

use std::{io, os::fd::BorrowedFd, path::PathBuf};

use bulkhead_vmm::config::{VmCommand, VmConfig, VmEvent};
use thiserror::Error;

pub use process::VmProcess;

/// The virtual machine failed.
#[derive(Debug, Error)]
pub enum VmError {
    /// The program could not be started.
    #[error("cannot start the virtual machine monitor {program}; give its path with --vmm")]
    Start {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The control socket failed.
    #[error("cannot {operation} the virtual machine monitor")]
    Control {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It said something that is not an event.
    #[error("the virtual machine monitor sent a malformed event")]
    Malformed(#[source] serde_json::Error),
    /// It said too much in one line.
    #[error("the virtual machine monitor sent a line of more than {0} bytes")]
    TooLong(usize),
    /// It gave up, in its own words.
    #[error("{0}")]
    Failed(String),
    /// It is gone without a word.
    #[error("the virtual machine ended unexpectedly{0}")]
    Gone(String),
    /// The guest ended by itself.
    #[error(
        "the guest ended by itself (panic or reset); --guest-log FILE shows what its kernel says"
    )]
    GuestEnded,
}

/// A virtual machine: a process of this host, or a fake in tests.
pub trait Vm {
    /// Readable when there is an event or the VM is gone.
    fn control(&self) -> BorrowedFd<'_>;

    /// Tells the VM what to be; the first thing it hears.
    fn configure(&mut self, config: &VmConfig) -> Result<(), VmError>;

    /// The next event, `None` when there is none yet. `Failed`, `Exited` and the end of the
    /// control socket come as errors.
    fn next_event(&mut self) -> Result<Option<VmEvent>, VmError>;

    /// Tells the VM something that needs these descriptors.
    fn command_with(
        &mut self,
        command: VmCommand,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), VmError>;

    /// Tells the VM something.
    fn command(&mut self, command: VmCommand) -> Result<(), VmError> {
        self.command_with(command, &[])
    }

    /// Ends the VM, unless it has other owners: unless it does, no process of it is left when this
    /// returns.
    fn stop(&mut self) -> Result<Stop, VmError>;
}

/// What has become of a VM that was told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It has ended.
    Ended,
    /// Others keep it. It can still be told things; dropping it parts with it.
    Shared,
}
