//! Many at a time, and engines that are killed.

use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::process::{WaitOptions, getpid, set_child_subreaper, waitpid};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::pid_of;

super::engine_cases!(many;
    [both] twenty, client_killed;
    [podman] conmon_killed);

fn twenty(engine: &Engine) -> Result<()> {
    let mut running = Vec::new();
    for n in 0..20 {
        // Half of them fail, in different ways.
        let script = format!("echo number {n}; exit {}", if n % 2 == 0 { 0 } else { n });
        let args = [
            "run",
            "--rm",
            "--network",
            "none",
            "--memory",
            "64m",
            IMAGE,
            "sh",
            "-c",
            &script,
        ];
        running.push((n, engine.begin(&args)?));
    }
    for (n, mut process) in running {
        // One CPU boots them all.
        process.close_stdin();
        process.wait_within(Duration::from_secs(240))?;
        process
            .finish()?
            .expect(if n % 2 == 0 { 0 } else { n })?
            .says(&[&format!("number {n}\n")])?;
    }
    Ok(())
}

fn client_killed(engine: &Engine) -> Result<()> {
    let mut client = engine.begin(&[
        "run",
        "--network",
        "none",
        "--name",
        "made-ck",
        IMAGE,
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ])?;
    client.wait_for("ready")?;
    client.signal(rustix::process::Signal::KILL)?;
    client.wait()?;
    // The container goes on without it.
    engine
        .exec("made-ck", "echo alive")?
        .ok()?
        .says(&["alive"])?;
    engine.remove(&["made-ck"])
}

fn conmon_killed(engine: &Engine) -> Result<()> {
    // Somebody must take the orphans in, as a host's init does, or they stay as zombies.
    set_child_subreaper(Some(getpid()))?;
    engine.start("made-mk", &[IMAGE, "sh", "-c", "echo ready; sleep 1000"])?;
    engine.wait_for_log("made-mk", "ready")?;
    let pid: i32 = engine.field("made-mk", "{{.State.ConmonPid}}")?.parse()?;
    let conmon = crate::process::Other::open(pid)?;
    conmon.signal(rustix::process::Signal::KILL)?;
    conmon.wait()?;
    let orphan: u32 = engine.field("made-mk", "{{.State.Pid}}")?.parse()?;
    let orphan = pid_of(orphan)?;
    let init = std::thread::spawn(move || waitpid(Some(orphan), WaitOptions::empty()));
    // Podman 4.3 waits in vain for what conmon would have written, once.
    engine.call(&["rm", "--force", "--time", "0", "made-mk"])?;
    ensure!(
        init.join().is_ok_and(|ended| ended.is_ok()),
        "the container's process was not left to us"
    );
    engine.remove(&["made-mk"])?;
    ensure!(
        engine.call(&["inspect", "made-mk"])?.code() != 0,
        "the container is still there"
    );
    Ok(())
}
