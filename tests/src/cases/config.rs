//! The configuration file, and what it decides about guests; systemd's form of cgroup paths.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::bundle::Bundle;
use crate::process::{Output, Process};
use crate::scene::Scene;

super::cases!(config;
    common: ;
    vm: guest_size, annotations, unknown_properties, lsm_labels, log, mistakes, systemd_cgroup);

fn file(scene: &Scene, text: &str) -> Result<PathBuf> {
    let path = scene.path("config.toml");
    fs::write(&path, text)?;
    Ok(path)
}

/// Runs a bundle by the rules of a configuration file.
fn run_with(scene: &Scene, config: &str, bundle: &Bundle) -> Result<Output> {
    bundle.write()?;
    let mut command = Command::new(scene.runtime.program());
    command
        .arg("--config")
        .arg(file(scene, config)?)
        .arg("--root")
        .arg(&scene.root)
        .args(["run", "--bundle"])
        .arg(&bundle.path)
        .arg(scene.id());
    Process::spawn(command)?.finish()
}

/// The guest's memory in MiB and its CPUs.
fn size(scene: &Scene, config: &str, annotations: Value) -> Result<(u64, u64)> {
    let script = "grep MemTotal /proc/meminfo; nproc";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        spec["annotations"] = annotations;
    });
    let text = run_with(scene, config, &bundle)?.ok()?.text();
    let numbers: Vec<u64> = text
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [memory, cpus] = numbers[..] else {
        anyhow::bail!("{text}");
    };
    Ok((memory / 1024, cpus))
}

fn guest_size(scene: &Scene) -> Result<()> {
    let (memory, cpus) = size(scene, "[guest]\nmemory_mib = 128\n", json!({}))?;
    ensure!((60..=128).contains(&memory) && cpus == 1, "{memory} {cpus}");
    let bundle = scene.bundle()?.with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 512 << 20 });
    });
    let output = run_with(scene, "[guest]\nmax_memory_mib = 300\n", &bundle)?;
    let errors = output.fails()?;
    for needle in ["linux.resources.memory.limit", "guest.max_memory_mib"] {
        ensure!(errors.contains(needle), "{needle}: {errors}");
    }
    scene.expect_nothing_left()
}

fn annotations(scene: &Scene) -> Result<()> {
    let name = "org.bulkhead.guest.memory-mib";
    let wish = json!({ name: "400" });
    let (memory, _) = size(scene, "", wish.clone())?;
    ensure!(memory <= 256, "an annotation that nobody allowed: {memory}");
    let allow = format!("[annotations]\nallow = [{name:?}]\n");
    let (memory, _) = size(scene, &allow, wish)?;
    ensure!((300..=400).contains(&memory), "{memory}");
    let bundle = scene
        .bundle()?
        .with(|spec| spec["annotations"] = json!({ name: "a lot" }));
    let errors = run_with(scene, &allow, &bundle)?.fails()?;
    ensure!(errors.contains(name), "{errors}");
    scene.expect_nothing_left()
}

fn unknown_properties(scene: &Scene) -> Result<()> {
    let bundle = scene
        .bundle()?
        .with(|spec| spec["process"]["noNewPrivilges"] = json!(true));
    let errors = run_with(scene, "", &bundle)?.fails()?;
    for needle in ["process.noNewPrivilges", "--unknown-properties=warn"] {
        ensure!(errors.contains(needle), "{needle}: {errors}");
    }
    let output = run_with(scene, "unknown_properties = \"warn\"\n", &bundle)?.ok()?;
    ensure!(output.errors().contains("noNewPrivilges"), "{output}");
    // A newer version of the specification may know it.
    let newer = bundle.with(|spec| spec["ociVersion"] = json!("1.9.0"));
    run_with(scene, "", &newer)?.ok()?;
    scene.expect_nothing_left()
}

