//! What the runtime tells a new `bulkhead-vmm` and what it hears back.
//!
//! The program is started with a Unix stream socket as its standard input and takes no arguments.
//! It reads one [`VmConfig`] as a line of JSON, then writes [`VmEvent`]s and reads [`VmCommand`]s,
//! a line of JSON each. When the socket's other end closes, the VM ends: the process that holds it
//! owns the VM. Standard error carries the log; paths are resolved before the jail is entered.
//!
//! Others may come to own the VM, too: who connects to [`CONTROL`] beside the vsock socket gets
//! [`VmEvent::Joined`] and may then write commands as the first one does. Answers go to the one who
//! has asked; the end of the VM is told to all. The VM ends when the last of them has gone. Devices of
//! one who has gone go when the guest has let them go.
//!
//! What a later owner wants to share goes into the share's tree from outside: the runtime enters the
//! mount namespace of the VM's process, where the tree is at [`SHARE`], and mounts it there. No
//! process of the VM has the right to mount anything.
//!
//! A command that needs file descriptors brings them as ancillary data (SCM_RIGHTS) of the one
//! `sendmsg` that carries its whole line. They are the VMM's from then on.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Name of the socket where others join the owner of the VM, in the directory of the vsock sockets.
pub const CONTROL: &str = "control.sock";
/// Where the share's tree is in the VM's mount namespace. The root there is a tmpfs, mounted
/// read-only, in which mount points can be made through another mount of it.
pub const SHARE: &str = "/share";
/// Mode of a frame ([`ShareEntry::name`]): a directory of that tmpfs with this mode is one. The sticky
/// bit does nothing where nobody can write.
pub const FRAME_MODE: u32 = 0o1755;

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
    /// Directory of a cgroup, version 2, that the VM's process begins in: to be moved there later would
    /// take it a grace period of the kernel. [`VmEvent::Forked`] says whether it could.
    pub cgroup: Option<PathBuf>,
    /// Places for devices that are attached later ([`VmCommand::AttachNetwork`],
    /// [`VmCommand::AttachDisk`]). The guest finds placeholders there, without a function. All
    /// devices and places together are at most 19.
    #[serde(default)]
    pub spare_slots: u8,
}

/// A virtio-blk device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Raw image file or block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// The disk's serial, by which the guest finds it (`/sys/block/*/serial`): as in
    /// [`VmCommand::AttachDisk`]. Without one it is `disk` and its number in the list, from 0.
    #[serde(default)]
    pub id: Option<String>,
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
    /// Directory or file on the host; in JSON a text, or the bytes of a path that is none.
    #[serde(with = "any_path")]
    pub source: PathBuf,
    /// Where it appears, relative to the share's root: plain names joined by `/`. Parents are made.
    pub target: String,
    /// With a name, `target` is a directory that holds the source under this name and nothing else, so
    /// that the root of what the guest mounts from there ends in it (mountinfo, findmnt). Around a
    /// directory it is a frame, which the guest takes with what is in it for one file system: the root
    /// is `/name` then. A file is no file system of its own: its root is `/target/name`.
    #[serde(default)]
    pub name: Option<String>,
    /// Whether the guest may only read it (enforced on the host).
    pub read_only: bool,
    /// Whether mounts below the source come along.
    pub recursive: bool,
}

/// Paths of the host need not be UTF-8, texts in JSON must.
pub mod any_path {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Text(PathBuf),
        Bytes(Vec<u8>),
    }

    /// To a text, or to bytes.
    pub fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        match path.to_str() {
            Some(text) => text.serialize(to),
            None => path.as_os_str().as_bytes().serialize(to),
        }
    }

    /// From either.
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(match Written::deserialize(from)? {
            Written::Text(path) => path,
            Written::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

impl ShareEntry {
    /// Where the source itself lies, relative to the share's root.
    pub fn place(&self) -> String {
        match &self.name {
            Some(name) => format!("{}/{name}", self.target),
            None => self.target.clone(),
        }
    }
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
        /// Whether it is in [`VmConfig::cgroup`].
        in_cgroup: bool,
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
    /// A device was attached.
    Attached {
        /// As in the command.
        id: String,
        /// The guest's name of the place, as it stands in `/sys/bus/platform/devices`
        /// (`virtio-mmio.4`). A guest that looked at it before has to be asked to look again:
        /// its name is written to `/sys/bus/platform/drivers/virtio-mmio/bind`.
        device: String,
    },
    /// A device was not attached. Its descriptors are closed; the VM goes on.
    AttachFailed {
        /// As in the command.
        id: String,
        /// For people: what failed, on what, why, what to do.
        message: String,
    },
    /// A device is gone, its descriptors are closed, its place is free.
    Detached {
        /// As in the command.
        id: String,
    },
    /// The first thing that somebody hears who has joined: the VM lives as long as this connection.
    Joined,
    /// The VM was not ended: it has other owners.
    Shared,
}

/// What the VMM is told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum VmCommand {
    /// Answer to [`VmEvent::Forked`].
    Go,
    /// The guest has booted: what it touches of its memory from now on is its containers', and is
    /// given to it in huge pages. Nothing answers.
    Booted,
    /// End the VM now, unless it has other owners: then [`VmEvent::Shared`] answers, and nothing has
    /// happened.
    Stop,
    /// Puts a network interface at a free place; [`VmEvent::Attached`] or
    /// [`VmEvent::AttachFailed`] answers. Brings one descriptor for each pair of queues, all of one
    /// tap (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and `IFF_MULTI_QUEUE` if there are several); the
    /// VMM sets the size of its packets' headers and its offloads.
    AttachNetwork {
        /// The runtime's name for it: 1 to 64 of `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_`, `:`, `-`, that
        /// no other device has that this owner has attached.
        id: String,
        /// The interface's address, `02:00:00:00:00:01`, that of one station.
        mac: String,
        /// The largest MTU that the guest can set, and the one that it begins with: 68 to 65535.
        mtu: u16,
    },
    /// Puts a disk at a free place; answered as [`Self::AttachNetwork`] is. Brings one descriptor,
    /// of a raw image or a block device, open for what `read_only` says.
    AttachDisk {
        /// The runtime's name for it, as above but 20 characters at most: the guest sees it as the
        /// disk's serial.
        id: String,
        /// Whether the guest may only read it.
        read_only: bool,
    },
    /// Takes an attached device away, at once: the guest's driver should have been unbound from it.
    /// [`VmEvent::Detached`] answers, also if no device of this name is attached.
    Detach {
        /// As in the command that attached it.
        id: String,
    },
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

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn sources_need_not_be_text() {
        for source in [&b"/a/b"[..], b"/caf\xe9", b"/\n\0\"\\"] {
            let entry = ShareEntry {
                source: OsStr::from_bytes(source).into(),
                target: "a".to_owned(),
                name: Some("b\n\"".to_owned()),
                read_only: true,
                recursive: false,
            };
            let text = serde_json::to_string(&entry).expect("written");
            assert_eq!(text.lines().count(), 1);
            let read: ShareEntry = serde_json::from_str(&text).expect("read");
            assert_eq!(read, entry);
        }
    }
}
