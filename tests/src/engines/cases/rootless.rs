//! Podman by somebody who is not root but may use KVM.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::{Output, Process};
use crate::scene::skip;

super::engine_cases!(rootless;
    [podman quick] exec, network;
    [podman] run, volume);

/// Podman as `somebody`, who has an image of his own.
fn podman(engine: &Engine, args: &str) -> Result<Output> {
    let script = format!(
        "export XDG_RUNTIME_DIR=/run/user/1000 HOME=/home/somebody; cd; podman --runtime {} --root /run/user/1000/storage {args}",
        engine.runtime
    );
    let mut command = Command::new("setpriv");
    command.args([
        "--reuid",
        "1000",
        "--regid",
        "1000",
        "--init-groups",
        "sh",
        "-c",
        &script,
    ]);
    Process::spawn(command)?.finish()
}

/// Gives somebody the image for what he does, and leaves nothing of his behind.
fn as_somebody(engine: &Engine, work: impl FnOnce() -> Result<()>) -> Result<()> {
    if !std::fs::exists("/run/user/1000")? {
        return skip("nobody who could run it here");
    }
    let archive = engine.path("image.tar");
    engine.call(&["save", "--output", &archive, IMAGE])?.ok()?;
    std::fs::set_permissions(&engine.directory, Permissions::from_mode(0o755))?;
    podman(engine, &format!("load --quiet --input {archive}"))?.ok()?;
    let done = work();
    podman(engine, "system reset --force")?.ok()?;
    // Podman's own process, which keeps the user namespace open, ends with this.
    podman(engine, "system migrate")?.ok()?;
    done
}

fn run(engine: &Engine) -> Result<()> {
    as_somebody(engine, || {
        let output = podman(engine, &format!("run --rm --network none {IMAGE} id -u"))?;
        output.ok()?.says(&["0\n"])?;
        let code = podman(
            engine,
            &format!("run --rm --network none {IMAGE} sh -c 'exit 7'"),
        )?;
        code.expect(7).map(drop)
    })
}

fn exec(engine: &Engine) -> Result<()> {
    as_somebody(engine, || {
        let start = format!("run --detach --name made-x --network none {IMAGE} sleep 1000");
        podman(engine, &start)?.ok()?;
        let inside = podman(engine, "exec made-x sh -c 'hostname; echo err >&2; exit 3'")?;
        ensure!(inside.errors() == "err\n", "{inside}");
        inside.expect(3)?;
        podman(engine, "stop --time 0 made-x")?.ok()?;
        podman(engine, "rm made-x")?.ok().map(drop)
    })
}

/// Root of the container is who has started it.
fn volume(engine: &Engine) -> Result<()> {
    as_somebody(engine, || {
        let directory = engine.path("data");
        std::fs::create_dir(&directory)?;
        std::os::unix::fs::chown(&directory, Some(1000), Some(1000))?;
        let script = "'echo there >/data/x; stat -c %u /data/x'";
        let run =
            format!("run --rm --network none --volume {directory}:/data {IMAGE} sh -c {script}");
        podman(engine, &run)?.ok()?.says(&["0\n"])?;
        let made = std::fs::metadata(format!("{directory}/x"))?;
        ensure!(made.uid() == 1000, "the file is {}'s", made.uid());
        Ok(())
    })
}

/// slirp4netns is at the other end of the interface.
fn network(engine: &Engine) -> Result<()> {
    // As udev has it; the test host has no udev.
    std::fs::set_permissions("/dev/net/tun", Permissions::from_mode(0o666))?;
    as_somebody(engine, || {
        let run = format!("run --rm {IMAGE} sh -c 'ip -o addr show tap0; ip route'");
        let output = podman(engine, &run)?.ok()?;
        output
            .says(&["10.0.2.100/24", "default via 10.0.2.2"])
            .map(drop)
    })
}