/// What engines write on hosts with AppArmor or SELinux.
fn lsm_labels(scene: &Scene) -> Result<()> {
    let labelled = |bundle: Bundle| {
        bundle.with(|spec| {
            spec["process"]["apparmorProfile"] = json!("containers-default-0.50.1");
            spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0:c1,c2");
            spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0:c1,c2");
        })
    };
    let named = [
        "process.apparmorProfile",
        "process.selinuxLabel",
        "linux.mountLabel",
    ];
    let bundle = labelled(scene.bundle()?.shell("echo up"));
    let output = run_with(scene, "", &bundle)?.ok()?;
    ensure!(output.text() == "up\n", "{output}");
    for name in named {
        ensure!(output.errors().contains(name), "{name}: {output}");
    }
    let errors = run_with(scene, "lsm_labels = \"refuse\"\n", &bundle)?.fails()?;
    for name in named {
        ensure!(errors.contains(name), "{name}: {errors}");
    }
    let container = scene.start(&labelled(scene.bundle()?.shell("sleep 1000")))?;
    for option in ["--apparmor", "--process-label"] {
        let args = ["exec", option, "some", &container.id, "/bin/echo", "ran"];
        let output = scene.call(&args)?.ok()?;
        ensure!(output.text() == "ran\n", "{output}");
        ensure!(output.errors().contains(option), "{output}");
    }
    let args = ["exec", "--apparmor", "", &container.id, "/bin/true"];
    let output = scene.call(&args)?.ok()?;
    ensure!(output.errors().is_empty(), "{output}");
    scene.destroy(&container.id)?;
    scene.expect_nothing_left()
}

fn log(scene: &Scene) -> Result<()> {
    let log = scene.path("bulkhead.log");
    let config = format!(
        "[log]\nformat = \"json\"\nfile = {:?}\n",
        log.display().to_string()
    );
    let bundle = scene.bundle()?.args(&["no-such-program"]);
    run_with(scene, &config, &bundle)?.expect(127)?;
    let text = crate::bundle::read(&log)?;
    let last = text.lines().last().context("the log is empty")?;
    let entry: Value = serde_json::from_str(last).with_context(|| last.to_owned())?;
    ensure!(entry["level"] == "error", "{entry}");
    scene.expect_nothing_left()
}

fn mistakes(scene: &Scene) -> Result<()> {
    for (text, needle) in [
        (
            "[guest]\nmemory = 5\n",
            "config.toml, line 2: unknown field `memory`",
        ),
        ("[guest]\nmemory_mib = 5\n", "guest.memory_mib"),
        ("nonsense", "config.toml, line 1"),
    ] {
        let errors = run_with(scene, text, &scene.bundle()?)?.fails()?;
        ensure!(errors.contains(needle), "{needle}: {errors}");
    }
    // What is there can be removed whatever the file says.
    let container = scene.start(&scene.bundle()?.shell("sleep 1000"))?;
    let config = file(scene, "nonsense")?;
    let mut command = Command::new(scene.runtime.program());
    command
        .arg("--config")
        .arg(config)
        .arg("--root")
        .arg(&scene.root)
        .args(["delete", "--force", &container.id]);
    Process::spawn(command)?.finish()?.ok()?;
    scene.expect_nothing_left()
}

fn systemd_cgroup(scene: &Scene) -> Result<()> {
    let run = |path: Value| -> Result<(String, Output)> {
        let bundle = scene.bundle()?.shell("echo up; read x").with(|spec| {
            spec["linux"]["cgroupsPath"] = path;
        });
        bundle.write()?;
        let id = scene.id();
        let mut command = Command::new(scene.runtime.program());
        command
            .arg("--systemd-cgroup")
            .arg("--root")
            .arg(&scene.root)
            .args(["run", "--bundle"])
            .arg(&bundle.path)
            .arg(&id);
        let mut process = Process::spawn(command)?;
        process.wait_for("up\n")?;
        let places = crate::leftovers::cgroups(&scene.prefix);
        let places = places.iter().map(|place| format!("{}\n", place.display()));
        let places = places.collect();
        process.send(b"\n")?;
        Ok((places, process.finish()?))
    };
    let name = format!("bta.slice:pre:{}", scene.id());
    let (places, output) = run(json!(name))?;
    output.ok()?;
    let scope = format!("/bta.slice/pre-{}.scope\n", &name["bta.slice:pre:".len()..]);
    ensure!(places.contains(&scope), "{scope} in {places}");
    ensure!(
        !Path::new("/sys/fs/cgroup/bta.slice").exists(),
        "the slice that was made is left"
    );
    let Err(refused) = run(json!("/plain/path")) else {
        anyhow::bail!("a plain path was accepted");
    };
    let refused = format!("{refused:#}");
    ensure!(refused.contains("slice:prefix:name"), "{refused}");
    scene.expect_nothing_left()
}
