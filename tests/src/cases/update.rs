//! `update`: limits of a container that runs, up and down, inside and on the host.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::{Output, Process};
use crate::runtime::{Runtime, unified_cgroups};
use crate::scene::{Created, Scene};

super::cases!(update;
    common: memory, processes, cpu_time, from_json;
    vm: on_the_host, beyond_the_guest, refused_options, states);

fn idle(scene: &Scene, resources: Value) -> Result<Created> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000").with(|spec| {
        for (name, part) in resources.as_object().into_iter().flatten() {
            spec["linux"]["resources"][name] = part.clone();
        }
    });
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    Ok(container)
}

fn exec(scene: &Scene, container: &Created, script: &str) -> Result<Output> {
    scene.call(&["exec", &container.id, "/bin/sh", "-c", script])
}

fn update(scene: &Scene, container: &Created, options: &[&str]) -> Result<Output> {
    let mut args = vec!["update"];
    args.extend(options);
    args.push(&container.id);
    scene.call(&args)
}

fn memory(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({ "memory": { "limit": 128 << 20 } }))?;
    let use_64_mib = "dd if=/dev/zero of=/dev/null bs=67108864 count=1 2>/dev/null; echo $?";
    exec(scene, &container, use_64_mib)?.ok()?.says(&["0\n"])?;
    // crun knows no units.
    update(scene, &container, &["--memory", "33554432"])?.ok()?;
    exec(scene, &container, use_64_mib)?.says(&["137\n"])?;
    update(scene, &container, &["--memory", "134217728"])?.ok()?;
    exec(scene, &container, use_64_mib)?.ok()?.says(&["0\n"])?;
    scene.expect_status(&container.id, "running")?;
    scene.destroy(&container.id)
}

fn processes(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({ "pids": { "limit": 100 } }))?;
    // What is left of an attempt that fails must not hold the streams.
    let fork = "for i in 1 2 3 4 5 6 7 8; do sleep 100 </dev/null >/dev/null 2>&1 & done; \
        echo all; kill $(jobs -p)";
    exec(scene, &container, fork)?.says(&["all\n"])?;
    update(scene, &container, &["--pids-limit", "6"])?.ok()?;
    let output = exec(scene, &container, fork)?;
    ensure!(!output.text().contains("all"), "8 processes: {output}");
    update(scene, &container, &["--pids-limit", "200"])?.ok()?;
    exec(scene, &container, fork)?.says(&["all\n"])?;
    scene.destroy(&container.id)
}

/// The quota and the period as the container sees them.
fn quota(scene: &Scene, container: &Created) -> Result<String> {
    let script = "cd /sys/fs/cgroup; cat cpu.max 2>/dev/null || \
        echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us)";
    let text = exec(scene, container, script)?.ok()?.text();
    Ok(text.trim().replace("-1", "max"))
}

fn cpu_time(scene: &Scene) -> Result<()> {
    let container = idle(
        scene,
        json!({ "cpu": { "quota": 50_000, "period": 100_000 } }),
    )?;
    ensure!(quota(scene, &container)? == "50000 100000");
    let options = ["--cpu-quota", "20000", "--cpu-period", "50000"];
    update(scene, &container, &options)?.ok()?;
    ensure!(quota(scene, &container)? == "20000 50000");
    // What is not named stays.
    update(scene, &container, &["--cpu-share", "512"])?.ok()?;
    ensure!(quota(scene, &container)? == "20000 50000");
    scene.destroy(&container.id)
}

fn from_json(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({}))?;
    let resources = json!({ "cpu": { "quota": 30_000, "period": 60_000 } }).to_string();
    // crun 1.8 wants a path, and opens /dev/stdin for "-", which the test host does not have.
    if scene.runtime != Runtime::Crun {
        let mut process =
            Process::spawn(scene.command(&["update", "--resources", "-", &container.id]))?;
        process.send(resources.as_bytes())?;
        process.finish()?.ok()?;
        ensure!(quota(scene, &container)? == "30000 60000");
    }
    let file = scene.path("resources.json");
    fs::write(&file, resources.replace("30000", "40000"))?;
    let name = file.to_str().context("a path in UTF-8")?;
    update(scene, &container, &["-r", name])?.ok()?;
    ensure!(quota(scene, &container)? == "40000 60000");
    fs::write(&file, "{")?;
    update(scene, &container, &["-r", name])?.fails()?;
    ensure!(quota(scene, &container)? == "40000 60000");
    scene.destroy(&container.id)
}

