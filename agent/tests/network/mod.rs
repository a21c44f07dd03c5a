//! Cases about the network of a container. Devices are ends of veth pairs, whose other ends stay in
//! the agent's namespace and answer.

use bulkhead_agent_protocol::messages::{
    InterfaceAddress, Neighbour, NetworkInterface, NextHop, Route, SetNetworkRequest, Stdio,
};
use serde_json::json;

use crate::support::{Container, Fixture, spec};

/// A pair whose first end is in a place of the VMM's, and whose second one answers.
fn pair(fixture: &Fixture, number: u8) {
    fixture.in_network(&format!(
        "ip link add dev wire{number} type veth peer name far{number}; \
        ip addr add 10.{number}.0.1/24 dev far{number}; \
        ip addr add fd0{number}::1/64 dev far{number} nodad; ip link set far{number} up"
    ));
    fixture.add_device(&format!("virtio-mmio.{number}"), &format!("wire{number}"));
}

fn interface(number: u8, name: &str) -> NetworkInterface {
    NetworkInterface {
        device: format!("virtio-mmio.{number}"),
        name: name.to_owned(),
        mac: format!("02:00:00:00:00:0{number}"),
        mtu: 1400,
        addresses: vec![
            address(&format!("10.{number}.0.2/24")),
            address(&format!("fd0{number}::2/64")),
        ],
        up: true,
        ..Default::default()
    }
}

fn address(text: &str) -> InterfaceAddress {
    InterfaceAddress {
        address: text.to_owned(),
        ..Default::default()
    }
}

fn route(destination: &str, gateway: &str, device: &str) -> Route {
    Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        device: device.to_owned(),
        ..Default::default()
    }
}

fn request(id: &str, interfaces: Vec<NetworkInterface>) -> SetNetworkRequest {
    SetNetworkRequest {
        container_id: id.to_owned(),
        interfaces,
        ..Default::default()
    }
}

/// A container that waits, with the lines that a script in it prints.
struct Waiting<'f>(Container<'f>);

impl<'f> Waiting<'f> {
    fn new(fixture: &'f Fixture, id: &str) -> Self {
        Self(fixture.start(id, &spec(&["sleep", "1000"]), Stdio::new()))
    }

    fn run(&self, script: &str) -> Vec<String> {
        let run = self.0.exec("script", &["sh", "-c", script], b"");
        assert_eq!(run.stderr, "", "{script}");
        run.stdout.lines().map(str::to_owned).collect()
    }

