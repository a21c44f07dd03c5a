//! Makes the difference between what a namespace was made earlier and what it is to be. What is done
//! is noted step by step, so that a request after one that failed goes on from there.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    os::fd::BorrowedFd,
};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use rustix::fs::{Mode, OFlags, openat};

use super::{
    Host,
    messages::{self, Request},
    netlink::{Netlink, Refusal},
    wanted::{Address, Interface, Neighbour, Route, Wanted},
    within,
};
use crate::error::{Attempt, Error, Result};

/// The loopback interface's number, in every namespace.
const LOOPBACK: u32 = 1;

/// What requests have made of a namespace.
#[derive(Debug, Default)]
pub(super) struct Applied {
    /// By device; "" is the loopback interface.
    links: BTreeMap<String, Link>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

/// An interface in the namespace, as it is.
#[derive(Debug)]
struct Link {
    index: u32,
    interface: Interface,
    /// Something has made the kernel drop addresses or routes of it.
    disturbed: bool,
}

impl Applied {
    /// Takes all devices away.
    pub(super) fn clear(&mut self, host: &Host) -> Result<()> {
        self.routes.clear();
        self.neighbours.clear();
        while let Some((device, link)) = self.links.pop_first() {
            if link.interface.device.is_some()
                && let Err(error) = host.bus.unbind(&device)
            {
                self.links.insert(device, link);
                return Err(error);
            }
        }
        Ok(())
    }

    fn index(&self, name: &str) -> Result<u32> {
        let mut links = self.links.values();
        match links.find(|link| link.interface.name == name) {
            Some(link) => Ok(link.index),
            None if name == "lo" => Ok(LOOPBACK),
            None => Err(Error::invalid("device", format!("{name:?} is not there"))),
        }
    }
}

/// A change of a namespace.
pub(super) struct Change<'a> {
    pub(super) host: &'a Host,
    pub(super) namespace: BorrowedFd<'a>,
    /// The agent's procfs.
    pub(super) proc: BorrowedFd<'a>,
    pub(super) wanted: &'a Wanted,
}

