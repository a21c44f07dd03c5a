//! Reads a request: text becomes addresses and numbers, and what cannot be is refused by its field.
//! Touches nothing.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use bulkhead_agent_protocol::messages::{
    self, InterfaceAddress, NetworkInterface, SetNetworkRequest,
};

use super::Bus;
use crate::error::{Error, Result};

/// What a network namespace is to be.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) interfaces: Vec<Interface>,
    /// Those without a gateway first: they lead to the gateways of the others.
    pub(super) routes: Vec<Route>,
    pub(super) neighbours: Vec<Neighbour>,
}

/// A link with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    /// On the platform bus; none for the loopback interface.
    pub(super) device: Option<String>,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) addresses: Vec<Address>,
}

/// An address of a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) local: IpAddr,
    pub(super) prefix_length: u8,
    pub(super) peer: Option<IpAddr>,
    pub(super) broadcast: Option<Ipv4Addr>,
    pub(super) scope: u8,
    pub(super) no_prefix_route: bool,
}

/// A route of table main.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: IpAddr,
    pub(super) prefix_length: u8,
    pub(super) source: Option<IpAddr>,
    pub(super) scope: u8,
    pub(super) priority: u32,
    pub(super) protocol: u8,
    pub(super) kind: u8,
    pub(super) type_of_service: u8,
    /// By number, in order.
    pub(super) metrics: Vec<(u16, u32)>,
    /// One, or several of a multipath route.
    pub(super) hops: Vec<Hop>,
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    pub(super) gateway: Option<IpAddr>,
    /// Name of the interface.
    pub(super) device: Option<String>,
    pub(super) on_link: bool,
    /// Less one, as in `rtnh_hops`.
    pub(super) weight: u8,
}

/// A fixed entry of the neighbour table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Neighbour {
    pub(super) address: IpAddr,
    pub(super) mac: Option<Vec<u8>>,
    pub(super) device: String,
    pub(super) state: u16,
    pub(super) router: bool,
    pub(super) proxy: bool,
}

impl Route {
    /// Whether the first way of it is through a gateway.
    fn has_gateway(&self) -> bool {
        self.hops.iter().any(|hop| hop.gateway.is_some())
    }

    /// Whether it leads through one of the interfaces, or the kernel chooses where.
    pub(super) fn uses(&self, names: &[&str]) -> bool {
        self.hops.iter().any(|hop| match &hop.device {
            Some(device) => names.contains(&device.as_str()),
            None => true,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.local, self.prefix_length)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.destination, self.prefix_length)?;
        for hop in &self.hops {
            if let Some(gateway) = hop.gateway {
                write!(formatter, " via {gateway}")?;
            }
            if let Some(device) = &hop.device {
                write!(formatter, " through {device}")?;
            }
        }
        Ok(())
    }
}

/// Reads a request.
pub(super) fn read(request: &SetNetworkRequest) -> Result<Wanted> {
    let mut wanted = Wanted::default();
    for (index, interface) in request.interfaces.iter().enumerate() {
        let read = interface_of(&format!("interfaces[{index}]"), interface)?;
        let clash = wanted.interfaces.iter().find(|other| {
            other.name == read.name || other.device.is_some() && other.device == read.device
        });
        if let Some(clash) = clash {
            let problem = format!("{} and {} are one", clash.name, read.name);
            return Err(Error::invalid(format!("interfaces[{index}]"), problem));
        }
        wanted.interfaces.push(read);
    }
    if wanted.interfaces.iter().all(|i| i.device.is_some()) {
        wanted.interfaces.push(loopback());
    }
    let is_known = |field: &str, device: &str| {
        let known = device == "lo" || wanted.interfaces.iter().any(|i| i.name == device);
        let problem = || format!("{device:?} is none of the interfaces");
        known
            .then(|| device.to_owned())
            .ok_or_else(|| Error::invalid(format!("{field}.device"), problem()))
    };
    for (index, route) in request.routes.iter().enumerate() {
        let read = route_of(&format!("routes[{index}]"), route, &is_known)?;
        wanted.routes.push(read);
    }
    wanted.routes.sort_by_key(Route::has_gateway);
    for (index, neighbour) in request.neighbours.iter().enumerate() {
        let read = neighbour_of(&format!("neighbours[{index}]"), neighbour, &is_known)?;
        wanted.neighbours.push(read);
    }
    Ok(wanted)
}

fn loopback() -> Interface {
    Interface {
        device: None,
        name: "lo".to_owned(),
        mac: Vec::new(),
        mtu: 0,
        up: true,
        addresses: Vec::new(),
    }
}

