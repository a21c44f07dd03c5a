//! `events`: what a container uses, and when it runs out of memory.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::Process;
use crate::runtime::Runtime;
use crate::scene::{Created, Scene, skip};

super::cases!(events;
    common: once, out_of_memory;
    vm: refused);

fn busy(scene: &Scene) -> Result<Created> {
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo up; sleep 1000";
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20 });
        spec["linux"]["resources"]["pids"] = json!({ "limit": 50 });
    });
    let mut container = scene.start(&bundle)?;
    container.streams.wait_for("up\n")?;
    Ok(container)
}

fn once(scene: &Scene) -> Result<()> {
    if scene.runtime == Runtime::Crun {
        return skip("crun has no `events`");
    }
    let container = busy(scene)?;
    let output = scene.call(&["events", "--stats", &container.id])?.ok()?;
    let event: Value = serde_json::from_slice(&output.stdout).with_context(|| output.text())?;
    ensure!(
        event["type"] == "stats" && event["id"] == container.id.as_str(),
        "{event}"
    );
    let number = |pointer: &str| {
        let value = event["data"].pointer(pointer).and_then(Value::as_u64);
        value.with_context(|| format!("{pointer} in {event}"))
    };
    ensure!(number("/cpu/usage/total")? > 1_000_000, "{event}");
    ensure!(number("/memory/usage/limit")? == 64 << 20, "{event}");
    let usage = number("/memory/usage/usage")?;
    ensure!((4096..64 << 20).contains(&usage), "{event}");
    ensure!(number("/memory/raw/anon")? > 0, "{event}");
    ensure!((1..=3).contains(&number("/pids/current")?), "{event}");
    ensure!(number("/pids/limit")? == 50, "{event}");
    ensure!(event["data"]["hugetlb"].is_object(), "{event}");
    scene.destroy(&container.id)
}

fn out_of_memory(scene: &Scene) -> Result<()> {
    if scene.runtime == Runtime::Crun {
        return skip("crun has no `events`");
    }
    if !crate::runtime::unified_cgroups() && scene.runtime == Runtime::Runc {
        return skip("runc does not always tell of it with cgroups of version 1");
    }
    let container = busy(scene)?;
    let mut events =
        Process::spawn(scene.command(&["events", "--interval", "500ms", &container.id]))?;
    // Its first line shows that it listens.
    events.wait_for("\"type\":\"stats\"")?;
    let script = "dd if=/dev/zero of=/dev/null bs=134217728 count=1 2>/dev/null; echo $?";
    let output = scene.call(&["exec", &container.id, "/bin/sh", "-c", script])?;
    output.says(&["137\n"])?;
    events.wait_for("\"type\":\"oom\"")?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    let text = events.finish()?.ok()?.text();
    for line in text.lines() {
        let event: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(event["id"] == container.id.as_str(), "{event}");
    }
    container.process()?.wait()?;
    scene.destroy(&container.id)
}

fn refused(scene: &Scene) -> Result<()> {
    let container = busy(scene)?;
    for interval in ["0s", "5", "-1s", "soon"] {
        let option = format!("--interval={interval}");
        let errors = scene.call(&["events", &option, &container.id])?.fails()?;
        ensure!(errors.contains("--interval"), "{interval}: {errors}");
    }
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    container.process()?.wait()?;
    let errors = scene.call(&["events", "--stats", &container.id])?.fails()?;
    ensure!(errors.contains("not running"), "{errors}");
    scene.destroy(&container.id)
}