impl Change<'_> {
    /// Makes it.
    pub(super) fn run(&self, applied: &mut Applied) -> Result<()> {
        within(self.namespace, self.host, || {
            self.remove_from_tables(&mut open()?, applied)
        })?;
        self.remove_links(applied)?;
        let arrivals = self.bring_links(applied)?;
        within(self.namespace, self.host, || {
            let netlink = &mut open()?;
            for interface in arrivals {
                self.note_arrival(netlink, applied, interface)?;
            }
            self.name_links(netlink, applied)?;
            for interface in &self.wanted.interfaces {
                let device = interface.device.clone().unwrap_or_default();
                if let Some(link) = applied.links.get_mut(&device) {
                    set_link(netlink, link, interface, self.has_ipv6(&interface.name))?;
                }
            }
            self.add_to_tables(netlink, applied)
        })
    }

    /// Removes routes and neighbours that are not wanted any more.
    fn remove_from_tables(&self, netlink: &mut Netlink, applied: &mut Applied) -> Result<()> {
        // What goes by the name of a link that gets another one may mean a different link then.
        let links = applied.links.values().map(|link| &link.interface);
        let renamed = links.filter(|link| {
            let mut wanted = self.wanted.interfaces.iter();
            wanted.any(|wanted| wanted.device == link.device && wanted.name != link.name)
        });
        let names: Vec<_> = renamed.map(|link| link.name.clone()).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let gone = |present: &Route| !self.wanted.routes.contains(present) || present.uses(&names);
        while let Some(at) = applied.routes.iter().rposition(gone) {
            let route = &applied.routes[at];
            // Its interface is not known any more: the kernel has removed the route with that.
            if let Ok(message) = messages::remove_route(route, |name| applied.index(name)) {
                let action = || format!("remove the route to {route}");
                remove(netlink, &message).or_cannot(action)?;
            }
            applied.routes.remove(at);
        }
        let gone = |present: &Neighbour| {
            !self.wanted.neighbours.contains(present) || names.contains(&present.device.as_str())
        };
        while let Some(at) = applied.neighbours.iter().rposition(gone) {
            let neighbour = &applied.neighbours[at];
            if let Ok(index) = applied.index(&neighbour.device) {
                let message = messages::remove_neighbour(index, neighbour);
                let action = || format!("remove the neighbour {}", neighbour.address);
                remove(netlink, &message).or_cannot(action)?;
            }
            applied.neighbours.remove(at);
        }
        Ok(())
    }

    fn remove_links(&self, applied: &mut Applied) -> Result<()> {
        let is_wanted = |device: &str| {
            let mut wanted = self.wanted.interfaces.iter();
            wanted.any(|interface| interface.device.as_deref() == Some(device))
        };
        let gone: Vec<_> = applied
            .links
            .keys()
            .filter(|device| !device.is_empty() && !is_wanted(device))
            .cloned()
            .collect();
        for device in gone {
            self.host.bus.unbind(&device)?;
            if let Some(link) = applied.links.remove(&device) {
                let name = link.interface.name;
                applied.routes.retain(|route| !route.uses(&[&name]));
                applied.neighbours.retain(|other| other.device != name);
            }
        }
        Ok(())
    }

    /// Moves new devices into the namespace, under interim names: that way what holds the name
    /// there cannot make the kernel do half of it.
    fn bring_links(&self, applied: &Applied) -> Result<Vec<&Interface>> {
        let mut arrivals = Vec::new();
        let mut netlink = None;
        for interface in &self.wanted.interfaces {
            let Some(device) = &interface.device else {
                continue;
            };
            if applied.links.contains_key(device) {
                continue;
            }
            let name = self.host.bus.bind_interface(device)?;
            let netlink = match &mut netlink {
                Some(open) => open,
                None => netlink.insert(open()?),
            };
            let action = || format!("move {device} to the container for {}", interface.name);
            let index = netlink.index(&name).or_cannot(action)?;
            let message = messages::move_link(index, self.namespace, &interim_name(device));
            if let Err(error) = netlink.ask(&message, 0) {
                // Wherever it is now, the next request finds it as new.
                self.host.bus.unbind(device)?;
                return Err(error).or_cannot(action);
            }
            arrivals.push(interface);
        }
        Ok(arrivals)
    }

    /// A link that has just come is down and without addresses.
    fn note_arrival(
        &self,
        netlink: &mut Netlink,
        applied: &mut Applied,
        interface: &Interface,
    ) -> Result<()> {
        let device = interface.device.clone().unwrap_or_default();
        let name = interim_name(&device);
        let action = || format!("set {device} up as {}", interface.name);
        let index = netlink.index(&name).or_cannot(action)?;
        match netlink.ask(&messages::choose_no_address(index), 0) {
            // Without IPv6 in the namespace there is nothing to choose.
            Err(error) if error.is(libc::EAFNOSUPPORT) => {}
            chosen => chosen.or_cannot(action)?,
        }
        self.ignore_routers(&name).or_cannot(action)?;
        let present = Interface {
            name,
            mac: Vec::new(),
            mtu: 0,
            up: false,
            addresses: Vec::new(),
            ..interface.clone()
        };
        let link = Link {
            index,
            interface: present,
            disturbed: true,
        };
        applied.links.insert(device, link);
        Ok(())
    }

    /// The addresses and routes that routers announce are the host's to take.
    fn ignore_routers(&self, name: &str) -> io::Result<()> {
        let path = format!("sys/net/ipv6/conf/{name}/accept_ra");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        match openat(self.proc, path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(()),
            file => File::from(file?).write_all(b"0"),
        }
    }

    /// Whether the container has not turned IPv6 off on an interface (net.ipv6.conf.*.disable_ipv6):
    /// then what the host has of it counts for nothing.
    fn has_ipv6(&self, name: &str) -> bool {
        let path = format!("sys/net/ipv6/conf/{name}/disable_ipv6");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut value = [0];
        openat(self.proc, path, flags, Mode::empty())
            .and_then(|file| rustix::io::read(&file, &mut value))
            .is_ok()
            && value == *b"0"
    }

    fn can_have(&self, route: &Route) -> bool {
        let mut devices = route.hops.iter().filter_map(|hop| hop.device.as_deref());
        route.destination.is_ipv4() || devices.all(|device| self.has_ipv6(device))
    }

    /// Gives links their names. One that another is to give up is free after that other has its
    /// interim name.
    fn name_links(&self, netlink: &mut Netlink, applied: &mut Applied) -> Result<()> {
        for interface in &self.wanted.interfaces {
            let Some(device) = &interface.device else {
                // The loopback interface only has an entry if it has addresses.
                let lo = applied.links.entry(String::new());
                lo.or_insert_with(|| Link::loopback(interface));
                continue;
            };
            let holder = applied
                .links
                .iter_mut()
                .find(|(holder, link)| link.interface.name == interface.name && *holder != device);
            if let Some((holder, link)) = holder {
                set_name(netlink, link, &interim_name(holder))?;
            }
            if let Some(link) = applied.links.get_mut(device) {
                set_name(netlink, link, &interface.name)?;
            }
        }
        Ok(())
    }

    fn add_to_tables(&self, netlink: &mut Netlink, applied: &mut Applied) -> Result<()> {
        let disturbed: Vec<_> = applied
            .links
            .values()
            .filter(|link| link.disturbed)
            .map(|link| link.interface.name.as_str())
            .collect();
        let present = |route: &Route| applied.routes.contains(route);
        let missing: Vec<_> = self
            .wanted
            .routes
            .iter()
            .filter(|route| !present(route) || !disturbed.is_empty() && route.uses(&disturbed))
            .filter(|route| self.can_have(route))
            .collect();
        for route in missing {
            let action = || format!("add the route to {route}");
            let message = messages::add_route(route, |name| applied.index(name))?;
            add(netlink, &message, NLM_F_CREATE | NLM_F_APPEND).or_cannot(action)?;
            if !applied.routes.contains(route) {
                applied.routes.push(route.clone());
            }
        }
        for neighbour in &self.wanted.neighbours {
            if neighbour.address.is_ipv6() && !self.has_ipv6(&neighbour.device) {
                continue;
            }
            let index = applied.index(&neighbour.device)?;
            let link = applied.links.values().find(|link| link.index == index);
            if applied.neighbours.contains(neighbour) && !link.is_some_and(|link| link.disturbed) {
                continue;
            }
            let message = messages::add_neighbour(index, neighbour);
            let action = || {
                let Neighbour {
                    address, device, ..
                } = neighbour;
                format!("add the neighbour {address} of {device}")
            };
            add(netlink, &message, NLM_F_CREATE | NLM_F_REPLACE).or_cannot(action)?;
            if !applied.neighbours.contains(neighbour) {
                applied.neighbours.push(neighbour.clone());
            }
        }
        for link in applied.links.values_mut() {
            link.disturbed = false;
        }
        Ok(())
    }
}

