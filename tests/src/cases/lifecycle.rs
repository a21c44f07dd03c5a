//! From `create` to `delete`, as OCI runtime-spec "Lifecycle" and runc's command line have it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::process::{Other, Process};
use crate::runtime::Runtime;
use crate::scene::{Scene, read_pid, skip};

super::cases!(lifecycle;
    common: create_start_delete, run_exit_code, run_detached, kill_term, kill_created,
        delete_force, pause_resume, list_and_ps, options_after_the_id, without_a_user, bundle_is_current_directory, long_names,
        many_at_once, spec_is_runnable;
    vm: ps_columns);

fn create_start_delete(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo ran; exit 5").with(|spec| {
        spec["annotations"] = json!({ "org.example.key": "value" });
    });
    let mut created = scene.create(&bundle)?;
    let process = created.process()?;

    let state = scene.state(&created.id)?;
    for (field, value) in [
        ("id", json!(created.id)),
        ("status", json!("created")),
        ("pid", json!(created.pid)),
        ("bundle", json!(bundle.path)),
    ] {
        ensure!(state[field] == value, "{field} should be {value}: {state}");
    }
    ensure!(state["ociVersion"].is_string(), "ociVersion: {state}");
    ensure!(
        state["annotations"]["org.example.key"] == "value",
        "annotations: {state}"
    );
    ensure!(
        !created
            .streams
            .says_within("ran", Duration::from_millis(50)),
        "it ran before start"
    );

    scene.call(&["start", &created.id])?.ok()?;
    created.streams.drain()?;
    ensure!(
        created.streams.stdout() == "ran\n",
        "stdout: {:?}",
        created.streams.stdout()
    );
    let code = process.exit_code()?;
    ensure!(
        code == 5,
        "the process of the pid file ended with {code}, not 5"
    );
    scene.expect_status(&created.id, "stopped")?;

    scene.call(&["delete", &created.id])?.ok()?;
    scene.call(&["state", &created.id])?.fails()?;
    scene.expect_nothing_left()
}

fn run_exit_code(scene: &Scene) -> Result<()> {
    for code in [0, 42, 255] {
        let output = scene.run_script(&format!("echo out; echo err >&2; exit {code}"))?;
        let output = output.expect(code)?;
        ensure!(
            output.stdout == b"out\n" && output.stderr == b"err\n",
            "streams of {output}"
        );
    }
    scene.expect_nothing_left()
}

fn run_detached(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo up; sleep 1000");
    bundle.write()?;
    let (id, pid_file) = (scene.id(), scene.path("pid"));
    let mut command = scene.command(&["run", "--detach", "--bundle"]);
    command
        .arg(&bundle.path)
        .arg("--pid-file")
        .arg(&pid_file)
        .arg(&id);
    let mut streams = Process::spawn(command)?;
    ensure!(
        streams.wait()?.success(),
        "run --detach: {}",
        streams.stderr()
    );
    streams.wait_for("up\n")?;
    scene.expect_status(&id, "running")?;
    let pid = read_pid(&pid_file)?;
    ensure!(
        scene.state(&id)?["pid"] == pid,
        "pid of the pid file {pid}, of state: other"
    );
    let process = Other::open(pid)?;
    scene.call(&["kill", &id, "KILL"])?.ok()?;
    ensure!(process.exit_code()? == 137, "exit code after SIGKILL");
    scene.call(&["delete", &id])?.ok()?;
    Ok(())
}

fn kill_term(scene: &Scene) -> Result<()> {
    for signal in ["TERM", "SIGTERM", "15"] {
        let script = "trap 'echo caught; exit 7' TERM; echo up; while :; do read x; done";
        let mut container = scene.start(&scene.bundle()?.shell(script))?;
        container.streams.wait_for("up\n")?;
        let process = container.process()?;
        scene.call(&["kill", &container.id, signal])?.ok()?;
        // A trap runs when the shell's `read` returns.
        container.streams.send(b"\n")?;
        container.streams.wait_for("caught\n")?;
        ensure!(process.exit_code()? == 7, "exit code after kill {signal}");
        scene.call(&["delete", &container.id])?.ok()?;
    }
    Ok(())
}

fn kill_created(scene: &Scene) -> Result<()> {
    let container = scene.create(&scene.bundle()?.shell("echo ran"))?;
    let process = container.process()?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.wait()?;
    scene.expect_status(&container.id, "stopped")?;
    scene.call(&["start", &container.id])?.fails()?;
    scene.call(&["delete", &container.id])?.ok()?;
    ensure!(container.streams.stdout().is_empty(), "it ran");
    Ok(())
}

