//! Podman's pods: each container has a machine of its own, and they share what Podman shares.

use anyhow::Result;

use crate::engines::engine::{Engine, IMAGE};

super::engine_cases!(pods;
    [podman] pod, pod_with_port);

fn pod(engine: &Engine) -> Result<()> {
    engine
        .call(&[
            "pod",
            "create",
            "--name",
            "made-pod",
            "--network",
            "none",
            "--share",
            "net",
        ])?
        .ok()?;
    engine
        .call(&[
            "run",
            "--detach",
            "--pod",
            "made-pod",
            "--name",
            "made-p1",
            IMAGE,
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ])?
        .ok()?;
    engine.wait_for_log("made-p1", "ready")?;
    engine
        .call(&["run", "--rm", "--pod", "made-pod", IMAGE, "echo", "second"])?
        .ok()?
        .says(&["second"])?;
    engine
        .call(&["pod", "ps"])?
        .ok()?
        .says(&["made-pod", "Running"])?;
    engine
        .call(&["pod", "stop", "--time", "0", "made-pod"])?
        .ok()?;
    engine.call(&["pod", "rm", "--force", "made-pod"])?.ok()?;
    Ok(())
}

fn pod_with_port(engine: &Engine) -> Result<()> {
    engine
        .call(&[
            "pod",
            "create",
            "--name",
            "made-pod",
            "--publish",
            "127.0.0.1:8085:80",
        ])?
        .ok()?;
    let script = "echo from the pod >/tmp/index.html; echo ready; exec httpd -f -p 80 -h /tmp";
    engine
        .call(&[
            "run", "--detach", "--pod", "made-pod", "--name", "made-web", IMAGE, "sh", "-c", script,
        ])?
        .ok()?;
    engine.wait_for_log("made-web", "ready")?;
    let fetch = "for i in 1 2 3 4 5 6 7 8 9 10; do timeout 5 wget -qO- http://127.0.0.1/ && exit; sleep 0.3; done; exit 1";
    engine
        .exec("made-web", fetch)?
        .ok()?
        .says(&["from the pod"])?;
    engine
        .call(&["pod", "rm", "--force", "--time", "0", "made-pod"])?
        .ok()?;
    Ok(())
}
