//! Interfaces of a network namespace of the host as the container sees them. Each test makes a
//! namespace, tied to the test host by a pair of virtual interfaces, as an engine would.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::leftovers::descendants;
use crate::process::{Other, Output, Process};
use crate::scene::{Created, Scene};

use super::vm::vmm;

super::cases!(network;
    common: both_ways, big_transfers, routes_and_neighbours, several_interfaces, large_and_small_frames,
        empty_namespace, hook_brings_the_interface, two_in_a_namespace, processes_shared_and_not_the_network;
    vm: interface_comes_and_goes, what_changes_is_followed, host_network_is_refused, namespace_that_is_none,
        namespace_vanishes, interface_no_guest_can_have, state_shows_the_namespace,
        monitor_killed, vmm_killed);

/// A network namespace with an interface `eth0`, whose other end the test host has.
pub(super) struct Wire {
    holder: Process,
    pid: i32,
    /// The test host's end.
    near: String,
}

/// Runs a command of the host.
fn shell(script: &str) -> Result<Output> {
    let mut command = Command::new("sh");
    command.args(["-ec", script]);
    Process::spawn(command)?.finish()?.ok()
}

impl Wire {
    pub(super) fn new() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo up; exec sleep 1000"]);
        let mut holder = Process::spawn(command)?;
        holder.wait_for("up\n")?;
        let pid = holder.pid()?.as_raw_nonzero().get();
        let wire = Self {
            holder,
            pid,
            near: format!("near{}", std::process::id()),
        };
        shell(&format!(
            "ip link add {near} type veth peer name eth0 address 02:00:00:00:77:02 netns {pid}
            ip address add 10.77.0.1/24 dev {near}; ip address add fd77::1/64 nodad dev {near}
            ip link set {near} up",
            near = wire.near
        ))?;
        wire.inside(
            "ip link set lo up; ip address add 10.77.0.2/24 dev eth0
            ip address add fd77::2/64 nodad dev eth0; ip link set eth0 up
            ip route add default via 10.77.0.1",
        )?;
        Ok(wire)
    }

    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }

    /// Runs a command of the host in the namespace.
    fn inside(&self, script: &str) -> Result<Output> {
        let mut command = Command::new("nsenter");
        let namespace = format!("--net={}", self.path().display());
        command.args([namespace.as_str(), "sh", "-ec", script]);
        Process::spawn(command)?.finish()?.ok()
    }

    /// A bundle whose container is in the namespace.
    fn bundle(&self, scene: &Scene, script: &str) -> Result<Bundle> {
        let path = self.path();
        let bundle = scene.bundle()?.shell(script);
        Ok(bundle.with(|spec| networked(spec, &path.display().to_string())))
    }

    /// Nothing of ours is in the namespace, and none of the rest is gone; then it is given up.
    pub(super) fn untouched(mut self, scene: &Scene) -> Result<()> {
        let seen = self.inside("tc qdisc show; tc filter show dev eth0 ingress; ip -o link")?;
        let text = seen.text();
        for trace in ["clsact", "bhtap", "mirred"] {
            ensure!(!text.contains(trace), "{trace} is left: {text}");
        }
        ensure!(text.contains("eth0"), "eth0 is gone: {text}");
        self.end()?;
        scene.expect_nothing_left()
    }

    fn end(&mut self) -> Result<()> {
        self.holder.signal(Signal::KILL)?;
        self.holder.wait()?;
        // The interface goes with the namespace, which goes a little later.
        let _ = shell(&format!("ip link delete {} 2>/dev/null || true", self.near));
        Ok(())
    }
}

/// The container joins a network namespace, and may send packets of its own making.
pub(super) fn networked(spec: &mut Value, path: &str) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        for namespace in namespaces {
            // Without a path it is a new one.
            if namespace["type"] == "network" && !path.is_empty() {
                namespace["path"] = json!(path);
            }
        }
    }
    for set in ["bounding", "effective", "permitted"] {
        if let Some(set) = spec["process"]["capabilities"][set].as_array_mut() {
            set.push(json!("CAP_NET_RAW"));
            set.push(json!("CAP_NET_ADMIN"));
        }
    }
}