fn interface_of(field: &str, asked: &NetworkInterface) -> Result<Interface> {
    let addresses = asked.addresses.iter().enumerate();
    let addresses = addresses
        .map(|(index, address)| address_of(&format!("{field}.addresses[{index}]"), address))
        .collect::<Result<_>>()?;
    let mut interface = Interface {
        device: None,
        name: asked.name.clone(),
        mac: Vec::new(),
        mtu: asked.mtu,
        up: asked.up,
        addresses,
    };
    if asked.device.is_empty() {
        let loopback = asked.name == "lo" && asked.mac.is_empty() && asked.mtu == 0 && asked.up;
        let problem = "is empty, which is for lo only, up and without mac and mtu";
        // What it has by itself stays when it is not named any more.
        let own = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        interface
            .addresses
            .retain(|address| !own.contains(&address.local));
        return loopback
            .then_some(interface)
            .ok_or_else(|| Error::invalid(format!("{field}.device"), problem));
    }
    Bus::check(&asked.device)
        .map_err(|problem| Error::invalid(format!("{field}.device"), problem))?;
    check_name(&asked.name).map_err(|problem| Error::invalid(format!("{field}.name"), problem))?;
    interface.device = Some(asked.device.clone());
    interface.mac = mac(&format!("{field}.mac"), &asked.mac)?;
    if interface.mac[0] & 1 != 0 || interface.mac.iter().all(|byte| *byte == 0) {
        let problem = format!("{} is no address of a single interface", asked.mac);
        return Err(Error::invalid(format!("{field}.mac"), problem));
    }
    if !(68..=65_535).contains(&asked.mtu) {
        let problem = format!("{} is not 68 to 65535", asked.mtu);
        return Err(Error::invalid(format!("{field}.mtu"), problem));
    }
    Ok(interface)
}

/// What the kernel takes (dev_valid_name), less what means something else to it: `%` is a pattern,
/// and the others have a place of their own in /proc/sys/net.
fn check_name(name: &str) -> std::result::Result<(), String> {
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
    if name.is_empty() || name.len() > 15 || name.contains(odd) {
        return Err(format!(
            "{name:?} is not 1 to 15 bytes without spaces, /, : and %"
        ));
    }
    if ["lo", "all", "default", ".", ".."].contains(&name) {
        return Err(format!("{name:?} is taken"));
    }
    Ok(())
}

