//! What is in the network namespace that the thread is in, in the words of the agent's contract:
//! the interfaces that a guest can have an image of, their addresses, the routes of table main and
//! the neighbours that do not expire.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_agent_protocol::messages::InterfaceAddress;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{
        InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo,
        LinkLayerType, LinkMessage,
    },
};
use thiserror::Error;

use super::{
    netlink::{Netlink, NetlinkError},
    resolver,
    routes::{self, Names},
    tap,
};

/// IETF RFC 791: the smallest that every link must carry.
const LEAST_MTU: u32 = 68;
/// The largest that a tap can have (drivers/net/tun.c: 65535 less the Ethernet header).
const LARGEST_MTU: u32 = 65521;

/// An interface that a guest cannot have an image of, though it should.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("interface {name:?} of the network namespace {reason}")]
pub struct Unfit {
    pub(super) name: String,
    pub(super) reason: String,
}

/// An interface.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Link {
    /// Of the host's kernel, unique in the namespace.
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    pub(super) up: bool,
    pub(super) addresses: Vec<InterfaceAddress>,
    /// Its driver passes on only multicast that somebody has asked for.
    pub(super) filters_multicast: bool,
    /// Whether all multicast is passed on.
    pub(super) all_multicast: bool,
}

/// A namespace as it is now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct View {
    /// The interfaces, in the order in which they were made.
    pub(super) links: Vec<Link>,
    /// Addresses of the loopback interface beyond 127.0.0.1 and ::1.
    pub(super) loopback: Vec<InterfaceAddress>,
    pub(super) routes: Vec<bulkhead_agent_protocol::messages::Route>,
    pub(super) neighbours: Vec<bulkhead_agent_protocol::messages::Neighbour>,
    /// Whether Docker has a name server there.
    pub(super) resolver: bool,
    /// Interfaces that break a rule.
    pub(super) unfit: Vec<Unfit>,
    /// What else has no image in the guest, for people.
    pub(super) left_out: BTreeSet<String>,
}

/// Looks at the namespace.
pub(super) fn scan(netlink: &mut Netlink) -> Result<View, NetlinkError> {
    let mut view = View::default();
    let mut names = Names::new();
    let links = netlink.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let links: Vec<Found> = links.into_iter().filter_map(Found::of).collect();
    let vrfs: BTreeSet<u32> = links
        .iter()
        .filter(|link| link.kind == Some(InfoKind::Vrf))
        .map(|link| link.index)
        .collect();
    let mut addresses = addresses(netlink)?;
    for link in links {
        let addresses = addresses.remove(&link.index).unwrap_or_default();
        if link.flags.contains(LinkFlags::Loopback) {
            names.insert(link.index, link.name);
            view.loopback = addresses.into_iter().filter(beyond_default).collect();
            continue;
        }
        // What comes in at a port of a bridge or bond is the bridge's or bond's; that one has its
        // image. A VRF is a routing table only.
        if tap::is_ours(&link.name) || link.controller.is_some_and(|index| !vrfs.contains(&index)) {
            continue;
        }
        if let Some(reason) = link.without_image() {
            if link.flags.contains(LinkFlags::Up) || !addresses.is_empty() {
                let text = format!(
                    "interface {:?} of the network namespace {reason}",
                    link.name
                );
                view.left_out.insert(text);
            }
            continue;
        }
        match link.fit(addresses) {
            Ok(link) => {
                names.insert(link.index, link.name.clone());
                view.links.push(link);
            }
            Err(unfit) => view.unfit.push(unfit),
        }
    }
    view.routes = routes::routes(netlink, &names, &mut view.left_out)?;
    view.neighbours = routes::neighbours(netlink, &names)?;
    view.resolver = !view.links.is_empty() && resolver::is_there();
    Ok(view)
}

/// A link as the kernel tells of it, as far as it matters.
#[derive(Debug)]
struct Found {
    index: u32,
    name: String,
    flags: LinkFlags,
    layer: LinkLayerType,
    mac: Vec<u8>,
    mtu: u32,
    controller: Option<u32>,
    kind: Option<InfoKind>,
    ipvlan: Option<IpVlanMode>,
}