    /// Runs a script that may change the network.
    fn administer(&self, script: &str) {
        let mut process = spec(&["sh", "-c", script])["process"].clone();
        for set in ["bounding", "effective", "permitted"] {
            process["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
        }
        let run = self.0.exec_process("administer", &process, b"");
        assert_eq!(run.status, 0, "{}", run.stderr);
    }

    #[track_caller]
    fn shows(&self, script: &str, expected: &[&str]) {
        assert_eq!(self.run(script), expected, "{script}");
    }
}

pub(crate) fn everything(fixture: &Fixture) {
    pair(fixture, 1);
    let container = Waiting::new(fixture, "net");
    let mut first = interface(1, "eth0");
    first.addresses[0].broadcast = "10.1.0.255".to_owned();
    let mut peer = address("10.7.0.1/32");
    peer.peer = "10.7.0.2".to_owned();
    let mut bare = address("10.8.0.1/24");
    bare.no_prefix_route = true;
    first.addresses.extend([peer, bare]);
    let loopback = NetworkInterface {
        name: "lo".to_owned(),
        up: true,
        addresses: vec![address("127.0.0.1/8"), address("10.99.0.1/32")],
        ..Default::default()
    };
    let mut request = request("net", vec![first, loopback]);
    let mut default = route("0.0.0.0/0", "10.1.0.1", "eth0");
    default.priority = 5;
    default.protocol = 4;
    default.metrics = [(2, 1300)].into();
    let mut source = route("10.3.0.0/16", "", "eth0");
    source.source = "10.1.0.2".to_owned();
    source.scope = 253;
    let mut black_hole = route("10.4.0.0/16", "", "");
    black_hole.kind = 6;
    let mut outside = route("10.5.0.0/16", "192.0.2.1", "eth0");
    outside.on_link = true;
    let mut several = route("10.6.0.0/16", "", "");
    several.next_hops = ["10.1.0.1", "10.1.0.3"]
        .map(|gateway| NextHop {
            gateway: gateway.to_owned(),
            device: "eth0".to_owned(),
            weight: 2,
            ..Default::default()
        })
        .into();
    request.routes = vec![
        default,
        route("::/0", "fd01::1", "eth0"),
        source,
        black_hole,
        outside,
        several,
        // The kernel makes it for the address.
        route("10.1.0.0/24", "", "eth0"),
    ];
    request.neighbours = vec![Neighbour {
        address: "10.1.0.9".to_owned(),
        mac: "02:00:00:00:00:99".to_owned(),
        device: "eth0".to_owned(),
        ..Default::default()
    }];
    fixture.set_network(&request);
    container.shows(
        "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /proc/sys/net/ipv6/conf/eth0/accept_ra; ls /sys/class/net",
        &["02:00:00:00:00:01", "1400", "0", "eth0", "lo"],
    );
    container.shows(
        "ip addr show eth0 | grep inet | sed 's/ *inet/inet/; s/ *$//'",
        &[
            "inet 10.1.0.2/24 brd 10.1.0.255 scope global eth0",
            "inet 10.7.0.1 peer 10.7.0.2/32 scope global eth0",
            "inet 10.8.0.1/24 scope global noprefixroute eth0",
            "inet6 fd01::2/64 scope global flags 02",
        ],
    );
    container.shows("ip addr show lo | grep -c 'inet'", &["3"]);
    let routes = container.run("ip route | sed 's/ *$//'");
    for expected in [
        "default via 10.1.0.1 dev eth0  metric 5",
        "10.1.0.0/24 dev eth0 scope link  src 10.1.0.2",
        "10.3.0.0/16 dev eth0 scope link  src 10.1.0.2",
        "blackhole 10.4.0.0/16",
        "10.5.0.0/16 via 192.0.2.1 dev eth0",
        "10.7.0.2 dev eth0 scope link  src 10.7.0.1",
    ] {
        assert!(
            routes.iter().any(|r| r.starts_with(expected)),
            "{expected} in {routes:?}"
        );
    }
    assert!(
        !routes.iter().any(|r| r.starts_with("10.8.0.0")),
        "{routes:?}"
    );
    container.shows(
        "ip -6 route | grep -o 'default via fd01::1 dev eth0'",
        &["default via fd01::1 dev eth0"],
    );
    container.shows(
        "ip neigh | grep -o '.* PERMANENT'",
        &["10.1.0.9 dev eth0 lladdr 02:00:00:00:00:99 used 0/0/0 probes 0 PERMANENT"],
    );
    container.shows(
        "ping -c1 -W2 10.1.0.1 >/dev/null && ping -c1 -W2 fd01::1 > /dev/null && ping -c1 10.99.0.1 > /dev/null && echo all",
        &["all"],
    );
    container.0.remove_by_force();
    assert_eq!(fixture.unbound_device(), "virtio-mmio.1");
}

pub(crate) fn changes(fixture: &Fixture) {
    let container = Waiting::new(fixture, "net");
    let mut wanted = request("net", Vec::new());
    fixture.set_network(&wanted);
    container.shows(
        "ls /sys/class/net; ping -c1 127.0.0.1 > /dev/null && echo up",
        &["lo", "up"],
    );

    pair(fixture, 1);
    wanted.interfaces.push(interface(1, "eth0"));
    wanted.routes = vec![route("0.0.0.0/0", "10.1.0.1", "eth0")];
    fixture.set_network(&wanted);
    // One that the container makes itself stays.
    container.administer("ip addr add 10.55.0.1/24 dev eth0");

    // A second one comes, and both names change.
    pair(fixture, 2);
    wanted.interfaces[0].name = "eth1".to_owned();
    wanted.interfaces.insert(0, interface(2, "eth0"));
    wanted.interfaces[1].mtu = 1300;
    wanted.interfaces[1].mac = "02:00:00:00:00:aa".to_owned();
    wanted.interfaces[1].addresses.push(address("10.1.0.77/24"));
    wanted.routes = vec![route("0.0.0.0/0", "10.2.0.1", "eth0")];
    fixture.set_network(&wanted);
    container.shows(
        "cd /sys/class/net; ls; cat eth0/address eth1/address eth0/mtu eth1/mtu",
        &[
            "eth0",
            "eth1",
            "lo",
            "02:00:00:00:00:02",
            "02:00:00:00:00:aa",
            "1400",
            "1300",
        ],
    );
    let addresses = "ip -4 addr show eth1 | grep -o 'inet [0-9./]*' | sort";
    container.shows(
        addresses,
        &["inet 10.1.0.2/24", "inet 10.1.0.77/24", "inet 10.55.0.1/24"],
    );
    container.shows(
        "ip route | grep default | sed 's/ *$//'",
        &["default via 10.2.0.1 dev eth0"],
    );
    container.shows("ping -c1 -W2 10.2.0.1 | grep -o '1 packets received'; ping -c1 -W2 10.1.0.1 | grep -o '1 packets received'",
        &["1 packets received", "1 packets received"]);

    // The kernel drops the other address of the prefix with the first one, and what depends on it.
    wanted.interfaces[1].addresses.remove(0);
    wanted.routes.push(route("10.9.0.0/16", "10.1.0.1", "eth1"));
    fixture.set_network(&wanted);
    container.shows(addresses, &["inet 10.1.0.77/24", "inet 10.55.0.1/24"]);
    container.shows("ip route | grep -c 10.1.0.1", &["1"]);

    // Names swap; routes by the same words lead elsewhere then.
    let (first, second) = ("eth0".to_owned(), "eth1".to_owned());
    wanted.interfaces[0].name = second;
    wanted.interfaces[1].name = first;
    wanted.routes = vec![route("10.9.0.0/16", "10.1.0.1", "eth0")];
    fixture.set_network(&wanted);
    container.shows(
        "cd /sys/class/net; ls; cat eth0/address eth1/address; ip route | grep 10.9 | sed 's/ *$//'",
        &["eth0", "eth1", "lo", "02:00:00:00:00:aa", "02:00:00:00:00:02", "10.9.0.0/16 via 10.1.0.1 dev eth0"],
    );

    // Down and up again: what the kernel has dropped is back.
    wanted.interfaces[1].up = false;
    wanted.routes.clear();
    fixture.set_network(&wanted);
    container.shows("cat /sys/class/net/eth0/operstate", &["down"]);
    wanted.interfaces[1].up = true;
    wanted.routes = vec![route("fd77::/64", "fd01::1", "eth0")];
    fixture.set_network(&wanted);
    container.shows(
        "ping -c1 -W2 fd01::1 | grep -o '1 packets received'",
        &["1 packets received"],
    );
    container.shows("ip -6 route | grep -c fd77::", &["1"]);

    // Gone: the device is released, and nothing speaks of it.
    wanted.interfaces.remove(0);
    fixture.set_network(&wanted);
    assert_eq!(fixture.unbound_device(), "virtio-mmio.2");
    container.0.remove_by_force();
}

pub(crate) fn failures(fixture: &Fixture) {
    let container = Waiting::new(fixture, "net");
    pair(fixture, 1);
    let refused = |request: &SetNetworkRequest| {
        let refused = fixture.try_set_network(request);
        refused.expect_err("refused").1
    };
    let mut wanted = request("other", Vec::new());
    assert!(refused(&wanted).contains("no container other"));
    wanted.container_id = "net".to_owned();
    wanted.interfaces = vec![interface(3, "eth0")];
    // No such place on the bus.
    let message = refused(&wanted);
    assert!(message.contains("virtio-mmio.3"), "{message}");
    wanted.interfaces = vec![interface(1, "eth0")];
    wanted.interfaces[0].mtu = 65_535;
    wanted.routes = vec![route("10.3.0.0/16", "10.200.0.1", "eth0")];
    let message = refused(&wanted);
    assert_eq!(
        message,
        "cannot add the route to 10.3.0.0/16 via 10.200.0.1 through eth0: \
        Nexthop has invalid gateway (Network is unreachable (os error 101))"
    );
    // What comes after a failure goes on from there.
    wanted.routes = vec![route("10.3.0.0/16", "10.1.0.1", "eth0")];
    fixture.set_network(&wanted);
    container.shows("ip route | grep -c 10.3.0.0/16", &["1"]);
    wanted.interfaces[0].addresses.push(address("ff02::5/64"));
    let message = refused(&wanted);
    assert!(
        message.starts_with("cannot give eth0 the address ff02::5/64: "),
        "{message}"
    );
    // A name that the container has taken itself.
    fixture.in_network("ip link add dev wire2 type veth peer name far2");
    fixture.add_device("virtio-mmio.2", "wire2");
    wanted.interfaces[0].addresses.pop();
    wanted.interfaces.push(interface(2, "eth5"));
    container.administer("ip link add eth5 type veth && ip link set veth0 name eth6");
    let message = refused(&wanted);
    let expected = "cannot rename the interface mmio2 to eth5: ";
    assert!(message.starts_with(expected), "{message}");
    wanted.interfaces[1].name = "eth7".to_owned();
    fixture.set_network(&wanted);
    container.shows("ls /sys/class/net", &["eth0", "eth5", "eth6", "eth7", "lo"]);
    container.0.remove_by_force();
}

pub(crate) fn parameters(fixture: &Fixture) {
    let mut own = spec(&[
        "sh",
        "-c",
        "cat /proc/sys/net/ipv4/conf/eth0/forwarding /proc/sys/net/ipv4/conf/eth0/rp_filter \
            /proc/sys/net/ipv4/ip_unprivileged_port_start",
    ]);
    own["linux"]["sysctl"] = json!({
        "net.ipv4.conf.eth0.forwarding": "1",
        // As elsewhere, it is for interfaces that come later.
        "net.ipv4.conf.default.rp_filter": "2",
        "net.ipv4.ip_unprivileged_port_start": "7",
    });
    pair(fixture, 1);
    let (number, mut stream) = fixture.stream();
    let stdio = Stdio {
        stdout: number,
        ..Default::default()
    };
    let container = fixture.create_only("net", &own, stdio);
    fixture.set_network(&request("net", vec![interface(1, "eth0")]));
    container.try_start().expect("started");
    assert_eq!(crate::support::read_all(&mut stream), "1\n0\n7\n");
    container.remove_by_force();

    // Without IPv6 in the container, what the host has of it counts for nothing.
    let mut without = spec(&["sleep", "1000"]);
    without["linux"]["sysctl"] = json!({"net.ipv6.conf.all.disable_ipv6": "1"});
    pair(fixture, 2);
    let container = Waiting(fixture.create_only("net", &without, Stdio::new()));
    let mut wanted = request("net", vec![interface(2, "eth0")]);
    wanted.interfaces[0].addresses.push(address("10.2.0.3/24"));
    wanted.routes = vec![route("::/0", "fd02::1", "eth0")];
    fixture.set_network(&wanted);
    wanted.interfaces[0].addresses.remove(0);
    fixture.set_network(&wanted);
    container.0.try_start().expect("started");
    container.shows(
        "ip addr show eth0 | grep -o 'inet.*/[0-9]*'",
        &["inet 10.2.0.3/24"],
    );
    container.0.remove_by_force();

    let message = fixture.try_run("net", &own).expect_err("refused");
    assert!(
        message.contains("linux.sysctl net/ipv4/conf/eth0/forwarding: no interface"),
        "{message}"
    );
}
