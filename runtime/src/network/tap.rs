//! Taps: the host's ends of a guest's network devices. A tap lives as long as its descriptor, which
//! goes to the VMM, and descriptors for taps that are made once `/dev/net/tun` may not be opened any more.

use std::{io, os::fd::OwnedFd};

use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
};
use rustix::fs::{Mode, OFlags};

use super::{NetworkError, netlink::Netlink};

/// The kernel puts a free number behind it, so no tap's name collides with another interface's.
const NAME: &str = "bhtap";
/// linux/if_tun.h: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR. The header carries what checksum and
/// segmentation offloads need (virtio 1.2 §5.1.6).
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;

/// As many as a guest has places for interfaces, unless it is configured otherwise.
const BLANKS: usize = 8;

/// Whether an interface has the name of a tap.
pub(super) fn is_ours(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Descriptors of `/dev/net/tun` that have no tap yet. They are opened early, since the engine's
/// cgroup, which the monitor enters, may allow no devices (Podman's of a pod does not).
#[derive(Debug)]
pub(super) struct Blanks(Vec<OwnedFd>);

impl Blanks {
    /// Their taps will be in the namespace that the thread is in now. Where the device cannot be
    /// opened there are none: whoever wants a tap hears why.
    pub(super) fn open() -> Self {
        Self((0..BLANKS).map_while(|_| open().ok()).collect())
    }

    pub(super) fn take(&mut self) -> Option<OwnedFd> {
        self.0.pop()
    }

    pub(super) fn close(&mut self) {
        self.0.clear();
    }

    /// Ends a tap; its descriptor can have another if it was one of these.
    pub(super) fn take_back(&mut self, netlink: &mut Netlink, tap: Tap) {
        if !tap.of_blank {
            return;
        }
        // A descriptor has one tap at a time, and is free again when its tap is deleted
        // (tun_detach_all in drivers/net/tun.c).
        let mut message = LinkMessage::default();
        message.header.index = tap.index;
        match netlink.change(RouteNetlinkMessage::DelLink(message), 0) {
            Ok(()) => self.0.push(tap.descriptor),
            Err(error) => {
                tracing::debug!("a tap was not deleted: {}", crate::error::chain(&error));
            }
        }
    }
}

fn open() -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open("/dev/net/tun", flags, Mode::empty())
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> NetworkError {
    move |error| NetworkError::Tap(what, error)
}

/// A tap in the namespace that the thread is in.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) descriptor: OwnedFd,
    pub(super) index: u32,
    /// To be given back.
    pub(super) of_blank: bool,
}

impl Tap {
    /// Makes one that is up.
    pub(super) fn make(
        netlink: &mut Netlink,
        blanks: &mut Blanks,
        mtu: u16,
    ) -> Result<Self, NetworkError> {
        match open() {
            Ok(descriptor) => Self::of(descriptor, false, netlink, mtu),
            Err(errno) => match blanks.take() {
                Some(descriptor) => Self::of(descriptor, true, netlink, mtu),
                None => Err(failed("open /dev/net/tun (`modprobe tun` makes it)")(
                    errno.into(),
                )),
            },
        }
    }

    /// Of a descriptor that has none.
    pub(super) fn of(
        descriptor: OwnedFd,
        of_blank: bool,
        netlink: &mut Netlink,
        mtu: u16,
    ) -> Result<Self, NetworkError> {
        let name = crate::sys::set_interface(&descriptor, &format!("{NAME}%d"), FLAGS)
            .map_err(failed("make a tap in the network namespace"))?;
        let index = rustix::net::netdevice::name_to_index(&*netlink, &name)
            .map_err(|errno| failed("find the tap that was made")(errno.into()))?;
        let refused = |source| NetworkError::Change {
            what: "set up the tap",
            interface: name.clone(),
            source,
        };
        // The tap is a wire to the guest: the host's kernel must not speak on it of its own
        // accord. Where there is no IPv6 there is nothing to be silenced.
        let mut silence = LinkMessage::default();
        silence.header.index = index;
        silence
            .attributes
            .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)],
            )]));
        if let Err(error) = netlink.change(RouteNetlinkMessage::SetLink(silence), 0) {
            tracing::debug!("{name} has no IPv6: {}", crate::error::chain(&error));
        }
        let mut up = LinkMessage::default();
        up.header.index = index;
        (up.header.flags, up.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
        up.attributes.push(LinkAttribute::Mtu(mtu.into()));
        netlink
            .change(RouteNetlinkMessage::SetLink(up), 0)
            .map_err(refused)?;
        Ok(Self {
            descriptor,
            index,
            of_blank,
        })
    }
}

/// The tap's MTU follows the interface's.
pub(super) fn set_mtu(netlink: &mut Netlink, index: u32, mtu: u16) -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Mtu(mtu.into()));
    netlink
        .change(RouteNetlinkMessage::SetLink(message), 0)
        .map_err(|source| NetworkError::Change {
            what: "set the MTU of the tap with index",
            interface: index.to_string(),
            source,
        })
}
