//! The host's network namespace that a container's interfaces lie in. The monitor enters it, and so does
//! the stand-in: `/proc/<container's pid>/ns/net` is where managers put interfaces.
//!
//! One sandbox holds a namespace at a time, since a packet can be handed to one guest only. Who
//! holds it shows by an abstract Unix socket, which belongs to a network namespace and is gone with
//! the process that made it.

use std::{
    io,
    marker::PhantomData,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// `NSFS_MAGIC`, linux/magic.h.
const NSFS: i64 = 0x6e73_6673;
/// `CLONE_NEWNET`, linux/sched.h.
const NETWORK: i32 = 0x4000_0000;
/// Name of the abstract socket.
const CLAIM: &[u8] = b"bulkhead/network-namespace";

/// A network namespace cannot be used.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// It cannot be opened.
    #[error(
        "cannot open the network namespace {path}; it may be gone, or was never made (`ip netns add`)"
    )]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error(
        "{0} is not a network namespace; give a path such as /run/netns/NAME or /proc/PID/ns/net"
    )]
    Other(PathBuf),
    /// Everybody's.
    #[error(
        "{0} is the host's own network namespace, which a container in a virtual machine cannot \
         use: it has a kernel and interfaces of its own; use a bridge, or another network of the \
         engine (Podman: --network bridge, not host)"
    )]
    Host(PathBuf),
    /// Another guest has its interfaces.
    #[error(
        "the network namespace {0} is used by another Bulkhead container, whose guest has its \
         interfaces; give each container a namespace of its own"
    )]
    Taken(PathBuf),
    /// It cannot be entered.
    #[error("cannot enter the network namespace {path}")]
    Enter {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// None can be made.
    #[error("cannot {0}")]
    Make(&'static str, #[source] io::Error),
}

/// Another container's network namespace, which the thread is in; its interfaces are that one's
/// affair.
#[derive(Debug)]
pub struct Joined(Stay);

impl Joined {
    /// Enters the namespace at a path.
    pub fn enter(path: &Path) -> Result<Self, NamespaceError> {
        Ok(Self(Stay::enter(path, open(path)?.as_fd())?))
    }

    /// The namespace that the thread is in.
    pub fn here(&self) -> Result<OwnedFd, NamespaceError> {
        Stay::here()
    }

    /// The namespace that the thread came from: the host's.
    pub fn home(&self) -> BorrowedFd<'_> {
        self.0.home.as_fd()
    }
}

/// Which namespace: device and inode number of nsfs mean it for as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(descriptor: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(descriptor)?;
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    fn at(path: &str) -> io::Result<Self> {
        let stat = rustix::fs::stat(path)?;
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }
}

/// Opens a network namespace, which is not the host's.
pub fn open(path: &Path) -> Result<OwnedFd, NamespaceError> {
    let failed = |errno: Errno| NamespaceError::Open {
        path: path.to_owned(),
        source: errno.into(),
    };
    // What the path leads to is looked at before it is opened: opening a device or a FIFO can
    // have effects, or wait.
    let place = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let place = place.map_err(failed)?;
    if rustix::fs::fstatfs(&place).map_err(failed)?.f_type != NSFS {
        return Err(NamespaceError::Other(path.to_owned()));
    }
    let reopened = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::open(reopened, flags, Mode::empty()).map_err(failed)?;
    if crate::sys::namespace_kind(&namespace).ok() != Some(NETWORK) {
        return Err(NamespaceError::Other(path.to_owned()));
    }
    let own = "/proc/thread-self/ns/net";
    let identity = Identity::of(&namespace).map_err(|error| NamespaceError::Open {
        path: path.to_owned(),
        source: error,
    })?;
    // That of PID 1 may be out of sight; then the runtime's own is the host's.
    if [own, "/proc/1/ns/net"]
        .into_iter()
        .any(|host| Identity::at(host).is_ok_and(|host| host == identity))
    {
        return Err(NamespaceError::Host(path.to_owned()));
    }
    Ok(namespace)
}

