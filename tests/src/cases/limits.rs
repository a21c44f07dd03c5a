//! Resource limits are felt inside.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::runtime::Runtime;
use crate::scene::{Created, Scene, skip};

super::cases!(limits;
    common: memory, host_counts_out_of_memory, pids, cpu_quota, cpuset, rlimits, tmpfs_size;
    vm: on_the_host, version_1);

fn limited(spec: &mut Value, name: &str, limits: Value) {
    spec["linux"]["resources"][name] = limits;
}

fn memory(scene: &Scene) -> Result<()> {
    let limit = |spec: &mut Value| limited(spec, "memory", json!({ "limit": 48 << 20 }));
    let within = [
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=16777216",
        "count=1",
    ];
    scene
        .run(&scene.bundle()?.args(&within).with(limit))?
        .ok()?;
    let beyond = [
        "dd",
        "if=/dev/zero",
        "of=/dev/null",
        "bs=134217728",
        "count=1",
    ];
    scene
        .run(&scene.bundle()?.args(&beyond).with(limit))?
        .expect(137)?;
    scene.expect_nothing_left()?;
    // A child beyond the limit dies; the container lives on.
    let script = "dd if=/dev/zero of=/dev/null bs=134217728 count=1; echo child: $?";
    let output = scene.run(&scene.bundle()?.shell(script).with(limit))?;
    output.ok()?.says(&["child: 137\n"])?;
    Ok(())
}

/// Engines look into the host's cgroup for what has become of a container that ran out of memory.
fn host_counts_out_of_memory(scene: &Scene) -> Result<()> {
    if !crate::runtime::unified_cgroups() && scene.runtime == Runtime::Crun {
        return skip("crun leaves an empty cgroup of version 2 behind here");
    }
    for (size, kills) in [(128, true), (1, false)] {
        let container = hungry(scene, scene.bundle()?)?;
        container.eats(scene, size, kills)?;
    }
    Ok(())
}

/// A container that may have 48 MiB.
pub(super) struct Hungry {
    bundle: Bundle,
    container: Created,
}

pub(super) fn hungry(scene: &Scene, bundle: Bundle) -> Result<Hungry> {
    let script = "read size; dd if=/dev/zero of=/dev/null bs=$size count=1 2>/dev/null; exit $?";
    let bundle = bundle
        .shell(script)
        .with(|spec| limited(spec, "memory", json!({ "limit": 48 << 20 })));
    let container = scene.start(&bundle)?;
    Ok(Hungry { bundle, container })
}

impl Hungry {
    pub(super) fn pid(&self) -> i32 {
        self.container.pid
    }

    /// Has it take so much, and end; the host's cgroup is to count whether that was too much.
    pub(super) fn eats(mut self, scene: &Scene, mebibytes: u32, kills: bool) -> Result<()> {
        let read = |unified, split| on_host(&self.bundle, "memory", unified, split);
        let limit = read("memory.max", "memory.limit_in_bytes")?;
        let process = self.container.process()?;
        let size = format!("{mebibytes}M\n");
        self.container.streams.send(size.as_bytes())?;
        let status = process.exit_code()?;
        ensure!(status == if kills { 137 } else { 0 }, "status {status}");
        let events = read("memory.events", "memory.oom_control")?;
        let counted = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .with_context(|| events.clone())?;
        ensure!((counted != "0") == kills, "{mebibytes} MiB: {events}");
        let after = read("memory.max", "memory.limit_in_bytes")?;
        ensure!(after == limit, "a limit of {after}");
        let processes = read("cgroup.procs", "cgroup.procs")?;
        ensure!(processes.is_empty(), "left in the cgroup: {processes}");
        scene.destroy(&self.container.id)
    }
}

/// A file of the container's cgroup on the host, by its name in version 2 and in version 1.
fn on_host(bundle: &Bundle, controller: &str, unified: &str, split: &str) -> Result<String> {
    let path = bundle.spec["linux"]["cgroupsPath"].as_str();
    let path = path.context("cgroupsPath")?;
    let file = if crate::runtime::unified_cgroups() {
        format!("/sys/fs/cgroup{path}/{unified}")
    } else {
        format!("/sys/fs/cgroup/{controller}{path}/{split}")
    };
    let text = fs::read_to_string(&file).with_context(|| file)?;
    Ok(text.trim().to_owned())
}

fn pids(scene: &Scene) -> Result<()> {
    let script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done; echo all; kill -9 -1";
    let few = scene
        .bundle()?
        .shell(script)
        .with(|spec| limited(spec, "pids", json!({ "limit": 8 })));
    let output = scene.run(&few)?;
    ensure!(
        !output.text().contains("all"),
        "12 processes under a limit of 8: {output}"
    );
    ensure!(output.errors().contains("fork"), "why it ended: {output}");
    let enough = scene
        .bundle()?
        .shell(script)
        .with(|spec| limited(spec, "pids", json!({ "limit": 32 })));
    scene.run(&enough)?.says(&["all\n"])?;
    Ok(())
}

