//! `exec`: further processes in a running container.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::process::{Other, Process};
use crate::runtime::Runtime;
use crate::scene::{Created, Scene, read_pid, skip};

super::cases!(exec;
    common: codes_and_streams, process_options, privileges, process_file, detached, many_at_once, not_found,
        ends_with_container;
    vm: refused_options);

fn idle(scene: &Scene) -> Result<Created> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; sleep 1000"))?;
    container.streams.wait_for("up\n")?;
    Ok(container)
}

fn codes_and_streams(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    for code in [0, 1, 77, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let output = scene
            .call(&["exec", &container.id, "/bin/sh", "-c", &script])?
            .expect(code)?;
        ensure!(
            output.stdout == b"out\n" && output.stderr == b"err\n",
            "{output}"
        );
    }
    let killed = scene.call(&["exec", &container.id, "/bin/sh", "-c", "kill -KILL $$"])?;
    killed.expect(137)?;
    let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let mut process = Process::spawn(scene.command(&["exec", &container.id, "/bin/cat"]))?;
    process.send(&bytes)?;
    ensure!(
        process.finish()?.ok()?.stdout == bytes,
        "1 MiB through exec's cat came back changed"
    );
    scene.destroy(&container.id)
}

fn process_options(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let show = "id -u; id -g; id -G; pwd; echo $COLOUR; hostname; \
        grep -q sleep /proc/1/cmdline /proc/*/cmdline && echo same processes";
    let script = ["/bin/sh", "-c", show];
    let mut args = vec![
        "exec",
        "--user",
        "1000:1001",
        "--cwd",
        "/tmp",
        "--env",
        "COLOUR=red",
    ];
    args.push(&container.id);
    args.extend(script);
    let output = scene.call(&args)?.ok()?;
    let text = output.text();
    ensure!(
        text.starts_with("1000\n1001\n1001"),
        "user and groups: {text}"
    );
    ensure!(
        text.contains("/tmp\nred\ntested\nsame processes\n"),
        "cwd, env, namespaces: {text}"
    );
    scene.destroy(&container.id)
}

fn privileges(scene: &Scene) -> Result<()> {
    let container = scene.start(&scene.bundle()?.shell("sleep 1000").with(|spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
    }))?;
    let show = "grep -E 'CapBnd|CapEff|NoNewPrivs' /proc/self/status";
    let exec = |options: &[&str]| -> Result<String> {
        let mut args = vec!["exec"];
        args.extend(options);
        args.extend([container.id.as_str(), "/bin/sh", "-c", show]);
        Ok(scene.call(&args)?.ok()?.text())
    };
    // AUDIT_WRITE 29, KILL 5, NET_BIND_SERVICE 10; CHOWN 0.
    let usual = exec(&[])?;
    ensure!(
        usual.contains("CapEff:\t0000000020000420") && usual.contains("NoNewPrivs:\t0"),
        "{usual}"
    );
    let more = exec(&["--cap", "CAP_CHOWN", "--no-new-privs"])?;
    // crun gives this one only, the others this one too.
    let sets = match scene.runtime {
        Runtime::Crun => "0000000000000001",
        _ => "0000000020000421",
    };
    ensure!(
        more.contains(&format!("CapBnd:\t{sets}"))
            && more.contains(&format!("CapEff:\t{sets}"))
            && more.contains("NoNewPrivs:\t1"),
        "{more}"
    );
    if scene.runtime != Runtime::Crun {
        let args = [
            "exec",
            "-g",
            "2002",
            "-g",
            "2003",
            &container.id,
            "/bin/id",
            "-G",
        ];
        scene.call(&args)?.ok()?.says(&["2002 2003"])?;
    }
    scene.destroy(&container.id)
}

/// What cannot be done in a guest is refused by name.
fn refused_options(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    for options in [
        ["--preserve-fds", "1"],
        ["--cgroup", "below"],
        ["--user", "root"],
    ] {
        let mut args = vec!["exec"];
        args.extend(options);
        args.extend([container.id.as_str(), "/bin/true"]);
        let errors = scene.call(&args)?.fails()?;
        ensure!(errors.contains(options[0]), "{options:?}: {errors}");
    }
    scene.call(&["pause", &container.id])?.ok()?;
    scene.call(&["exec", &container.id, "/bin/true"])?.fails()?;
    let script = ["exec", "--ignore-paused", "-d", &container.id, "/bin/true"];
    let mut process = Process::spawn(scene.command(&script))?;
    process.close_stdin();
    scene.call(&["resume", &container.id])?.ok()?;
    ensure!(process.wait()?.success(), "{}", process.stderr());
    scene.destroy(&container.id)
}

