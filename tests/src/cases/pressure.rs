//! A host that runs out of room, many containers at once, and containers that end at awkward
//! moments.

use std::ffi::CString;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;
use serde_json::json;

use crate::leftovers::entries;
use crate::process::Process;
use crate::scene::Scene;

super::cases!(pressure;
    common: twenty_at_once_half_of_them_bad, ends_before_start, ends_under_exec;
    vm: full_state_directory);

/// Many guests share a CPU that may be emulated.
const CROWDED: Duration = Duration::from_secs(240);

fn twenty_at_once_half_of_them_bad(scene: &Scene) -> Result<()> {
    let mut running = Vec::new();
    for number in 0..20 {
        let mut bundle = scene.bundle()?.shell(&format!("echo {number}; exit 3"));
        let bad = number % 2 == 1;
        if bad {
            let missing = scene.path("missing");
            match number % 5 {
                0 => bundle = bundle.args(&["/no/such/program"]),
                1 => bundle = bundle.bind(&missing, "/var/data", &["bind"]),
                2 => fs::remove_dir_all(bundle.rootfs())?,
                3 => bundle.spec["mounts"] = json!("none"),
                _ => bundle.spec["process"]["args"] = json!({}),
            }
        }
        running.push((bad, scene.start_run(&bundle)?));
    }
    for (number, (bad, mut process)) in running.into_iter().enumerate() {
        process.close_stdin();
        process.wait_within(CROWDED)?;
        let output = process.finish()?;
        if bad {
            ensure!(!output.errors().is_empty(), "no reason given by {output}");
            ensure!(output.text().is_empty(), "it ran: {output}");
            output.fails()?;
        } else {
            let output = output.expect(3)?;
            ensure!(output.text() == format!("{number}\n"), "{output}");
        }
    }
    scene.expect_nothing_left()
}

fn ends_before_start(scene: &Scene) -> Result<()> {
    let container = scene.create(&scene.bundle()?.shell("echo ran"))?;
    let process = container.process()?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.wait()?;
    scene.expect_status(&container.id, "stopped")?;
    scene.call(&["start", &container.id])?.fails()?;
    scene.call(&["delete", &container.id])?.ok()?;
    ensure!(container.streams.stdout().is_empty(), "it ran");
    scene.expect_nothing_left()
}

fn ends_under_exec(scene: &Scene) -> Result<()> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; read x"))?;
    container.streams.wait_for("up\n")?;
    let id = container.id.clone();
    let long = ["exec", &id, "/bin/sh", "-c", "echo in; sleep 1000"];
    let mut inside = Process::spawn(scene.command(&long))?;
    inside.wait_for("in\n")?;
    // Some of these come before the end, some in the middle of it, some after.
    let mut racing = Vec::new();
    for number in 0..6 {
        if number == 2 {
            container.streams.send(b"\n")?;
        }
        let short = ["exec", &id, "/bin/echo", "quick"];
        racing.push(Process::spawn(scene.command(&short))?);
    }
    let code = inside.finish()?.code();
    ensure!(
        code == 128 + Signal::KILL.as_raw(),
        "exec ended with {code} when its container did"
    );
    for process in racing {
        let output = process.finish()?;
        match output.code() {
            0 => ensure!(output.text() == "quick\n", "{output}"),
            137 => {}
            _ => ensure!(!output.errors().is_empty(), "no reason given by {output}"),
        }
    }
    container.process()?.wait()?;
    scene.call(&["delete", &id])?.ok()?;
    scene.expect_nothing_left()
}

/// Gives the state directory room for one file, two files, three … until a container runs.
fn full_state_directory(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("exit 3");
    bundle.write()?;
    fs::create_dir_all(&scene.root)?;
    for (kind, most) in [("nr_inodes", 40), ("size", 20)] {
        let ran = (1..=most).find_map(|room| {
            let data = match kind {
                "size" => format!("size={}", room * 4096),
                _ => format!("{kind}={room}"),
            };
            match run_with_room(scene, &bundle, &data) {
                Ok(false) => None,
                outcome => Some(outcome.context(data)),
            }
        });
        match ran {
            Some(outcome) => ensure!(outcome?, "it ran"),
            None => bail!("{kind} of {most} is not enough for a container"),
        }
    }
    Ok(())
}

/// Whether a container runs; if not, the reason must be told and nothing be left.
fn run_with_room(scene: &Scene, bundle: &crate::bundle::Bundle, room: &str) -> Result<bool> {
    let data = CString::new(room)?;
    mount(
        "tests",
        &scene.root,
        "tmpfs",
        MountFlags::empty(),
        Some(data.as_c_str()),
    )?;
    let result = (|| {
        let output = scene.run_as_it_is(bundle)?;
        let ran = output.code() == 3;
        if !ran {
            ensure!(
                output.errors().trim_end().lines().count() == 1,
                "not one line: {output}"
            );
            ensure!(output.errors().contains("No space left"), "{output}");
        }
        let left = entries(&scene.root);
        ensure!(left.is_empty(), "left behind: {}", left.join(", "));
        Ok(ran)
    })();
    unmount(&scene.root, UnmountFlags::DETACH).context("unmounting the state directory")?;
    let ran = result?;
    scene.expect_nothing_left()?;
    Ok(ran)
}