/// A container that waits to be told to end.
fn start(scene: &Scene, wire: &Wire, script: &str) -> Result<Created> {
    let script = format!("{script}; echo ready; sleep 1000");
    let mut container = scene.start(&wire.bundle(scene, &script)?)?;
    container.streams.wait_for("ready\n")?;
    Ok(container)
}

/// A socat that listens.
fn serve(ends: &str) -> Result<Process> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec socat -d -d -u {ends} 2>&1")]);
    let mut server = Process::spawn(command)?;
    server.wait_for("listening on")?;
    Ok(server)
}

/// What a command in the container prints.
fn exec(scene: &Scene, container: &Created, script: &str) -> Result<String> {
    let output = scene.call(&["exec", &container.id, "/bin/sh", "-c", script])?;
    Ok(output.ok()?.text())
}

fn both_ways(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(
        scene,
        &wire,
        "ping -c 2 -w 20 10.77.0.1 && ping -c 2 -w 20 fd77::1 && cat /sys/class/net/eth0/address",
    )?;
    let seen = container.streams.stdout();
    ensure!(seen.contains("02:00:00:00:77:02"), "{seen}");
    // No packet is answered twice: by the guest, and by the host's own stack.
    for address in ["10.77.0.2", "fd77::2"] {
        let answers = shell(&format!("ping -c 3 -i 0.2 -w 20 {address}"))?.text();
        ensure!(
            answers.contains("3 received") && !answers.contains("duplicate"),
            "{answers}"
        );
    }
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

/// Segments larger than the MTU and unfinished checksums travel between the two kernels.
fn big_transfers(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let file = scene.path("big");
    shell(&format!(
        "head -c 10000000 /dev/urandom > {}",
        file.display()
    ))?;
    let sum = shell(&format!("sha256sum < {}", file.display()))?.text();
    let container = start(scene, &wire, "true")?;
    for (kind, address) in [("TCP4", "10.77.0.1"), ("TCP6", "[fd77::1]")] {
        let bare = address.trim_matches(['[', ']']);
        let listen = |port: u16| format!("{kind}-LISTEN:{port},bind={address},reuseaddr");
        // Into the container.
        let mut server = serve(&format!("FILE:{} {}", file.display(), listen(7001)))?;
        let got = exec(scene, &container, &format!("nc {bare} 7001 | sha256sum"))?;
        ensure!(got == sum, "what came in is {got}, not {sum}");
        ensure!(server.wait()?.success(), "{}", server.stdout());
        // Out of it.
        let received = scene.path("received");
        let mut server = serve(&format!("{} CREATE:{}", listen(7002), received.display()))?;
        let mut command = scene.command(&["exec", &container.id, "/bin/sh", "-c"]);
        command.arg(format!("cat | nc {bare} 7002"));
        command.stdin(std::fs::File::open(&file)?);
        Process::spawn_as_is(command)?.finish()?.ok()?;
        ensure!(server.wait()?.success(), "{}", server.stdout());
        let got = shell(&format!("sha256sum < {}", received.display()))?.text();
        ensure!(got == sum, "what went out is {got}, not {sum}");
        std::fs::remove_file(received)?;
    }
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

fn routes_and_neighbours(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    wire.inside(
        "ip route add 192.0.2.0/24 via 10.77.0.9 metric 5; ip route add blackhole 198.51.100.0/24
        ip -6 route add default via fd77::1; ip -6 route add 2001:db8::/32 dev eth0
        ip neighbour add 10.77.0.9 lladdr 02:00:00:00:77:09 nud permanent dev eth0",
    )?;
    let script = "ip route; ip -6 route; cat /proc/net/arp";
    let text = scene.run(&wire.bundle(scene, script)?)?.ok()?.text();
    for line in [
        "default via 10.77.0.1 dev eth0",
        "10.77.0.0/24 dev eth0",
        "192.0.2.0/24 via 10.77.0.9 dev eth0",
        "metric 5",
        "blackhole 198.51.100.0/24",
        "default via fd77::1 dev eth0",
        "2001:db8::/32 dev eth0",
        "02:00:00:00:77:09",
    ] {
        ensure!(text.contains(line), "{line:?} is missing in {text}");
    }
    wire.untouched(scene)
}

fn several_interfaces(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    for number in 1..4 {
        shell(&format!(
            "ip link add {near}b{number} type veth peer name net{number} netns {pid}
            ip address add 10.78.{number}.1/24 dev {near}b{number}; ip link set {near}b{number} up",
            near = wire.near,
            pid = wire.pid
        ))?;
        wire.inside(&format!(
            "ip address add 10.78.{number}.2/24 dev net{number}; ip link set net{number} up"
        ))?;
    }
    let script = "for n in 1 2 3; do ping -c 1 -w 20 10.78.$n.1 || exit 1; done; ip -o link";
    let text = scene.run(&wire.bundle(scene, script)?)?.ok()?.text();
    for name in ["eth0", "net1", "net2", "net3", "lo"] {
        ensure!(
            text.contains(&format!(": {name}")),
            "{name} is missing: {text}"
        );
    }
    ensure!(
        text.lines().filter(|line| line.contains("link/")).count() == 5,
        "{text}"
    );
    wire.untouched(scene)
}

fn large_and_small_frames(scene: &Scene) -> Result<()> {
    for mtu in [1400, 9000] {
        let wire = Wire::new()?;
        shell(&format!("ip link set {} mtu {mtu}", wire.near))?;
        wire.inside(&format!("ip link set eth0 mtu {mtu}"))?;
        let container = start(scene, &wire, "cat /sys/class/net/eth0/mtu")?;
        let seen = container.streams.stdout();
        ensure!(seen.starts_with(&format!("{mtu}\n")), "{seen}");
        // As much as a frame carries, and not to be cut in pieces.
        let size = mtu - 28;
        shell(&format!("ping -M do -c 2 -i 0.2 -w 20 -s {size} 10.77.0.2"))?;
        scene.destroy(&container.id)?;
        wire.untouched(scene)?;
    }
    Ok(())
}

fn empty_namespace(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("ping -c 1 -w 20 127.0.0.1 >&2 && ping -c 1 -w 20 ::1 >&2; ip -o link")
        .with(|spec| networked(spec, ""));
    let bundle = bundle.with(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            for namespace in namespaces {
                if let Some(namespace) = namespace.as_object_mut() {
                    namespace.remove("path");
                }
            }
        }
    });
    let text = scene.run(&bundle)?.ok()?.text();
    ensure!(text.lines().count() == 1 && text.contains("lo"), "{text}");
    scene.expect_nothing_left()
}

