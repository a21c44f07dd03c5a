//! Terminals: the caller's own, and one sent over a console socket.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::bundle::Bundle;
use crate::process::{DEADLINE, Process, wait_readable};
use crate::runtime::Runtime;
use crate::scene::Scene;
use crate::sys::own_terminal;
use crate::terminal::Terminal;

super::cases!(tty;
    common: run_interactive, console_socket, exec_interactive, needs_a_terminal;
    vm: last_words);

fn with_terminal(scene: &Scene, script: &str) -> Result<Bundle> {
    let bundle = scene.bundle()?.shell(script).with(|spec| {
        spec["process"]["terminal"] = json!(true);
    });
    bundle.write()?;
    Ok(bundle)
}

/// Starts the runtime with a terminal as its three streams.
fn on_terminal(mut command: std::process::Command) -> Result<(Terminal, Process)> {
    let (terminal, slave) = Terminal::open(31, 97)?;
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    own_terminal(&mut command);
    Ok((terminal, Process::spawn_as_is(command)?))
}

/// A conversation that shows the size, a change of it, the line discipline and the exit code.
/// A trapped signal ends the shell's `read` early.
const CONVERSATION: &str = "test -t 0 && test -t 1 && test -t 2 && tty && \
    trap 'stty size' WINCH; echo hello; read -r line; stty size; echo ready; \
    while :; do read -r line || continue; echo \"<$line>\"; \
    case $line in end) read -r line; exit 6;; esac; done";

fn converse(scene: &Scene, terminal: &mut Terminal) -> Result<()> {
    // crun 1.8 does not always carry sizes over.
    let sizes = scene.runtime != Runtime::Crun;
    let shown = terminal.wait_for("hello")?;
    ensure!(
        shown.contains("/dev/pts/0") || shown.contains("/dev/console"),
        "tty: {shown:?}"
    );
    // Not before the first answer: runc sets the size when the process runs already.
    terminal.send("go\n")?;
    let shown = terminal.wait_for("ready")?;
    ensure!(!sizes || shown.contains("31 97"), "size: {shown:?}");
    terminal.resize(40, 120)?;
    // The shell runs a trap when it is between lines.
    terminal.send("x\n")?;
    let shown = terminal.wait_for("<x>")?;
    ensure!(
        shown.contains("x\r\n"),
        "no echo of what was typed: {shown:?}"
    );
    if sizes && !shown.contains("40 120") {
        terminal.wait_for("40 120")?;
    }
    terminal.send("end\n")?;
    terminal.wait_for("<end>\r\n")?;
    terminal.send("\n")?;
    Ok(())
}

fn run_interactive(scene: &Scene) -> Result<()> {
    let bundle = with_terminal(scene, CONVERSATION)?;
    let mut command = scene.command(&["run".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command.arg(scene.id());
    let (mut terminal, mut process) = on_terminal(command)?;
    converse(scene, &mut terminal)?;
    let status = process.wait()?;
    ensure!(status.code() == Some(6), "exit status {status}");
    scene.expect_nothing_left()?;

    // Control-C reaches the container's foreground process, not the runtime.
    let bundle = with_terminal(
        scene,
        "trap 'echo interrupted; exit 4' INT; echo up; sleep 1000 & wait",
    )?;
    let mut command = scene.command(&["run".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command.arg(scene.id());
    let (mut terminal, mut process) = on_terminal(command)?;
    terminal.wait_for("up\r\n")?;
    terminal.send("\x03")?;
    terminal.wait_for("interrupted")?;
    let status = process.wait()?;
    ensure!(
        status.code() == Some(4),
        "exit status after control-C: {status}"
    );
    Ok(())
}

fn console_socket(scene: &Scene) -> Result<()> {
    let bundle = with_terminal(scene, CONVERSATION)?;
    let (socket, id, pid_file) = (scene.path("console"), scene.id(), scene.path("pid"));
    let listener = UnixListener::bind(&socket)?;
    let mut command = scene.command(&["create", "--bundle"]);
    command
        .arg(&bundle.path)
        .arg("--console-socket")
        .arg(&socket);
    command.arg("--pid-file").arg(&pid_file).arg(&id);
    let created = Process::spawn(command)?;
    wait_readable(listener.as_fd(), DEADLINE)?;
    let (connection, _) = listener.accept()?;
    let mut terminal = Terminal::receive(&connection)?;
    created.finish()?.ok()?;
    terminal.resize(31, 97)?;
    let process = crate::process::Other::open(crate::scene::read_pid(&pid_file)?)?;
    scene.call(&["start", &id])?.ok()?;
    converse(scene, &mut terminal)?;
    ensure!(process.exit_code()? == 6, "exit code");
    terminal.drain()?;
    scene.call(&["delete", &id])?.ok()?;
    Ok(())
}

/// What is written just before the end arrives too. (runc 1.1 loses it now and then.)
fn last_words(scene: &Scene) -> Result<()> {
    for _ in 0..2 {
        let bundle = with_terminal(scene, "seq 1 2000; echo last words")?;
        let mut command = scene.command(&["run".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
        command.arg(scene.id());
        let (mut terminal, mut process) = on_terminal(command)?;
        let shown = terminal.drain()?;
        ensure!(
            shown.ends_with("2000\r\nlast words\r\n"),
            "the end of {} bytes",
            shown.len()
        );
        ensure!(process.wait()?.success(), "exit status");
    }
    Ok(())
}

fn exec_interactive(scene: &Scene) -> Result<()> {
    let mut container = scene.start(&scene.bundle()?.shell("echo up; sleep 1000 & wait"))?;
    container.streams.wait_for("up\n")?;
    let mut command = scene.command(&["exec", "--tty", &container.id, "/bin/sh", "-c"]);
    command.arg(CONVERSATION);
    let (mut terminal, mut process) = on_terminal(command)?;
    converse(scene, &mut terminal)?;
    let status = process.wait()?;
    ensure!(status.code() == Some(6), "exit status {status}");
    scene.destroy(&container.id)
}

fn needs_a_terminal(scene: &Scene) -> Result<()> {
    // Detached with a terminal but nobody to send it to, and the other way round.
    let bundle = with_terminal(scene, "true")?;
    let mut command = scene.command(&["create".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command.arg(scene.id()).stdin(Stdio::null());
    Process::spawn(command)?.finish()?.fails()?;
    let bundle = with_terminal(scene, "true")?;
    let id = scene.id();
    let mut command = scene.command(&["create".as_ref(), "--bundle".as_ref(), bundle.as_os_str()]);
    command
        .arg("--console-socket")
        .arg(scene.path("no-such-socket"))
        .arg(id);
    Process::spawn(command)?.finish()?.fails()?;
    scene.expect_nothing_left()
}
