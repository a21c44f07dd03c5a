//! Containers that join the namespaces of another one, as those of a pod do: with Bulkhead they are
//! in one virtual machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use crate::bundle::Bundle;
use crate::leftovers::{command_line, descendants, entries};
use crate::process::{Other, Output, Process};
use crate::runtime::Runtime;
use crate::scene::{Created, Scene, skip};

use super::limits::hungry;

super::cases!(pods;
    common: shares_what_is_named, shares_processes, own_files, ends_in_any_order, run_in_the_foreground,
        shared_memory, limits_of_its_own, host_counts_out_of_memory, joins_a_member, shared_behind_the_pids;
    vm: one_machine, monitor_of_a_member_killed, monitor_of_the_first_killed, machine_killed, everything_killed,
        a_disk_of_its_own, refusals, shown_together);

pub(super) const PODS: [&str; 3] = ["network", "ipc", "uts"];

/// What `/proc/PID/ns` calls a type.
fn file(kind: &str) -> &str {
    match kind {
        "network" => "net",
        kind => kind,
    }
}

/// The container joins the namespaces of a process.
pub(super) fn joining(bundle: Bundle, pid: i32, kinds: &[&str]) -> Bundle {
    bundle.with(|spec| {
        if kinds.contains(&"uts")
            && let Some(spec) = spec.as_object_mut()
        {
            spec.remove("hostname");
        }
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            let kind = namespace["type"].as_str().unwrap_or_default().to_owned();
            if kinds.contains(&kind.as_str()) {
                namespace["path"] = json!(format!("/proc/{pid}/ns/{}", file(&kind)));
            }
        }
    })
}

/// A container that others can join.
fn first(scene: &Scene, script: &str) -> Result<Created> {
    start(scene, scene.bundle()?, script)
}

fn start(scene: &Scene, bundle: Bundle, script: &str) -> Result<Created> {
    let script = format!("{script}; echo ready; while :; do sleep 1; done");
    let mut container = scene.start(&bundle.shell(&script))?;
    container.streams.wait_for("ready\n")?;
    Ok(container)
}

fn member(scene: &Scene, first: &Created, kinds: &[&str], script: &str) -> Result<Created> {
    start(scene, joining(scene.bundle()?, first.pid, kinds), script)
}

fn exec(scene: &Scene, container: &Created, script: &str) -> Result<Output> {
    scene
        .call(&["exec", &container.id, "/bin/sh", "-c", script])?
        .ok()
}

/// Kills its process and removes the container, as an engine does.
fn stop(scene: &Scene, container: &Created) -> Result<()> {
    let process = container.process()?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.wait()?;
    scene.call(&["delete", &container.id])?.ok()?;
    Ok(())
}

/// What shows which network, host name and machine a process is in.
const WHERE: &str = "hostname; cat /proc/sys/kernel/random/boot_id; readlink /proc/self/ns/net; \
    readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts";