/// What Docker does: the runtime makes the namespace, and a hook that knows it by the pid of the
/// state puts the interface there.
fn hook_brings_the_interface(scene: &Scene) -> Result<()> {
    let near = format!("near{}", std::process::id());
    let hook = scene.script(
        "hook",
        &format!(
            "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/')
            ip link add {near} type veth peer name eth7 netns $pid
            ip address add 10.79.0.1/24 dev {near}; ip link set {near} up
            nsenter --net=/proc/$pid/ns/net sh -c 'ip address add 10.79.0.2/24 dev eth7
                ip link set eth7 up; ip route add default via 10.79.0.1'"
        ),
    )?;
    let environment = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"];
    for kind in ["prestart", "createRuntime"] {
        let bundle = scene
            .bundle()?
            .shell("ping -c 1 -w 20 10.79.0.1 && ip route")
            .with(|spec| {
                networked(spec, "");
                spec["hooks"] = json!({kind: [{"path": hook, "env": environment}]});
            });
        let text = scene.run(&bundle)?.ok()?.text();
        ensure!(
            text.contains("default via 10.79.0.1 dev eth7"),
            "{kind}: {text}"
        );
        let _ = shell(&format!("ip link delete {near} 2>/dev/null || true"));
    }
    scene.expect_nothing_left()
}

