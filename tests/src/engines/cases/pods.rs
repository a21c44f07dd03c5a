//! Podman's pods, and containers that join another one's namespaces: with Bulkhead they are in one
//! machine, and see of each other what Podman shares.

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};

// Pods with Bulkhead alone: Podman 4.3 without systemd denies all devices to the cgroup of a pod, so
// that no container of crun or runc starts there.
super::engine_cases!(pods;
    [podman vm quick] with_port;
    [podman vm] without_network, shares_what_podman_shares, stops_gracefully, stopped_and_started, with_an_init_container;
    [both] processes_of_another, ipc_of_another);

const POD: &str = "made-pod";

fn create(engine: &Engine, options: &[&str]) -> Result<()> {
    let pod = ["pod", "create", "--name", POD];
    engine.call(&[&pod, options].concat())?.ok()?;
    Ok(())
}

/// Starts a container of the pod, and waits until it says that it is ready.
fn start(engine: &Engine, name: &str, options: &[&str], script: &str) -> Result<()> {
    let run = ["run", "--detach", "--pod", POD, "--name", name];
    let command = [IMAGE, "sh", "-c", script];
    engine.call(&[&run, options, &command].concat())?.ok()?;
    engine.wait_for_log(name, "ready")
}

/// Runs a script in one more container of the pod.
fn run(engine: &Engine, script: &str) -> Result<crate::process::Output> {
    let run = ["run", "--rm", "--pod", POD, IMAGE, "sh", "-c", script];
    engine.call(&run)?.ok()
}

fn remove(engine: &Engine) -> Result<()> {
    engine
        .call(&["pod", "rm", "--force", "--time", "0", POD])?
        .ok()?;
    Ok(())
}

fn without_network(engine: &Engine) -> Result<()> {
    create(engine, &["--network", "none", "--share", "net"])?;
    start(engine, "made-p1", &[], "echo ready; sleep 1000")?;
    run(engine, "echo second")?.says(&["second"])?;
    engine.call(&["pod", "ps"])?.ok()?.says(&[POD, "Running"])?;
    engine.call(&["pod", "stop", "--time", "0", POD])?.ok()?;
    remove(engine)
}

fn shares_what_podman_shares(engine: &Engine) -> Result<()> {
    create(engine, &["--hostname", "of-the-pod"])?;
    let web = "echo shared >/dev/shm/file; echo from the pod >/tmp/index.html; echo ready; \
        exec httpd -f -p 80 -h /tmp";
    start(engine, "made-web", &[], web)?;
    let look = "for i in 1 2 3 4 5 6 7 8 9 10; do \
        timeout 5 wget -qO- http://127.0.0.1/ && break; sleep 0.3; done; \
        hostname; cat /dev/shm/file; ps | grep -c httpd; cat /proc/sys/kernel/random/boot_id";
    let seen = run(engine, look)?.says(&["from the pod", "of-the-pod", "shared"])?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let boot = engine.exec("made-web", boot)?.ok()?.text();
    ensure!(seen.text().ends_with(&boot), "two machines: {seen}");
    engine
        .call(&["pod", "inspect", POD])?
        .ok()?
        .says(&["made-web", "Running"])?;
    engine.call(&["pod", "top", POD, "-ef"]).map(drop)?;
    remove(engine)
}

fn with_port(engine: &Engine) -> Result<()> {
    create(engine, &["--publish", "127.0.0.1:8085:80"])?;
    let script = "echo from the pod >/tmp/index.html; echo ready; exec httpd -f -p 80 -h /tmp";
    start(engine, "made-web", &[], script)?;
    let fetch = "for i in 1 2 3 4 5 6 7 8 9 10; do timeout 5 wget -qO- http://127.0.0.1/ && exit; sleep 0.3; done; exit 1";
    engine
        .exec("made-web", fetch)?
        .ok()?
        .says(&["from the pod"])?;
    remove(engine)
}

/// Podman stops all containers of a pod at once, and the one that holds the namespaces ends first.
fn stops_gracefully(engine: &Engine) -> Result<()> {
    create(engine, &["--network", "none"])?;
    let script = "trap 'sleep 2; echo saved; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    start(engine, "made-slow", &[], script)?;
    engine.call(&["pod", "stop", "--time", "30", POD])?.ok()?;
    engine.expect_field("made-slow", "{{.State.ExitCode}}", "7")?;
    engine
        .call(&["logs", "made-slow"])?
        .ok()?
        .says(&["saved"])?;
    remove(engine)
}

fn stopped_and_started(engine: &Engine) -> Result<()> {
    create(engine, &["--network", "none"])?;
    let script = "echo once more >>/tmp/count; echo ready; exec sleep 1000";
    start(engine, "made-one", &[], script)?;
    start(engine, "made-two", &[], "echo ready; exec sleep 1000")?;
    engine.call(&["pod", "stop", "--time", "0", POD])?.ok()?;
    engine.call(&["pod", "start", POD])?.ok()?;
    engine.expect_field("made-one", "{{.State.Status}}", "running")?;
    engine.call(&["restart", "--time", "0", "made-one"])?.ok()?;
    let count = "until test $(wc -l </tmp/count) = 3; do sleep 0.1; done; hostname";
    engine.exec("made-one", count)?.ok()?;
    engine.exec("made-two", "hostname")?.ok()?.says(&[POD])?;
    engine.remove(&["made-two"])?;
    engine.exec("made-one", "hostname")?.ok()?.says(&[POD])?;
    remove(engine)
}

fn with_an_init_container(engine: &Engine) -> Result<()> {
    create(engine, &["--network", "none"])?;
    let init = ["create", "--pod", POD, "--init-ctr", "once", IMAGE];
    engine
        .call(&[&init[..], &["sh", "-c", "echo prepared >/dev/shm/file"]].concat())?
        .ok()?;
    let main = ["create", "--pod", POD, "--name", "made-main", IMAGE];
    let script = "cat /dev/shm/file; echo ready; exec sleep 1000";
    engine
        .call(&[&main[..], &["sh", "-c", script]].concat())?
        .ok()?;
    engine.call(&["pod", "start", POD])?.ok()?;
    engine.wait_for_log("made-main", "ready")?;
    engine
        .call(&["logs", "made-main"])?
        .ok()?
        .says(&["prepared"])?;
    remove(engine)
}

fn processes_of_another(engine: &Engine) -> Result<()> {
    engine.start("made-first", &[IMAGE, "sleep", "4321"])?;
    engine
        .script(&["--pid", "container:made-first"], "ps")?
        .ok()?
        .says(&["sleep 4321"])?;
    engine
        .exec("made-first", "ps")?
        .ok()?
        .says(&["sleep 4321"])?;
    engine.remove(&["made-first"])
}

fn ipc_of_another(engine: &Engine) -> Result<()> {
    let script = "echo shared >/dev/shm/file; echo ready; sleep 1000";
    let shareable = ["--ipc", "shareable", IMAGE, "sh", "-c", script];
    engine.start("made-first", &shareable)?;
    engine.wait_for_log("made-first", "ready")?;
    let script = "cat /dev/shm/file; echo back >/dev/shm/other";
    engine
        .script(&["--ipc", "container:made-first"], script)?
        .ok()?
        .says(&["shared"])?;
    engine
        .exec("made-first", "cat /dev/shm/other")?
        .ok()?
        .says(&["back"])?;
    engine.remove(&["made-first"])
}
