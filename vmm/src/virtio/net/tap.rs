//! The tap behind an interface: a descriptor for each pair of queues, made by whoever starts the VM.

use std::ffi::{CStr, c_uint};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{HEADER_SIZE, features};
use crate::sys::tun;

/// Pairs of queues that one interface can have.
const MOST_QUEUES: usize = 8;

/// Why descriptors cannot be a tap's.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Too few or too many.
    #[error("an interface came with {0} descriptors of a tap, it takes 1 to {MOST_QUEUES}")]
    Count(usize),
    /// Not of /dev/net/tun, or of no interface.
    #[error("descriptor {index} of an interface is no tap's")]
    NoTap {
        /// Its place.
        index: usize,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// A tap of another kind.
    #[error(
        "the tap {0} is not as it must be: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, and IFF_MULTI_QUEUE with several descriptors"
    )]
    Flags(String),
    /// Descriptors of several taps.
    #[error("the descriptors of an interface belong to two taps, {0} and {1}")]
    Different(String, String),
    /// It cannot be set up.
    #[error("set up the tap {name}")]
    SetUp {
        /// The host's name.
        name: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

/// An open tap. Its clones are the same.
#[derive(Clone, Debug)]
pub struct Tap {
    name: Arc<str>,
    queues: Arc<[OwnedFd]>,
    udp_segmentation: bool,
    /// Has the ioctls of a tap: all but the stand-ins of tests have.
    real: bool,
}

impl Tap {
    /// Takes the descriptors of one tap.
    pub fn new(queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        if queues.is_empty() || queues.len() > MOST_QUEUES {
            return Err(TapError::Count(queues.len()));
        }
        let mut needed = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues.len() > 1 {
            needed |= libc::IFF_MULTI_QUEUE;
        }
        let mut name: Option<String> = None;
        for (index, queue) in queues.iter().enumerate() {
            let interface = tun::interface(queue.as_fd())
                .map_err(|source| TapError::NoTap { index, source })?;
            let this = text(&interface.name);
            if interface.flags & needed != needed {
                return Err(TapError::Flags(this));
            }
            match &name {
                Some(name) if *name != this => {
                    return Err(TapError::Different(name.clone(), this));
                }
                _ => name = Some(this),
            }
        }
        let mut tap = Self {
            name: name.unwrap_or_default().into(),
            queues: queues.into(),
            udp_segmentation: false,
            real: true,
        };
        tap.set_up().map_err(|source| TapError::SetUp {
            name: tap.name.to_string(),
            source,
        })?;
        Ok(tap)
    }

    /// Any descriptors that packets can be read from and written to.
    #[cfg(test)]
    pub(super) fn stand_in(queues: Vec<OwnedFd>) -> Self {
        let tap = Self {
            name: "stand-in".into(),
            queues: queues.into(),
            udp_segmentation: true,
            real: false,
        };
        tap.never_wait().expect("descriptors");
        tap
    }

    fn set_up(&mut self) -> io::Result<()> {
        self.never_wait()?;
        let size = libc::c_int::try_from(HEADER_SIZE).map_err(io::Error::other)?;
        // They belong to the interface, not to the descriptor.
        tun::set_header_size(self.first(), size)?;
        let with_udp = features::tap_offloads(features::offered(1, true));
        // Since Linux 6.2; others say EINVAL.
        self.udp_segmentation = tun::set_offloads(self.first(), with_udp).is_ok();
        tun::set_offloads(self.first(), 0)
    }

    fn never_wait(&self) -> io::Result<()> {
        for queue in self.queues.iter() {
            fcntl_setfl(queue, fcntl_getfl(queue)? | OFlags::NONBLOCK)?;
        }
        Ok(())
    }

    /// The host's name of it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Pairs of queues.
    pub(super) fn pairs(&self) -> usize {
        self.queues.len()
    }

    /// Whether the host segments UDP.
    pub(super) fn udp_segmentation(&self) -> bool {
        self.udp_segmentation
    }

    /// The descriptor of a pair of queues; an index beyond them is that of the last.
    pub(super) fn queue(&self, index: usize) -> BorrowedFd<'_> {
        self.queues[index.min(self.queues.len() - 1)].as_fd()
    }

    fn first(&self) -> BorrowedFd<'_> {
        self.queue(0)
    }

    /// Says what the guest can take.
    pub(super) fn set_offloads(&self, offloads: c_uint) -> io::Result<()> {
        if self.real {
            tun::set_offloads(self.first(), offloads)?;
        }
        Ok(())
    }

    /// Packets for the guest go to the first `count` queues only.
    pub(super) fn use_queues(&self, count: usize) -> io::Result<()> {
        if !self.real || self.queues.len() == 1 {
            return Ok(());
        }
        for (index, queue) in self.queues.iter().enumerate() {
            match tun::use_queue(queue.as_fd(), index < count) {
                Ok(()) => {}
                // It is as it should be.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn text(name: &[libc::c_char; libc::IFNAMSIZ]) -> String {
    let bytes = name.map(i8::cast_unsigned);
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}
