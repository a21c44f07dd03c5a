//! The container really is in a virtual machine of its own, and the host stays in charge of it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::leftovers::{command_line, descendants};
use crate::scene::{Created, Scene, skip};

super::cases!(vm;
    common: ;
    vm: own_kernel, guest_size, jailed, host_cgroup, clock, timeline, guest_log, check, several_cpus,
        console);

/// The VMM's process.
pub(super) fn vmm() -> Result<i32> {
    let found = descendants()?
        .into_iter()
        .find(|pid| command_line(*pid).contains("bulkhead-vmm"));
    found.context("no process of the VMM below this one")
}

fn idle(scene: &Scene, change: impl FnOnce(&mut Value)) -> Result<Created> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000").with(change);
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    Ok(container)
}

fn own_kernel(scene: &Scene) -> Result<()> {
    let script = "uname -r; cat /proc/sys/kernel/random/boot_id; cat /proc/cmdline; dmesg | wc -l";
    let output = scene.run_script(script)?;
    let text = output.text();
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() >= 3, "{output}");
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    ensure!(
        lines[0] != host.trim(),
        "the container runs on the host's kernel {host}"
    );
    let host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(
        lines[1] != host.trim(),
        "the container runs in the host's boot"
    );
    let again = scene
        .run_script("cat /proc/sys/kernel/random/boot_id")?
        .ok()?
        .text();
    ensure!(lines[1] != again.trim(), "two containers share a machine");
    Ok(())
}

fn guest_size(scene: &Scene) -> Result<()> {
    let memory = |output: String| -> Result<u64> {
        let number = output.split_whitespace().nth(1).context("MemTotal")?;
        Ok(number.parse::<u64>()? / 1024)
    };
    let args = ["grep", "MemTotal", "/proc/meminfo"];
    let default = memory(scene.run(&scene.bundle()?.args(&args))?.ok()?.text())?;
    ensure!(
        (150..=256).contains(&default),
        "a guest of 256 MiB shows {default} MiB"
    );
    let bundle = scene.bundle()?.args(&args).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 512 << 20 });
    });
    let limited = memory(scene.run(&bundle)?.ok()?.text())?;
    ensure!(
        limited >= 500,
        "a limit of 512 MiB in a guest of {limited} MiB"
    );
    Ok(())
}

fn several_cpus(scene: &Scene) -> Result<()> {
    if std::thread::available_parallelism()?.get() < 2 {
        return skip("a guest has no more CPUs than this host, which has one");
    }
    let bundle = scene.bundle()?.args(&["nproc"]).with(|spec| {
        spec["linux"]["resources"]["cpu"] = json!({ "quota": 200_000, "period": 100_000 });
    });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(
        output.text().trim() == "2",
        "a quota of two CPUs gives {output}"
    );
    Ok(())
}

/// What a guest that breaks out of the VMM would find (design, decisions 3 and 11).
fn jailed(scene: &Scene) -> Result<()> {
    let container = idle(scene, |_| ())?;
    let pid = vmm()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    ensure!(
        field("NoNewPrivs:") == "1",
        "no_new_privs of the VMM: {status}"
    );
    let capabilities = u64::from_str_radix(&field("CapEff:"), 16)?;
    for (bit, name) in [
        (12, "NET_ADMIN"),
        (13, "NET_RAW"),
        (16, "SYS_MODULE"),
        (17, "SYS_RAWIO"),
        (19, "SYS_PTRACE"),
        (21, "SYS_ADMIN"),
        (22, "SYS_BOOT"),
        (25, "SYS_TIME"),
        (38, "PERFMON"),
        (39, "BPF"),
    ] {
        ensure!(capabilities & (1 << bit) == 0, "the VMM has CAP_{name}");
    }
    for name in ["mnt", "pid", "ipc", "uts", "net"] {
        let own = fs::read_link(format!("/proc/self/ns/{name}"))?;
        let its = fs::read_link(format!("/proc/{pid}/ns/{name}"))?;
        ensure!(own != its, "the VMM is in the host's {name} namespace");
    }
    let root = format!("/proc/{pid}/root");
    for path in ["etc", "usr", "home", "var/lib", "proc/1", "sys/class"] {
        ensure!(
            !Path::new(&root).join(path).exists(),
            "the VMM can see the host's /{path}"
        );
    }
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        ensure!(
            !target.is_dir() || target == Path::new("/"),
            "the VMM holds {}",
            target.display()
        );
    }
    scene.destroy(&container.id)
}