fn shares_what_is_named(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let bundle = joining(scene.bundle()?, one.pid, &PODS).shell(WHERE);
    let output = scene.run(&bundle)?.ok()?;
    let of_first = exec(scene, &one, WHERE)?.text();
    ensure!(output.text() == of_first, "{of_first} and {output}");
    // What is not named is its own.
    let script = "ps | grep -c [s]leep; readlink /proc/self/ns/net; readlink /proc/self/ns/ipc";
    let bundle = joining(scene.bundle()?, one.pid, &["network"]).shell(script);
    let output = scene.run(&bundle)?.ok()?.text();
    let lines: Vec<_> = output.lines().collect();
    let lines_of_first: Vec<_> = of_first.lines().collect();
    ensure!(
        lines[0] == "0" && lines[1] == lines_of_first[2] && lines[2] != lines_of_first[3],
        "{output} and {of_first}"
    );
    // The loopback interface is one.
    let bundle = joining(scene.bundle()?, one.pid, &PODS);
    let mut server = scene.start_run(&bundle.shell("echo up; nc -l -p 4321"))?;
    server.wait_for("up\n")?;
    let script = "until echo hello | nc 127.0.0.1 4321; do sleep 0.1; done";
    exec(scene, &one, script)?;
    server.wait_for("hello\n")?;
    server.finish()?.ok()?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

fn shares_processes(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let bundle = joining(scene.bundle()?, one.pid, &["pid"]);
    let script = "echo up; while kill -0 1; do sleep 1; done";
    let (id, mut second) = scene.start_named(&bundle.shell(script))?;
    second.wait_for("up\n")?;
    let seen = exec(scene, &one, "ps")?.text();
    ensure!(seen.contains("kill -0 1"), "{seen}");
    let seen = scene.call(&["exec", &id, "ps"])?.ok()?.text();
    ensure!(seen.contains("echo ready"), "{seen}");
    // The end of the PID namespace is that of everything in it.
    scene.call(&["kill", &one.id, "KILL"])?.ok()?;
    second.finish()?.expect(137)?;
    one.process()?.wait()?;
    scene.call(&["delete", &one.id])?.ok()?;
    scene.expect_nothing_left()
}

fn own_files(scene: &Scene) -> Result<()> {
    let one = first(scene, "echo one >/tmp/whose")?;
    let (data, note) = (scene.path("data"), scene.path("note"));
    fs::create_dir(&data)?;
    fs::write(&note, "from the host\n")?;
    let bundle =
        scene
            .bundle()?
            .bind(&data, "/data", &["rbind"])
            .bind(&note, "/note", &["bind", "ro"]);
    let script = "cat /note; echo two >/data/file; echo two >/tmp/whose; \
        touch /note 2>/dev/null && echo written";
    let two = start(scene, joining(bundle, one.pid, &PODS), script)?;
    let shown = two.streams.stdout();
    ensure!(shown == "from the host\nready\n", "{shown}");
    ensure!(fs::read_to_string(data.join("file"))? == "two\n");
    for (container, whose) in [(&one, "one\n"), (&two, "two\n")] {
        exec(scene, container, "cat /tmp/whose")?.says(&[whose])?;
    }
    // What the host changes it sees, as any other container does.
    fs::write(data.join("file"), "host\n")?;
    exec(
        scene,
        &two,
        "until grep -q host /data/file; do sleep 0.1; done",
    )?;
    stop(scene, &two)?;
    exec(scene, &one, "cat /tmp/whose")?.says(&["one\n"])?;
    stop(scene, &one)?;
    scene.expect_nothing_left()
}

fn ends_in_any_order(scene: &Scene) -> Result<()> {
    for first_goes in [0, 1, 2] {
        let one = first(scene, "true")?;
        let others = [
            member(scene, &one, &PODS, "true")?,
            member(scene, &one, &PODS, "true")?,
        ];
        let all = [&one, &others[0], &others[1]];
        stop(scene, all[first_goes])?;
        let rest: Vec<_> = (0..3).filter(|index| *index != first_goes).collect();
        for index in &rest {
            scene.expect_status(&all[*index].id, "running")?;
            exec(scene, all[*index], "hostname")?.says(&["tested"])?;
        }
        // One more, of the same name and bundle as one that has been there.
        stop(scene, all[rest[0]])?;
        exec(scene, all[rest[1]], "echo there >/tmp/x; cat /tmp/x")?.says(&["there"])?;
        stop(scene, all[rest[1]])?;
        scene.expect_nothing_left()?;
    }
    Ok(())
}

fn run_in_the_foreground(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    for round in 0..3 {
        let bundle = joining(scene.bundle()?, one.pid, &PODS);
        let script = format!("cat; exit {}", 3 + round);
        let mut process = scene.start_run(&bundle.shell(&script))?;
        process.send(b"through\n")?;
        process.close_stdin();
        process.finish()?.expect(3 + round)?.says(&["through"])?;
    }
    ensure!(entries(&scene.root).len() == 1, "a container is left");
    stop(scene, &one)?;
    scene.expect_nothing_left()
}

/// As engines make it: a tmpfs of the host, bound into each container that shares the IPC namespace.
fn shared_memory(scene: &Scene) -> Result<()> {
    let shm = scene.path("engine/shm");
    fs::create_dir_all(&shm)?;
    let mount = |script: &str| -> Result<()> {
        let mut command = Command::new("sh");
        command.args(["-ec", script]);
        Process::spawn(command)?.finish()?.ok()?;
        Ok(())
    };
    mount(&format!("mount -t tmpfs -o size=8m shm {}", shm.display()))?;
    let with_shm = |bundle: Bundle| {
        bundle
            .with(|spec| {
                if let Some(mounts) = spec["mounts"].as_array_mut() {
                    mounts.retain(|mount| mount["destination"] != "/dev/shm");
                }
            })
            .bind(
                &shm,
                "/dev/shm",
                &["bind", "rprivate", "nosuid", "noexec", "nodev"],
            )
    };
    let one = start(scene, with_shm(scene.bundle()?), "echo one >/dev/shm/one")?;
    let kinds = ["network", "ipc"];
    let two = start(
        scene,
        joining(with_shm(scene.bundle()?), one.pid, &kinds),
        "cat /dev/shm/one >/dev/shm/two",
    )?;
    exec(scene, &one, "cat /dev/shm/two")?.says(&["one\n"])?;
    // One that joins through the member has the same.
    let three = start(
        scene,
        joining(with_shm(scene.bundle()?), two.pid, &kinds),
        "cat /dev/shm/two; rm /dev/shm/one",
    )?;
    let left = exec(scene, &two, "ls /dev/shm")?.text();
    ensure!(left == "two\n", "{left}");
    for container in [&three, &two, &one] {
        stop(scene, container)?;
    }
    mount(&format!("umount {}", shm.display()))?;
    scene.expect_nothing_left()
}

fn limits_of_its_own(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let bundle = scene.bundle()?.with(|spec| {
        spec["linux"]["resources"] =
            json!({ "memory": { "limit": 24 << 20, "swap": 24 << 20 }, "pids": { "limit": 20 } });
    });
    let greedy = "x=y; while :; do x=$x$x; done";
    let output = scene.run(&joining(bundle, one.pid, &PODS).shell(greedy))?;
    ensure!(output.code() != 0, "{output}");
    exec(scene, &one, "echo alive")?.says(&["alive"])?;
    // Pausing one does not pause the other.
    let two = member(scene, &one, &PODS, "true")?;
    scene.call(&["pause", &two.id])?.ok()?;
    exec(scene, &one, "echo alive")?.says(&["alive"])?;
    scene.expect_status(&two.id, "paused")?;
    scene.call(&["resume", &two.id])?.ok()?;
    exec(scene, &two, "echo alive")?.says(&["alive"])?;
    scene.destroy(&two.id)?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

/// What is named is a container that itself has joined another one.
/// Also where the host's cgroup holds a stand-in only, and where the machine has just left it.
fn host_counts_out_of_memory(scene: &Scene) -> Result<()> {
    if !crate::runtime::unified_cgroups() && scene.runtime == Runtime::Crun {
        return skip("crun leaves an empty cgroup of version 2 behind here");
    }
    let one = hungry(scene, scene.bundle()?)?;
    let two = hungry(scene, joining(scene.bundle()?, one.pid(), &PODS))?;
    let three = hungry(scene, joining(scene.bundle()?, one.pid(), &PODS))?;
    two.eats(scene, 128, true)?;
    one.eats(scene, 128, true)?;
    three.eats(scene, 1, false)
}

fn joins_a_member(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    stop(scene, &one)?;
    let three = member(scene, &two, &PODS, "true")?;
    let (of_two, of_three) = (exec(scene, &two, WHERE)?, exec(scene, &three, WHERE)?);
    ensure!(of_two.text() == of_three.text(), "{of_two} and {of_three}");
    scene.destroy(&two.id)?;
    exec(scene, &three, "echo alive")?.says(&["alive"])?;
    scene.destroy(&three.id)?;
    scene.expect_nothing_left()
}

/// The processes of VMMs.
fn machines() -> Result<Vec<i32>> {
    let mut found = descendants()?;
    found.retain(|pid| command_line(*pid).contains("bulkhead-vmm"));
    Ok(found)
}

fn only_machine() -> Result<i32> {
    let found = machines()?;
    ensure!(found.len() == 1, "one virtual machine, not {}", found.len());
    Ok(found[0])
}

/// Mounts that the VMM sees of a container.
pub(super) fn pieces(vmm: i32, id: &str) -> Result<usize> {
    let mounts = fs::read_to_string(format!("/proc/{vmm}/mountinfo"))?;
    let place = format!(" /share/{id}");
    Ok(mounts.lines().filter(|line| line.contains(&place)).count())
}

fn one_machine(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    let vmm = only_machine()?;
    ensure!(pieces(vmm, &two.id)? > 0, "its files are elsewhere");
    // The root of the VMM stays as it was.
    let root = fs::read_to_string(format!("/proc/{vmm}/mountinfo"))?;
    let root = root.lines().find(|line| line.contains(" / / "));
    ensure!(root.is_some_and(|line| line.contains(" ro,")), "{root:?}");
    let directory = format!("/proc/{vmm}/root/share");
    stop(scene, &two)?;
    ensure!(pieces(vmm, &two.id)? == 0, "its files are still there");
    let left = entries(Path::new(&directory));
    ensure!(left == [one.id.clone()], "left in the share: {left:?}");
    // The machine is in the cgroup of a container that is there.
    let two = member(scene, &one, &PODS, "true")?;
    let cgroup = || fs::read_to_string(format!("/proc/{vmm}/cgroup"));
    ensure!(cgroup()?.contains(&one.id[..]) || !cgroup()?.contains(&two.id[..]));
    stop(scene, &one)?;
    ensure!(
        pieces(vmm, &one.id)? == 0,
        "the first one's files are still there"
    );
    ensure!(only_machine()? == vmm);
    stop(scene, &two)?;
    scene.expect_nothing_left()
}

/// What they share, the host's tools find shared behind their pids.
fn shared_behind_the_pids(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    let of = |container: &Created, kind: &str| {
        fs::read_link(format!("/proc/{}/ns/{kind}", container.pid))
    };
    for (kind, shared) in [
        ("net", true),
        ("ipc", true),
        ("uts", true),
        ("pid", false),
        ("mnt", false),
    ] {
        let (one, two) = (of(&one, kind)?, of(&two, kind)?);
        ensure!((one == two) == shared, "{kind}: {one:?} and {two:?}");
    }
    scene.destroy(&two.id)?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

fn monitor_of_a_member_killed(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &["network", "ipc", "uts", "pid"], "true")?;
    let monitor = two.process()?;
    monitor.signal(Signal::KILL)?;
    monitor.wait()?;
    scene.expect_status(&two.id, "stopped")?;
    // Its processes end in the guest, since nobody stands for them.
    exec(
        scene,
        &one,
        "while test $(ps | grep -c 'echo [r]eady') -gt 1; do sleep 0.1; done",
    )?;
    let vmm = only_machine()?;
    scene.destroy(&two.id)?;
    ensure!(pieces(vmm, &two.id)? == 0, "its files are still there");
    exec(scene, &one, "echo alive")?.says(&["alive"])?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

fn monitor_of_the_first_killed(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    let monitor = one.process()?;
    monitor.signal(Signal::KILL)?;
    monitor.wait()?;
    scene.expect_status(&one.id, "stopped")?;
    exec(scene, &two, "echo alive")?.says(&["alive"])?;
    scene.destroy(&one.id)?;
    exec(scene, &two, "echo alive")?.says(&["alive"])?;
    stop(scene, &two)?;
    scene.expect_nothing_left()
}

fn machine_killed(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    let monitors = [one.process()?, two.process()?];
    Other::open(only_machine()?)?.signal(Signal::KILL)?;
    for monitor in &monitors {
        let code = monitor.exit_code().context("a monitor outlives its VMM")?;
        ensure!(code == 137, "{code}");
    }
    for container in [&two, &one] {
        scene.expect_status(&container.id, "stopped")?;
        scene.call(&["delete", &container.id])?.ok()?;
    }
    scene.expect_nothing_left()
}

fn everything_killed(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    let monitors = [one.process()?, two.process()?];
    let vmm = Other::open(only_machine()?)?;
    for monitor in &monitors {
        monitor.signal(Signal::KILL)?;
    }
    // Nobody holds the machine any more.
    vmm.wait().context("the VMM outlives its monitors")?;
    for container in [&one, &two] {
        scene.destroy(&container.id)?;
    }
    scene.expect_nothing_left()
}

fn a_disk_of_its_own(scene: &Scene) -> Result<()> {
    let disk = scene.path("disk.img");
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-t", "ext4", "-F"])
        .arg(&disk)
        .arg("16M");
    Process::spawn(command)?.finish()?.ok()?;
    let one = first(scene, "true")?;
    for round in 0..2 {
        let bundle = scene.bundle()?.mount(json!({
            "destination": "/disk", "type": "ext4", "source": disk,
        }));
        let script =
            format!("cat /disk/file; echo {round} >/disk/file; grep -c ' /disk ext4' /proc/mounts");
        let two = start(scene, joining(bundle, one.pid, &PODS), &script)?;
        let shown = two.streams.stdout();
        ensure!(shown.ends_with("1\nready\n"), "{shown}");
        ensure!(round == 0 || shown.starts_with("0\n"), "{shown}");
        if round == 0 {
            let monitor = two.process()?;
            scene.call(&["kill", &two.id, "KILL"])?.ok()?;
            monitor.wait()?;
        }
        scene.destroy(&two.id)?;
    }
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

fn refusals(scene: &Scene) -> Result<()> {
    let (one, other) = (first(scene, "true")?, first(scene, "true")?);
    let refused = |bundle: Bundle, words: &[&str]| -> Result<()> {
        let errors = scene.run(&bundle)?.fails()?;
        for word in words {
            ensure!(errors.contains(word), "{word:?} is not in {errors}");
        }
        ensure!(errors.trim().lines().count() == 1, "{errors}");
        Ok(())
    };
    let own = i32::try_from(std::process::id())?;
    for (pid, kind) in [(own, "ipc"), (1, "pid"), (own, "uts"), (i32::MAX, "ipc")] {
        let bundle = joining(scene.bundle()?, pid, &[kind]);
        refused(
            bundle,
            &[
                "linux.namespaces[",
                "].path",
                "no namespace of a Bulkhead container",
            ],
        )?;
    }
    let bundle = joining(
        joining(scene.bundle()?, one.pid, &["ipc"]),
        other.pid,
        &["uts"],
    );
    refused(
        bundle,
        &["is in another virtual machine", &one.id, &other.id],
    )?;
    let bundle = joining(scene.bundle()?, one.pid, &["mount"]);
    refused(bundle, &["cannot share their mount namespace"])?;
    let bundle = joining(scene.bundle()?, one.pid, &["ipc"]).with(|spec| {
        spec["linux"]["resources"] = json!({ "memory": { "limit": 4_u64 << 30 } });
    });
    refused(
        bundle,
        &["linux.resources.memory.limit", "4096 MiB", &one.id],
    )?;
    let wrong = joining(scene.bundle()?, one.pid, &[]).with(|spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        for namespace in namespaces.into_iter().flatten() {
            if namespace["type"] == "ipc" {
                namespace["path"] = json!(format!("/proc/{}/ns/uts", one.pid));
            }
        }
    });
    refused(wrong, &["is not a namespace of type ipc"])?;
    // The one that was named has gone.
    scene.destroy(&other.id)?;
    let bundle = joining(scene.bundle()?, other.pid, &["uts"]);
    refused(bundle, &["no namespace of a Bulkhead container"])?;
    // A member that cannot be made leaves nothing in the machine.
    let bundle = joining(scene.bundle()?, one.pid, &PODS).args(&["/nowhere"]);
    let output = scene.run(&bundle)?;
    ensure!(output.code() == 127, "{output}");
    let left = entries(Path::new(&format!("/proc/{}/root/share", only_machine()?)));
    ensure!(left == [one.id.clone()], "left in the share: {left:?}");
    exec(scene, &one, "echo alive")?.says(&["alive"])?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}

fn shown_together(scene: &Scene) -> Result<()> {
    let one = first(scene, "true")?;
    let two = member(scene, &one, &PODS, "true")?;
    ensure!(scene.state(&two.id)?["sandbox"] == one.id[..]);
    ensure!(scene.state(&one.id)?.get("sandbox").is_none());
    let list = scene.call(&["list", "--format", "json"])?.ok()?;
    let list: serde_json::Value = serde_json::from_slice(&list.stdout)?;
    let found = list.as_array().into_iter().flatten();
    let sandboxes: Vec<_> = found.map(|one| one["sandbox"].as_str()).collect();
    ensure!(sandboxes == [None, Some(&one.id[..])], "{list}");
    scene.destroy(&two.id)?;
    scene.destroy(&one.id)?;
    scene.expect_nothing_left()
}
