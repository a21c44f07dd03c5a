use super::*;
use bulkhead_agent_protocol::messages::NextHop;

fn interface() -> NetworkInterface {
    NetworkInterface {
        device: "virtio-mmio.7".to_owned(),
        name: "eth0".to_owned(),
        mac: "02:42:ac:11:00:02".to_owned(),
        mtu: 1500,
        addresses: vec![InterfaceAddress {
            address: "10.88.0.2/16".to_owned(),
            broadcast: "10.88.255.255".to_owned(),
            ..Default::default()
        }],
        up: true,
        ..Default::default()
    }
}

fn route(destination: &str, gateway: &str) -> messages::Route {
    messages::Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        device: "eth0".to_owned(),
        ..Default::default()
    }
}

fn request() -> SetNetworkRequest {
    SetNetworkRequest {
        container_id: "c".to_owned(),
        interfaces: vec![interface()],
        routes: vec![
            route("0.0.0.0/0", "10.88.0.1"),
            route("fd00::/64", ""),
            route("10.88.0.1/32", ""),
        ],
        neighbours: vec![messages::Neighbour {
            address: "10.88.0.1".to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            device: "eth0".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_request_is_read() {
    let wanted = read(&request()).expect("valid");
    assert_eq!(wanted.interfaces[0].mac, [2, 0x42, 0xac, 0x11, 0, 2]);
    assert_eq!(
        wanted.interfaces[0].addresses[0].to_string(),
        "10.88.0.2/16"
    );
    let routes: Vec<_> = wanted.routes.iter().map(ToString::to_string).collect();
    let expected = [
        "fd00::/64 through eth0",
        "10.88.0.1/32 through eth0",
        "0.0.0.0/0 via 10.88.0.1 through eth0",
    ];
    assert_eq!(routes, expected);
    assert_eq!((wanted.routes[0].protocol, wanted.routes[0].kind), (3, 1));
    assert_eq!(wanted.neighbours[0].state, 0x80);
}

/// A change of the request, and what the error begins with.
type Fault = (fn(&mut SetNetworkRequest), &'static str);

#[test]
fn what_cannot_be_is_refused_by_its_field() {
    let faults: &[Fault] = &[
        (
            |r| r.interfaces[0].device = "../../x".into(),
            "interfaces[0].device:",
        ),
        (
            |r| r.interfaces[0].device = "virtio-mmio.".into(),
            "interfaces[0].device:",
        ),
        (|r| r.interfaces[0].device.clear(), "interfaces[0].device:"),
        (
            |r| r.interfaces[0].name = "lo".into(),
            "interfaces[0].name:",
        ),
        (
            |r| r.interfaces[0].name = "a/b".into(),
            "interfaces[0].name:",
        ),
        (
            |r| r.interfaces[0].name = "eth%d".into(),
            "interfaces[0].name:",
        ),
        (
            |r| r.interfaces[0].name = "a\0b".into(),
            "interfaces[0].name:",
        ),
        (
            |r| r.interfaces[0].name = "0123456789abcdef".into(),
            "interfaces[0].name:",
        ),
        (|r| r.interfaces[0].name.clear(), "interfaces[0].name:"),
        (
            |r| r.interfaces[0].mac = "01:00:5e:00:00:01".into(),
            "interfaces[0].mac:",
        ),
        (
            |r| r.interfaces[0].mac = "00:00:00:00:00:00".into(),
            "interfaces[0].mac:",
        ),
        (
            |r| r.interfaces[0].mac = "02:00:00:00:00".into(),
            "interfaces[0].mac:",
        ),
        (
            |r| r.interfaces[0].mac = "+2:00:00:00:00:01".into(),
            "interfaces[0].mac:",
        ),
        (|r| r.interfaces[0].mtu = 0, "interfaces[0].mtu:"),
        (|r| r.interfaces[0].mtu = u32::MAX, "interfaces[0].mtu:"),
        (|r| r.interfaces.push(interface()), "interfaces[1]:"),
        (
            |r| r.interfaces[0].addresses[0].address = "10.0.0.1".into(),
            "interfaces[0].addresses[0].address:",
        ),
        (
            |r| r.interfaces[0].addresses[0].address = "10.0.0.1/33".into(),
            "interfaces[0].addresses[0].address:",
        ),
        (
            |r| r.interfaces[0].addresses[0].address = "10.0.0.1/+8".into(),
            "interfaces[0].addresses[0].address:",
        ),
        (
            |r| r.interfaces[0].addresses[0].peer = "::1".into(),
            "interfaces[0].addresses[0].peer:",
        ),
        (
            |r| r.interfaces[0].addresses[0].broadcast = "x".into(),
            "interfaces[0].addresses[0].broadcast:",
        ),
        (
            |r| r.interfaces[0].addresses[0].scope = 256,
            "interfaces[0].addresses[0].scope:",
        ),
        (
            |r| r.routes[0].destination = "default".into(),
            "routes[0].destination:",
        ),
        (|r| r.routes[0].device = "eth1".into(), "routes[0].device:"),
        (|r| r.routes[0].gateway = "gw".into(), "routes[0].gateway:"),
        (|r| r.routes[0].source = "::1".into(), "routes[0].source:"),
        (|r| r.routes[0].kind = 2, "routes[0].kind is not supported:"),
        (|r| r.routes[0].protocol = 1000, "routes[0].protocol:"),
        (
            |r| r.routes[0].metrics = [(16, 1)].into(),
            "routes[0].metrics:",
        ),
        (
            |r| r.routes[0].metrics = [(u32::MAX, 1)].into(),
            "routes[0].metrics:",
        ),
        (
            |r| r.routes[0].next_hops.push(NextHop::new()),
            "routes[0].next_hops:",
        ),
        (|r| r.neighbours[0].state = 2, "neighbours[0].state:"),
        (|r| r.neighbours[0].mac.clear(), "neighbours[0].mac:"),
        (
            |r| r.neighbours[0].address = "10.0.0.1/8".into(),
            "neighbours[0].address:",
        ),
        (|r| r.neighbours[0].device.clear(), "neighbours[0].device:"),
    ];
    for (change, field) in faults {
        let mut request = request();
        change(&mut request);
        let error = read(&request).expect_err(field).to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[test]
fn the_loopback_interface_has_addresses_only() {
    let mut request = request();
    let mut loopback = NetworkInterface {
        name: "lo".to_owned(),
        up: true,
        addresses: request.interfaces[0].addresses.clone(),
        ..Default::default()
    };
    request.interfaces.push(loopback.clone());
    assert_eq!(read(&request).expect("valid").interfaces[1].device, None);
    loopback.mtu = 1000;
    request.interfaces[1] = loopback;
    assert!(read(&request).is_err());
}

#[test]
fn several_ways_have_weights() {
    let mut request = request();
    let hop = |gateway: &str, weight| NextHop {
        gateway: gateway.to_owned(),
        weight,
        ..Default::default()
    };
    request.routes[0].gateway.clear();
    request.routes[0].device.clear();
    request.routes[0].next_hops = vec![hop("10.88.0.1", 0), hop("fe80::1", 256)];
    let wanted = read(&request).expect("valid");
    let hops = &wanted.routes[2].hops;
    assert_eq!((hops[0].weight, hops[1].weight), (0, 255));
    request.routes[0].next_hops[0].weight = 257;
    assert!(read(&request).is_err());
}
