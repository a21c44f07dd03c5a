//! Containers that live longer than a command: start, stop, kill, exec, pause, inspect and the rest.

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};

super::engine_cases!(lifecycle;
    [both quick] detached, exec;
    [both] stop_and_start, kill, exec_in_terminal, pause, stats, create_and_start, restart_policy, health,
        update, exec_detached, many_execs, top, init, rename_and_inspect, timeout_of_stop, prune;
    [podman] top_with_options);

/// Runs until it is told to end, then exits with 7.
const SERVICE: &str = "echo ready; trap 'exit 7' TERM; while :; do sleep 0.1; done";

fn service(engine: &Engine, name: &str) -> Result<()> {
    engine.start(name, &[IMAGE, "sh", "-c", SERVICE])?;
    engine.wait_for_log(name, "ready")
}

fn detached(engine: &Engine) -> Result<()> {
    service(engine, "made-d")?;
    engine
        .call(&["ps", "--format", "{{.Names}} {{.Status}}"])?
        .ok()?
        .says(&["made-d Up"])?;
    engine.expect_field("made-d", "{{.State.Status}}", "running")?;
    engine.call(&["stop", "made-d"])?.ok()?;
    engine.expect_field(
        "made-d",
        "{{.State.Status}} {{.State.ExitCode}}",
        "exited 7",
    )?;
    engine.call(&["logs", "made-d"])?.ok()?.says(&["ready"])?;
    engine.call(&["rm", "made-d"])?.ok()?;
    Ok(())
}

fn create_and_start(engine: &Engine) -> Result<()> {
    let create = [
        "create",
        "--network",
        "none",
        "--name",
        "made-c",
        IMAGE,
        "sh",
        "-c",
        "echo started; exit 3",
    ];
    engine.call(&create)?.ok()?;
    engine.expect_field("made-c", "{{.State.Status}}", "created")?;
    engine
        .call(&["start", "--attach", "made-c"])?
        .expect(3)?
        .says(&["started"])?;
    engine
        .call(&["start", "--attach", "made-c"])?
        .expect(3)?
        .says(&["started"])?;
    engine.remove(&["made-c"])
}

fn stop_and_start(engine: &Engine) -> Result<()> {
    service(engine, "made-s")?;
    engine.exec("made-s", "echo kept >/root/file")?.ok()?;
    engine.call(&["stop", "made-s"])?.ok()?;
    engine.call(&["start", "made-s"])?.ok()?;
    engine
        .exec("made-s", "cat /root/file")?
        .ok()?
        .says(&["kept"])?;
    engine.call(&["restart", "--time", "5", "made-s"])?.ok()?;
    engine
        .exec("made-s", "cat /root/file")?
        .ok()?
        .says(&["kept"])?;
    engine.remove(&["made-s"])
}

fn timeout_of_stop(engine: &Engine) -> Result<()> {
    engine.start(
        "made-t",
        &[
            IMAGE,
            "sh",
            "-c",
            "trap '' TERM; echo ready; while :; do sleep 0.1; done",
        ],
    )?;
    engine.wait_for_log("made-t", "ready")?;
    engine.call(&["stop", "--time", "1", "made-t"])?.ok()?;
    engine.expect_field("made-t", "{{.State.ExitCode}}", "137")?;
    engine.remove(&["made-t"])
}

fn kill(engine: &Engine) -> Result<()> {
    let script = "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
    engine.start("made-k", &[IMAGE, "sh", "-c", script])?;
    engine.wait_for_log("made-k", "ready")?;
    engine.call(&["kill", "--signal", "USR1", "made-k"])?.ok()?;
    engine.wait_for_log("made-k", "usr1")?;
    engine.call(&["kill", "made-k"])?.ok()?;
    engine.call(&["wait", "made-k"])?.ok()?.says(&["137"])?;
    engine.remove(&["made-k"])
}

fn exec(engine: &Engine) -> Result<()> {
    service(engine, "made-e")?;
    let output = engine
        .exec("made-e", "echo out; echo err >&2; exit 9")?
        .expect(9)?;
    ensure!(
        output.text() == "out\n" && output.errors().contains("err"),
        "{output}"
    );
    let mut cat = engine.begin(&["exec", "--interactive", "made-e", "cat"])?;
    cat.send(b"through\n")?;
    cat.finish()?.ok()?.says(&["through"])?;
    let id = engine.call(&[
        "exec",
        "--user",
        "1000:2000",
        "--workdir",
        "/tmp",
        "--env",
        "A=b",
        "made-e",
        "sh",
        "-c",
        "id; pwd; echo $A",
    ])?;
    id.ok()?
        .says(&["uid=1000(user) gid=2000(extra)", "/tmp\nb\n"])?;
    let code = engine.call(&["exec", "made-e", "/nowhere"])?.code();
    ensure!(
        code == 127 || code == 126,
        "exit code {code} of a program that is not there"
    );
    engine.remove(&["made-e"])
}