/// The whole virtual machine counts as the container on the host (design, decision 9).
fn host_cgroup(scene: &Scene) -> Result<()> {
    let container = idle(scene, |spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 128 << 20 });
    })?;
    let path = memory_cgroup(vmm()?)?;
    ensure!(
        path.contains(&scene.prefix),
        "the VMM is in {path}, not where the spec wants it"
    );
    let monitor = memory_cgroup(container.pid)?;
    ensure!(
        monitor == path,
        "whoever asks for the cgroup of the container's process gets {monitor}, not {path}"
    );
    let (file, base) = if crate::runtime::unified_cgroups() {
        ("memory.max", "/sys/fs/cgroup")
    } else {
        ("memory.limit_in_bytes", "/sys/fs/cgroup/memory")
    };
    let limit = fs::read_to_string(format!("{base}{path}/{file}"))?;
    let limit: u64 = limit
        .trim()
        .parse()
        .with_context(|| format!("{file} is {limit}"))?;
    let mib = limit >> 20;
    ensure!(
        (128..=512).contains(&mib),
        "{file} on the host is {mib} MiB for a container of 128"
    );
    scene.destroy(&container.id)
}

/// A process's path in the hierarchy that limits memory.
fn memory_cgroup(pid: i32) -> Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let controllers = if crate::runtime::unified_cgroups() {
        "0::"
    } else {
        ":memory:"
    };
    let line = text
        .lines()
        .find(|line| line.contains(controllers))
        .context("the memory cgroup")?;
    Ok(line.rsplit(':').next().context("the path")?.to_owned())
}

fn clock(scene: &Scene) -> Result<()> {
    let now = || -> Result<u64> {
        Ok(std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)?
            .as_secs())
    };
    let before = now()?;
    let output = scene.run(&scene.bundle()?.args(&["date", "+%s"]))?.ok()?;
    let guest: u64 = output.text().trim().parse()?;
    let after = now()?;
    ensure!(
        (before..=after).contains(&guest),
        "{guest} in the guest, {before} to {after} outside"
    );
    Ok(())
}

/// `--timeline FILE` tells where the time of a start went.
fn timeline(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    bundle.write()?;
    let file = scene.path("timeline.json");
    let mut command = scene.command(&["run", "--timeline"]);
    command
        .arg(&file)
        .arg("--bundle")
        .arg(&bundle.path)
        .arg(scene.id());
    crate::process::Process::spawn(command)?.finish()?.ok()?;
    let phases = crate::bench::phases(&file)?;
    let names: BTreeSet<_> = phases.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(names.len() >= 4, "phases: {names:?}");
    ensure!(
        phases.iter().all(|(_, ms)| *ms >= 0.0 && *ms < 60_000.0),
        "phases: {phases:?}"
    );
    Ok(())
}

/// `--guest-log FILE` holds the guest kernel's messages, for whoever looks into a failure.
fn guest_log(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?;
    bundle.write()?;
    let file = scene.path("guest.log");
    let mut command = scene.command(&["run", "--guest-log"]);
    command
        .arg(&file)
        .arg("--bundle")
        .arg(&bundle.path)
        .arg(scene.id());
    crate::process::Process::spawn(command)?.finish()?.ok()?;
    let text = crate::bundle::read(&file)?;
    ensure!(text.contains("Linux version"), "the guest's log: {text}");
    Ok(())
}

fn check(scene: &Scene) -> Result<()> {
    let output = scene.call(&["check"])?.ok()?;
    ensure!(
        output.text().contains("kvm") || output.text().contains("KVM"),
        "{output}"
    );
    scene.expect_nothing_left()
}

/// `--guest-debug` boots an image with a shell, which `console` opens in the guest itself.
fn console(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000");
    bundle.write()?;
    let id = scene.id();
    let mut command = scene.command(&["run", "--guest-debug", "--bundle"]);
    command.arg(&bundle.path).arg(&id);
    let mut running = crate::process::Process::spawn(command)?;
    running.wait_for("up\n")?;
    let mut shell = crate::process::Process::spawn(scene.command(&["console", &id]))?;
    shell.send(b"cat /proc/1/comm; hostname; exit 7\n")?;
    let output = shell.finish()?.expect(7)?;
    ensure!(
        output.text().contains("bulkhead-agent") || output.text().contains("init"),
        "process 1 of the guest: {output}"
    );
    scene.call(&["kill", &id, "KILL"])?.ok()?;
    running.finish()?.expect(137)?;
    // The ordinary image has none, and the error says what to do.
    let container = idle(scene, |_| ())?;
    let errors = scene.call(&["console", &container.id])?.fails()?;
    ensure!(errors.contains("--guest-debug"), "{errors}");
    scene.destroy(&container.id)
}
