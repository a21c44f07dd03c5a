//! Building images: RUN steps happen in a container of the runtime.

use anyhow::{Context, Result, ensure};

use crate::engines::engine::{Engine, IMAGE};

super::engine_cases!(build;
    [both] run_steps, failing_step);

/// `build` of a recipe in the case's directory.
fn build(engine: &Engine, recipe: &str, options: &[&str]) -> Result<crate::process::Output> {
    std::fs::write(engine.path("Containerfile"), recipe)?;
    std::fs::write(engine.path("context-file"), "from the context\n")?;
    let file = engine.path("Containerfile");
    let mut args = vec!["build", "--no-cache", "--network", "none", "--file", &file];
    if engine.podman() {
        // Podman's global option is not for builds.
        args.extend(["--runtime", engine.runtime.as_str()]);
    }
    args.extend(options);
    let directory = engine.directory.to_str().context("a path of letters")?;
    args.push(directory);
    let mut command = std::process::Command::new(engine.kind.program());
    command
        .args(&args)
        .env("DOCKER_BUILDKIT", "0")
        .env("BUILDAH_ISOLATION", "oci");
    crate::process::Process::spawn(command)?.finish()
}

fn run_steps(engine: &Engine) -> Result<()> {
    let recipe = format!(
        "FROM {IMAGE}\nENV A=b\nCOPY context-file /root/\nRUN cat /root/context-file && echo \"$A\" >/root/made && chown 12:34 /root/made\n\
         USER user\nRUN id -u >/home/id || id -u >/tmp/id\nRUN uname -r >/tmp/kernel\nCMD cat /root/made /tmp/kernel\n"
    );
    build(engine, &recipe, &["--tag", "localhost/made-built"])?
        .ok()?
        .says(&["from the context"])?;
    let output = engine.run(&[
        "--user",
        "root",
        "localhost/made-built",
        "sh",
        "-c",
        "stat -c %u:%g /root/made; cat /root/made /tmp/id /tmp/kernel",
    ])?;
    let output = output.ok()?.says(&["12:34\nb\n1000\n"])?;
    if engine.bulkhead() {
        let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        ensure!(
            !output.text().contains(host.trim()),
            "the steps ran on the host's kernel"
        );
    }
    engine
        .call(&["rmi", "--force", "localhost/made-built"])?
        .ok()?;
    engine.call(&["image", "prune", "--force"])?.ok()?;
    Ok(())
}

fn failing_step(engine: &Engine) -> Result<()> {
    let output = build(
        engine,
        &format!("FROM {IMAGE}\nRUN echo before && exit 9\n"),
        &["--force-rm", "--tag", "localhost/made-failed"],
    )?;
    ensure!(output.code() != 0, "{output}");
    let all = format!("{}{}", output.text(), output.errors());
    ensure!(all.contains("before") && all.contains('9'), "{all}");
    engine.call(&["image", "prune", "--force"])?.ok()?;
    Ok(())
}
