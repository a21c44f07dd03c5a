//! The host's side: hooks, logs, cgroups, files that the runtime writes.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::Process;
use crate::scene::Scene;

super::cases!(host;
    common: features, hooks, failing_hook, log_formats, pid_file_is_replaced_whole, version,
        mount_namespace_of_the_pid;
    vm: default_cgroup, foreground_cgroup, no_cgroup, named);

fn features(scene: &Scene) -> Result<()> {
    let output = scene.call(&["features"])?;
    if output.code() != 0 && scene.runtime == crate::runtime::Runtime::Crun {
        return crate::scene::skip("this crun has no `features`");
    }
    let features: Value = serde_json::from_slice(&output.ok()?.stdout)?;
    ensure!(
        features["ociVersionMin"].is_string() && features["ociVersionMax"].is_string(),
        "{features}"
    );
    let list = |pointer: &str| {
        features
            .pointer(pointer)
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
    };
    for name in ["pid", "network", "ipc", "uts", "mount", "user", "cgroup"] {
        ensure!(
            list("/linux/namespaces").contains(&json!(name)),
            "namespace {name}: {features}"
        );
    }
    ensure!(
        list("/linux/capabilities").contains(&json!("CAP_CHOWN")),
        "{features}"
    );
    ensure!(
        list("/mountOptions").contains(&json!("rbind")),
        "{features}"
    );
    for hook in ["createRuntime", "poststart", "poststop"] {
        ensure!(
            list("/hooks").contains(&json!(hook)),
            "hook {hook}: {features}"
        );
    }
    Ok(())
}

/// Hooks on the host get the state on standard input, in the order of the specification.
fn hooks(scene: &Scene) -> Result<()> {
    let log = scene.path("hooks.log");
    let hook = |name: &str| -> Result<Value> {
        let text = format!(
            "echo {name} \"$1\" \"$WHO\" $(grep -o '\"status\": *\"[a-z]*\"' | tr -d ' ') >>{}",
            log.display()
        );
        let path = scene.script(name, &text)?;
        Ok(
            json!([{ "path": path, "args": [name, "argument"], "env": ["WHO=me", "PATH=/usr/bin:/bin"] }]),
        )
    };
    let bundle = scene.bundle()?.shell("echo ran").with(|_| ());
    let mut bundle = bundle;
    for name in ["prestart", "createRuntime", "poststart", "poststop"] {
        bundle.spec["hooks"][name] = hook(name)?;
    }
    let container = scene.create(&bundle)?;
    let lines = || fs::read_to_string(&log).unwrap_or_default();
    let after_create = lines();
    ensure!(
        after_create.contains("prestart argument me")
            && after_create.contains("createRuntime argument me"),
        "after create: {after_create:?}"
    );
    // runc 1.1 runs poststart at the end of `create` already.
    let early = scene.runtime == crate::runtime::Runtime::Runc;
    ensure!(
        early || !after_create.contains("poststart"),
        "after create: {after_create:?}"
    );
    let process = container.process()?;
    scene.call(&["start", &container.id])?.ok()?;
    ensure!(
        lines().contains("poststart argument me"),
        "after start: {:?}",
        lines()
    );
    process.wait()?;
    scene.call(&["delete", &container.id])?.ok()?;
    let all = lines();
    let names: Vec<_> = all
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    ensure!(
        names == ["prestart", "createRuntime", "poststart", "poststop"],
        "order: {all:?}"
    );
    Ok(())
}

fn failing_hook(scene: &Scene) -> Result<()> {
    let hook = scene.script("fails", "echo the reason >&2; exit 3")?;
    let mut bundle = scene.bundle()?.shell("echo ran");
    bundle.spec["hooks"]["createRuntime"] = json!([{ "path": hook }]);
    let output = scene.run(&bundle)?;
    ensure!(
        !output.text().contains("ran"),
        "the container ran in spite of its hook: {output}"
    );
    output.fails()?;
    scene.expect_nothing_left()?;
    let mut bundle = scene.bundle()?.shell("echo ran");
    bundle.spec["hooks"]["createRuntime"] = json!([{ "path": "/no/such/hook" }]);
    scene.run(&bundle)?.fails()?;
    scene.expect_nothing_left()
}

fn log_formats(scene: &Scene) -> Result<()> {
    if scene.runtime == crate::runtime::Runtime::Crun {
        return crate::scene::skip("crun 1.8 reports a missing bundle before it opens its log");
    }
    for format in ["text", "json"] {
        let log = scene.path(&format!("log.{format}"));
        let mut command = std::process::Command::new(scene.runtime.program());
        command
            .arg("--root")
            .arg(&scene.root)
            .arg("--log")
            .arg(&log);
        command.args([
            "--log-format",
            format,
            "run",
            "--bundle",
            "/no/such/bundle",
            &scene.id(),
        ]);
        Process::spawn(command)?.finish()?.fails()?;
        let text = fs::read_to_string(&log).context("the log file")?;
        let last = text.lines().last().context("the log is empty")?;
        ensure!(
            last.contains("no/such/bundle"),
            "the log does not tell what failed: {text}"
        );
        if format == "json" {
            // containerd and podman look for these fields.
            let entry: Value = serde_json::from_str(last).with_context(|| last.to_owned())?;
            ensure!(entry["level"] == "error", "level: {entry}");
            ensure!(
                entry["msg"].is_string() && entry["time"].is_string(),
                "msg and time: {entry}"
            );
        }
    }
    Ok(())
}

