//! What each command says about a container in a state that does not allow it.

use anyhow::{Result, ensure};

use crate::runtime::Runtime;
use crate::scene::Scene;

super::cases!(states;
    common: unknown_container, created, running_and_stopped, duplicate;
    vm: );

fn refused(scene: &Scene, args: &[&str]) -> Result<()> {
    let errors = scene.call(args)?.fails()?;
    ensure!(!errors.trim().is_empty(), "no reason given for {args:?}");
    Ok(())
}

/// crun takes `resume` of what is not paused for done.
fn refuses_resume(scene: &Scene, id: &str) -> Result<()> {
    if scene.runtime == Runtime::Crun {
        Ok(())
    } else {
        refused(scene, &["resume", id])
    }
}

fn unknown_container(scene: &Scene) -> Result<()> {
    let id = scene.id();
    for command in ["state", "start", "delete", "pause", "resume", "ps"] {
        refused(scene, &[command, &id])?;
    }
    refused(scene, &["kill", &id, "KILL"])?;
    refused(scene, &["exec", &id, "/bin/true"])?;
    scene.expect_nothing_left()
}

fn created(scene: &Scene) -> Result<()> {
    let container = scene.create(&scene.bundle()?.shell("sleep 1000"))?;
    refuses_resume(scene, &container.id)?;
    scene.expect_status(&container.id, "created")?;
    scene.destroy(&container.id)
}

fn running_and_stopped(scene: &Scene) -> Result<()> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; read x"))?;
    let id = container.id.clone();
    container.streams.wait_for("up\n")?;
    refused(scene, &["start", &id])?;
    refuses_resume(scene, &id)?;
    refused(scene, &["delete", &id])?;
    if scene.runtime != Runtime::Crun {
        refused(scene, &["kill", &id, "NOSUCHSIGNAL"])?;
    }
    scene.expect_status(&id, "running")?;
    let process = container.process()?;
    container.streams.send(b"\n")?;
    process.wait()?;
    scene.expect_status(&id, "stopped")?;
    refused(scene, &["start", &id])?;
    refused(scene, &["exec", &id, "/bin/true"])?;
    refused(scene, &["kill", &id, "TERM"])?;
    refused(scene, &["pause", &id])?;
    scene.call(&["delete", &id])?.ok()?;
    Ok(())
}

fn duplicate(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("sleep 1000");
    let container = scene.create(&bundle)?;
    for command in ["create", "run"] {
        let args = [
            command.as_ref(),
            "--bundle".as_ref(),
            bundle.as_os_str(),
            container.id.as_ref(),
        ];
        let errors = scene.call(&args)?.fails()?;
        ensure!(
            errors.contains("exist"),
            "{command} of a name in use says: {errors}"
        );
    }
    scene.expect_status(&container.id, "created")?;
    scene.destroy(&container.id)
}
