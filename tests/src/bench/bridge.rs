//! Podman's default bridge: what a container on it costs to run, and what passes over it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::figures::Figures;
use super::{LONGEST, timed};
use crate::engines::{IMAGE, Kind, Prepared};
use crate::process::{DEADLINE, Process};
use crate::runtime::Runtime;

/// Round trips of one value.
const ROUNDS: usize = 100;
/// Bytes of a page of the web with its header, say.
const PAGE: usize = 2 << 10;
/// Bytes of one transfer: the more packets, the likelier the emulator loses the guest (tests/host/README.md).
const BULK: usize = 1 << 20;

/// `podman run --rm` of true on the default bridge. The runtimes take turns.
pub(super) fn runs(runtimes: &[Runtime], runs: usize, figures: &mut Figures) -> Result<()> {
    let mut prepared = Prepared::default();
    prepared.engine(Kind::Podman)?;
    for round in 0..=runs {
        for &runtime in runtimes.iter().filter(|runtime| suits(**runtime)) {
            let ms = timed(podman(runtime, &["run", "--rm", IMAGE, "true"]))?;
            // The first round warms the caches.
            if round > 0 {
                figures.add("podman_run_true", runtime, "ms", ms);
            }
        }
    }
    prepared.end()
}

/// A request with its response, and bulk in both directions, between the host's end of the bridge and
/// a container.
pub(super) fn traffic(runtimes: &[Runtime], runs: usize, figures: &mut Figures) -> Result<()> {
    let mut prepared = Prepared::default();
    prepared.engine(Kind::Podman)?;
    for &runtime in runtimes.iter().filter(|runtime| suits(**runtime)) {
        let outcome = traffic_of(runtime, runs, figures);
        let mut remove = podman(runtime, &["rm", "--force", "--time", "0", NAME]);
        remove.stdout(Stdio::null());
        timed(remove)?;
        outcome.context(
            "traffic over the bridge: has the emulator lost a guest (tests/host/README.md)? Run it again",
        )?;
    }
    prepared.end()
}

/// Podman comes with crun: a third runtime would tell nothing more.
fn suits(runtime: Runtime) -> bool {
    runtime != Runtime::Runc
}

const NAME: &str = "bench-bridge";

fn podman(runtime: Runtime, args: &[&str]) -> Command {
    let mut command = Command::new("podman");
    command.arg("--runtime").arg(runtime.program()).args(args);
    command.stdin(Stdio::null());
    command
}

/// The container connects to the host, so that nobody has to wait until it listens.
fn traffic_of(runtime: Runtime, runs: usize, figures: &mut Figures) -> Result<()> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let gateway = "$(ip route | awk '/default/ {print $3}')";
    // One after the other: what comes back as it is, a source and a sink.
    let script = format!(
        "nc {gateway} {port} -e cat; nc {gateway} {port} </dev/zero; nc {gateway} {port} >/dev/null"
    );
    let args = [
        "run", "--detach", "--name", NAME, IMAGE, "sh", "-c", &script,
    ];
    Process::spawn(podman(runtime, &args))?.finish()?.ok()?;
    let mut echo = accept(&listener)?;
    echo.set_nodelay(true)?;
    for (name, bytes) in [("bridge_round_trip", 1), ("bridge_round_trip_2k", PAGE)] {
        let (sent, mut back) = (vec![b'x'; bytes], vec![0; bytes]);
        for round in 0..=runs {
            let begun = Instant::now();
            for _ in 0..ROUNDS {
                echo.write_all(&sent)?;
                echo.read_exact(&mut back)
                    .context("reading what came back")?;
            }
            if round > 0 {
                let each = begun.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(ROUNDS)?);
                figures.add(name, runtime, "us", each);
            }
        }
    }
    drop(echo);
    let mut buffer = vec![0; 256 << 10];
    let mut source = accept(&listener)?;
    for round in 0..=runs {
        let rate = rate(BULK, |_| Ok(source.read(&mut buffer)?))?;
        if round > 0 {
            figures.add("bridge_bulk_out", runtime, "Mbit/s", rate);
        }
    }
    drop(source);
    let mut sink = accept(&listener)?;
    for round in 0..=runs {
        let rate = rate(BULK, |left| {
            Ok(sink.write(&buffer[..left.min(buffer.len())])?)
        })?;
        if round > 0 {
            figures.add("bridge_bulk_in", runtime, "Mbit/s", rate);
        }
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    use std::os::fd::AsFd;
    crate::process::wait_readable(listener.as_fd(), DEADLINE)
        .context("waiting for the container to connect")?;
    let (stream, _): (_, SocketAddr) = listener.accept()?;
    stream.set_read_timeout(Some(LONGEST))?;
    stream.set_write_timeout(Some(LONGEST))?;
    Ok(stream)
}

/// Megabits a second of moving so many bytes.
fn rate(bytes: usize, mut some: impl FnMut(usize) -> Result<usize>) -> Result<f64> {
    let begun = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let moved = some(left)?;
        ensure!(moved > 0, "the container closed the connection");
        left = left.saturating_sub(moved);
    }
    let bits = f64::from(u32::try_from(bytes)?) * 8.0;
    Ok(bits / begun.elapsed().as_secs_f64() / 1e6)
}