fn setns(namespace: BorrowedFd<'_>) -> rustix::io::Result<()> {
    // EINVAL for a namespace of another kind.
    move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))
}

/// The calling thread is in another network namespace while this exists; dropping it returns.
#[derive(Debug)]
pub(super) struct Stay {
    home: OwnedFd,
    /// A namespace is a thread's: the guard stays on it.
    thread: PhantomData<Rc<()>>,
}

impl Stay {
    /// The namespace that the thread is in.
    fn here() -> Result<OwnedFd, NamespaceError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty()).map_err(|errno| {
            NamespaceError::Make("open the present network namespace", errno.into())
        })
    }

    /// Enters the namespace that was opened at `path`.
    fn enter(path: &Path, namespace: BorrowedFd<'_>) -> Result<Self, NamespaceError> {
        let home = Self::here()?;
        setns(namespace).map_err(|errno| match errno {
            Errno::INVAL => NamespaceError::Other(path.to_owned()),
            errno => NamespaceError::Enter {
                path: path.to_owned(),
                source: errno.into(),
            },
        })?;
        Ok(Self::since(home))
    }

    /// Makes an empty namespace and enters it.
    fn in_new() -> Result<Self, NamespaceError> {
        let home = Self::here()?;
        crate::sys::unshare(UnshareFlags::NEWNET)
            .map_err(|error| NamespaceError::Make("make a network namespace", error.into()))?;
        Ok(Self::since(home))
    }

    fn since(home: OwnedFd) -> Self {
        Self {
            home,
            thread: PhantomData,
        }
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        if let Err(errno) = setns(self.home.as_fd()) {
            tracing::error!("cannot return to the host's network namespace: {errno}");
        }
    }
}

/// A namespace that this sandbox holds, and that the thread is in.
#[derive(Debug)]
pub(super) struct Namespace {
    stay: Stay,
    identity: Identity,
    path: Option<PathBuf>,
    /// Says that it is taken.
    _claim: UnixListener,
}

impl Namespace {
    /// Enters the namespace at a path, or an empty one that is made.
    pub(super) fn enter(path: Option<&Path>) -> Result<Self, NamespaceError> {
        let stay = match path {
            Some(path) => Stay::enter(path, open(path)?.as_fd())?,
            None => Stay::in_new()?,
        };
        Self::claim(stay, path)
    }

    /// Enters the namespace at a path if it is still the one that is meant and nobody's.
    pub(super) fn again(path: &Path, identity: Identity) -> Result<Option<Self>, NamespaceError> {
        let namespace = match open(path) {
            Ok(namespace) => namespace,
            // It is gone, and with it whatever was in it.
            Err(NamespaceError::Open { .. } | NamespaceError::Other(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        if !Identity::of(&namespace).is_ok_and(|found| found == identity) {
            return Ok(None);
        }
        match Self::claim(Stay::enter(path, namespace.as_fd())?, Some(path)) {
            Err(NamespaceError::Taken(_)) => Ok(None),
            entered => entered.map(Some),
        }
    }

    fn claim(stay: Stay, path: Option<&Path>) -> Result<Self, NamespaceError> {
        let failed = |error| NamespaceError::Make("look at the network namespace", error);
        let identity = Identity::at("/proc/thread-self/ns/net").map_err(failed)?;
        let address = SocketAddr::from_abstract_name(CLAIM).map_err(failed)?;
        let claim = UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => NamespaceError::Taken(path.unwrap_or(Path::new("")).into()),
            _ => failed(error),
        })?;
        Ok(Self {
            stay,
            identity,
            path: path.map(Path::to_owned),
            _claim: claim,
        })
    }

    /// The namespace that the thread is in.
    pub(super) fn here(&self) -> Result<OwnedFd, NamespaceError> {
        Stay::here()
    }

    /// The namespace that the thread came from: the host's.
    pub(super) fn home(&self) -> BorrowedFd<'_> {
        self.stay.home.as_fd()
    }

    /// Which one it is.
    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// Where it was found; `None` for one that was made.
    pub(super) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}