fn delete_force(scene: &Scene) -> Result<()> {
    let created = scene.create(&scene.bundle()?.shell("sleep 1000"))?;
    // As the runtime-spec has it; runc and crun remove what was only created.
    if scene.runtime == Runtime::Bulkhead {
        scene.call(&["delete", &created.id])?.fails()?;
        scene.expect_status(&created.id, "created")?;
    }
    let mut running = scene.start(&scene.bundle()?.shell("echo up; sleep 1000"))?;
    running.streams.wait_for("up\n")?;
    scene.call(&["delete", &running.id])?.fails()?;
    scene.expect_status(&running.id, "running")?;
    scene.destroy(&created.id)?;
    scene.destroy(&running.id)?;
    scene.expect_nothing_left()?;
    // As runc has it: nothing to delete is no failure under --force, but is without.
    scene.destroy(&running.id)?;
    scene.call(&["delete", &running.id])?.fails()?;
    Ok(())
}

fn pause_resume(scene: &Scene) -> Result<()> {
    let mut container = scene.start(
        &scene
            .bundle()?
            .shell("echo up; while read x; do echo got $x; done"),
    )?;
    let id = container.id.clone();
    container.streams.wait_for("up\n")?;
    container.streams.send(b"one\n")?;
    container.streams.wait_for("got one\n")?;
    scene.call(&["pause", &id])?.ok()?;
    scene.expect_status(&id, "paused")?;
    container.streams.send(b"two\n")?;
    let answered = container
        .streams
        .says_within("got two", Duration::from_millis(300));
    ensure!(!answered, "a paused container answered");
    scene.call(&["resume", &id])?.ok()?;
    scene.expect_status(&id, "running")?;
    container.streams.wait_for("got two\n")?;
    // A paused container can be removed.
    scene.call(&["pause", &id])?.ok()?;
    scene.destroy(&id)
}

fn list_and_ps(scene: &Scene) -> Result<()> {
    let first = scene.create(&scene.bundle()?)?;
    let mut second = scene.start(&scene.bundle()?.shell("sleep 1234 & echo up; wait"))?;
    second.streams.wait_for("up\n")?;

    let table = scene.call(&["list"])?.ok()?.text();
    ensure!(
        table.starts_with("ID ") || table.starts_with("NAME "),
        "header: {table}"
    );
    ensure!(
        table.contains(&first.id) && table.contains("created"),
        "list: {table}"
    );
    ensure!(
        table.contains(&second.id) && table.contains("running"),
        "list: {table}"
    );
    let names = scene.call(&["list", "--quiet"])?.ok()?.text();
    let names: Vec<_> = names.lines().collect();
    ensure!(names == [&first.id, &second.id], "list --quiet: {names:?}");
    let json: Value =
        serde_json::from_slice(&scene.call(&["list", "--format", "json"])?.ok()?.stdout)?;
    let listed = json.as_array().context("list --format json gives a list")?;
    let of_second = listed
        .iter()
        .find(|entry| entry["id"] == second.id.as_str());
    ensure!(
        of_second.is_some_and(|entry| entry["status"] == "running"),
        "list as json: {json}"
    );

    let pids = scene.call(&["ps", "--format", "json", &second.id])?.ok()?;
    let pids: Vec<i32> = serde_json::from_slice(&pids.stdout).context("ps --format json")?;
    ensure!(pids.len() == 2, "ps --format json: {pids:?}");
    if scene.runtime == crate::runtime::Runtime::Crun {
        scene.call(&["ps", &second.id])?.ok()?; // crun's table holds nothing but ids.
    } else {
        scene
            .call(&["ps", &second.id])?
            .ok()?
            .says(&["PID", "CMD", "sleep 1234"])?;
    }
    scene.destroy(&first.id)?;
    scene.destroy(&second.id)
}

fn bundle_is_current_directory(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo here");
    bundle.write()?;
    for args in [vec!["run"], vec!["run", "--bundle", "rootfs/.."]] {
        let mut command = scene.command(&args);
        command.arg(scene.id()).current_dir(&bundle.path);
        Process::spawn(command)?.finish()?.ok()?.says(&["here\n"])?;
    }
    Ok(())
}