fn process_file(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let file = scene.path("process.json");
    let process = json!({
        "terminal": false,
        "user": { "uid": 1000, "gid": 1001, "additionalGids": [2002] },
        "args": ["/bin/sh", "-c", "id -u; id -G; pwd; env; grep -E 'NoNewPrivs|CapEff' \
            /proc/self/status"],
        "env": ["ONLY=this"],
        "cwd": "/var",
        "noNewPrivileges": true,
        "capabilities": { "bounding": ["CAP_KILL"], "effective": [], "permitted": [] },
    });
    fs::write(&file, process.to_string())?;
    let output = scene.call(&[
        "exec".as_ref(),
        "--process".as_ref(),
        file.as_os_str(),
        container.id.as_ref(),
    ])?;
    let output =
        output
            .ok()?
            .says(&["1000\n1001 2002\n/var\n", "ONLY=this\n", "NoNewPrivs:\t1"])?;
    ensure!(
        !output.text().contains("TERM="),
        "the environment is more than asked for: {output}"
    );
    ensure!(
        output.text().contains("CapEff:\t0000000000000000"),
        "capabilities: {output}"
    );
    scene.destroy(&container.id)
}

fn detached(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let pid_file = scene.path("exec.pid");
    let mut command = scene.command(&["exec", "--detach", "--pid-file"]);
    command.arg(&pid_file).arg(&container.id);
    command.args(["/bin/sh", "-c", "echo detached; read x; exit 12"]);
    let mut streams = Process::spawn(command)?;
    ensure!(
        streams.wait()?.success(),
        "exec --detach: {}",
        streams.stderr()
    );
    let process = Other::open(read_pid(&pid_file)?)?;
    streams.wait_for("detached\n")?;
    streams.send(b"\n")?;
    streams.drain()?;
    ensure!(
        process.exit_code()? == 12,
        "exit code of the process in exec's pid file"
    );
    scene.expect_status(&container.id, "running")?;
    scene.destroy(&container.id)
}

fn many_at_once(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let mut running = Vec::new();
    for number in 0..8 {
        let script = format!("read x; echo {number}-$x; exit {number}");
        let args = ["exec", &container.id, "/bin/sh", "-c", &script];
        running.push(Process::spawn(scene.command(&args))?);
    }
    for process in &mut running {
        process.send(b"go\n")?;
    }
    for (number, process) in running.into_iter().enumerate() {
        let output = process.finish()?.expect(i32::try_from(number)?)?;
        ensure!(output.text() == format!("{number}-go\n"), "{output}");
    }
    scene.destroy(&container.id)
}

fn not_found(scene: &Scene) -> Result<()> {
    if scene.runtime == Runtime::Crun {
        return skip("crun 1.8 may leave the process of an exec that failed behind");
    }
    let container = idle(scene)?;
    for (program, code) in [
        ("no-such-program", 127),
        ("/no/such/program", 127),
        ("/etc/passwd", 126),
    ] {
        let output = scene.call(&["exec", &container.id, program])?;
        // runc says 255 for all of these.
        if scene.runtime == Runtime::Bulkhead {
            ensure!(
                output.code() == code,
                "expected exit code {code} of {output}"
            );
        }
        let errors = output.fails()?;
        ensure!(
            errors.contains(program),
            "the error should name {program}: {errors}"
        );
    }
    let errors = scene
        .call(&["exec", "--cwd", "/no/such", &container.id, "/bin/true"])?
        .fails()?;
    ensure!(
        errors.contains("/no/such") || errors.contains("chdir"),
        "cwd: {errors}"
    );
    scene.expect_status(&container.id, "running")?;
    scene.destroy(&container.id)
}

fn ends_with_container(scene: &Scene) -> Result<()> {
    let container = idle(scene)?;
    let args = [
        "exec",
        &container.id,
        "/bin/sh",
        "-c",
        "echo up; sleep 1000",
    ];
    let mut process = Process::spawn(scene.command(&args))?;
    process.wait_for("up\n")?;
    scene.call(&["kill", &container.id, "KILL"])?.ok()?;
    process.finish()?.expect(137)?;
    container.process()?.wait()?;
    scene.call(&["exec", &container.id, "/bin/true"])?.fails()?;
    scene.destroy(&container.id)
}
