//! Podman's pods, and containers that join another one's namespaces: with Bulkhead they are in one
//! machine, and see of each other what Podman shares.

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::Process;

// Pods with Bulkhead alone: Podman 4.3 without systemd denies all devices to the cgroup of a pod, so
// that no container of crun or runc starts there.
super::engine_cases!(pods;
    [podman vm quick] with_port, connected_without_devices;
    [podman vm] without_network, connected_later, shares_what_podman_shares, stops_gracefully, stopped_and_started, with_an_init_container;
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

/// A server on a network of its own; gives its address there.
fn serve_on(engine: &Engine, network: &str) -> Result<String> {
    engine.call(&["network", "create", network])?.ok()?;
    let web = "echo from elsewhere >/tmp/index.html; echo ready; exec httpd -f -p 80 -h /tmp";
    let run = ["run", "--detach", "--name", "made-server", "--network"];
    let command = [network, IMAGE, "sh", "-c", web];
    engine.call(&[&run[..], &command].concat())?.ok()?;
    engine.wait_for_log("made-server", "ready")?;
    let template = format!("{{{{(index .NetworkSettings.Networks \"{network}\").IPAddress}}}}");
    engine.field("made-server", &template)
}

/// Waits in a container until eth1 has an address, and speaks with the server over it.
fn expect_connected(engine: &Engine, name: &str, server: &str) -> Result<()> {
    // The host would route from one bridge to the other, too.
    let script = format!(
        "i=0; until ip -4 -o addr show dev eth1 2>/dev/null | grep inet || [ $i = 100 ]; do i=$((i+1)); sleep 0.1; done; \
         ip route get {server}; timeout 5 wget -qO- http://{server}/"
    );
    let output = engine.exec(name, &script)?.ok()?;
    output.says(&["inet ", "dev eth1", "from elsewhere"])?;
    Ok(())
}

/// Waits in a container until eth1 is gone, and in the host's namespace of it until its tap is; eth0 stays.
fn expect_disconnected(engine: &Engine, name: &str, pid: &str) -> Result<()> {
    let mut taps = std::process::Command::new("nsenter");
    let script = "i=0; until [ $(ip -o link | grep -c bhtap) = 1 ] || [ $i = 100 ]; do i=$((i+1)); sleep 0.1; done; ip -o link";
    taps.args(["--net", "--target", pid, "sh", "-c", script]);
    let taps = Process::spawn(taps)?.finish()?.ok()?;
    let count = taps.text().matches("bhtap").count();
    ensure!(count == 1, "{count} taps: {taps}");
    let script = "i=0; while [ -e /sys/class/net/eth1 ] && [ $i != 100 ]; do i=$((i+1)); sleep 0.1; done; ls /sys/class/net";
    let found = engine.exec(name, script)?.ok()?.text();
    let found: Vec<_> = found.split_whitespace().collect();
    ensure!(found == ["eth0", "lo"], "{found:?}");
    Ok(())
}

/// A pod's network is that of the container that Podman makes for it: Podman connects no other.
fn connected_later(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-first"])?.ok()?;
    let server = serve_on(engine, "made-later")?;
    create(engine, &["--network", "made-first"])?;
    start(engine, "made-one", &[], "echo ready; sleep 1000")?;
    start(engine, "made-two", &[], "echo ready; sleep 1000")?;
    let of_a_member = ["network", "connect", "made-later", "made-one"];
    let why = engine.call(&of_a_member)?.fails()?;
    ensure!(why.contains("invalid network mode"), "{why}");
    let pod = ["pod", "inspect", "--format", "{{.InfraContainerID}}", POD];
    let infra = engine.call(&pod)?.ok()?.text();
    let pid = engine.field(infra.trim(), "{{.State.Pid}}")?;
    let connect = ["network", "connect", "made-later", infra.trim()];
    engine.call(&connect)?.ok()?;
    expect_connected(engine, "made-one", &server)?;
    expect_connected(engine, "made-two", &server)?;
    let disconnect = ["network", "disconnect", "made-later", infra.trim()];
    engine.call(&disconnect)?.ok()?;
    expect_disconnected(engine, "made-one", &pid)?;
    // Once more; and it ends with both.
    engine.call(&connect)?.ok()?;
    expect_connected(engine, "made-two", &server)?;
    remove(engine)?;
    engine.remove(&["made-server"])?;
    engine
        .call(&["network", "rm", "made-first", "made-later"])?
        .ok()?;
    Ok(())
}

/// A container of no pod in a cgroup that allows no devices: that of a pod.
fn connected_without_devices(engine: &Engine) -> Result<()> {
    engine.call(&["network", "create", "made-first"])?.ok()?;
    let server = serve_on(engine, "made-later")?;
    create(engine, &["--network", "none"])?;
    let pod = ["pod", "inspect", "--format", "{{.CgroupPath}}", POD];
    let cgroup = engine.call(&pod)?.ok()?.text();
    ensure!(
        cgroup.contains("libpod"),
        "the pod has the cgroup {cgroup:?}"
    );
    let run = ["run", "--detach", "--name", "made-one", "--cgroup-parent"];
    let options = [cgroup.trim(), "--network", "made-first"];
    let command = [IMAGE, "sh", "-c", "echo ready; sleep 1000"];
    engine
        .call(&[&run[..], &options, &command].concat())?
        .ok()?;
    engine.wait_for_log("made-one", "ready")?;
    let connect = ["network", "connect", "made-later", "made-one"];
    engine.call(&connect)?.ok()?;
    expect_connected(engine, "made-one", &server)?;
    let disconnect = ["network", "disconnect", "made-later", "made-one"];
    engine.call(&disconnect)?.ok()?;
    let pid = engine.field("made-one", "{{.State.Pid}}")?;
    expect_disconnected(engine, "made-one", &pid)?;
    engine.remove(&["made-one", "made-server"])?;
    remove(engine)?;
    engine
        .call(&["network", "rm", "made-first", "made-later"])?
        .ok()?;
    Ok(())
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