/// Engines use 64 digits and deep directories: longer than a socket's address may be.
fn long_names(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("echo fine");
    bundle.write()?;
    let id = format!("{}{}", scene.prefix, "0123456789abcdef".repeat(4));
    let deep = scene.path(&"deep/io.containerd.runtime.v2.task/".repeat(3));
    fs::create_dir_all(&deep)?;
    let mut command = std::process::Command::new(scene.runtime.program());
    command
        .arg("--root")
        .arg(&deep)
        .arg("run")
        .arg("--bundle")
        .arg(&bundle.path)
        .arg(&id);
    Process::spawn(command)?.finish()?.ok()?.says(&["fine\n"])?;
    let left = crate::leftovers::entries(&deep);
    ensure!(left.is_empty(), "left in the state directory: {left:?}");
    Ok(())
}

fn options_after_the_id(scene: &Scene) -> Result<()> {
    if scene.runtime == Runtime::Crun {
        return skip("crun takes options before the id only");
    }
    let bundle = scene.bundle()?.shell("sleep 1000");
    bundle.write()?;
    let (id, pid_file) = (scene.id(), scene.path("late.pid"));
    let mut command = scene.command(&["create", &id, "--bundle"]);
    command.arg(&bundle.path).arg("--pid-file").arg(&pid_file);
    let mut created = Process::spawn(command)?;
    ensure!(created.wait()?.success(), "create: {}", created.stderr());
    let process = Other::open(read_pid(&pid_file)?)?;
    scene.call(&["start", &id])?.ok()?;
    scene.call(&["kill", &id, "KILL", "--all"])?.ok()?;
    process.wait()?;
    scene.call(&["delete", &id, "--force"])?.ok()?;
    scene.expect_nothing_left()
}

/// As for runc, whoever names no user is root.
fn without_a_user(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("id -u; id -g").with(|spec| {
        if let Some(process) = spec["process"].as_object_mut() {
            process.remove("user");
        }
    });
    let output = scene.run(&bundle)?.ok()?;
    ensure!(output.text() == "0\n0\n", "{output}");
    Ok(())
}

/// Options of ps(1) choose the columns.
fn ps_columns(scene: &Scene) -> Result<()> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; sleep 1000"))?;
    container.streams.wait_for("up\n")?;
    let text = scene
        .call(&["ps", &container.id, "-eo", "pid,cmd=COMMAND"])?
        .ok()?
        .text();
    let mut lines = text.lines();
    ensure!(
        lines
            .next()
            .is_some_and(|line| line.split_whitespace().eq(["PID", "COMMAND"])),
        "{text}"
    );
    ensure!(
        lines.any(|line| line.ends_with("sleep 1000") && line.split_whitespace().count() == 3),
        "{text}"
    );
    let errors = scene.call(&["ps", &container.id, "aux"])?.fails()?;
    ensure!(errors.contains("aux"), "{errors}");
    scene.destroy(&container.id)
}

fn many_at_once(scene: &Scene) -> Result<()> {
    let mut running = Vec::new();
    for number in 0..8 {
        let bundle = scene
            .bundle()?
            .shell(&format!("read x; echo {number}-$x; exit {number}"));
        let mut process = scene.start_run(&bundle)?;
        process.send(b"go\n")?;
        running.push(process);
    }
    for (number, process) in running.into_iter().enumerate() {
        let output = process.finish()?.expect(i32::try_from(number)?)?;
        ensure!(output.text() == format!("{number}-go\n"), "{output}");
    }
    scene.expect_nothing_left()
}

fn spec_is_runnable(scene: &Scene) -> Result<()> {
    let mut bundle = scene.bundle()?;
    fs::remove_file(bundle.path.join("config.json"))?;
    scene
        .call(&["spec".as_ref(), "--bundle".as_ref(), bundle.as_os_str()])?
        .ok()?;
    scene
        .call(&["spec".as_ref(), "--bundle".as_ref(), bundle.as_os_str()])?
        .fails()?;
    bundle.spec = serde_json::from_str(&crate::bundle::read(&bundle.path.join("config.json"))?)?;
    ensure!(
        bundle.spec["process"]["terminal"] == true,
        "spec asks for a terminal"
    );
    bundle.spec["process"]["terminal"] = json!(false);
    let mut process = scene.start_run(&bundle)?;
    process.send(b"echo from a shell; exit 3\n")?;
    process.finish()?.expect(3)?.says(&["from a shell\n"])?;
    Ok(())
}