fn exec_in_terminal(engine: &Engine) -> Result<()> {
    service(engine, "made-x")?;
    let (mut terminal, mut process) = engine.begin_in_terminal(&["exec", "-it", "made-x", "sh"])?;
    terminal.wait_for("# ")?;
    super::output::expect_size(&mut terminal, "33 111")?;
    terminal.send("exit 6\n")?;
    let code = crate::process::shell_code(process.wait()?);
    ensure!(code == 6, "exit code {code}");
    engine.remove(&["made-x"])
}

fn exec_detached(engine: &Engine) -> Result<()> {
    service(engine, "made-b")?;
    engine
        .call(&[
            "exec",
            "--detach",
            "made-b",
            "sh",
            "-c",
            "echo done >/root/file; mkfifo /root/f; cat /root/f",
        ])?
        .ok()?;
    engine
        .exec(
            "made-b",
            "until [ -p /root/f ]; do :; done; cat /root/file; echo >/root/f",
        )?
        .ok()?
        .says(&["done"])?;
    // One that still runs when the container ends.
    engine
        .call(&["exec", "--detach", "made-b", "sleep", "1000"])?
        .ok()?;
    engine.remove(&["made-b"])
}

fn many_execs(engine: &Engine) -> Result<()> {
    service(engine, "made-m")?;
    let mut running = Vec::new();
    for n in 0..4 {
        running.push((
            n,
            engine.begin(&[
                "exec",
                "made-m",
                "sh",
                "-c",
                &format!("seq 1 1000 | tail -1; exit {n}"),
            ])?,
        ));
    }
    for (n, process) in running {
        process.finish()?.expect(n)?.says(&["1000"])?;
    }
    engine.remove(&["made-m"])
}

fn pause(engine: &Engine) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i >/root/count; sleep 0.05; done";
    engine.start("made-p", &[IMAGE, "sh", "-c", script])?;
    engine.call(&["pause", "made-p"])?.ok()?;
    engine.expect_field("made-p", "{{.State.Status}}", "paused")?;
    engine.call(&["exec", "made-p", "true"])?.fails()?;
    engine.call(&["unpause", "made-p"])?.ok()?;
    engine.expect_field("made-p", "{{.State.Status}}", "running")?;
    engine
        .exec(
            "made-p",
            "a=$(cat /root/count); until [ \"$(cat /root/count)\" != \"$a\" ]; do :; done",
        )?
        .ok()?;
    engine.remove(&["made-p"])
}

fn top(engine: &Engine) -> Result<()> {
    engine.start("made-o", &[IMAGE, "sh", "-c", "echo ready; sleep 4321"])?;
    engine.wait_for_log("made-o", "ready")?;
    let text = engine.call(&["top", "made-o"])?.ok()?.text();
    ensure!(
        !text.contains("bulkhead-engines"),
        "processes of the host: {text}"
    );
    ensure!(text.contains("PID"), "{text}");
    // Docker looks for the guest's numbers among the host's processes (docs/docker.md).
    if engine.podman() || !engine.bulkhead() {
        ensure!(text.contains("sleep 4321"), "{text}");
    }
    engine.remove(&["made-o"])
}

fn top_with_options(engine: &Engine) -> Result<()> {
    engine.start("made-o", &[IMAGE, "sh", "-c", "echo ready; sleep 4321"])?;
    engine.wait_for_log("made-o", "ready")?;
    engine
        .call(&["top", "made-o", "-o", "pid,args"])?
        .ok()?
        .says(&["sleep 4321"])?;
    engine.remove(&["made-o"])
}

fn stats(engine: &Engine) -> Result<()> {
    engine.start(
        "made-st",
        &[
            "--memory",
            "100m",
            IMAGE,
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ],
    )?;
    engine.wait_for_log("made-st", "ready")?;
    let text = engine.call(&[
        "stats",
        "--no-stream",
        "--format",
        "{{.Name}} {{.MemUsage}} {{.PIDs}}",
        "made-st",
    ])?;
    let text = text.ok()?.text();
    // Docker reads the limit of the host's cgroup: the guest's 256 MiB and 64 for its machine.
    let limit = match (engine.podman(), engine.bulkhead()) {
        (true, _) => "104.9MB",
        (false, true) => "320MiB",
        (false, false) => "100MiB",
    };
    ensure!(
        text.contains("made-st") && text.contains(limit),
        "no limit of {limit}: {text}"
    );
    let used = text.split_whitespace().nth(1).unwrap_or("0B");
    ensure!(!used.starts_with("0B"), "no memory used: {text}");
    engine.remove(&["made-st"])
}

