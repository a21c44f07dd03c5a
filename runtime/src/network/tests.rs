//! Network namespaces of the tests' own, made with iproute2. They need its programs and the right to
//! make namespaces; where those are missing, a test says that it was skipped.

mod resolver;

use std::{
    fs,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use bulkhead_vmm::config::{VmCommand, VmConfig, VmEvent};
use rustix::{
    event::{PollFd, PollFlags},
    thread::UnshareFlags,
};

use super::{
    Network, NetworkError,
    namespace::{Namespace, NamespaceError},
    netlink::{Changes, Netlink},
    redirect, scan,
};
use crate::{
    state::{Container, ProcessIdentity, Record, StateRoot},
    vm::{Vm, VmError},
    wait::{Deadline, poll},
};

/// Runs a test in a thread whose network namespace is new and has what these commands make.
fn in_namespace(name: &str, commands: &str, test: impl FnOnce(&Path) + Send) {
    let capable = rustix::process::geteuid().is_root()
        && Command::new("ip").arg("-V").output().is_ok()
        && Path::new("/dev/net/tun").exists();
    if !capable {
        eprintln!("skipped {name}: it needs root, iproute2 and /dev/net/tun");
        return;
    }
    thread::scope(|scope| {
        let finished = scope.spawn(|| {
            crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
            shell(commands);
            let thread = rustix::thread::gettid().as_raw_nonzero();
            test(Path::new(&format!(
                "/proc/{}/task/{thread}/ns/net",
                std::process::id()
            )));
        });
        finished.join().unwrap();
    });
}

fn shell(commands: &str) {
    let output = Command::new("sh").args(["-ec", commands]).output().unwrap();
    assert!(output.status.success(), "{commands}: {output:?}");
}

fn output(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

const PAIR: &str = "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far
    ip link set far up; ip link set eth0 mtu 1400 up";

#[test]
fn what_people_set_is_found() {
    let commands = format!(
        "ip link set lo up; {PAIR}
        ip address add 10.0.0.2/24 broadcast 10.0.0.255 dev eth0
        ip address add 10.9.0.1 peer 10.9.0.2 dev eth0
        ip address add fd00::2/64 nodad dev eth0
        ip address add 192.0.2.1/32 dev lo
        ip route add default via 10.0.0.1 dev eth0 metric 7 mtu 1300
        ip -6 route add default via fd00::1 dev eth0
        ip route add blackhole 198.51.100.0/24
        ip route add 203.0.113.0/24 nexthop via 10.0.0.1 dev eth0 weight 3 nexthop via 10.0.0.9 dev eth0
        ip neighbour add 10.0.0.77 lladdr 02:00:00:00:00:77 nud permanent dev eth0
        ip neighbour add proxy 10.0.0.78 dev eth0"
    );
    in_namespace("what_people_set_is_found", &commands, |_| {
        let view = scan::scan(&mut Netlink::open().unwrap()).unwrap();
        assert!(
            view.unfit.is_empty() && view.left_out.is_empty(),
            "{view:?}"
        );
        let link = view.links.iter().find(|link| link.name == "eth0").unwrap();
        assert_eq!(
            (link.mac, link.mtu, link.up),
            ([2, 0, 0, 0, 0, 1], 1400, true)
        );
        let addresses: Vec<_> = link
            .addresses
            .iter()
            .map(|one| {
                (
                    one.address.as_str(),
                    one.peer.as_str(),
                    one.broadcast.as_str(),
                    one.scope,
                )
            })
            .collect();
        for expected in [
            ("10.0.0.2/24", "", "10.0.0.255", 0),
            ("10.9.0.1/32", "10.9.0.2", "", 0),
            ("fd00::2/64", "", "", 0),
        ] {
            assert!(
                addresses.contains(&expected),
                "{expected:?} in {addresses:?}"
            );
        }
        assert!(
            addresses
                .iter()
                .any(|one| one.0.starts_with("fe80::") && one.3 == 253)
        );
        assert_eq!(view.loopback.len(), 1);
        assert_eq!(view.loopback[0].address, "192.0.2.1/32");
        let mut routes: Vec<_> = view
            .routes
            .iter()
            .map(|one| {
                format!(
                    "{} {} {} {}",
                    one.destination, one.gateway, one.device, one.kind
                )
            })
            .collect();
        routes.sort();
        assert_eq!(
            routes,
            [
                "0.0.0.0/0 10.0.0.1 eth0 1",
                "198.51.100.0/24   6",
                "203.0.113.0/24   1",
                "::/0 fd00::1 eth0 1",
            ]
        );
        let default = view
            .routes
            .iter()
            .find(|one| one.destination == "0.0.0.0/0")
            .unwrap();
        assert_eq!((default.priority, default.metrics[&2]), (7, 1300));
        let several = view
            .routes
            .iter()
            .find(|one| !one.next_hops.is_empty())
            .unwrap();
        assert_eq!(several.next_hops[0].weight, 3);
        let neighbours: Vec<_> = view
            .neighbours
            .iter()
            .map(|one| (one.address.as_str(), one.mac.as_str(), one.proxy))
            .collect();
        assert_eq!(
            neighbours,
            [
                ("10.0.0.77", "02:00:00:00:00:77", false),
                ("10.0.0.78", "", true)
            ]
        );
    });
}

#[test]
fn what_no_guest_can_have_is_named() {
    let commands = "ip link add br0 type bridge
        ip link add port type veth peer name far; ip link set port master br0
        ip link add huge type veth peer name other; ip link set huge mtu 65535 up
        ip link add tun0 type veth peer name t; ip link set br0 up
        ip tuntap add plain mode tun; ip link set plain up";
    in_namespace("what_no_guest_can_have_is_named", commands, |_| {
        let view = scan::scan(&mut Netlink::open().unwrap()).unwrap();
        let unfit: Vec<String> = view.unfit.iter().map(ToString::to_string).collect();
        assert_eq!(unfit.len(), 1, "{unfit:?}");
        assert!(
            unfit[0].contains("\"huge\"") && unfit[0].contains("65535"),
            "{unfit:?}"
        );
        let left_out: Vec<_> = view.left_out.into_iter().collect();
        assert_eq!(left_out.len(), 1, "{left_out:?}");
        assert!(left_out[0].contains("\"plain\"") && left_out[0].contains("not an Ethernet"));
        let names: Vec<_> = view.links.iter().map(|link| link.name.as_str()).collect();
        assert!(
            names.contains(&"br0") && !names.contains(&"port"),
            "{names:?}"
        );
    });
}

/// A VMM that does what it is told, and remembers it.
struct Obedient {
    socket: UnixStream,
    commands: Vec<VmCommand>,
    taps: Vec<OwnedFd>,
}

impl Obedient {
    fn new() -> Self {
        Self {
            socket: UnixStream::pair().unwrap().0,
            commands: Vec::new(),
            taps: Vec::new(),
        }
    }
}

impl Vm for Obedient {
    fn control(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn configure(&mut self, _: &VmConfig) -> Result<(), VmError> {
        Ok(())
    }

    fn next_event(&mut self) -> Result<Option<VmEvent>, VmError> {
        Ok(None)
    }

    fn command_with(
        &mut self,
        command: VmCommand,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), VmError> {
        let taps = descriptors
            .iter()
            .map(|one| one.try_clone_to_owned().unwrap());
        self.taps.extend(taps);
        self.commands.push(command);
        Ok(())
    }

    fn stop(&mut self) -> Result<crate::vm::Stop, VmError> {
        Ok(crate::vm::Stop::Ended)
    }
}

fn container(root: &Path) -> Container {
    let container = StateRoot::new(root).create("one").unwrap();
    let own = ProcessIdentity::own().unwrap();
    let record = Record::new("one", Path::new("/b"), "1.2.0", own);
    container.lock().unwrap().write(&record).unwrap();
    container
}

fn attached(id: &str, place: u8) -> VmEvent {
    VmEvent::Attached {
        id: id.to_owned(),
        device: format!("virtio-mmio.{place}"),
    }
}

/// What `tc` and `ip` show of our doings.
fn traces() -> String {
    output("tc qdisc show | grep clsact; ip -o link | grep bhtap; tc filter show dev eth0 ingress")
}

/// In a thread whose own namespace is another one: the host's, as far as it is concerned.
fn elsewhere(work: &(dyn Fn() + Sync)) {
    thread::scope(|scope| {
        let work = || {
            crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
            work();
        };
        scope.spawn(work).join().unwrap();
    });
}

/// Taps go when the last holder of their descriptor does, which can be a program that another test
/// starts just then.
fn without_traces() -> bool {
    let mut changes = Changes::watch().unwrap();
    let deadline = Deadline::after(Duration::from_secs(30));
    while !traces().is_empty() {
        let mut descriptors = [PollFd::new(&changes, PollFlags::IN)];
        if poll(&mut descriptors, Some(deadline)).unwrap() == 0 {
            return false;
        }
        changes.happened().unwrap();
    }
    true
}

/// From the outside: a namespace at a path, entered by another thread.
fn with_network(commands: &str, test: impl FnOnce(&mut Network<'_>, &Container) + Send) {
    in_namespace("with_network", commands, |path| {
        let directory = tempfile::tempdir().unwrap();
        let container = container(directory.path());
        thread::scope(|scope| {
            let finished = scope.spawn(|| {
                // Its own is the host's, as far as this thread is concerned.
                crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
                let mut network = Network::enter(&container, Some(path)).unwrap();
                test(&mut network, &container);
            });
            finished.join().unwrap();
        });
        assert!(without_traces(), "{}", traces());
    });
}

#[test]
fn an_interface_comes_changes_and_goes() {
    with_network(PAIR, |network, _| {
        let mut vm = Obedient::new();
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        // Both ends of the pair.
        assert_eq!((vm.commands.len(), vm.taps.len()), (2, 2));
        assert!(!network.is_settled() && network.request().is_none());
        for (id, place) in [("net1", 4), ("net2", 5)] {
            network.on_event(&attached(id, place), &mut vm).unwrap();
        }
        let request = network.request().unwrap();
        assert_eq!(request.interfaces.len(), 2);
        network.on_set(request, true, &mut vm).unwrap();
        assert!(network.request().is_none());
        // Our own taps and redirections are no news.
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        assert!(network.request().is_none(), "{:?}", network.request());

        shell("ip link set eth0 mtu 1300; ip address add 10.0.0.2/24 dev eth0");
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        let request = network.request().unwrap();
        let eth0 = request
            .interfaces
            .iter()
            .find(|one| one.name == "eth0")
            .unwrap();
        assert_eq!(eth0.mtu, 1300);
        assert!(
            eth0.addresses
                .iter()
                .any(|one| one.address == "10.0.0.2/24")
        );
        assert!(output("ip -o link show type tun").contains("mtu 1300"));
        network.on_set(request, true, &mut vm).unwrap();

        // More than the guest's device can have: another device.
        shell("ip link set eth0 mtu 9000");
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        assert_eq!(vm.commands.len(), 3);
        network.on_event(&attached("net3", 6), &mut vm).unwrap();
        let request = network.request().unwrap();
        let devices: Vec<_> = request
            .interfaces
            .iter()
            .map(|one| one.device.as_str())
            .collect();
        assert!(devices.contains(&"virtio-mmio.6"), "{devices:?}");
        assert_eq!(devices.len(), 2);
        network.on_set(request, true, &mut vm).unwrap();
        assert!(matches!(vm.commands.last(), Some(VmCommand::Detach { .. })));

        shell("ip link delete eth0");
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        let request = network.request().unwrap();
        assert!(request.interfaces.is_empty());
        let before = vm.commands.len();
        network.on_set(request, true, &mut vm).unwrap();
        assert_eq!(vm.commands.len(), before + 2);
        shell("ip link add eth0 type veth peer name far");
    });
}

#[test]
fn what_the_vmm_refuses_is_named_and_restored() {
    with_network(PAIR, |network, _| {
        let mut vm = Obedient::new();
        network.refresh(&mut vm).unwrap();
        let refusal = VmEvent::AttachFailed {
            id: "net1".to_owned(),
            message: "no place is free".to_owned(),
        };
        let error = network.on_event(&refusal, &mut vm).unwrap_err();
        assert!(error.to_string().contains("no place is free"), "{error}");
        network.on_event(&attached("net2", 4), &mut vm).unwrap();
        assert_eq!(network.request().unwrap().interfaces.len(), 1);
        // Gone before the agent has ever heard of it.
        shell("ip link delete eth0");
        network.refresh(&mut vm).unwrap();
        assert!(matches!(vm.commands.last(), Some(VmCommand::Detach { id }) if id == "net2"));
        shell("ip link add eth0 type veth peer name far");
    });
}

#[test]
fn what_a_killed_monitor_left_is_undone_once() {
    with_network(PAIR, |network, container| {
        let mut vm = Obedient::new();
        network.refresh(&mut vm).unwrap();
        let record = container.record().unwrap();
        // Its holder is alive: nothing is touched.
        elsewhere(&|| record.network.as_ref().unwrap().undo().unwrap());
        assert!(traces().contains("mirred"));
    });
    in_namespace("undo", PAIR, |path| {
        let directory = tempfile::tempdir().unwrap();
        let container = container(directory.path());
        elsewhere(&|| {
            let mut network = Network::enter(&container, Some(path)).unwrap();
            network.refresh(&mut Obedient::new()).unwrap();
            // As a kill would: the descriptors are closed, nothing else happens.
            network.abandon();
        });
        assert!(traces().contains("clsact"), "{}", traces());
        let record = container.record().unwrap();
        elsewhere(&|| record.network.as_ref().unwrap().undo().unwrap());
        assert_eq!(traces(), "");
        shell("tc qdisc add dev eth0 clsact");
        elsewhere(&|| record.network.as_ref().unwrap().undo().unwrap());
        assert!(traces().contains("clsact"), "another's was removed");
        shell("tc qdisc del dev eth0 clsact");
        // Taken over by the next container, which then leaves nothing either.
        for leave in [true, false] {
            elsewhere(&|| {
                let mut network = Network::enter(&container, Some(path)).unwrap();
                network.refresh(&mut Obedient::new()).unwrap();
                if leave {
                    network.abandon();
                }
            });
        }
        assert!(without_traces(), "{}", traces());
    });
}

#[test]
fn a_discipline_of_others_stays() {
    let commands = format!(
        "{PAIR}; tc qdisc add dev eth0 clsact
        tc filter add dev eth0 ingress pref 5 u32 match u32 0 0"
    );
    in_namespace("a_discipline_of_others_stays", &commands, |_| {
        let mut netlink = Netlink::open().unwrap();
        let view = scan::scan(&mut netlink).unwrap();
        let find = |name: &str| {
            view.links
                .iter()
                .find(|link| link.name == name)
                .unwrap()
                .index
        };
        let (eth0, far) = (find("eth0"), find("far"));
        let before = traces();
        assert!(redirect::disciplines(&mut netlink).unwrap().contains(&eth0));
        let tie = redirect::Tie {
            index: eth0,
            discipline: false,
            all_multicast: true,
        };
        // Twice, as after a monitor that was killed.
        for _ in 0..2 {
            tie.make(&mut netlink, far).unwrap();
            assert!(traces().contains("mirred") && traces().contains("pref 5"));
            assert!(output("ip link show dev eth0").contains("ALLMULTI"));
            shell("tc qdisc del dev far clsact");
        }
        tie.undo(&mut netlink).unwrap();
        assert_eq!(traces(), before);
        assert!(!output("ip link show dev eth0").contains("ALLMULTI"));
    });
}

#[test]
fn a_namespace_is_one_sandboxs_and_never_the_hosts() {
    in_namespace("a_namespace_is_one_sandboxs", PAIR, |path| {
        let own = Path::new("/proc/thread-self/ns/net");
        assert!(matches!(
            Namespace::enter(Some(own)),
            Err(NamespaceError::Host(_))
        ));
        // It may be out of sight.
        let init = Path::new("/proc/1/ns/net");
        if fs::read_link(init).is_ok() {
            let refused = Namespace::enter(Some(init));
            assert!(matches!(refused, Err(NamespaceError::Host(_))));
        }
        let outside = || {
            crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
            let first = Namespace::enter(Some(path)).unwrap();
            let identity = first.identity();
            thread::scope(|scope| {
                let second = || {
                    crate::sys::unshare(UnshareFlags::NEWNET).unwrap();
                    let taken = Namespace::enter(Some(path)).unwrap_err();
                    assert!(matches!(taken, NamespaceError::Taken(_)), "{taken}");
                    assert!(Namespace::again(path, identity).unwrap().is_none());
                };
                scope.spawn(second).join().unwrap();
            });
            drop(first);
            drop(Namespace::enter(Some(path)).unwrap());
            let gone = Path::new("/run/netns/never-made");
            assert!(Namespace::again(gone, identity).unwrap().is_none());
            let error = Namespace::enter(Some(gone)).unwrap_err().to_string();
            assert!(error.contains("/run/netns/never-made"), "{error}");
        };
        thread::scope(|scope| scope.spawn(outside).join().unwrap());
    });
}

#[test]
fn a_namespace_may_be_mounted_anywhere() {
    in_namespace("a_namespace_may_be_mounted_anywhere", "true", |path| {
        let directory = tempfile::tempdir().unwrap();
        let mounted = directory.path().join("name");
        fs::write(&mounted, b"").unwrap();
        let mount = |kind: &str| format!("mount --bind {} {}", kind, mounted.display());
        shell(&mount(&path.display().to_string()));
        elsewhere(&|| drop(Namespace::enter(Some(&mounted)).unwrap()));
        shell(&format!("umount {}", mounted.display()));
        shell(&mount("/proc/self/ns/uts"));
        let refused = Namespace::enter(Some(&mounted));
        shell(&format!("umount {}", mounted.display()));
        assert!(matches!(refused, Err(NamespaceError::Other(_))));
    });
}

#[test]
fn an_error_names_the_interface() {
    let error = NetworkError::Attach {
        interface: "eth0".to_owned(),
        message: "no place is free".to_owned(),
    };
    assert!(error.to_string().contains("\"eth0\""));
}
