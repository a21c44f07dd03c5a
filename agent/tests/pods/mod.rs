//! Cases about several containers of one guest that share namespaces, as those of a pod do.

use bulkhead_agent_protocol::messages::{
    InterfaceAddress, NetworkInterface, SetNetworkRequest, Stdio,
};
use serde_json::{Value, json};

use crate::support::{Container, Fixture, Reply, Streams, spec};

const ALL: [&str; 4] = ["pid", "ipc", "uts", "network"];

/// A spec whose namespaces of these kinds have paths, as engines write it.
fn joining(arguments: &[&str], kinds: &[&str]) -> Value {
    let mut spec = spec(arguments);
    for namespace in spec["linux"]["namespaces"].as_array_mut().expect("array") {
        let kind = namespace["type"].as_str().expect("text").to_owned();
        if kinds.contains(&kind.as_str()) {
            namespace["path"] = json!(format!("/proc/1234/ns/{kind}"));
        }
    }
    spec.as_object_mut().expect("object").remove("hostname");
    spec
}

fn others<'a>(kinds: &[&'a str], id: &'a str) -> Vec<(&'a str, &'a str)> {
    kinds.iter().map(|kind| (*kind, id)).collect()
}

/// Starts a container that joins another one, and returns what it prints.
fn run_joined(fixture: &Fixture, id: &str, script: &str, kinds: &[&str], other: &str) -> String {
    let streams = Streams::new(fixture, b"");
    let spec = joining(&["sh", "-c", script], kinds);
    let reply = fixture.create_joining(id, &spec, &others(kinds, other), streams.stdio());
    if let Reply::Refused(code, message) = reply {
        panic!("{code}: {message}");
    }
    let container = fixture.container(id);
    container.try_start().expect("started");
    let run = streams.collect(|| container.wait());
    assert_eq!(run.stderr, "");
    container.remove();
    run.stdout
}

fn first<'f>(fixture: &'f Fixture, script: &str) -> Container<'f> {
    fixture.start("first", &spec(&["sh", "-c", script]), Stdio::new())
}

