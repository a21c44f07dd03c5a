//! Direct boot of a 64-bit Linux kernel: the ELF image and what the 64-bit boot protocol wants to
//! find in memory (Linux, Documentation/arch/x86/boot.rst). No firmware takes part.

pub mod command_line;
pub mod kernel;
pub mod mp_table;
pub mod params;
pub mod tables;

use std::io;

use vm_memory::GuestMemoryMmap;

/// Why the guest could not be prepared for its first instruction.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel image.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] command_line::CommandLineError),
    /// A structure does not fit into guest memory.
    #[error("write {what} to guest memory")]
    Write {
        /// Which structure.
        what: &'static str,
        /// Cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// No seed for the guest's random numbers.
    #[error("read random bytes for the guest")]
    Seed(#[source] io::Error),
}

/// Puts the kernel and all boot structures into guest memory; returns the entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &kernel::Kernel,
    command_line: &str,
    cpus: u8,
) -> Result<u64, BootError> {
    let entry = kernel.load(memory)?;
    command_line::write(memory, command_line)?;
    mp_table::write(memory, cpus)?;
    tables::write(memory)?;
    params::write(memory, command_line.len())?;
    Ok(entry)
}
