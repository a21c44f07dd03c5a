//! `bulkhead-bench [--json FILE] [--runs N] [--only start|memory|share|podman|bridge]`: how long a container takes to run and what it costs,
//! beside crun and runc. The figures mean most in the test host's virtual time (docs/testing.md).

mod bridge;
mod figures;
mod memory;
mod share;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::bundle::Bundle;
use crate::inside;
use crate::process::Other;
use crate::runtime::Runtime;
use crate::scene::{self, Scene};
use figures::Figures;

/// Fewest runs that a median is taken of.
const FEWEST: usize = 7;
/// No program that is measured takes as long; a guest that spins makes virtual time pass.
const LONGEST: Duration = Duration::from_secs(20);

/// The program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, first, rest @ ..] = args.as_slice()
        && first == inside::INSIDE
    {
        return inside::main(rest);
    }
    let result = options().and_then(|options| measure(&options));
    scene::clean_up();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Options {
    json: Option<PathBuf>,
    runs: usize,
    runtimes: Vec<Runtime>,
    /// The only part to be measured.
    only: Option<String>,
}

/// The parts.
const PARTS: [&str; 5] = ["start", "memory", "share", "podman", "bridge"];

impl Options {
    fn measures(&self, part: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == part)
    }
}

fn options() -> Result<Options> {
    let installed = Runtime::ALL
        .into_iter()
        .filter(|runtime| runtime.installed())
        .collect();
    let mut options = Options {
        json: None,
        runs: 9,
        runtimes: installed,
        only: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let value = args
            .next()
            .with_context(|| format!("{arg} wants a value"))?;
        match arg.as_str() {
            "--json" => options.json = Some(std::path::absolute(value)?),
            "--runs" => options.runs = value.parse().context("--runs wants a number")?,
            "--runtime" => options.runtimes = Runtime::list(&value)?,
            "--only" => {
                ensure!(
                    PARTS.contains(&value.as_str()),
                    "--only wants one of {}",
                    PARTS.join(", ")
                );
                options.only = Some(value);
            }
            _ => bail!("{arg} is unknown: use --json FILE, --runs N, --runtime LIST, --only PART"),
        }
    }
    ensure!(
        options.runs >= FEWEST,
        "--runs must be {FEWEST} or more for a median to mean much"
    );
    Ok(options)
}

