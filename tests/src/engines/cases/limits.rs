//! Limits: shown in the container, and kept.

use std::fs;

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::Process;

super::engine_cases!(limits;
    [both quick] out_of_memory;
    [both] memory, cpus, cpuset, pids, weight, host_cgroup;
    [both vm] machine_shows_its_size;
    [podman] without_cgroups);

fn memory(engine: &Engine) -> Result<()> {
    let options = [
        "--memory",
        "100m",
        "--memory-reservation",
        "50m",
        "--memory-swap",
        "150m",
    ];
    engine
        .script(
            &options,
            "cd /sys/fs/cgroup; cat memory.max memory.low memory.swap.max",
        )?
        .ok()?
        .says(&["104857600\n52428800\n52428800\n"])?;
    Ok(())
}

fn cpus(engine: &Engine) -> Result<()> {
    engine
        .script(&["--cpus", "0.5"], "cat /sys/fs/cgroup/cpu.max")?
        .ok()?
        .says(&["50000 100000\n"])?;
    Ok(())
}

fn cpuset(engine: &Engine) -> Result<()> {
    engine
        .script(
            &["--cpuset-cpus", "0"],
            "cat /sys/fs/cgroup/cpuset.cpus; nproc",
        )?
        .ok()?
        .says(&["0\n1\n"])?;
    Ok(())
}

fn pids(engine: &Engine) -> Result<()> {
    let script =
        "cat /sys/fs/cgroup/pids.max; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done";
    let output = engine.script(&["--pids-limit", "10"], script)?;
    ensure!(output.text().starts_with("10\n"), "{output}");
    ensure!(
        output.errors().contains("can't fork"),
        "no fork failed: {output}"
    );
    Ok(())
}

fn weight(engine: &Engine) -> Result<()> {
    engine
        .script(&["--cpu-shares", "512"], "cat /sys/fs/cgroup/cpu.weight")?
        .ok()?
        .says(&["20\n"])?;
    Ok(())
}

fn out_of_memory(engine: &Engine) -> Result<()> {
    // A string that grows in the shell itself.
    let script = "a=x; while :; do a=$a$a; done";
    engine.start(
        "made-oom",
        &[
            "--memory",
            "30m",
            "--memory-swap",
            "30m",
            IMAGE,
            "sh",
            "-c",
            script,
        ],
    )?;
    engine.call(&["wait", "made-oom"])?.ok()?.says(&["137"])?;
    if engine.podman() {
        // Debian's conmon notes it in the directory that it was started in, where Podman does not look.
        let noted = fs::exists(engine.path("oom"))?;
        ensure!(noted, "conmon knows of no want of memory");
    } else {
        engine.expect_field("made-oom", "{{.State.OOMKilled}}", "true")?;
    }
    engine.remove(&["made-oom"])
}

fn host_cgroup(engine: &Engine) -> Result<()> {
    engine.start(
        "made-hc",
        &[
            "--memory",
            "100m",
            "--pids-limit",
            "50",
            IMAGE,
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-hc", "ready")?;
    let pid = engine.field("made-hc", "{{.State.Pid}}")?;
    let line = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = line.trim().trim_start_matches("0::").to_owned();
    ensure!(
        path.contains("made-hc") || path.len() > 60,
        "not in a cgroup of its own: {line}"
    );
    let max = std::fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.max"))?;
    let max: u64 = max.trim().parse().unwrap_or(u64::MAX);
    ensure!(
        (100 << 20..400 << 20).contains(&max),
        "the host allows {max} bytes for a limit of 100 MiB"
    );
    engine.remove(&["made-hc"])
}

fn machine_shows_its_size(engine: &Engine) -> Result<()> {
    let free = engine
        .script(
            &["--memory", "100m"],
            "awk '/MemTotal/ {print $2}' /proc/meminfo",
        )?
        .ok()?
        .text();
    let kilobytes: u64 = free.trim().parse()?;
    ensure!(
        (64 << 10..512 << 10).contains(&kilobytes),
        "{kilobytes} kB of memory for a limit of 100 MiB"
    );
    Ok(())
}

fn without_cgroups(engine: &Engine) -> Result<()> {
    // As docs/podman.md says; Podman reads the key without the s of its manual.
    let configuration = engine.path("containers.conf");
    std::fs::write(
        &configuration,
        "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
         runtime_supports_nocgroup = [\"bulkhead\", \"crun\"]\n\
         [engine.runtimes]\nbulkhead = [\"/opt/bulkhead/bin/bulkhead\"]\n",
    )?;
    let mut command = engine.command(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--cgroups",
        "disabled",
        IMAGE,
        "echo",
        "runs",
    ]);
    command.env("CONTAINERS_CONF", &configuration);
    Process::spawn(command)?.finish()?.ok()?.says(&["runs\n"])?;
    Ok(())
}
