//! Finds the tests to run and runs each in a process of its own, so that a panic, a hang or a
//! stray process of one is confined to it.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::cases::{self, Case};
use crate::inside;
use crate::process::{Process, excerpt};
use crate::runtime::Runtime;
use crate::scene::{self, Scene, Skip};

/// Longest time for one test that says nothing else.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);
/// When the process of a test is given up that did not end itself.
const HANGS: Duration = cases::workloads::LONGEST.saturating_add(Duration::from_secs(120));
/// What the process of a skipped test exits with.
const SKIPPED: u8 = 77;
/// First argument of the process of one test.
pub(crate) const ONE: &str = "--in-this-process";
/// The only argument that makes this program show whose rights it has.
pub(crate) const EFFECTIVE_USER: &str = "--effective-user";

/// The program.
pub fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().collect();
    if let [_, first, runtime, name, directory] = args.as_slice()
        && first == ONE
    {
        return one(runtime, name, Path::new(directory));
    }
    if let [_, first, rest @ ..] = args.as_slice()
        && first == inside::INSIDE
    {
        return inside::main(rest);
    }
    if let [_, only] = args.as_slice()
        && only == EFFECTIVE_USER
    {
        println!("{}", rustix::process::geteuid().as_raw());
        return ExitCode::SUCCESS;
    }
    let runtimes = match take_runtimes(&mut args) {
        Ok(runtimes) => runtimes,
        Err(error) => {
            eprintln!("bulkhead-tests: {error:#}");
            return ExitCode::from(2);
        }
    };
    // What a test's process leaves to its parent when it is killed must not outlive this one.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let trials = runtimes.into_iter().flat_map(|runtime| {
        let cases = cases::all()
            .into_iter()
            .filter(move |case| case.applies_to(runtime));
        cases.map(move |case| trial(runtime, &case))
    });
    libtest_mimic::run(&Arguments::from_iter(args), trials.collect()).exit_code()
}

/// Takes `--runtime LIST` out of the arguments; without it, all runtimes that are installed.
fn take_runtimes(args: &mut Vec<String>) -> Result<Vec<Runtime>> {
    let Some(at) = args.iter().position(|arg| arg == "--runtime") else {
        return Ok(Runtime::ALL
            .into_iter()
            .filter(|runtime| runtime.installed())
            .collect());
    };
    args.remove(at);
    anyhow::ensure!(
        at < args.len(),
        "--runtime wants a list such as bulkhead,crun,runc"
    );
    let runtimes = Runtime::list(&args.remove(at))?;
    for runtime in &runtimes {
        anyhow::ensure!(
            runtime.installed(),
            "{} is not on the PATH",
            runtime.program()
        );
    }
    Ok(runtimes)
}

/// The test as the harness sees it.
fn trial(runtime: Runtime, case: &Case) -> Trial {
    let title = format!("{} [{}]", case.name, runtime.program());
    confined_trial(title, vec![runtime.program().to_owned(), case.name.clone()])
}

/// A test that runs in a process of its own: this program with [`ONE`], these arguments and the
/// path of an empty directory.
pub(crate) fn confined_trial(title: String, arguments: Vec<String>) -> Trial {
    Trial::ignorable_test(title.clone(), move || {
        let attempt =
            || confined(&arguments).map_err(|error| Failed::from(format!("{error:#}")))?;
        let outcome = match attempt() {
            // The emulator loses a guest now and then (tests/host/README.md): once more, and said
            // aloud. Whatever else fails has failed.
            Err(failed) if emulated() && lost_a_guest(&failed) => {
                let why = failed.message().unwrap_or_default().trim();
                eprintln!("second attempt for {title}, after: {why}");
                attempt()
            }
            outcome => outcome,
        };
        // The harness says why at its end, which may be an hour away.
        if let Err(failed) = &outcome {
            eprintln!("{title}: {}", failed.message().unwrap_or_default().trim());
        }
        outcome
    })
}

/// Whether this machine's CPU is QEMU's software one.
fn emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

/// Whether a guest may have died or stopped for no reason of ours.
fn lost_a_guest(failed: &Failed) -> bool {
    const SIGNS: [&str; 5] = [
        "ended by itself",
        "hangs",
        "took longer than",
        "waited ",
        "nothing within",
    ];
    let why = failed.message().unwrap_or_default();
    SIGNS.iter().any(|sign| why.contains(sign))
}

/// Runs one test in a process of its own.
fn confined(arguments: &[String]) -> Result<Result<Completion, Failed>> {
    let directory = tempfile::Builder::new()
        .prefix("bulkhead-tests-")
        .tempdir()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(ONE).args(arguments).arg(directory.path());
    let mut process = Process::spawn(command)?;
    process.close_stdin();
    let ended = process.wait_within(HANGS);
    let Ok(status) = ended else {
        return Ok(Err(format!("hangs: {}", process.stderr()).into()));
    };
    let text = process.output_at_end()?.errors();
    Ok(match status.code() {
        Some(0) => Ok(Completion::Completed),
        Some(code) if code == i32::from(SKIPPED) => Ok(Completion::ignored_with(text.trim())),
        _ => Err(excerpt(text.as_bytes()).into()),
    })
}

/// The process of one test.
fn one(runtime: &str, name: &str, directory: &Path) -> ExitCode {
    verdict(attempt(runtime, name, directory))
}

/// What the process of one test says and exits with.
pub(crate) fn verdict(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<Skip>() {
            Some(skip) => {
                eprintln!("{skip}");
                ExitCode::from(SKIPPED)
            }
            None => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn attempt(runtime: &str, name: &str, directory: &Path) -> Result<()> {
    let runtime = Runtime::from_name(runtime)?;
    let case = cases::all()
        .into_iter()
        .find(|case| case.name == name)
        .context("no such test")?;
    let scene = Scene::enter(runtime, directory)?;
    guarded(case.longest(), scene::clean_up, || {
        (case.run)(&scene).and_then(|()| scene.expect_nothing_left())
    })
}

/// Runs a test's body in its process; however it ends, `clean_up` is called, too late or not.
pub(crate) fn guarded(
    longest: Duration,
    clean_up: impl Fn() + Clone + Send + Sync + 'static,
    body: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let after_panic = clean_up.clone();
    std::panic::set_hook(Box::new(move |info| {
        eprintln!("{info}");
        after_panic();
        std::process::exit(1);
    }));
    let (_running, watched) = mpsc::channel::<()>();
    let too_late = clean_up.clone();
    std::thread::spawn(move || {
        if watched.recv_timeout(longest) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("took longer than {} s", longest.as_secs());
            too_late();
            std::process::exit(1);
        }
    });
    let result = body();
    clean_up();
    result
}
