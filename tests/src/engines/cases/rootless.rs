//! Podman by somebody who is not root but may use KVM.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::process::{Output, Process};
use crate::scene::skip;

super::engine_cases!(rootless;
    [podman] run);

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

fn run(engine: &Engine) -> Result<()> {
    if !std::fs::exists("/run/user/1000")? {
        return skip("nobody who could run it here");
    }
    let archive = engine.path("image.tar");
    engine.call(&["save", "--output", &archive, IMAGE])?.ok()?;
    std::fs::set_permissions(
        &engine.directory,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    podman(engine, &format!("load --quiet --input {archive}"))?.ok()?;
    let result = podman(engine, &format!("run --rm --network none {IMAGE} id -u"));
    let output = result.and_then(|output| {
        if !engine.bulkhead() {
            return output.ok()?.says(&["0\n"]);
        }
        // The host's cgroups are root's; who tries is told so (docs/podman.md).
        ensure!(
            output.code() != 0 && output.errors().contains("cannot make the cgroup"),
            "{output}"
        );
        Ok(output)
    });
    podman(engine, "system reset --force")?.ok()?;
    // Podman's own process, which keeps the user namespace open, ends with this.
    podman(engine, "system migrate")?.ok()?;
    output?;
    Ok(())
}