/// A file of the container's cgroup on the host: the first name is version 2's.
fn on_host(container: &Created, names: [&str; 2]) -> Result<String> {
    let unified = unified_cgroups();
    let cgroups = crate::leftovers::cgroups(container.id.trim_end_matches(char::is_numeric));
    let found = cgroups
        .iter()
        .map(|place| place.join(names[usize::from(!unified)]))
        .find(|file| file.exists());
    let file = found.with_context(|| format!("{names:?} in {cgroups:?}"))?;
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

fn on_the_host(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({ "memory": { "limit": 128 << 20 } }))?;
    let pids = || on_host(&container, ["pids.max", "pids.max"]);
    let weight = || on_host(&container, ["cpu.weight", "cpu.shares"]);
    ensure!(pids()? == "max", "{}", pids()?);
    let options = ["--pids-limit", "1000", "--cpu-share", "2048"];
    update(scene, &container, &options)?.ok()?;
    ensure!(pids()? == "1000", "{}", pids()?);
    let expected = if unified_cgroups() { "79" } else { "2048" };
    ensure!(weight()? == expected, "{}", weight()?);
    update(scene, &container, &["--pids-limit", "-1"])?.ok()?;
    ensure!(pids()? == "max", "{}", pids()?);
    // What the guest refuses is taken back on the host.
    let check = json!({ "pids": { "limit": 500 },
        "memory": { "limit": 4096, "checkBeforeUpdate": true } });
    let mut process =
        Process::spawn(scene.command(&["update", "--resources", "-", &container.id]))?;
    process.send(check.to_string().as_bytes())?;
    process.finish()?.fails()?;
    ensure!(pids()? == "max", "{}", pids()?);
    scene.destroy(&container.id)
}

fn beyond_the_guest(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({}))?;
    let errors = update(scene, &container, &["--memory", "1g"])?.fails()?;
    for needle in ["1024 MiB", "256 MiB", "guest.memory_mib"] {
        ensure!(errors.contains(needle), "{needle}: {errors}");
    }
    update(scene, &container, &["--memory", "200m"])?.ok()?;
    update(scene, &container, &["--memory", "-1"])?.ok()?;
    scene.destroy(&container.id)
}

fn refused_options(scene: &Scene) -> Result<()> {
    let container = idle(scene, json!({}))?;
    for options in [
        &["--cpu-rt-runtime", "1000"][..],
        &["--kernel-memory", "5m"],
        &["--l3-cache-schema", "L3:0=f"],
        &["--memory", "lots"],
        &["--cpu-idle", "7"],
        &["--resources", "/no/such/file"],
        &["--resources", "-", "--memory", "5m"],
        &[],
    ] {
        let errors = update(scene, &container, options)?.fails()?;
        ensure!(!errors.trim().is_empty(), "no reason for {options:?}");
    }
    let wrong = json!({ "memory": { "limt": 5 } }).to_string();
    let mut process =
        Process::spawn(scene.command(&["update", "--resources", "-", &container.id]))?;
    process.send(wrong.as_bytes())?;
    let errors = process.finish()?.fails()?;
    ensure!(errors.contains("memory.limt"), "{errors}");
    scene.destroy(&container.id)
}

fn states(scene: &Scene) -> Result<()> {
    let created = scene.create(&scene.bundle()?)?;
    update(scene, &created, &["--pids-limit", "50"])?.ok()?;
    let process = created.process()?;
    scene.call(&["start", &created.id])?.ok()?;
    process.wait()?;
    let errors = update(scene, &created, &["--pids-limit", "60"])?.fails()?;
    ensure!(errors.contains("not running"), "{errors}");
    scene.destroy(&created.id)
}
