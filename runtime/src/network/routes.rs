//! Routes and neighbours of the network namespace that the thread is in, in the words of the
//! agent's contract.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use bulkhead_agent_protocol::messages::{Neighbour, NextHop, Route};
use netlink_packet_core::Nla;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric,
        RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
    },
};

use super::netlink::{Netlink, NetlinkError};

/// Names of the interfaces that have an image in the guest, by their index on the host.
pub(super) type Names = BTreeMap<u32, String>;

/// `NTF_EXT_LEARNED` (linux/neighbour.h): a routing daemon's entry.
const LEARNED: NeighbourFlags = NeighbourFlags::ExtLearned;

/// The routes of table main but those that the kernel makes for addresses.
pub(super) fn routes(
    netlink: &mut Netlink,
    names: &Names,
    left_out: &mut BTreeSet<String>,
) -> Result<Vec<Route>, NetlinkError> {
    let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
    let mut found = Vec::new();
    for message in netlink.dump(&request)? {
        let RouteNetlinkMessage::NewRoute(message) = message else {
            continue;
        };
        if !is_set_by_people(&message) {
            continue;
        }
        match route(&message, names) {
            Ok(Some(route)) => found.push(route),
            // It leads to an interface that has no image, which was said.
            Ok(None) => {}
            Err(Unsupported { destination, what }) => {
                left_out.insert(format!(
                    "the route to {destination} of the network namespace has {what}, so the guest \
                     does not get it"
                ));
            }
        }
    }
    Ok(found)
}

fn is_set_by_people(message: &RouteMessage) -> bool {
    let header = &message.header;
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    table.unwrap_or(header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
        && matches!(
            header.address_family,
            AddressFamily::Inet | AddressFamily::Inet6
        )
        && header.protocol != RouteProtocol::Kernel
        && !header.flags.contains(RouteFlags::Cloned)
}

/// A route that the contract has no words for.
struct Unsupported {
    destination: String,
    what: String,
}

fn route(message: &RouteMessage, names: &Names) -> Result<Option<Route>, Unsupported> {
    let header = &message.header;
    let unicast = header.kind == RouteType::Unicast;
    let mut route = Route {
        destination: destination(message),
        scope: u8::from(header.scope).into(),
        protocol: u8::from(header.protocol).into(),
        kind: u8::from(header.kind).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        type_of_service: header.tos.into(),
        ..Default::default()
    };
    let unsupported = |what: &str| Unsupported {
        destination: destination(message),
        what: what.to_owned(),
    };
    if !matches!(
        header.kind,
        RouteType::Unicast
            | RouteType::BlackHole
            | RouteType::Unreachable
            | RouteType::Prohibit
            | RouteType::Throw
    ) {
        return Err(unsupported(&format!("the kind {:?}", header.kind)));
    }
    if header.source_prefix_length != 0 {
        return Err(unsupported("a source prefix"));
    }
    for attribute in &message.attributes {
        match attribute {
            // IPv6 names the loopback interface for those that lead nowhere.
            RouteAttribute::Oif(_) if !unicast => {}
            RouteAttribute::Oif(index) => match names.get(index) {
                Some(name) => route.device.clone_from(name),
                None => return Ok(None),
            },
            RouteAttribute::Gateway(gateway) => route.gateway = text(gateway),
            RouteAttribute::Via(via) => route.gateway = via_text(via),
            RouteAttribute::PrefSource(source) => route.source = text(source),
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Metrics(list) => {
                route.metrics = metrics(list).map_err(|what| unsupported(&what))?;
            }
            RouteAttribute::MultiPath(hops) => {
                let hops: Option<Vec<_>> = hops.iter().map(|hop| next_hop(hop, names)).collect();
                match hops {
                    Some(hops) => route.next_hops = hops,
                    None => return Ok(None),
                }
            }
            RouteAttribute::EncapType(_) => return Err(unsupported("an encapsulation")),
            RouteAttribute::Realm(_) => return Err(unsupported("a realm")),
            _ => {}
        }
    }
    Ok(Some(route))
}

fn destination(message: &RouteMessage) -> String {
    let address = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(address) => Some(text(address)),
            _ => None,
        });
    let any = match message.header.address_family {
        AddressFamily::Inet6 => "::",
        _ => "0.0.0.0",
    };
    let length = message.header.destination_prefix_length;
    format!("{}/{length}", address.as_deref().unwrap_or(any))
}

fn text(address: &RouteAddress) -> String {
    match address {
        RouteAddress::Inet(address) => address.to_string(),
        RouteAddress::Inet6(address) => address.to_string(),
        _ => String::new(),
    }
}

fn via_text(via: &RouteVia) -> String {
    match via {
        RouteVia::Inet(address) => address.to_string(),
        RouteVia::Inet6(address) => address.to_string(),
        _ => String::new(),
    }
}

fn metrics(list: &[RouteMetric]) -> Result<HashMap<u32, u32>, String> {
    let mut found = HashMap::new();
    for metric in list {
        let mut value = [0; 4];
        if metric.value_len() != value.len() {
            return Err(format!("the metric {metric:?}"));
        }
        metric.emit_value(&mut value);
        found.insert(metric.kind().into(), u32::from_ne_bytes(value));
    }
    Ok(found)
}

fn next_hop(hop: &RouteNextHop, names: &Names) -> Option<NextHop> {
    let mut found = NextHop {
        device: names.get(&hop.interface_index)?.clone(),
        on_link: hop.flags.contains(RouteNextHopFlags::Onlink),
        weight: u32::from(hop.hops) + 1,
        ..Default::default()
    };
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(gateway) => found.gateway = text(gateway),
            RouteAttribute::Via(via) => found.gateway = via_text(via),
            _ => {}
        }
    }
    Some(found)
}

/// The neighbours that somebody has set, those that are proxied included.
pub(super) fn neighbours(
    netlink: &mut Netlink,
    names: &Names,
) -> Result<Vec<Neighbour>, NetlinkError> {
    let mut found = Vec::new();
    let mut proxied = NeighbourMessage::default();
    proxied.header.flags = NeighbourFlags::Proxy;
    for request in [NeighbourMessage::default(), proxied] {
        for message in netlink.dump(&RouteNetlinkMessage::GetNeighbour(request))? {
            if let RouteNetlinkMessage::NewNeighbour(message) = message {
                found.extend(neighbour(&message, names));
            }
        }
    }
    Ok(found)
}

fn neighbour(message: &NeighbourMessage, names: &Names) -> Option<Neighbour> {
    let header = &message.header;
    let proxy = header.flags.contains(NeighbourFlags::Proxy);
    // The kernel has entries of its own for groups and for itself, of other kinds than unicast.
    let set = header.state == NeighbourState::Permanent
        || header.state == NeighbourState::Noarp && header.kind == RouteType::Unicast;
    if !(proxy || set) || header.flags.contains(LEARNED) {
        return None;
    }
    let mut found = Neighbour {
        device: names.get(&header.ifindex)?.clone(),
        state: if proxy {
            0
        } else {
            u16::from(header.state).into()
        },
        router: header.flags.contains(NeighbourFlags::Router),
        proxy,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                found.address = IpAddr::from(*address).to_string();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                found.address = IpAddr::from(*address).to_string();
            }
            NeighbourAttribute::LinkLayerAddress(mac) if !proxy => found.mac = mac_text(mac),
            _ => {}
        }
    }
    (!found.address.is_empty() && (proxy || found.mac.len() == 17)).then_some(found)
}

/// `02:42:ac:11:00:02`.
pub(super) fn mac_text(mac: &[u8]) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}
