//! Signals by `kill` and by sending them to the runtime's process, and exit codes that tell of them.

use anyhow::{Result, ensure};
use rustix::process::Signal;

use crate::scene::Scene;

super::cases!(signals;
    common: codes, forwarded, to_all;
    vm: by_pid);

fn codes(scene: &Scene) -> Result<()> {
    // PID 1 of a namespace cannot kill itself, so its child does and the shell passes it on.
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("HUP", 129)] {
        let script = format!("sh -c 'kill -{signal} $$'; exit $?");
        scene.run_script(&script)?.expect(code)?;
    }
    Ok(())
}

/// What `run` in the foreground gets, the container's process gets.
fn forwarded(scene: &Scene) -> Result<()> {
    let script = "for s in TERM INT HUP USR1; do trap \"echo got $s\" $s; done; \
        trap 'exit 33' USR2; echo up; while :; do sleep 1000 & wait $!; done";
    let mut process = scene.start_run(&scene.bundle()?.shell(script))?;
    process.wait_for("up\n")?;
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::USR1, "USR1"),
    ] {
        process.signal(signal)?;
        process.wait_for(&format!("got {name}\n"))?;
    }
    process.signal(Signal::USR2)?;
    process.finish()?.expect(33)?;
    scene.expect_nothing_left()
}

/// Engines signal the pid of the pid file too.
fn by_pid(scene: &Scene) -> Result<()> {
    let script = "trap 'exit 21' TERM; echo up; while :; do sleep 1000 & wait $!; done";
    let mut container = scene.start(&scene.bundle()?.shell(script))?;
    container.streams.wait_for("up\n")?;
    let process = container.process()?;
    process.signal(Signal::TERM)?;
    ensure!(
        process.exit_code()? == 21,
        "exit code after SIGTERM to the process of the pid file"
    );
    scene.expect_status(&container.id, "stopped")?;
    scene.destroy(&container.id)
}

fn to_all(scene: &Scene) -> Result<()> {
    let script = "sh -c 'trap \"echo child got it; exit\" USR1; echo up; \
        while :; do sleep 1000 & wait $!; done' & trap '' USR1; wait $!; echo over";
    let mut container = scene.start(&scene.bundle()?.shell(script))?;
    container.streams.wait_for("up\n")?;
    scene
        .call(&["kill", "--all", &container.id, "USR1"])?
        .ok()?;
    container.streams.wait_for("child got it\n")?;
    container.streams.wait_for("over\n")?;
    scene.destroy(&container.id)
}
