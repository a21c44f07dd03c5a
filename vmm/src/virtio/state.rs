//! What the devices save: one plain struct each. Queues, features and status are the transport's.

use serde::{Deserialize, Serialize};

use super::DeviceKind;

/// State of one device beyond its queues and features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "snake_case")]
pub enum DeviceState {
    /// virtio-blk.
    Block(BlockState),
    /// virtio-net.
    Network(NetworkState),
    /// virtio-rng: has none.
    Entropy,
    /// virtio-vsock.
    Vsock(VsockState),
    /// virtio-fs.
    Filesystem(FilesystemState),
}

impl DeviceState {
    /// Which device the state belongs to.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Block(_) => DeviceKind::Block,
            Self::Network(_) => DeviceKind::Net,
            Self::Entropy => DeviceKind::Entropy,
            Self::Vsock(_) => DeviceKind::Vsock,
            Self::Filesystem(_) => DeviceKind::Filesystem,
        }
    }
}

/// virtio-blk: what the driver was told about the disk. The disk that it is restored onto must be
/// the same size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether VIRTIO_BLK_F_RO was offered.
    pub read_only: bool,
}

/// virtio-net: the tap is not part of it, it is handed in again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkState {
    /// The address that the driver was told.
    pub mac: [u8; 6],
    /// The MTU that the driver was told.
    pub mtu: u16,
    /// Pairs of queues that the driver uses.
    pub pairs_in_use: u16,
    /// What the driver switched on or off by the control queue: feature bits; none if it did not.
    pub guest_offloads: Option<u64>,
}

/// virtio-vsock: connections do not outlive a save; the driver is told so with a transport reset
/// event (virtio 1.2 §5.10.6.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
}

/// virtio-fs: the file server's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesystemState {
    /// The tag in the configuration space.
    pub tag: String,
    /// As the file server serialises it (inodes by path, open handles).
    pub server: Vec<u8>,
    /// What the guest watches (inotify): nodes of the server with masks.
    pub watches: Vec<(u64, u32)>,
    /// Files that the guest had for itself, so that it may know better than the host what is in them.
    pub delegated: Vec<u64>,
}

/// Why state could not be taken or put back.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state belongs to another kind of device.
    #[error("the saved state is that of a {found:?} device, this is a {expected:?} device")]
    WrongDevice {
        /// This device.
        expected: DeviceKind,
        /// The state's.
        found: DeviceKind,
    },
    /// The state does not fit what the device serves now, or does not make sense.
    #[error("the saved state does not fit: {0}")]
    Mismatch(String),
    /// The device's server could not take or put back its state.
    #[error("{what}")]
    Server {
        /// What was tried.
        what: &'static str,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
}