pub(crate) fn shared_namespaces(fixture: &Fixture) {
    let container = first(fixture, "touch /dev/shm/own; exec sleep 4321");
    fixture.set_network(&SetNetworkRequest {
        container_id: "first".to_owned(),
        interfaces: vec![NetworkInterface {
            name: "lo".to_owned(),
            up: true,
            addresses: vec![InterfaceAddress {
                address: "10.99.0.1/32".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    });
    let script = "hostname; ps | grep -c 'sleep [4]321'; ip addr show lo | grep -o 10.99.0.1; \
        test $$ -gt 1 && echo guest; ls /dev/shm | wc -l; grep ^0 /proc/self/cgroup";
    let shown = run_joined(fixture, "second", script, &ALL, "first");
    assert_eq!(shown, "inside\n1\n10.99.0.1\nguest\n0\n0::/\n");
    // Some only; the others are its own.
    let script = "ps | grep -c 'sleep [4]321'; ip addr show lo | grep -o 10.99.0.1; echo $$";
    let shown = run_joined(fixture, "third", script, &["network"], "first");
    assert_eq!(shown, "0\n10.99.0.1\n1\n");

    // With ids of its own it may not make what shows the other's network, but sees it.
    let mut mapped = joining(&["sh", "-c", "ls /sys/class/net; id -u"], &["network"]);
    crate::namespaces::add_user_namespace(&mut mapped);
    fixture.in_rootfs("chown -R 100000:100000 .");
    let mut process = spec(&["ip", "link", "add", "seen", "type", "veth"])["process"].clone();
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
    }
    let run = container.exec_process("administer", &process, b"");
    assert_eq!(run.status, 0, "{}", run.stderr);
    let streams = Streams::new(fixture, b"");
    let joins = others(&["network"], "first");
    let reply = fixture.create_joining("mapped", &mapped, &joins, streams.stdio());
    if let Reply::Refused(code, message) = reply {
        panic!("{code}: {message}");
    }
    let second = fixture.container("mapped");
    second.try_start().expect("started");
    let run = streams.collect(|| second.wait());
    assert_eq!(run.stdout, "lo\nseen\nveth0\n0\n", "{}", run.stderr);
    second.remove();
    fixture.in_rootfs("chown -R 0:0 .");

    // A process that is added is where the others are.
    let spec = joining(&["sleep", "1000"], &ALL);
    let reply = fixture.create_joining("fourth", &spec, &others(&ALL, "first"), Stdio::new());
    assert!(matches!(reply, Reply::Created(_)));
    let fourth = fixture.container("fourth");
    fourth.try_start().expect("started");
    let script = "hostname; ps | grep -c 'sleep [4]321'; ip addr show lo | grep -o 10.99.0.1";
    let run = fourth.exec("one", &["sh", "-c", script], b"");
    assert_eq!(run.stdout, "inside\n1\n10.99.0.1\n", "{}", run.stderr);
    assert_eq!(fourth.processes(), ["sleep 1000"]);
    let refused = fixture.try_set_network(&SetNetworkRequest {
        container_id: "fourth".to_owned(),
        ..Default::default()
    });
    let message = refused.expect_err("refused").1;
    assert!(message.contains("network of container first"), "{message}");
    fourth.remove_by_force();
    container.remove_by_force();
}

pub(crate) fn ends(fixture: &Fixture) {
    let container = first(fixture, "exec sleep 4321");
    let start = |id: &str, script: &str, kinds: &[&str]| {
        let spec = joining(&["sh", "-c", script], kinds);
        let reply = fixture.create_joining(id, &spec, &others(kinds, "first"), Stdio::new());
        assert!(matches!(reply, Reply::Created(_)));
        let container = fixture.container(id);
        container.try_start().expect("started");
        container
    };
    // What the second one leaves behind ends with it, though another one's init is its parent.
    let second = start("second", "sleep 4000 & exit 3", &ALL);
    assert_eq!(second.wait(), 3);
    second.remove();
    let run = container.exec("one", &["sh", "-c", "ps | grep -c 'sleep [4]'"], b"");
    assert_eq!(run.stdout, "1\n");

    // The end of the first one ends what is in its PID namespace, and nothing else.
    let third = start("third", "exec sleep 1000", &ALL);
    let fourth = start("fourth", "exec sleep 1000", &["network", "ipc", "uts"]);
    container.signal(9);
    assert_eq!(container.wait(), 137);
    assert_eq!(third.wait(), 137);
    container.remove();
    let run = fourth.exec("one", &["sh", "-c", "hostname; ls /sys/class/net"], b"");
    assert_eq!(run.stdout, "inside\nlo\n", "{}", run.stderr);
    third.remove();
    fourth.remove_by_force();
}

pub(crate) fn refusals(fixture: &Fixture) {
    let container = first(fixture, "exec sleep 4321");
    let refused = |spec: &Value, others: &[(&str, &str)]| match fixture.create_joining(
        "second",
        spec,
        others,
        Stdio::new(),
    ) {
        Reply::Refused(_, message) => message,
        Reply::Created(_) => panic!("created"),
    };
    let joins = joining(&["true"], &["ipc"]);
    let message = refused(&joins, &[]);
    assert!(
        message.contains("linux.namespaces[2].path is not supported"),
        "{message}"
    );
    let message = refused(&joins, &[("ipc", "nobody")]);
    assert!(
        message.contains("the ipc namespace of container nobody: there is no"),
        "{message}"
    );
    let message = refused(&joins, &[("mount", "first")]);
    assert!(message.contains("joining the mount namespace"), "{message}");
    let message = refused(&joins, &[("ipc", "first"), ("time", "first")]);
    assert!(
        message.contains("does not list a namespace that is to be joined"),
        "{message}"
    );
    let message = refused(&joins, &[("ipc", "second")]);
    assert!(
        message.contains("container second is being created"),
        "{message}"
    );
    container.signal(9);
    container.wait();
    let message = refused(&joins, &[("ipc", "first")]);
    assert!(
        message.contains("container first: it has stopped"),
        "{message}"
    );
    container.remove();
}

pub(crate) fn out_of_memory(fixture: &Fixture) {
    let container = first(fixture, "exec sleep 4321");
    let mut greedy = joining(
        &["sh", "-c", "x=y; while :; do x=$x$x; done"],
        &["network", "ipc"],
    );
    greedy["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    let joins = others(&["network", "ipc"], "first");
    let reply = fixture.create_joining("greedy", &greedy, &joins, Stdio::new());
    assert!(matches!(reply, Reply::Created(_)));
    let second = fixture.container("greedy");
    second.try_start().expect("started");
    assert_eq!(second.wait(), 137);
    second.remove();
    let run = container.exec("one", &["echo", "alive"], b"");
    assert_eq!(run.stdout, "alive\n");
    container.remove_by_force();
}

/// `/dev/shm` of one container becomes that of another.
pub(crate) fn joined_mounts(fixture: &Fixture) {
    let container = first(fixture, "echo own >/dev/shm/file; exec sleep 4321");
    let ready = "until test -e /dev/shm/file; do sleep 0.1; done";
    assert_eq!(container.exec("ready", &["sh", "-c", ready], b"").status, 0);
    let mut spec = joining(
        &["sh", "-c", "cat /dev/shm/file; echo back >/dev/shm/other"],
        &["ipc"],
    );
    let mounts = spec["mounts"].as_array().expect("array");
    let shm = mounts.iter().position(|m| m["destination"] == "/dev/shm");
    let index = u32::try_from(shm.expect("a mount")).expect("small");
    spec["mounts"][index as usize] = json!({"destination": "/dev/shm", "type": "bind",
        "source": "/somewhere", "options": ["bind", "rprivate", "nosuid"]});
    let create = |id: &str, of: &str, stdio: Stdio| {
        fixture.create_with(id, &spec, stdio, |request| {
            request.join_namespaces = [("ipc".to_owned(), "first".to_owned())].into();
            request.join_mounts = [(index, of.to_owned())].into();
        })
    };
    let streams = Streams::new(fixture, b"");
    if let Reply::Refused(code, message) = create("second", "first", streams.stdio()) {
        panic!("{code}: {message}");
    }
    let second = fixture.container("second");
    second.try_start().expect("started");
    let run = streams.collect(|| second.wait());
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("own\n", ""));
    second.remove();
    let run = container.exec("look", &["cat", "/dev/shm/other"], b"");
    assert_eq!(run.stdout, "back\n");
    let Reply::Refused(_, message) = create("third", "nobody", Stdio::new()) else {
        panic!("created");
    };
    assert!(message.contains("that of container nobody"), "{message}");
    // A link in the other container leads nowhere.
    let link = "rm -r /dev/shm 2>/dev/null; umount /dev/shm; rmdir /dev/shm; ln -s /etc /dev/shm";
    let mut process = spec_of_root(&["sh", "-c", link]);
    for set in ["bounding", "effective", "permitted"] {
        process["capabilities"][set] = json!(["CAP_SYS_ADMIN"]);
    }
    container.exec_process("link", &process, b"");
    let Reply::Refused(_, message) = create("fourth", "first", Stdio::new()) else {
        panic!("created");
    };
    assert!(message.contains("/dev/shm of the container"), "{message}");
    container.remove_by_force();
}

fn spec_of_root(arguments: &[&str]) -> Value {
    spec(arguments)["process"].clone()
}

/// Whoever stands for a container goes away, and the container with it.
pub(crate) fn monitor_lost(fixture: &Fixture) {
    let container = first(fixture, "exec sleep 4321");
    let joins = joining(&["sleep", "1234"], &ALL);
    let reply = fixture.create_joining("second", &joins, &others(&ALL, "first"), Stdio::new());
    assert!(matches!(reply, Reply::Created(_)));
    fixture.container("second").try_start().expect("started");
    fixture.stand_for_and_leave("second");
    let gone = "while ps | grep -q 'sleep [1]234'; do sleep 0.1; done";
    assert_eq!(container.exec("gone", &["sh", "-c", gone], b"").status, 0);
    // Its name is free again once it is removed.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let reply = fixture.create_joining("second", &joins, &others(&ALL, "first"), Stdio::new());
        match reply {
            Reply::Created(_) => break,
            Reply::Refused(_, message) => {
                assert!(message.contains("exists already"), "{message}");
                assert!(std::time::Instant::now() < deadline, "{message}");
            }
        }
    }
    fixture.container("second").remove_by_force();
    container.remove_by_force();
}