impl Found {
    fn of(message: RouteNetlinkMessage) -> Option<Self> {
        let RouteNetlinkMessage::NewLink(message) = message else {
            return None;
        };
        let mut found = Self {
            index: message.header.index,
            name: String::new(),
            flags: message.header.flags,
            layer: message.header.link_layer_type,
            mac: Vec::new(),
            mtu: 0,
            controller: None,
            kind: None,
            ipvlan: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => found.name = name,
                LinkAttribute::Address(mac) => found.mac = mac,
                LinkAttribute::Mtu(mtu) => found.mtu = mtu,
                LinkAttribute::Controller(index) => found.controller = Some(index),
                LinkAttribute::LinkInfo(infos) => found.describe(infos),
                _ => {}
            }
        }
        Some(found)
    }

    fn describe(&mut self, infos: Vec<LinkInfo>) {
        for info in infos {
            match info {
                LinkInfo::Kind(kind) => self.kind = Some(kind),
                LinkInfo::Data(InfoData::IpVlan(data)) => {
                    self.ipvlan = data.into_iter().find_map(|info| match info {
                        InfoIpVlan::Mode(mode) => Some(mode),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
    }

    /// Why a guest cannot have an image of this kind of interface.
    fn without_image(&self) -> Option<String> {
        let kind = self.kind.as_ref().map(ToString::to_string);
        let kind = kind.as_deref().unwrap_or("unknown");
        if self.layer != LinkLayerType::Ether {
            return Some(format!(
                "is not an Ethernet interface (kind {kind}), so the guest does not get it"
            ));
        }
        if self.flags.contains(LinkFlags::Noarp)
            && !matches!(self.kind, Some(InfoKind::Dummy | InfoKind::Ifb))
            || !matches!(self.ipvlan, None | Some(IpVlanMode::L2))
        {
            return Some(format!(
                "resolves no addresses (kind {kind}, layer 3), so the guest does not get it; use \
                 ipvlan in mode l2, macvlan or a bridge"
            ));
        }
        // The fallback devices of tunnels are in every namespace.
        let nobody = self.mac.iter().all(|byte| *byte == 0);
        nobody.then(|| "has no address on its link, so the guest does not get it".to_owned())
    }

    fn fit(self, addresses: Vec<InterfaceAddress>) -> Result<Link, Unfit> {
        let unfit = |reason: String| Unfit {
            name: self.name.clone(),
            reason,
        };
        let mtu = (LEAST_MTU..=LARGEST_MTU).contains(&self.mtu);
        let mtu = u16::try_from(self.mtu).ok().filter(|_| mtu);
        let mtu = mtu.ok_or_else(|| {
            unfit(format!(
                "has an MTU of {} bytes, while a guest's can have {LEAST_MTU} to {LARGEST_MTU}; \
                 set another (`ip link set {} mtu 1500`)",
                self.mtu, self.name
            ))
        })?;
        let mac: [u8; 6] = self.mac.as_slice().try_into().map_err(|_| {
            unfit(format!(
                "has a link address of {} bytes instead of 6",
                self.mac.len()
            ))
        })?;
        // IEEE 802: the lowest bit of the first byte says that it is a group's.
        if mac[0] & 1 == 1 {
            return Err(unfit(
                "has the address of a group as its link address".to_owned(),
            ));
        }
        // A guest could not make such an interface.
        if self.name.is_empty() || self.name.len() > 15 || self.name.contains(['/', ':']) {
            return Err(unfit(
                "has a name that a guest's cannot have (1 to 15 bytes, without / and :)".to_owned(),
            ));
        }
        Ok(Link {
            index: self.index,
            mac,
            mtu,
            up: self.flags.contains(LinkFlags::Up),
            addresses,
            // Those that have no filter for what they pass on.
            filters_multicast: !matches!(
                self.kind,
                Some(InfoKind::Veth | InfoKind::Dummy | InfoKind::Bridge | InfoKind::Tun)
            ),
            all_multicast: self.flags.contains(LinkFlags::Allmulti),
            name: self.name,
        })
    }
}

/// The agent gives these to the loopback interface by itself.
fn beyond_default(address: &InterfaceAddress) -> bool {
    !matches!(address.address.as_str(), "127.0.0.1/8" | "::1/128")
}

fn addresses(netlink: &mut Netlink) -> Result<BTreeMap<u32, Vec<InterfaceAddress>>, NetlinkError> {
    let mut found: BTreeMap<u32, Vec<InterfaceAddress>> = BTreeMap::new();
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    for message in netlink.dump(&request)? {
        let RouteNetlinkMessage::NewAddress(message) = message else {
            continue;
        };
        let index = message.header.index;
        if let Some(address) = address(message) {
            found.entry(index).or_default().push(address);
        }
    }
    Ok(found)
}

fn address(message: AddressMessage) -> Option<InterfaceAddress> {
    let header = message.header;
    if !matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    let mut flags = AddressFlags::from_bits_retain(header.flags.bits().into());
    let (mut local, mut other, mut broadcast) = (None, None, String::new());
    for attribute in message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(address),
            AddressAttribute::Address(address) => other = Some(address),
            AddressAttribute::Broadcast(address) => broadcast = address.to_string(),
            AddressAttribute::Flags(all) => flags = all,
            _ => {}
        }
    }
    // Somebody else has it.
    if flags.contains(AddressFlags::Dadfailed) {
        return None;
    }
    // IPv6 gives IFA_LOCAL only where there is another end.
    let own = local.or(other)?;
    let peer = other.filter(|other| *other != own);
    Some(InterfaceAddress {
        address: format!("{own}/{}", header.prefix_len),
        peer: peer.map(|peer| peer.to_string()).unwrap_or_default(),
        broadcast,
        scope: u8::from(header.scope).into(),
        no_prefix_route: flags.contains(AddressFlags::Noprefixroute),
        ..Default::default()
    })
}
