//! Everything that the configuration names by a path, opened before the jail is entered.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kvm_ioctls::Kvm;
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::boot::kernel::{Kernel, KernelError};
use crate::config::{CONTROL, DiskConfig, VmConfig, VsockConfig};
use crate::jail::JailError;
use crate::jail::share::{self, ShareTree};
use crate::kvm::{self, KvmError};
use crate::machine::serial::GuestLog;
use crate::virtio::blk::{Disk, DiskError, Serial};
use crate::virtio::vsock::LISTENER_NAME;

/// Why something could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A share's source, or the jail's other needs.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A file or directory.
    #[error("open {what} {}", path.display())]
    File {
        /// What it is for.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A disk that is none.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Numbers that make no sense.
    #[error("{0}")]
    Number(&'static str),
}

/// The vsock device's directory, and the listener in it.
#[derive(Debug)]
pub struct Sockets {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Bound to `vsock.sock`.
    pub listener: UnixListener,
    /// Bound to `control.sock`.
    pub control: UnixListener,
    /// The directory as a detached mount.
    pub mount: OwnedFd,
}

/// All of it.
#[derive(Debug)]
pub struct Opened {
    /// /dev/kvm.
    pub kvm: Kvm,
    /// The kernel image.
    pub kernel: Kernel,
    /// In the configuration's order.
    pub disks: Vec<(Serial, Disk)>,
    /// The guest's log.
    pub log: Option<GuestLog>,
    /// The share's pieces as detached mounts.
    pub share: Option<ShareTree>,
    /// vsock.
    pub sockets: Option<Sockets>,
    /// Network namespace to join.
    pub network: Option<OwnedFd>,
    /// Cgroup to begin in.
    pub cgroup: Option<OwnedFd>,
}

impl Opened {
    /// Opens everything; on failure nothing is left behind, but for a socket in the directory that
    /// the caller has made for it.
    pub fn new(config: &VmConfig) -> Result<Self, OpenError> {
        if config.cpus == 0 || config.cpus == u8::MAX {
            return Err(OpenError::Number("a guest has 1 to 254 vCPUs"));
        }
        let kvm = kvm::vm::open()?;
        let kernel = Kernel::open(&config.kernel)?;
        let disks = config
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| open_disk(index, disk))
            .collect::<Result<_, _>>()?;
        let log = config.guest_log.as_deref().map(open_log).transpose()?;
        let share = config.share.as_ref().map(share::open).transpose()?;
        let network = config
            .network_namespace
            .as_deref()
            .map(open_network)
            .transpose()?;
        let sockets = config.vsock.as_ref().map(open_sockets).transpose()?;
        let cgroup = config.cgroup.as_deref().map(open_cgroup).transpose()?;
        Ok(Self {
            kvm,
            kernel,
            disks,
            log,
            share,
            sockets,
            network,
            cgroup,
        })
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(rustix::io::Errno) -> OpenError {
    move |error| OpenError::File {
        what,
        path: path.to_owned(),
        source: error.into(),
    }
}

fn open_cgroup(path: &Path) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(failed("the cgroup", path))
}

fn open_disk(index: usize, disk: &DiskConfig) -> Result<(Serial, Disk), OpenError> {
    let serial = match &disk.id {
        Some(id) => Serial::new(id)?,
        None => Serial::new(&format!("disk{index}"))?,
    };
    let access = if disk.read_only {
        OFlags::RDONLY
    } else {
        // EXCL: a block device that is mounted on the host, or part of another device, is not to
        // be had (open(2)); for files it means nothing.
        OFlags::RDWR | OFlags::EXCL
    };
    // NONBLOCK: opening a pipe by mistake must not hang.
    let fd = open(
        &disk.path,
        access | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(failed("disk", &disk.path))?;
    let disk = Disk::new(&disk.path, fd.into(), disk.read_only)?;
    Ok((serial, disk))
}

fn open_log(path: &Path) -> Result<GuestLog, OpenError> {
    GuestLog::open(path).map_err(|source| OpenError::File {
        what: "the guest's log",
        path: path.to_owned(),
        source,
    })
}

fn open_network(path: &Path) -> Result<OwnedFd, OpenError> {
    open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .map_err(failed("network namespace", path))
}

fn open_sockets(vsock: &VsockConfig) -> Result<Sockets, OpenError> {
    let directory = &vsock.directory;
    let fd = open(
        directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed("the directory of the sandbox's sockets", directory))?;
    let previous = rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let bound = bind(directory, &fd, LISTENER_NAME)
        .and_then(|listener| Ok((listener, bind(directory, &fd, CONTROL)?)));
    rustix::process::umask(previous);
    let (listener, control) = bound?;
    let mount = share::detached(directory, false)?;
    Ok(Sockets {
        guest_cid: vsock.guest_cid,
        listener,
        control,
        mount,
    })
}

/// Listens at a name in a directory. A socket's path has 107 bytes at most, so the directory goes by
/// its number.
fn bind(directory: &Path, fd: &OwnedFd, name: &str) -> Result<UnixListener, OpenError> {
    let path = format!("/proc/self/fd/{}/{name}", fd.as_raw_fd());
    UnixListener::bind(path).map_err(|source| OpenError::File {
        what: "the sandbox's socket",
        path: directory.join(name),
        source,
    })
}
