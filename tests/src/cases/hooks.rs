//! Hooks in their places (runtime-spec, config "POSIX-platform Hooks"), and hooks that fail, hang
//! or do not listen. The order of those on the host is in `host`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::runtime::Runtime;
use crate::scene::{Scene, skip};

super::cases!(hooks;
    common: around_the_process, failing_before_create, hanging, deaf, failing_start;
    vm: namespaces, failing_after_start, bad_hooks);

/// A hook of the host that appends a line and its state to a file.
fn noting(scene: &Scene, name: &str) -> Result<Value> {
    let text = format!("{{ echo hook {name}; cat; echo; }} >>{}", log(scene));
    let path = scene.script(name, &text)?;
    Ok(json!([{ "path": path, "env": ["PATH=/usr/bin:/bin"] }]))
}

fn log(scene: &Scene) -> String {
    scene.path("hooks.log").display().to_string()
}

fn around_the_process(scene: &Scene) -> Result<()> {
    let mut bundle = scene.bundle()?.shell("cat /var/data/hook; echo ran");
    let state = "/var/data/hook";
    bundle.spec["hooks"] = json!({
        "createRuntime": noting(scene, "createRuntime")?,
        "createContainer": noting(scene, "createContainer")?,
        "startContainer": [{ "path": "/bin/sh", "env": ["PATH=/bin"],
            "args": ["sh", "-c", format!("{{ echo in the container; cat; echo; }} >{state}")] }],
    });
    let mut container = scene.create(&bundle)?;
    let lines = fs::read_to_string(log(scene)).unwrap_or_default();
    let names: Vec<_> = lines
        .lines()
        .filter_map(|line| line.strip_prefix("hook "))
        .collect();
    ensure!(names == ["createRuntime", "createContainer"], "{lines}");
    for line in lines.lines().filter(|line| line.starts_with('{')) {
        let state: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(state["id"] == container.id.as_str(), "{state}");
        ensure!(state["bundle"] == json!(bundle.path), "{state}");
        // crun 1.8 says "created" to all of them, and names no process.
        if scene.runtime != Runtime::Crun {
            ensure!(state["pid"].as_i64().is_some_and(|pid| pid > 0), "{state}");
            ensure!(state["status"] == "creating", "{state}");
        }
    }
    ensure!(
        !bundle.rootfs().join("var/data/hook").exists(),
        "startContainer hooks ran before start"
    );
    scene.call(&["start", &container.id])?.ok()?;
    container.streams.wait_for("ran\n")?;
    let text = container.streams.stdout();
    ensure!(
        text.contains("in the container\n") && text.contains(&container.id),
        "{text}"
    );
    container.process()?.wait()?;
    scene.destroy(&container.id)
}

fn failing_before_create(scene: &Scene) -> Result<()> {
    let fails = scene.script("fails", "echo the reason >&2; exit 3")?;
    for name in ["prestart", "createRuntime", "createContainer"] {
        let mut bundle = scene.bundle()?.shell("echo ran");
        bundle.spec["hooks"][name] = json!([{ "path": fails }]);
        let output = scene.run(&bundle)?;
        ensure!(!output.text().contains("ran"), "{name}: {output}");
        let errors = output.fails()?;
        if scene.runtime == Runtime::Bulkhead {
            for needle in [name, "the reason", "exit status: 3"] {
                ensure!(errors.contains(needle), "{needle}: {errors}");
            }
        }
        scene.expect_nothing_left()?;
    }
    Ok(())
}

fn failing_start(scene: &Scene) -> Result<()> {
    let mut bundle = scene.bundle()?.shell("echo ran");
    bundle.spec["hooks"]["startContainer"] = json!([{ "path": "/bin/false", "args": ["false"] }]);
    let container = scene.create(&bundle)?;
    let started = scene.call(&["start", &container.id])?;
    // runc 1.1 and crun 1.8 return before these hooks have run.
    if scene.runtime == Runtime::Bulkhead {
        started.fails()?;
    }
    container.process()?.wait()?;
    ensure!(
        !container.streams.stdout().contains("ran"),
        "it ran in spite of its hook"
    );
    scene.destroy(&container.id)
}

