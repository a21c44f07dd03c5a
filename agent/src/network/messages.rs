//! The requests of rtnetlink(7) about links, addresses, routes and neighbours.

use std::{
    net::IpAddr,
    os::fd::{AsRawFd, BorrowedFd},
};

use netlink_packet_core::{DefaultNla, Emitable};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage},
    route::{
        RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
        RouteNextHopFlags, RouteVia,
    },
};

use super::wanted::{Address, Hop, Neighbour, Route};

/// A request's type and what follows the header. In bytes: the library's type for any request
/// would bring all that it knows into the program, a megabyte.
pub(super) struct Request {
    /// `RTM_*`.
    pub(super) kind: u16,
    pub(super) body: Vec<u8>,
}

impl Request {
    fn new(kind: u16, message: &impl Emitable) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        Self { kind, body }
    }
}

fn set_link(index: u32, attribute: LinkAttribute) -> Request {
    Request::new(libc::RTM_SETLINK, &link(index, vec![attribute]))
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn link(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

/// Moves a link into a namespace, with a new name.
pub(super) fn move_link(index: u32, into: BorrowedFd<'_>, name: &str) -> Request {
    Request::new(
        libc::RTM_SETLINK,
        &link(
            index,
            vec![
                LinkAttribute::NetNsFd(into.as_raw_fd()),
                LinkAttribute::IfName(name.to_owned()),
            ],
        ),
    )
}

/// Renames a link.
pub(super) fn rename(index: u32, name: &str) -> Request {
    let name = LinkAttribute::IfName(name.to_owned());
    set_link(index, name)
}

/// Sets a link's address.
pub(super) fn set_mac(index: u32, mac: &[u8]) -> Request {
    let mac = LinkAttribute::Address(mac.to_vec());
    set_link(index, mac)
}

/// Sets a link's MTU.
pub(super) fn set_mtu(index: u32, mtu: u32) -> Request {
    set_link(index, LinkAttribute::Mtu(mtu))
}

/// Keeps a link from choosing an IPv6 address of its own when it comes up.
pub(super) fn choose_no_address(index: u32) -> Request {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let mode = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]);
    set_link(index, mode)
}

/// Sets a link up or down.
pub(super) fn set_up(index: u32, up: bool) -> Request {
    let mut message = link(index, Vec::new());
    message.header.change_mask = LinkFlags::Up;
    message.header.flags.set(LinkFlags::Up, up);
    Request::new(libc::RTM_SETLINK, &message)
}

fn address(index: u32, address: &Address) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.local);
    message.header.prefix_len = address.prefix_length;
    message.header.scope = address.scope.into();
    message.header.index = index;
    let mut flags = AddressFlags::empty();
    flags.set(AddressFlags::Noprefixroute, address.no_prefix_route);
    // Whoever gave the address on the host has seen to it, and the wait would hold the container up.
    flags.set(AddressFlags::Nodad, address.local.is_ipv6());
    message.attributes = vec![
        AddressAttribute::Local(address.local),
        AddressAttribute::Address(address.peer.unwrap_or(address.local)),
        AddressAttribute::Flags(flags),
    ];
    let broadcast = address.broadcast.map(AddressAttribute::Broadcast);
    message.attributes.extend(broadcast);
    message
}

/// Gives a link an address.
pub(super) fn add_address(index: u32, wanted: &Address) -> Request {
    Request::new(libc::RTM_NEWADDR, &address(index, wanted))
}

/// Takes an address from a link.
pub(super) fn remove_address(index: u32, wanted: &Address) -> Request {
    Request::new(libc::RTM_DELADDR, &address(index, wanted))
}

/// A route; `index` gives the numbers of interfaces.
fn route<E>(
    route: &Route,
    mut index: impl FnMut(&str) -> Result<u32, E>,
) -> Result<RouteMessage, E> {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination);
    header.destination_prefix_length = route.prefix_length;
    header.tos = route.type_of_service;
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = route.protocol.into();
    header.scope = route.scope.into();
    header.kind = route.kind.into();
    if route.prefix_length != 0 {
        let destination = RouteAttribute::Destination(route.destination.into());
        message.attributes.push(destination);
    }
    let source = route.source.map(|source| source.into());
    message
        .attributes
        .extend(source.map(RouteAttribute::PrefSource));
    if route.priority != 0 {
        let priority = RouteAttribute::Priority(route.priority);
        message.attributes.push(priority);
    }
    if !route.metrics.is_empty() {
        let number = |(number, value): &(u16, u32)| {
            RouteMetric::Other(DefaultNla::new(*number, value.to_ne_bytes().to_vec()))
        };
        let metrics = route.metrics.iter().map(number).collect();
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    if let [hop] = route.hops.as_slice() {
        if hop.on_link {
            message.header.flags |= RouteFlags::Onlink;
        }
        message.attributes.extend(gateway(route, hop));
        if let Some(device) = &hop.device {
            message.attributes.push(RouteAttribute::Oif(index(device)?));
        }
        return Ok(message);
    }
    let mut hops = Vec::with_capacity(route.hops.len());
    for hop in &route.hops {
        let mut way = RouteNextHop::default();
        way.hops = hop.weight;
        way.flags.set(RouteNextHopFlags::Onlink, hop.on_link);
        if let Some(device) = &hop.device {
            way.interface_index = index(device)?;
        }
        way.attributes.extend(gateway(route, hop));
        hops.push(way);
    }
    message.attributes.push(RouteAttribute::MultiPath(hops));
    Ok(message)
}

/// RTA_VIA is for gateways of the other family.
fn gateway(route: &Route, hop: &Hop) -> Option<RouteAttribute> {
    let gateway = hop.gateway?;
    Some(match gateway {
        _ if gateway.is_ipv4() == route.destination.is_ipv4() => {
            RouteAttribute::Gateway(gateway.into())
        }
        IpAddr::V4(gateway) => RouteAttribute::Via(RouteVia::Inet(gateway)),
        IpAddr::V6(gateway) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
    })
}

/// Adds a route.
pub(super) fn add_route<E>(
    wanted: &Route,
    index: impl FnMut(&str) -> Result<u32, E>,
) -> Result<Request, E> {
    Ok(Request::new(libc::RTM_NEWROUTE, &route(wanted, index)?))
}

/// Removes a route.
pub(super) fn remove_route<E>(
    wanted: &Route,
    index: impl FnMut(&str) -> Result<u32, E>,
) -> Result<Request, E> {
    Ok(Request::new(libc::RTM_DELROUTE, &route(wanted, index)?))
}

fn neighbour(index: u32, neighbour: &Neighbour) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbour.address);
    message.header.ifindex = index;
    message.header.state = neighbour.state.into();
    let flags = &mut message.header.flags;
    flags.set(NeighbourFlags::Router, neighbour.router);
    flags.set(NeighbourFlags::Proxy, neighbour.proxy);
    let address = match neighbour.address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes = vec![NeighbourAttribute::Destination(address)];
    let mac = neighbour.mac.clone();
    let mac = mac.map(NeighbourAttribute::LinkLayerAddress);
    message.attributes.extend(mac);
    message
}

/// Adds a neighbour.
pub(super) fn add_neighbour(index: u32, wanted: &Neighbour) -> Request {
    Request::new(libc::RTM_NEWNEIGH, &neighbour(index, wanted))
}

/// Removes a neighbour.
pub(super) fn remove_neighbour(index: u32, wanted: &Neighbour) -> Request {
    Request::new(libc::RTM_DELNEIGH, &neighbour(index, wanted))
}