fn measure(options: &Options) -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("bulkhead-bench-")
        .tempdir()?;
    let first = *options
        .runtimes
        .first()
        .context("no runtime is installed")?;
    let scene = Scene::enter(first, directory.path())?;
    let mut figures = Figures::default();
    if options.measures("start") {
        runs(&scene, options, &mut figures)?;
        execs(&scene, options, &mut figures)?;
    }
    if options.measures("share") {
        share::measure(&scene, options, &mut figures)?;
    }
    if options.measures("memory") && options.runtimes.contains(&Runtime::Bulkhead) {
        memory::measure(&scene, options.runs.min(FEWEST), &mut figures)?;
    }
    if options.measures("podman") {
        bridge::runs(&options.runtimes, options.runs, &mut figures)?;
    }
    if options.measures("bridge") {
        bridge::traffic(&options.runtimes, options.runs, &mut figures)?;
    }
    print!("{figures}");
    if let Some(path) = &options.json {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, serde_json::to_vec_pretty(&figures.results())?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// `run` of true, process start to process end. The runtimes take turns, so that whatever the host
/// does meanwhile meets all alike.
fn runs(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let bundle = scene.bundle()?.args(&["/bin/true"]);
    bundle.write()?;
    let timeline = scene.path("timeline.json");
    for round in 0..=options.runs {
        for runtime in &options.runtimes {
            let id = scene.id();
            let mut command = program(*runtime, scene);
            command
                .arg("run")
                .arg("--bundle")
                .arg(&bundle.path)
                .arg(&id);
            let ms = timed(command)?;
            // The first round warms the caches.
            if round > 0 {
                figures.add("run_true_cold", *runtime, "ms", ms);
            }
        }
        if round > 0 && options.runtimes.contains(&Runtime::Bulkhead) {
            record_phases(scene, &bundle, &timeline, figures)?;
        }
    }
    Ok(())
}

/// A run of its own, so that writing the timeline does not count in the figure above.
fn record_phases(
    scene: &Scene,
    bundle: &Bundle,
    timeline: &Path,
    figures: &mut Figures,
) -> Result<()> {
    let mut command = program(Runtime::Bulkhead, scene);
    command
        .arg("run")
        .arg("--timeline")
        .arg(timeline)
        .arg("--bundle")
        .arg(&bundle.path);
    command.arg(scene.id());
    timed(command)?;
    for (name, ms) in phases(timeline)? {
        figures.add(&format!("phase_{name}"), Runtime::Bulkhead, "ms", ms);
    }
    Ok(())
}

/// `exec` of true in a running container.
fn execs(scene: &Scene, options: &Options, figures: &mut Figures) -> Result<()> {
    let bundle = scene.bundle()?.shell("sleep 100000");
    let mut running = Vec::new();
    for runtime in &options.runtimes {
        running.push((*runtime, start_idle(scene, *runtime, &bundle)?));
    }
    for round in 0..=options.runs {
        for (runtime, id) in &running {
            let mut command = program(*runtime, scene);
            command.args(["exec", id, "/bin/true"]);
            let ms = timed(command)?;
            if round > 0 {
                figures.add("exec_true", *runtime, "ms", ms);
            }
        }
    }
    for (runtime, id) in &running {
        remove(scene, *runtime, id)?;
    }
    Ok(())
}

/// A container that does nothing, started in the background.
fn start_idle(scene: &Scene, runtime: Runtime, bundle: &Bundle) -> Result<String> {
    let id = scene.id();
    // Its own cgroup, since the runtimes would fight over one.
    let mut spec = bundle.spec.clone();
    spec["linux"]["cgroupsPath"] = format!("/{id}").into();
    fs::write(bundle.path.join("config.json"), serde_json::to_vec(&spec)?)?;
    let mut command = program(runtime, scene);
    command
        .arg("run")
        .arg("--detach")
        .arg("--bundle")
        .arg(&bundle.path)
        .arg(&id);
    timed(command)?;
    Ok(id)
}

fn remove(scene: &Scene, runtime: Runtime, id: &str) -> Result<()> {
    let mut command = program(runtime, scene);
    command.args(["delete", "--force", id]);
    timed(command)?;
    Ok(())
}

/// A runtime with a state directory of its own and no streams.
fn program(runtime: Runtime, scene: &Scene) -> Command {
    let mut command = Command::new(runtime.program());
    command
        .arg("--root")
        .arg(scene.root.join(runtime.program()));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
    command
}

/// Milliseconds from the start of the program to its end.
fn timed(command: Command) -> Result<f64> {
    let begun = Instant::now();
    finish(command)?;
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

/// Runs a program to its end; gives what it printed, where that is kept.
fn finish(mut command: Command) -> Result<Vec<u8>> {
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {command:?}"))?;
    let process = Other::open(i32::try_from(child.id())?)?;
    if process.wait_within(LONGEST).is_err() {
        child.kill()?;
        child.wait()?;
        bail!(
            "{command:?} did not end within {} s: has the emulator lost a guest (tests/host/README.md)? Run it again",
            LONGEST.as_secs()
        );
    }
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(output.stdout)
}

/// What `--timeline` writes.
#[derive(Deserialize)]
struct Timeline {
    phases: Vec<Phase>,
}

#[derive(Deserialize)]
struct Phase {
    name: String,
    duration_us: f64,
}

/// The phases of a start and their milliseconds.
pub(crate) fn phases(file: &Path) -> Result<Vec<(String, f64)>> {
    let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let timeline: Timeline = serde_json::from_slice(&bytes)
        .with_context(|| format!("{}: {}", file.display(), String::from_utf8_lossy(&bytes)))?;
    Ok(timeline
        .phases
        .into_iter()
        .map(|phase| (phase.name, phase.duration_us / 1000.0))
        .collect())
}