fn hanging(scene: &Scene) -> Result<()> {
    let hangs = scene.script("hangs", "exec sleep 1000")?;
    for name in ["createRuntime", "createContainer"] {
        let mut bundle = scene.bundle()?.shell("echo ran");
        bundle.spec["hooks"][name] =
            json!([{ "path": hangs, "timeout": 1, "env": ["PATH=/usr/bin:/bin"] }]);
        let output = scene.run(&bundle)?;
        ensure!(!output.text().contains("ran"), "{name}: {output}");
        output.fails()?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}

/// Hooks that read nothing, close everything, and say much.
fn deaf(scene: &Scene) -> Result<()> {
    if scene.runtime == Runtime::Runc {
        return skip("runc fails when a hook does not read");
    }
    let deaf = scene.script("deaf", "exec <&- >&- 2>&-; exit 0")?;
    let loud = scene.script(
        "loud",
        "i=0; while [ $i -lt 9999 ]; do i=$((i + 1)); echo $i; done",
    )?;
    let mut bundle = scene.bundle()?.shell("echo ran").with(|spec| {
        spec["annotations"] = json!({ "org.example.long": "x".repeat(200_000) });
    });
    for name in ["createRuntime", "createContainer", "poststart", "poststop"] {
        bundle.spec["hooks"][name] = json!([{ "path": deaf }, { "path": loud }]);
    }
    scene.run(&bundle)?.ok()?.says(&["ran\n"])?;
    scene.expect_nothing_left()
}

/// createContainer hooks see the namespaces of the container, the others the host's.
fn namespaces(scene: &Scene) -> Result<()> {
    let show = |name: &str| -> Result<Value> {
        let text = format!(
            "{{ for n in net ipc uts mnt; do readlink /proc/self/ns/$n; done; uname -n; }} >{}",
            scene.path(name).display()
        );
        let path = scene.script(&format!("{name}-hook"), &text)?;
        Ok(json!([{ "path": path, "env": ["PATH=/usr/bin:/bin"] }]))
    };
    let mut bundle = scene.bundle()?;
    bundle.spec["hooks"] = json!({
        "createRuntime": show("createRuntime")?,
        "createContainer": show("createContainer")?,
    });
    scene.run(&bundle)?.ok()?;
    let seen = |name: &str| -> Result<Vec<String>> {
        let text = crate::bundle::read(&scene.path(name))?;
        Ok(text.lines().map(str::to_owned).collect())
    };
    let own: Vec<_> = ["net", "ipc", "uts", "mnt"]
        .iter()
        .map(|name| fs::read_link(Path::new("/proc/self/ns").join(name)))
        .collect::<std::io::Result<_>>()?;
    let own: Vec<_> = own.iter().map(|link| link.display().to_string()).collect();
    ensure!(seen("createRuntime")?[..4] == own, "createRuntime");
    let inside = seen("createContainer")?;
    ensure!(inside.len() == 5, "{inside:?}");
    ensure!(
        inside[4] == bundle.spec["hostname"],
        "host name {}",
        inside[4]
    );
    for (index, name) in ["net", "ipc", "uts"].iter().enumerate() {
        ensure!(inside[index] != own[index], "{name} is the host's");
    }
    ensure!(inside[3] == own[3], "the mounts are not the host's");
    Ok(())
}

fn failing_after_start(scene: &Scene) -> Result<()> {
    let fails = scene.script("fails", "echo the reason >&2; exit 3")?;
    let mut bundle = scene.bundle()?.shell("sleep 1000");
    let mut hooks = vec![json!({ "path": fails })];
    let noting_start = noting(scene, "poststart")?;
    hooks.extend(noting_start.as_array().into_iter().flatten().cloned());
    bundle.spec["hooks"]["poststart"] = json!(hooks);
    let container = scene.create(&bundle)?;
    // What runs already goes on running, and the rest of the hooks run (runtime-spec 1.2).
    let output = scene.call(&["start", &container.id])?.ok()?;
    let errors = output.errors();
    ensure!(
        errors.contains("hooks.poststart[0]") && errors.contains("the reason"),
        "{errors}"
    );
    ensure!(crate::bundle::read(&scene.path("hooks.log"))?.contains("\"running\""));
    scene.expect_status(&container.id, "running")?;
    scene.destroy(&container.id)?;
    // The same after the container is gone.
    let mut bundle = scene.bundle()?;
    let mut hooks = vec![json!({ "path": fails })];
    hooks.extend(
        noting(scene, "poststop")?
            .as_array()
            .into_iter()
            .flatten()
            .cloned(),
    );
    bundle.spec["hooks"]["poststop"] = json!(hooks);
    let container = scene.create(&bundle)?;
    let process = container.process()?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.wait()?;
    let output = scene.call(&["delete", &container.id])?.ok()?;
    ensure!(output.errors().contains("hooks.poststop[0]"), "{output}");
    ensure!(crate::bundle::read(&scene.path("hooks.log"))?.contains("\"stopped\""));
    Ok(())
}

fn bad_hooks(scene: &Scene) -> Result<()> {
    for (hook, named) in [
        (json!({ "path": "relative" }), "hooks.poststop[0].path"),
        (
            json!({ "path": "/bin/true", "timeout": 0 }),
            "hooks.poststop[0].timeout",
        ),
        (
            json!({ "path": "/bin/true", "env": ["X"] }),
            "hooks.poststop[0].env",
        ),
    ] {
        let mut bundle = scene.bundle()?;
        bundle.spec["hooks"]["poststop"] = json!([hook]);
        let errors = scene.run(&bundle)?.fails()?;
        ensure!(errors.contains(named), "{named}: {errors}");
    }
    scene.expect_nothing_left()
}