fn restart_policy(engine: &Engine) -> Result<()> {
    // The file counts how often it was started.
    let script =
        "echo x >>/root/starts; [ $(wc -l </root/starts) -ge 3 ] || exit 1; echo third; sleep 1000";
    engine.start(
        "made-r",
        &["--restart", "on-failure:5", IMAGE, "sh", "-c", script],
    )?;
    // `logs --follow` ends with each of the container's lives.
    let lives = (0..5).find(|_| engine.wait_for_log("made-r", "third").is_ok());
    ensure!(lives.is_some(), "it was not started for the third time");
    engine.expect_field("made-r", "{{.State.Status}} {{.RestartCount}}", "running 2")?;
    engine.remove(&["made-r"])
}

fn health(engine: &Engine) -> Result<()> {
    let check = [
        "--health-cmd",
        "test -e /root/healthy",
        "--health-interval",
        if engine.podman() { "disable" } else { "1s" },
        "--health-retries",
        "1",
    ];
    engine.start(
        "made-h",
        &[&check[..], &[IMAGE, "sh", "-c", "echo ready; sleep 1000"]].concat(),
    )?;
    engine.wait_for_log("made-h", "ready")?;
    if engine.podman() {
        // Without systemd there are no timers; users run the check themselves.
        engine.call(&["healthcheck", "run", "made-h"])?.expect(1)?;
        engine.exec("made-h", "touch /root/healthy")?.ok()?;
        engine.call(&["healthcheck", "run", "made-h"])?.expect(0)?;
    } else {
        // The first check may have been made by now.
        let mut events = engine.begin(&[
            "events",
            "--since",
            "1m",
            "--filter",
            "container=made-h",
            "--filter",
            "event=health_status",
        ])?;
        events.wait_for("unhealthy")?;
        engine.exec("made-h", "touch /root/healthy")?.ok()?;
        events.wait_for("health_status: healthy")?;
    }
    engine.remove(&["made-h"])
}

fn update(engine: &Engine) -> Result<()> {
    if engine.podman() {
        // Podman 4.3 changes CPUs and the like through the runtime's `update`.
        engine.start(
            "made-u",
            &["--cpus", "1", "--memory", "200m", IMAGE, "sleep", "1000"],
        )?;
        engine
            .call(&["update", "--cpus", "0.5", "--memory", "100m", "made-u"])?
            .ok()?;
    } else {
        engine.start(
            "made-u",
            &[
                "--cpus",
                "1",
                "--memory",
                "200m",
                "--memory-swap",
                "200m",
                IMAGE,
                "sleep",
                "1000",
            ],
        )?;
        engine
            .call(&[
                "update",
                "--cpus",
                "0.5",
                "--memory",
                "100m",
                "--memory-swap",
                "100m",
                "made-u",
            ])?
            .ok()?;
    }
    engine
        .exec(
            "made-u",
            "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max",
        )?
        .ok()?
        .says(&["50000 100000", "104857600"])?;
    engine.remove(&["made-u"])
}

fn init(engine: &Engine) -> Result<()> {
    let output = engine
        .script(&["--init"], "tr '\\0' ' ' </proc/1/cmdline")?
        .ok()?;
    ensure!(output.text().contains("init"), "{output}");
    engine
        .script(&["--init"], "kill -TERM 1; sleep 1000")?
        .expect(143)?;
    Ok(())
}

fn rename_and_inspect(engine: &Engine) -> Result<()> {
    service(engine, "made-i")?;
    engine.call(&["rename", "made-i", "made-j"])?.ok()?;
    let all = engine.inspect("made-j")?;
    ensure!(all["State"]["Running"] == true, "{}", all["State"]);
    ensure!(
        all["State"]["Pid"].as_i64().is_some_and(|pid| pid > 1),
        "{}",
        all["State"]
    );
    engine.exec("made-j", "true")?.ok()?;
    engine.remove(&["made-j"])
}

fn prune(engine: &Engine) -> Result<()> {
    engine.start("made-g", &[IMAGE, "true"])?;
    engine.call(&["wait", "made-g"])?.ok()?;
    engine.call(&["container", "prune", "--force"])?.ok()?;
    ensure!(
        engine.call(&["inspect", "made-g"])?.code() != 0,
        "the container is still there"
    );
    Ok(())
}
