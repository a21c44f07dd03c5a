//! What `run` passes through: output, input, exit codes, a terminal; errors as users know them.

use anyhow::{Result, ensure};

use crate::engines::engine::{Engine, IMAGE};
use crate::terminal::Terminal;

super::engine_cases!(output;
    [both quick] terminal, input, codes;
    [both] streams, signals_of_the_terminal, messages, logs, log_of_a_burst, attach;
    [both vm] another_kernel);

fn streams(engine: &Engine) -> Result<()> {
    let output = engine.script(&[], "echo out; echo err >&2")?.ok()?;
    ensure!(output.text() == "out\n", "{output}");
    ensure!(output.errors() == "err\n", "{output}");
    Ok(())
}

fn codes(engine: &Engine) -> Result<()> {
    engine.script(&[], "exit 7")?.expect(7)?;
    // The first process of a PID namespace cannot kill itself.
    engine
        .script(&[], "sh -c 'kill -KILL $$'; exit $?")?
        .expect(137)?;
    engine.run(&[IMAGE, "/nowhere"])?.expect(127)?;
    engine.run(&[IMAGE, "/etc"])?.expect(126)?;
    Ok(())
}

fn messages(engine: &Engine) -> Result<()> {
    let missing = engine.run(&[IMAGE, "/nowhere"])?.expect(127)?.errors();
    let lines = missing
        .lines()
        .filter(|line| line.contains("/nowhere"))
        .count();
    ensure!(lines == 1, "one line about it: {missing}");
    // What Podman does with a log that is not JSON.
    ensure!(
        !missing.contains("level=error"),
        "a line of the log: {missing}"
    );
    Ok(())
}

fn input(engine: &Engine) -> Result<()> {
    let mut cat = engine.begin(&[
        "run",
        "--rm",
        "--network",
        "none",
        "--interactive",
        IMAGE,
        "sh",
        "-c",
        "cat; echo end",
    ])?;
    let text = "0123456789abcdef".repeat(16 << 10);
    cat.send(text.as_bytes())?;
    let output = cat.finish()?.ok()?;
    ensure!(
        output.text() == format!("{text}end\n"),
        "{} bytes came back",
        output.stdout.len()
    );
    Ok(())
}

fn terminal(engine: &Engine) -> Result<()> {
    let run = [
        "run",
        "--rm",
        "--network",
        "none",
        "--interactive",
        "--tty",
        IMAGE,
        "sh",
    ];
    let (mut terminal, mut process) = engine.begin_in_terminal(&run)?;
    terminal.wait_for("# ")?;
    terminal.send("tty; echo a$((1+1))b\n")?;
    terminal.wait_for("/dev/pts/0")?;
    terminal.wait_for("a2b")?;
    expect_size(&mut terminal, "33 111")?;
    terminal.resize(44, 122)?;
    process.signal(rustix::process::Signal::WINCH)?;
    expect_size(&mut terminal, "44 122")?;
    terminal.send("exit 5\n")?;
    let code = crate::process::shell_code(process.wait()?);
    ensure!(code == 5, "exit code {code}");
    Ok(())
}

/// The size reaches the container some time after its start, or the change: until then its shell asks
/// again.
pub(super) fn expect_size(terminal: &mut Terminal, size: &str) -> Result<()> {
    terminal.send(&format!(
        "until [ \"$(stty size 2>&1)\" = '{size}' ]; do :; done; echo siz''ed {size}\n"
    ))?;
    terminal.wait_for(&format!("sized {size}"))?;
    Ok(())
}

fn signals_of_the_terminal(engine: &Engine) -> Result<()> {
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 1; done";
    let run = [
        "run",
        "--rm",
        "--network",
        "none",
        "-it",
        IMAGE,
        "sh",
        "-c",
        script,
    ];
    let (mut terminal, mut process) = engine.begin_in_terminal(&run)?;
    terminal.wait_for("ready")?;
    terminal.send("\u{3}")?;
    terminal.wait_for("interrupted")?;
    let code = crate::process::shell_code(process.wait()?);
    ensure!(code == 3, "exit code {code}");
    Ok(())
}

fn logs(engine: &Engine) -> Result<()> {
    engine.start(
        "made-logs",
        &[IMAGE, "sh", "-c", "echo one; echo two >&2; sleep 1000"],
    )?;
    engine.wait_for_log("made-logs", "one")?;
    let mut follow = engine.begin(&["logs", "--follow", "--timestamps", "made-logs"])?;
    follow.wait_for("one")?;
    engine.remove(&["made-logs"])?;
    follow.wait()?;
    Ok(())
}

fn log_of_a_burst(engine: &Engine) -> Result<()> {
    engine.start("made-burst", &[IMAGE, "sh", "-c", "seq 1 20000"])?;
    engine.call(&["wait", "made-burst"])?.ok()?.says(&["0"])?;
    let log = engine.call(&["logs", "made-burst"])?.ok()?.text();
    ensure!(
        log.lines().count() == 20000,
        "{} lines of 20000",
        log.lines().count()
    );
    ensure!(log.ends_with("20000\n"), "the end is missing");
    let tail = engine
        .call(&["logs", "--tail", "2", "made-burst"])?
        .ok()?
        .text();
    ensure!(tail == "19999\n20000\n", "{tail}");
    engine.remove(&["made-burst"])
}

fn attach(engine: &Engine) -> Result<()> {
    let script = "while read -r line; do echo \"got $line\"; [ \"$line\" != end ] || exit 4; done";
    engine.start("made-attach", &["--interactive", IMAGE, "sh", "-c", script])?;
    let mut attached = engine.begin(&["attach", "made-attach"])?;
    attached.send(b"hello\n")?;
    attached.wait_for("got hello")?;
    attached.send(b"end\n")?;
    attached.wait_for("got end")?;
    attached.wait()?;
    engine.call(&["wait", "made-attach"])?.ok()?.says(&["4"])?;
    engine.remove(&["made-attach"])
}

fn another_kernel(engine: &Engine) -> Result<()> {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let guest = engine.run(&[IMAGE, "uname", "-r"])?.ok()?.text();
    ensure!(
        host != guest,
        "the container's kernel is the host's, {guest}"
    );
    Ok(())
}