impl Link {
    fn loopback(interface: &Interface) -> Self {
        Self {
            index: LOOPBACK,
            interface: Interface {
                addresses: Vec::new(),
                ..interface.clone()
            },
            disturbed: false,
        }
    }
}

/// "virtio-mmio.7" → "mmio7".
fn interim_name(device: &str) -> String {
    device.replace("virtio-", "").replace('.', "")
}

fn open() -> Result<Netlink> {
    Netlink::open().or_cannot(|| "open a netlink socket")
}

fn set_name(netlink: &mut Netlink, link: &mut Link, name: &str) -> Result<()> {
    let former = &mut link.interface.name;
    if former == name {
        return Ok(());
    }
    netlink
        .ask(&messages::rename(link.index, name), 0)
        .or_cannot(|| format!("rename the interface {former} to {name}"))?;
    name.clone_into(former);
    link.disturbed = true;
    Ok(())
}

/// Makes a link of this name what is wanted.
fn set_link(netlink: &mut Netlink, link: &mut Link, wanted: &Interface, ipv6: bool) -> Result<()> {
    let name = &wanted.name;
    let index = link.index;
    let present = &mut link.interface;
    if wanted.device.is_some() && present.mac != wanted.mac {
        let action = || format!("set the address of the interface {name}");
        netlink
            .ask(&messages::set_mac(index, &wanted.mac), 0)
            .or_cannot(action)?;
        present.mac.clone_from(&wanted.mac);
    }
    if present.mtu != wanted.mtu {
        let action = || format!("set the MTU of the interface {name} to {}", wanted.mtu);
        netlink
            .ask(&messages::set_mtu(index, wanted.mtu), 0)
            .or_cannot(action)?;
        present.mtu = wanted.mtu;
    }
    let gone = |address: &Address| !wanted.addresses.contains(address);
    while let Some(at) = present.addresses.iter().position(gone) {
        let address = &present.addresses[at];
        remove(netlink, &messages::remove_address(index, address))
            .or_cannot(|| format!("remove the address {address} from {name}"))?;
        present.addresses.remove(at);
        // The kernel removes other addresses of the prefix, and routes, with it.
        link.disturbed = true;
    }
    if present.up != wanted.up {
        let state = if wanted.up { "up" } else { "down" };
        netlink
            .ask(&messages::set_up(index, wanted.up), 0)
            .or_cannot(|| format!("set the interface {name} {state}"))?;
        present.up = wanted.up;
        link.disturbed = true;
    }
    for address in &wanted.addresses {
        let known = present.addresses.contains(address);
        if known && !link.disturbed || address.local.is_ipv6() && !ipv6 {
            continue;
        }
        let message = messages::add_address(index, address);
        add(netlink, &message, NLM_F_CREATE | NLM_F_REPLACE)
            .or_cannot(|| format!("give {name} the address {address}"))?;
        if !known {
            present.addresses.push(address.clone());
        }
    }
    Ok(())
}

fn add(netlink: &mut Netlink, message: &Request, flags: u16) -> std::result::Result<(), Refusal> {
    match netlink.ask(message, flags) {
        // The kernel, or the container, has made the same.
        Err(error) if error.is(libc::EEXIST) => Ok(()),
        added => added,
    }
}

fn remove(netlink: &mut Netlink, message: &Request) -> std::result::Result<(), Refusal> {
    match netlink.ask(message, 0) {
        // The kernel, or the container, has removed it.
        Err(error)
            if [libc::ESRCH, libc::ENOENT, libc::EADDRNOTAVAIL, libc::ENODEV]
                .into_iter()
                .any(|number| error.is(number)) =>
        {
            Ok(())
        }
        removed => removed,
    }
}