/// As `podman network connect` and `disconnect` do.
fn interface_comes_and_goes(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    for round in 0..2 {
        shell(&format!(
            "ip link add {near}b type veth peer name later netns {pid}
            ip address add 10.78.0.1/24 dev {near}b; ip link set {near}b up",
            near = wire.near,
            pid = wire.pid
        ))?;
        wire.inside("ip address add 10.78.0.2/24 dev later; ip link set later up")?;
        exec(
            scene,
            &container,
            "until ping -c 1 -w 1 10.78.0.1; do :; done; test -d /sys/class/net/later",
        )
        .with_context(|| format!("round {round}"))?;
        wire.inside("ip link delete later")?;
        exec(
            scene,
            &container,
            "while test -d /sys/class/net/later; do :; done",
        )?;
        exec(scene, &container, "ping -c 1 -w 20 10.77.0.1")?;
    }
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

fn what_changes_is_followed(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    // In this order: an address takes the later ones of its subnet with it.
    wire.inside("ip address delete 10.77.0.2/24 dev eth0; ip address add 10.77.0.3/24 dev eth0")?;
    exec(
        scene,
        &container,
        "until ip address show eth0 | grep -q 10.77.0.3; do :; done
        while ip address show eth0 | grep -q 10.77.0.2/; do :; done",
    )?;
    shell("ping -c 1 -w 20 10.77.0.3")?;
    wire.inside("ip link set eth0 mtu 1300; ip route add 192.0.2.0/24 via 10.77.0.1")?;
    exec(
        scene,
        &container,
        "until grep -q 1300 /sys/class/net/eth0/mtu; do :; done
        until ip route | grep -q 192.0.2.0/24; do :; done",
    )?;
    // More than the device was made for.
    shell(&format!("ip link set {} mtu 9000", wire.near))?;
    wire.inside("ip link set eth0 mtu 9000")?;
    exec(
        scene,
        &container,
        "until grep -qs 9000 /sys/class/net/eth0/mtu; do :; done",
    )?;
    shell("ping -M do -c 1 -w 20 -s 8972 10.77.0.3")?;
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

fn refused(scene: &Scene, bundle: &Bundle, words: &[&str]) -> Result<()> {
    let error = scene.run(bundle)?.fails()?;
    for word in words {
        ensure!(error.contains(word), "{word:?} is missing in {error}");
    }
    Ok(())
}

fn host_network_is_refused(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .with(|spec| networked(spec, "/proc/1/ns/net"));
    refused(
        scene,
        &bundle,
        &["linux.namespaces[1].path", "host's own", "bridge"],
    )?;
    let bundle = scene.bundle()?.with(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
    });
    refused(scene, &bundle, &["network", "host's own"])?;
    scene.expect_nothing_left()
}

fn namespace_that_is_none(scene: &Scene) -> Result<()> {
    let fifo = scene.path("fifo");
    shell(&format!("mkfifo {}", fifo.display()))?;
    let fifo = fifo.display().to_string();
    for (path, word) in [
        ("/run/netns/never-made", "cannot open"),
        ("/dev/null", "not a network namespace"),
        ("/proc/self/ns/uts", "not a network namespace"),
        (fifo.as_str(), "not a network namespace"),
    ] {
        let bundle = scene.bundle()?.with(|spec| networked(spec, path));
        refused(scene, &bundle, &["linux.namespaces[1].path", path, word])?;
    }
    scene.expect_nothing_left()
}

fn namespace_vanishes(scene: &Scene) -> Result<()> {
    // After the container was created, and while it runs: the guest still has its interface.
    let mut wire = Wire::new()?;
    let container = scene.create(&wire.bundle(scene, "echo ready; sleep 1000")?)?;
    wire.end()?;
    scene.call(&["start", &container.id])?.ok()?;
    exec(
        scene,
        &container,
        "while test -d /sys/class/net/eth0; do :; done",
    )?;
    scene.destroy(&container.id)?;
    // Between `create` and `delete`, with a monitor that could not clean up.
    let mut wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    container.process()?.signal(Signal::KILL)?;
    container.process()?.wait()?;
    wire.end()?;
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

/// Named by a path that tells nothing of a container.
fn two_in_a_namespace(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    let script =
        "ip -4 address show dev eth0 | grep -o 10.77.0.2; ping -c 1 -w 20 10.77.0.1; echo $$";
    let second = wire.bundle(scene, script)?;
    scene.run(&second)?.ok()?.says(&["10.77.0.2\n", "1\n"])?;
    let second = start(scene, &wire, "nc -l -p 4321 >/tmp/got & true")?;
    exec(
        scene,
        &container,
        "until echo hello | nc 127.0.0.1 4321; do sleep 0.1; done",
    )?;
    exec(
        scene,
        &second,
        "until grep hello /tmp/got; do sleep 0.1; done",
    )?;
    scene.destroy(&second.id)?;
    exec(scene, &container, "ping -c 1 -w 20 10.77.0.1")?;
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

/// Its interface is another one of the guest that it joins.
fn processes_shared_and_not_the_network(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let mut first = scene.start(&scene.bundle()?.shell("echo ready; sleep 1000"))?;
    first.streams.wait_for("ready\n")?;
    for _ in 0..2 {
        let script = "ps | grep -q 'sleep [1]000'; ping -c 1 -w 20 10.77.0.1";
        let bundle = wire.bundle(scene, script)?.with(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut();
            for namespace in namespaces.into_iter().flatten() {
                if namespace["type"] == "pid" {
                    namespace["path"] = json!(format!("/proc/{}/ns/pid", first.pid));
                }
            }
        });
        scene.run(&bundle)?.ok()?.says(&["1 packets received"])?;
    }
    exec(scene, &first, "test ! -e /sys/class/net/eth0")?;
    scene.destroy(&first.id)?;
    wire.untouched(scene)
}

fn interface_no_guest_can_have(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    wire.inside("ip link set eth0 mtu 65535")?;
    refused(
        scene,
        &wire.bundle(scene, "true")?,
        &["eth0", "MTU of 65535"],
    )?;
    wire.inside("ip link set eth0 mtu 1500")?;
    let count = 9;
    for number in 0..count {
        wire.inside(&format!(
            "ip link add pair{number} type veth peer name other{number}"
        ))?;
    }
    refused(
        scene,
        &wire.bundle(scene, "true")?,
        &["cannot attach interface"],
    )?;
    for number in 0..count {
        wire.inside(&format!("ip link delete pair{number}"))?;
    }
    wire.untouched(scene)
}

fn state_shows_the_namespace(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(
        of(container.pid)? == of(wire.pid)?,
        "the monitor is elsewhere"
    );
    scene.destroy(&container.id)?;
    wire.untouched(scene)
}

fn monitor_killed(scene: &Scene) -> Result<()> {
    for started in [false, true] {
        let wire = Wire::new()?;
        let bundle = wire.bundle(scene, "echo ready; sleep 1000")?;
        let mut container = if started {
            scene.start(&bundle)?
        } else {
            scene.create(&bundle)?
        };
        if started {
            container.streams.wait_for("ready\n")?;
        }
        let monitor = container.process()?;
        monitor.signal(Signal::KILL)?;
        monitor.wait()?;
        scene.destroy(&container.id)?;
        wire.untouched(scene)?;
    }
    Ok(())
}

fn vmm_killed(scene: &Scene) -> Result<()> {
    let wire = Wire::new()?;
    let container = start(scene, &wire, "true")?;
    let monitor = container.process()?;
    Other::open(vmm()?)?.signal(Signal::KILL)?;
    monitor.wait()?;
    // The monitor has restored what it could before it ended.
    let text = wire.inside("tc qdisc show; ip -o link")?.text();
    ensure!(
        !text.contains("clsact") && !text.contains("bhtap"),
        "{text}"
    );
    scene.destroy(&container.id)?;
    ensure!(descendants()?.len() <= 1, "something lives");
    wire.untouched(scene)
}
