//! Taps: the host's ends of a guest's network devices. A tap lives as long as its descriptor, which
//! goes to the VMM.

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

/// Whether an interface has the name of a tap.
pub(super) fn is_ours(name: &str) -> bool {
    name.strip_prefix(NAME).is_some_and(|number| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// A tap in the namespace that the thread is in.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) descriptor: OwnedFd,
    pub(super) index: u32,
}

impl Tap {
    /// Makes one that is up.
    pub(super) fn make(netlink: &mut Netlink, mtu: u16) -> Result<Self, NetworkError> {
        let failed = |what: &'static str| move |error: io::Error| NetworkError::Tap(what, error);
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open("/dev/net/tun", flags, Mode::empty())
            .map_err(|errno| failed("open /dev/net/tun (`modprobe tun` makes it)")(errno.into()))?;
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
        Ok(Self { descriptor, index })
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
