//! Each namespace holds the container's own, and nothing of the host's.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::process::Process;
use crate::runtime::Runtime;
use crate::scene::{Scene, skip};

super::cases!(isolation;
    common: namespaces, network, user_namespace, behind_the_pid, sysctls, mounts;
    vm: every_namespace);

fn namespaces(scene: &Scene) -> Result<()> {
    let script = "echo pid $$; ls -d /proc/[0-9]* | wc -l; hostname; cat /proc/sysvipc/shm; \
        for f in /proc/self/ns/*; do readlink $f; done; cat /proc/self/cgroup; echo other >/tmp/file; \
        hostname changed 2>/dev/null; echo end";
    let output = scene.run_script(script)?.ok()?;
    let text = output.text();
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines[0] == "pid 1", "{output}");
    let processes: u32 = lines[1].trim().parse().context("the number of processes")?;
    ensure!(processes <= 3, "{processes} processes to be seen: {output}");
    ensure!(lines[2] == "tested", "host name: {output}");
    for name in ["pid", "net", "ipc", "uts", "mnt", "cgroup"] {
        let host = fs::read_link(format!("/proc/self/ns/{name}"))?;
        let host = host.to_string_lossy();
        ensure!(
            text.contains(&format!("{name}:[")),
            "no {name} namespace shown: {output}"
        );
        // In a microVM the numbers belong to another kernel and say nothing.
        let own_kernel = scene.runtime == Runtime::Bulkhead;
        ensure!(
            own_kernel || !text.contains(&*host),
            "the host's {name} namespace: {output}"
        );
    }
    for line in lines
        .iter()
        .filter(|line| line.contains("::") || line.contains(":memory:"))
    {
        ensure!(line.ends_with(":/"), "the cgroup namespace shows {line}");
    }
    Ok(())
}

fn network(scene: &Scene) -> Result<()> {
    let output = scene.run_script(
        "ls /sys/class/net; cat /sys/class/net/lo/operstate; ip -o addr; \
        ping -c 1 -W 5 127.0.0.1 >/dev/null 2>&1 || cat /proc/net/dev",
    )?;
    let text = output.text();
    let interfaces: Vec<_> = text
        .lines()
        .take_while(|line| !line.contains(' '))
        .collect();
    ensure!(interfaces.contains(&"lo"), "no loopback: {output}");
    ensure!(
        !text.contains("eth0") && !text.contains("ens"),
        "the host's interfaces: {output}"
    );
    ensure!(
        text.contains("127.0.0.1/8"),
        "the loopback interface has no address: {output}"
    );
    Ok(())
}