fn cpu_quota(scene: &Scene) -> Result<()> {
    // The container works until the scheduler has held it back three times, and shows by how much.
    let script = "stat=/sys/fs/cgroup/cpu.stat; test -e $stat || stat=/sys/fs/cgroup/cpu/cpu.stat; \
        IFS='. '; read start rest </proc/uptime; now=$start; count=0; \
        while [ $count -lt 3 ]; do \
        while read name value; do [ $name = nr_throttled ] && count=$value; done <$stat; \
        read now rest </proc/uptime; [ $((now - start)) -lt 40 ] || exit 9; done; echo throttled";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        limited(
            spec,
            "cpu",
            json!({ "quota": 20_000, "period": 100_000, "shares": 512 }),
        );
    });
    scene.run(&bundle)?.ok()?.says(&["throttled\n"])?;
    Ok(())
}

fn cpuset(scene: &Scene) -> Result<()> {
    let script = "grep Cpus_allowed_list /proc/self/status";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        limited(spec, "cpu", json!({ "cpus": "0" }));
    });
    scene
        .run(&bundle)?
        .ok()?
        .says(&["Cpus_allowed_list:\t0\n"])?;
    Ok(())
}

fn rlimits(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("cat /proc/self/limits").with(|spec| {
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            { "type": "RLIMIT_FSIZE", "soft": 4096, "hard": 8192 },
        ]);
    });
    let text = scene.run(&bundle)?.ok()?.text();
    for (name, soft, hard) in [
        ("Max open files", "100", "200"),
        ("Max core file size", "0", "0"),
        ("Max file size", "4096", "8192"),
    ] {
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        let values: Vec<_> = line[name.len().min(line.len())..]
            .split_whitespace()
            .collect();
        ensure!(values.get(..2) == Some(&[soft, hard]), "{name} is {line:?}");
    }
    let twice = scene.bundle()?.with(|spec| {
        let limit = json!({ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 });
        spec["process"]["rlimits"] = json!([limit, limit]);
    });
    if scene.runtime == Runtime::Bulkhead {
        scene.run(&twice)?.fails()?;
    }
    Ok(())
}

fn tmpfs_size(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("dd if=/dev/zero of=/small/file bs=1024 count=4096; echo; stat -c %a:%s /small/file")
        .mount(json!({
            "destination": "/small", "type": "tmpfs", "source": "tmpfs",
            "options": ["size=1m", "mode=700"],
        }));
    let output = scene.run(&bundle)?.ok()?;
    ensure!(
        output.errors().contains("No space left"),
        "4 MiB in a tmpfs of 1 MiB: {output}"
    );
    ensure!(
        output.text().contains(":1048576\n"),
        "what fitted: {output}"
    );
    Ok(())
}

/// What only cgroup v1 has on the host: rules for devices, in their order, and marks of packets.
fn version_1(scene: &Scene) -> Result<()> {
    if !Path::new("/sys/fs/cgroup/devices").exists() {
        return skip("this host has no cgroup v1");
    }
    let bundle = scene.bundle()?.shell("echo up; sleep 1000").with(|spec| {
        spec["linux"]["resources"] = json!({
            "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
            ],
            "network": { "classID": 255, "priorities": [{ "name": "lo", "priority": 10 }] },
        });
    });
    let path = bundle.spec["linux"]["cgroupsPath"].clone();
    let path = path.as_str().context("cgroupsPath")?.to_owned();
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    let read = |controller: &str, file: &str| {
        crate::bundle::read(Path::new(&format!(
            "/sys/fs/cgroup/{controller}{path}/{file}"
        )))
    };
    let devices = read("devices", "devices.list")?;
    ensure!(devices.starts_with("c 10:229 rw\n"), "{devices}");
    ensure!(read("net_cls", "net_cls.classid")? == "255\n");
    let priorities = read("net_prio", "net_prio.ifpriomap")?;
    ensure!(priorities.contains("lo 10\n"), "{priorities}");
    scene.destroy(&container.id)
}

/// Whoever looks into the host's cgroup at `cgroupsPath` finds the limits that hold for the whole
/// virtual machine, and its figures.
fn on_the_host(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000").with(|spec| {
        spec["linux"]["resources"] = json!({
            "memory": { "limit": 128 << 20, "reservation": 64 << 20 },
            "pids": { "limit": 1000 },
            "cpu": { "shares": 2048, "quota": 200_000, "period": 100_000, "cpus": "0" },
        });
    });
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    let read = |controller, unified, split| on_host(&bundle, controller, unified, split);
    // 256 MiB of the guest and 64 of the VMM.
    let memory = read("memory", "memory.max", "memory.limit_in_bytes")?;
    ensure!(memory == (320_u64 << 20).to_string(), "memory: {memory}");
    let low = read("memory", "memory.low", "memory.soft_limit_in_bytes")?;
    ensure!(low == (64 << 20).to_string(), "reservation: {low}");
    let pids = read("pids", "pids.max", "pids.max")?;
    ensure!(pids == "1000", "pids: {pids}");
    let weight = read("cpu", "cpu.weight", "cpu.shares")?;
    ensure!(weight == "79" || weight == "2048", "shares: {weight}");
    let quota = read("cpu", "cpu.max", "cpu.cfs_quota_us")?;
    ensure!(quota.starts_with("200000"), "quota: {quota}");
    let cpus = read("cpuset", "cpuset.cpus", "cpuset.cpus")?;
    ensure!(cpus == "0", "cpus: {cpus}");
    let used: u64 = read("memory", "memory.current", "memory.usage_in_bytes")?.parse()?;
    ensure!(used > 16 << 20, "a virtual machine in {used} bytes");
    scene.destroy(&container.id)
}