fn pid_file_is_replaced_whole(scene: &Scene) -> Result<()> {
    let container = scene.create(&scene.bundle()?)?;
    // An engine that finds the file must never find half of it: it is renamed into place.
    let beside = crate::leftovers::entries(&scene.directory);
    let leftover = beside
        .iter()
        .any(|name| name.contains(".tmp") || name.starts_with(".1"));
    ensure!(!leftover, "beside the pid file: {beside:?}");
    scene.destroy(&container.id)
}

fn version(scene: &Scene) -> Result<()> {
    let mut command = std::process::Command::new(scene.runtime.program());
    command.arg("--version");
    let text = Process::spawn(command)?.finish()?.ok()?.text();
    ensure!(
        text.starts_with(&format!("{} version ", scene.runtime.program())),
        "{text}"
    );
    ensure!(
        text.lines().any(|line| line.starts_with("spec: 1.")),
        "no spec version: {text}"
    );
    Ok(())
}

/// The caller of a `run` in the foreground has put it into a cgroup; the virtual machine and the
/// container's pid are in the container's.
fn foreground_cgroup(scene: &Scene) -> Result<()> {
    let cgroup = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup"));
    let bundle = scene.bundle()?.shell("echo up; read x");
    let path = bundle.spec["linux"]["cgroupsPath"].clone();
    let path = path.as_str().context("cgroupsPath")?.to_owned();
    let (id, mut process) = scene.start_named(&bundle)?;
    process.wait_for("up\n")?;
    let (own, monitor) = (
        cgroup("self")?,
        cgroup(&process.pid()?.as_raw_nonzero().to_string())?,
    );
    ensure!(monitor == own, "{monitor}, not {own}");
    let pid = scene.state(&id)?["pid"].to_string();
    for pid in [pid, super::vm::vmm()?.to_string()] {
        let place = cgroup(&pid)?;
        ensure!(place.lines().all(|line| line.ends_with(&path)), "{place}");
    }
    process.send(b"\n")?;
    process.finish()?.ok()?;
    scene.expect_nothing_left()
}

/// Podman's `--cgroups=disabled`.
fn no_cgroup(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .shell("cat /sys/fs/cgroup/pids.max")
        .with(|spec| {
            spec["linux"]["resources"]["pids"] = json!({ "limit": 77 });
        });
    bundle.write()?;
    let id = scene.id();
    let mut command = scene.command(&["--cgroup-manager", "disabled", "run", "--bundle"]);
    command.arg(&bundle.path).arg(&id);
    let mut process = Process::spawn(command)?;
    process.wait_for("77\n")?;
    let made = crate::leftovers::cgroups(&scene.prefix);
    ensure!(made.is_empty(), "{made:?}");
    process.finish()?.ok()?;
    scene.expect_nothing_left()
}

/// Without `cgroupsPath` a container has a cgroup of its own all the same, and it goes with it.
fn default_cgroup(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000").with(|spec| {
        if let Some(linux) = spec["linux"].as_object_mut() {
            linux.remove("cgroupsPath");
        }
    });
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    ensure!(
        !crate::leftovers::cgroups(&container.id).is_empty(),
        "no cgroup on the host"
    );
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

/// `podman cp` reads and writes in the mount namespace of the container's process.
fn mount_namespace_of_the_pid(scene: &Scene) -> Result<()> {
    let (volume, fixed) = (scene.path("volume"), scene.path("fixed"));
    fs::create_dir(&volume)?;
    fs::write(&fixed, "fixed\n")?;
    let bundle = scene
        .bundle()?
        .shell("cat /root/theirs /volume/theirs; ls /volume")
        .bind(&volume, "/volume", &["rbind"])
        .bind(&fixed, "/etc/fixed", &["bind", "ro"]);
    let mut container = scene.create(&bundle)?;
    let inside = |script: &str| {
        let mut command = std::process::Command::new("nsenter");
        let pid = format!("--target={}", container.pid);
        command.args([&pid, "--mount", "/bin/sh", "-c", script]);
        Process::spawn(command)?.finish()
    };
    inside("echo a >/root/theirs && echo b >/volume/theirs && cat /etc/fixed && ls /var")?
        .ok()?
        .says(&["fixed\ndata\n"])?;
    ensure!(
        inside("echo x >/etc/fixed")?.code() != 0,
        "a read-only file was written"
    );
    scene.call(&["start", &container.id])?.ok()?;
    container.streams.drain()?;
    let output = container.streams.stdout();
    ensure!(output == "a\nb\ntheirs\n", "{output}");
    ensure!(
        bundle.rootfs().join("root/theirs").is_file(),
        "another root"
    );
    scene.destroy(&container.id)
}

/// Whoever lists the host's processes sees whose they are, and what runs in the container.
fn named(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.args(&["sleep", "4321"]);
    let container = scene.create(&bundle)?;
    let command = |process: &Path| fs::read(process.join("cmdline")).unwrap_or_default();
    let stand_in = Path::new("/proc").join(container.pid.to_string());
    ensure!(command(&stand_in) == b"sleep\x004321\0");
    let mut processes = vec![stand_in];
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        if command(&process).ends_with(b"\0monitor\0") {
            processes.push(process);
        }
    }
    ensure!(processes.len() >= 2, "no monitor");
    for process in processes {
        let name = crate::bundle::read(&process.join("comm"))?;
        ensure!(name == "bulkhead\n", "{name}");
    }
    scene.destroy(&container.id)
}