fn mac(field: &str, text: &str) -> Result<Vec<u8>> {
    let byte = |part: &str| {
        let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        plain.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or_else(|| {
        let problem = format!("{text:?} is not six bytes such as 02:00:00:00:00:01");
        Error::invalid(field, problem)
    })
}

fn address<A: FromStr>(field: &str, text: &str) -> Result<A> {
    let problem = || format!("{text:?} is no such address");
    text.parse().map_err(|_| Error::invalid(field, problem()))
}

fn address_if_any<A: FromStr>(field: &str, text: &str) -> Result<Option<A>> {
    (!text.is_empty()).then(|| address(field, text)).transpose()
}

fn prefix(field: &str, text: &str) -> Result<(IpAddr, u8)> {
    let problem = || format!("{text:?} is no address with the length of its prefix");
    let parts = text.split_once('/');
    let read = parts.and_then(|(address, length)| {
        let digits = length.bytes().all(|b| b.is_ascii_digit());
        let length = digits.then(|| length.parse::<u8>().ok()).flatten();
        Some((address.parse::<IpAddr>().ok()?, length?))
    });
    let fits =
        |(address, length): &(IpAddr, u8)| *length <= if address.is_ipv4() { 32 } else { 128 };
    read.filter(fits)
        .ok_or_else(|| Error::invalid(field, problem()))
}

fn byte(field: String, value: u32) -> Result<u8> {
    let problem = || format!("{value} is above 255");
    u8::try_from(value).map_err(|_| Error::invalid(field, problem()))
}

fn same_family(field: String, one: IpAddr, other: Option<IpAddr>) -> Result<()> {
    match other {
        Some(other) if one.is_ipv4() != other.is_ipv4() => {
            let problem = format!("{other} and {one} are not of one family");
            Err(Error::invalid(field, problem))
        }
        _ => Ok(()),
    }
}

fn address_of(field: &str, asked: &InterfaceAddress) -> Result<Address> {
    let (local, prefix_length) = prefix(&format!("{field}.address"), &asked.address)?;
    let peer = address_if_any(&format!("{field}.peer"), &asked.peer)?;
    same_family(format!("{field}.peer"), local, peer)?;
    let broadcast = address_if_any(&format!("{field}.broadcast"), &asked.broadcast)?;
    same_family(
        format!("{field}.broadcast"),
        local,
        broadcast.map(IpAddr::V4),
    )?;
    Ok(Address {
        local,
        prefix_length,
        peer,
        broadcast,
        scope: byte(format!("{field}.scope"), asked.scope)?,
        no_prefix_route: asked.no_prefix_route,
    })
}

fn route_of(
    field: &str,
    asked: &messages::Route,
    is_known: &impl Fn(&str, &str) -> Result<String>,
) -> Result<Route> {
    let (destination, prefix_length) = prefix(&format!("{field}.destination"), &asked.destination)?;
    let source = address_if_any(&format!("{field}.source"), &asked.source)?;
    same_family(format!("{field}.source"), destination, source)?;
    let mut metrics = Vec::new();
    for (&number, &value) in &asked.metrics {
        // RTAX_CC_ALGO is a name.
        match u16::try_from(number) {
            Ok(number @ (1..=15 | 17)) => metrics.push((number, value)),
            _ => {
                let problem = format!("{number} is no metric that is a number");
                return Err(Error::invalid(format!("{field}.metrics"), problem));
            }
        }
    }
    metrics.sort_unstable();
    let kind = match asked.kind {
        0 => 1,
        kind @ (1 | 6..=9) => byte(format!("{field}.kind"), kind)?,
        kind => {
            let reason =
                format!("{kind} is none of unicast, blackhole, unreachable, prohibit, throw");
            return Err(Error::unsupported(format!("{field}.kind"), reason));
        }
    };
    Ok(Route {
        destination,
        prefix_length,
        source,
        scope: byte(format!("{field}.scope"), asked.scope)?,
        priority: asked.priority,
        protocol: match byte(format!("{field}.protocol"), asked.protocol)? {
            0 => 3,
            protocol => protocol,
        },
        kind,
        type_of_service: byte(format!("{field}.type_of_service"), asked.type_of_service)?,
        metrics,
        hops: hops(field, asked, is_known)?,
    })
}

fn hops(
    field: &str,
    asked: &messages::Route,
    is_known: &impl Fn(&str, &str) -> Result<String>,
) -> Result<Vec<Hop>> {
    let hop = |field: &str, gateway: &str, device: &str, on_link, weight: u32| {
        let problem = || format!("{weight} is not 0 to 256");
        let weight = u8::try_from(weight.saturating_sub(1))
            .map_err(|_| Error::invalid(format!("{field}.weight"), problem()))?;
        Ok(Hop {
            gateway: address_if_any(&format!("{field}.gateway"), gateway)?,
            device: (!device.is_empty())
                .then(|| is_known(field, device))
                .transpose()?,
            on_link,
            weight,
        })
    };
    if asked.next_hops.is_empty() {
        let one = hop(field, &asked.gateway, &asked.device, asked.on_link, 0)?;
        return Ok(vec![one]);
    }
    if !asked.gateway.is_empty() || !asked.device.is_empty() || asked.on_link {
        let problem = "cannot stand beside gateway, device and on_link";
        return Err(Error::invalid(format!("{field}.next_hops"), problem));
    }
    let several = asked.next_hops.iter().enumerate();
    several
        .map(|(index, one)| {
            let field = format!("{field}.next_hops[{index}]");
            hop(&field, &one.gateway, &one.device, one.on_link, one.weight)
        })
        .collect()
}

fn neighbour_of(
    field: &str,
    asked: &messages::Neighbour,
    is_known: &impl Fn(&str, &str) -> Result<String>,
) -> Result<Neighbour> {
    let state = match asked.state {
        0 | 0x80 => 0x80,
        0x40 => 0x40,
        other => {
            let problem = format!("{other:#x} is neither permanent (0x80) nor noarp (0x40)");
            return Err(Error::invalid(format!("{field}.state"), problem));
        }
    };
    let mac = match asked.mac.as_str() {
        "" if asked.proxy => None,
        text => Some(mac(&format!("{field}.mac"), text)?),
    };
    Ok(Neighbour {
        address: address(&format!("{field}.address"), &asked.address)?,
        mac,
        device: is_known(field, &asked.device)?,
        state,
        router: asked.router,
        proxy: asked.proxy,
    })
}

#[cfg(test)]
mod tests;