/// A bundle with a user namespace, to whose root its files belong.
fn mapped(scene: &Scene, script: &str) -> Result<Bundle> {
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "user" }));
        }
        let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
    });
    // The mapped root owns its root filesystem and may pass through to it.
    let mut places = vec![bundle.rootfs()];
    while let Some(place) = places.pop() {
        std::os::unix::fs::lchown(&place, Some(100_000), Some(100_000))?;
        if place.is_dir() && !place.is_symlink() {
            places.extend(fs::read_dir(&place)?.flatten().map(|entry| entry.path()));
        }
    }
    for place in bundle
        .path
        .ancestors()
        .take_while(|place| place.starts_with(&scene.directory))
    {
        fs::set_permissions(place, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    Ok(bundle)
}

fn user_namespace(scene: &Scene) -> Result<()> {
    let bundle = mapped(scene, "id -u; cat /proc/self/uid_map /proc/self/gid_map")?;
    let output = scene.run(&bundle)?;
    if scene.runtime == Runtime::Bulkhead && output.errors().contains("user is not supported") {
        ensure!(output.code() != 0, "refused, and yet: {output}");
        scene.expect_nothing_left()?;
        return skip("bulkhead refuses user namespaces so far, and says so");
    }
    let text = output.ok()?.text();
    let words: Vec<_> = text.split_whitespace().collect();
    ensure!(
        words == ["0", "0", "100000", "65536", "0", "100000", "65536"],
        "user and mappings: {text}"
    );
    Ok(())
}

/// Who enters what is behind the container's pid on the host does not find the host's own.
fn behind_the_pid(scene: &Scene) -> Result<()> {
    const KINDS: [&str; 6] = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    for with_users in [false, true] {
        let bundle = if with_users {
            mapped(scene, "true")?
        } else {
            scene.bundle()?
        };
        let container = scene.create(&bundle)?;
        let pid = container.pid.to_string();
        for kind in KINDS.into_iter().chain(with_users.then_some("user")) {
            let (host, container) = (of("self", kind)?, of(&pid, kind)?);
            ensure!(host != container, "{kind} is the host's: {host:?}");
        }
        let mut command = Command::new("nsenter");
        command.args(["--target", &pid, "--uts", "hostname"]);
        let name = Process::spawn(command)?.finish()?.ok()?.text();
        ensure!(name == "tested\n", "host name: {name:?}");
        for file in ["uid_map", "gid_map"] {
            let map = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
            let map: Vec<_> = map.split_whitespace().collect();
            let own = ["0", "100000", "65536"];
            ensure!(!with_users || map == own, "{file}: {map:?}");
        }
        scene.destroy(&container.id)?;
    }
    scene.expect_nothing_left()
}

fn sysctls(scene: &Scene) -> Result<()> {
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax";
    let set = |spec: &mut Value| {
        spec["linux"]["sysctl"] =
            json!({ "net.ipv4.ip_unprivileged_port_start": "79", "kernel.msgmax": "12345" });
    };
    let output = scene.run(&scene.bundle()?.shell(script).with(set))?.ok()?;
    ensure!(output.text() == "79\n12345\n", "sysctls: {output}");
    let host = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")?;
    ensure!(host.trim() != "79", "a container's sysctl changed the host");
    let unknown = |spec: &mut Value| {
        spec["linux"]["sysctl"] = json!({ "net.no.such.setting": "1" });
    };
    scene.run(&scene.bundle()?.with(unknown))?.fails()?;
    scene.expect_nothing_left()
}

/// What the host mounts, and what lies beside the root filesystem, is out of reach.
fn mounts(scene: &Scene) -> Result<()> {
    fs::write(scene.path("secret"), "secret")?;
    let bundle = scene.bundle()?;
    let way_up = "../".repeat(20);
    let secret = scene.path("secret");
    let relative = secret.strip_prefix("/")?;
    symlink(
        format!("{way_up}{}", relative.display()),
        bundle.rootfs().join("escape"),
    )?;
    let bundle = bundle.shell(
        "cat /escape; cat /proc/1/root/escape; cat /proc/mounts | cut -d' ' -f2 | sort; \
         ls / /..; mount -t tmpfs x /tmp && echo mounted",
    );
    let output = scene.run(&bundle)?;
    let text = output.text();
    ensure!(
        !text.contains("secret\n") && !text.contains("mounted"),
        "{output}"
    );
    ensure!(
        !text.contains("bulkhead-tests"),
        "the host's mounts: {output}"
    );
    for expected in [
        "/\n",
        "/proc\n",
        "/dev\n",
        "/dev/pts\n",
        "/dev/shm\n",
        "/dev/mqueue\n",
        "/sys\n",
    ] {
        ensure!(
            text.contains(expected),
            "no mount at {expected:?}: {output}"
        );
    }
    Ok(())
}

/// A container that asks for fewer namespaces shares the guest's, never the host's.
fn every_namespace(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("hostname; ls /sys/class/net; ls -d /proc/[0-9]*")
        .with(|spec| {
            spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "pid" }]);
            if let Some(spec) = spec.as_object_mut() {
                spec.remove("hostname");
            }
        });
    let output = scene.run(&bundle)?;
    if output.code() != 0 {
        // Host networking cannot be had in a microVM; the error says so.
        ensure!(
            output.errors().contains("network"),
            "why it is refused: {output}"
        );
        ensure!(
            output.errors().trim_end().lines().count() == 1,
            "one line: {output}"
        );
    } else {
        ensure!(
            !output.text().contains("eth0"),
            "the host's network: {output}"
        );
    }
    scene.expect_nothing_left()
}
