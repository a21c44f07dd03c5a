//! What the runtime tells a new `bulkhead-vmm` and what it hears back.
//!
//! The program is started with a Unix stream socket as its standard input and takes no arguments.
//! It reads one [`VmConfig`] as a line of JSON, then writes [`VmEvent`]s and reads [`VmCommand`]s,
//! a line of JSON each. When the socket's other end closes, the VM ends: the process that holds it
//! owns the VM. Standard error carries the log; paths are resolved before the jail is entered.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A virtual machine to be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The guest kernel, an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Appended to the kernel command line that the VMM composes (devices, root, init).
    #[serde(default)]
    pub kernel_arguments: Vec<String>,
    /// Program that the guest kernel starts, in the root image.
    pub init: String,
    /// Number of virtual CPUs, 1 to 254 (255 is the APICs' broadcast address).
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Disks, in the order of the guest's /dev/vda, /dev/vdb, …; the first holds the root
    /// filesystem (erofs, read-only).
    pub disks: Vec<DiskConfig>,
    /// The shared directory tree; without one there is no virtio-fs device.
    pub share: Option<ShareConfig>,
    /// The vsock device; without it the guest can be reached only by its log.
    pub vsock: Option<VsockConfig>,
    /// Receives the guest kernel's log (serial console). Without it there is no serial port and
    /// the guest boots faster.
    pub guest_log: Option<PathBuf>,
    /// Network namespace to join; without one the VMM gets an empty one of its own.
    pub network_namespace: Option<PathBuf>,
}

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// The virtio-fs device: a tree put together from pieces of the host's file system, visible in the
/// VMM's private mount namespace only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// virtio-fs tag.
    pub tag: String,
    /// What the tree holds from the start.
    pub entries: Vec<ShareEntry>,
}

/// One piece of the share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareEntry {
    /// Directory or file on the host.
    pub source: PathBuf,
    /// Where it appears, relative to the share's root: plain names joined by `/`. Parents are made.
    pub target: String,
    /// Whether the guest may only read it (enforced on the host).
    pub read_only: bool,
    /// Whether mounts below the source come along.
    pub recursive: bool,
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or more.
    pub guest_cid: u64,
    /// Host directory that holds the sockets: the VMM listens at `vsock.sock` (a client writes
    /// `CONNECT <port>\n` and reads `OK <host port>\n`); a guest's connection to host port P goes
    /// to the listener at `vsock.sock_P`.
    pub directory: PathBuf,
}

/// What the VMM reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum VmEvent {
    /// The process that is the VM from now on, in the PID namespace of whoever started it (the one
    /// that was started has forked into a PID namespace of its own and ends). It goes on only
    /// after [`VmCommand::Go`], so that whoever reads this can note the pid first.
    Forked {
        /// Process id.
        pid: u32,
    },
    /// The vCPUs run. The vsock socket listens.
    Running {
        /// When each phase of the start was done.
        timeline: Timeline,
    },
    /// The VM could not be made or broke; the process ends after this.
    Failed {
        /// For people: what failed, on what, why, what to do.
        message: String,
    },
    /// The guest ended by itself (reset, triple fault or panic); the process ends after this.
    Exited,
}

/// What the VMM is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum VmCommand {
    /// Answer to [`VmEvent::Forked`].
    Go,
    /// End the VM now.
    Stop,
}

/// When the phases of a VM's start were done: microseconds of the host's CLOCK_MONOTONIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// The program's `main` began.
    pub started_us: u64,
    /// The configuration was read, every file in it opened.
    pub opened_us: u64,
    /// The namespaces were made and [`VmCommand::Go`] had come.
    pub released_us: u64,
    /// The jail was closed.
    pub jailed_us: u64,
    /// KVM's machine, guest memory and devices were there.
    pub machine_us: u64,
    /// The kernel and its boot parameters were in guest memory.
    pub loaded_us: u64,
    /// The vCPUs ran.
    pub running_us: u64,
}
