//! The three streams, byte for byte.

use std::fs::File;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::bundle::Bundle;
use crate::process::{DEADLINE, Process};
use crate::runtime::Runtime;
use crate::scene::Scene;
use crate::watch::Watch;

super::cases!(stdio;
    common: every_byte, large, stdin_closed, stdout_closed, output_then_exit, end_of_input,
        to_files, preserved_descriptors;
    vm: );

/// Bytes without a pattern that a wrong offset could hide in.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn every_byte(scene: &Scene) -> Result<()> {
    let all: Vec<u8> = (0..=255).cycle().take(1024).collect();
    let mut process = scene.start_run(&scene.bundle()?.shell("tee /dev/stderr"))?;
    process.send(&all)?;
    let output = process.finish()?.ok()?;
    ensure!(
        output.stdout == all && output.stderr == all,
        "bytes changed: {output}"
    );
    Ok(())
}

fn large(scene: &Scene) -> Result<()> {
    let input = noise(64 << 20);
    let bundle = scene
        .bundle()?
        .shell("mkfifo /tmp/copy; sha256sum </tmp/copy >&2 & tee /tmp/copy; wait");
    let mut process = scene.start_run(&bundle)?;
    process.send(&input)?;
    process.close_stdin();
    // An emulated CPU that others keep busy takes its time.
    process.wait_within(4 * DEADLINE)?;
    let output = process.finish()?.ok()?;
    ensure!(
        output.stdout == input,
        "64 MiB came back changed ({} bytes)",
        output.stdout.len()
    );
    let host = scene.path("sent");
    std::fs::write(&host, &input)?;
    let mut sum = std::process::Command::new("sha256sum");
    sum.stdin(File::open(&host)?).stdout(Stdio::piped());
    let sum = Process::spawn_as_is(sum)?.finish()?.ok()?.text();
    ensure!(
        output.errors().trim() == sum.trim(),
        "checksum in the container: {}",
        output.errors()
    );
    Ok(())
}

fn stdin_closed(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("cat; echo end");
    // Empty, and no descriptor 0 at all, as some supervisors start programs.
    for redirection in ["</dev/null", "<&-"] {
        if redirection == "<&-" && scene.runtime == Runtime::Crun {
            continue; // crun 1.8 fails: "fchown std stream 0".
        }
        let id = scene.id();
        let output =
            Process::spawn(redirected(scene, &bundle, redirection, &[], &id)?)?.finish()?;
        let output = output.ok()?;
        ensure!(output.text() == "end\n", "with {redirection}: {output}");
    }
    Ok(())
}

/// `run` by a shell that redirects descriptors first.
fn redirected(
    scene: &Scene,
    bundle: &Bundle,
    redirection: &str,
    options: &[&str],
    id: &str,
) -> Result<Command> {
    bundle.write()?;
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(format!("exec \"$0\" \"$@\" {redirection}"));
    command
        .arg(scene.runtime.program())
        .arg("--root")
        .arg(&scene.root)
        .arg("run")
        .args(options);
    command.arg("--bundle").arg(&bundle.path).arg(id);
    Ok(command)
}

fn stdout_closed(scene: &Scene) -> Result<()> {
    // The reader goes away: the writer gets SIGPIPE or EPIPE, and the container ends.
    let bundle = scene.bundle()?.shell("yes; echo yes ended >&2");
    bundle.write()?;
    let (reader, writer) = std::io::pipe()?;
    let mut command = scene.command(&["run".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command
        .arg(scene.id())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped());
    let process = Process::spawn_as_is(command)?;
    drop(reader);
    let output = process.finish()?;
    ensure!(
        output.errors().contains("yes ended"),
        "after the reader had gone: {output}"
    );
    Ok(())
}

fn output_then_exit(scene: &Scene) -> Result<()> {
    // What was written before the end arrives, however quickly the end follows.
    let script = "dd if=/dev/zero bs=1048576 count=4 2>/dev/null; echo last; echo last >&2; exit 9";
    let output = scene.run_script(script)?.expect(9)?;
    ensure!(
        output.stdout.len() == (4 << 20) + 5,
        "{} bytes arrived",
        output.stdout.len()
    );
    ensure!(
        output.stdout.ends_with(b"last\n") && output.stderr == b"last\n",
        "{output}"
    );
    Ok(())
}

fn end_of_input(scene: &Scene) -> Result<()> {
    let mut process = scene.start_run(&scene.bundle()?.shell("echo up; cat; echo end"))?;
    process.wait_for("up\n")?;
    process.send(b"some")?;
    process.wait_for("some")?;
    let output = process.finish()?.ok()?;
    ensure!(output.stdout == b"up\nsomeend\n", "{output}");
    Ok(())
}

fn to_files(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("cat; echo to stderr >&2; sleep 1000");
    bundle.write()?;
    std::fs::write(scene.path("in"), "from a file\n")?;
    let mut command = scene.command(&["run", "--detach", "--bundle"]);
    let id = scene.id();
    command
        .arg(&bundle.path)
        .arg(&id)
        .stdin(File::open(scene.path("in"))?);
    let (out, err) = (scene.path("out"), scene.path("err"));
    command
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?);
    let watch = Watch::new(&err)?;
    Process::spawn_as_is(command)?.finish()?.ok()?;
    watch.wait_until(|| {
        let written = |path| std::fs::read_to_string(path).unwrap_or_default();
        written(&out) == "from a file\n" && written(&err) == "to stderr\n"
    })?;
    scene.destroy(&id)
}

fn preserved_descriptors(scene: &Scene) -> Result<()> {
    let bundle = scene.bundle()?.shell("cat <&3");
    let file = scene.path("three");
    std::fs::write(&file, "by descriptor\n")?;
    let redirection = format!("3<{}", file.display());
    let command = redirected(
        scene,
        &bundle,
        &redirection,
        &["--preserve-fds", "1"],
        &scene.id(),
    )?;
    let output = Process::spawn(command)?.finish()?;
    if scene.runtime == Runtime::Bulkhead && output.code() != 0 {
        // A host's descriptor cannot cross into a guest; that must be said, not passed over.
        ensure!(output.errors().contains("preserve-fds"), "{output}");
        return Ok(());
    }
    output.ok()?.says(&["by descriptor\n"])?;
    Ok(())
}
