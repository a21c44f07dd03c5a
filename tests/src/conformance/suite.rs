//! The suite on disk, and one of its programs run against one runtime in a process of its own.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::tap::{self, Verdict};
use crate::leftovers;
use crate::process::{Process, shell_code};
use crate::runtime::Runtime;
use crate::scene::{self, Scene};

/// Longest time for one program. The slowest makes 32 containers, one after the other.
const LONGEST: Duration = Duration::from_secs(600);
/// Begins the reason of a test that does not end.
const HANGS: &str = "hangs";
/// First argument of the process of one test.
const ONE: &str = "--in-this-process";
/// What the tests that use the same cgroup make at the top of every hierarchy.
const SAME_CGROUPS: [&str; 2] = ["cgrouptest", "testdir"];

/// A program of the suite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) name: String,
    /// Whether it uses the same cgroup as others, so that it must not run beside them.
    pub(super) same_cgroup: bool,
}

/// What `tests/conformance/build-suite` made.
pub(super) struct Suite {
    pub(super) directory: PathBuf,
    pub(super) version: String,
    pub(super) tests: Vec<Test>,
}

impl Suite {
    pub(super) fn open(directory: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).with_context(|| {
                format!(
                    "reading {} (tests/conformance/build-suite makes it)",
                    path.display()
                )
            })
        };
        let tests: Vec<_> = read("TESTS")?.lines().map(Test::read).collect();
        ensure!(!tests.is_empty(), "{} names no tests", directory.display());
        Ok(Self {
            directory: directory.to_owned(),
            version: read("VERSION")?.trim().to_owned(),
            tests,
        })
    }
}

impl Test {
    /// A line of TESTS: `NAME` or `NAME same-cgroup`.
    fn read(line: &str) -> Self {
        let (name, same_cgroup) = match line.strip_suffix(" same-cgroup") {
            Some(name) => (name, true),
            None => (line, false),
        };
        Self {
            name: name.to_owned(),
            same_cgroup,
        }
    }
}

/// How a test went with one runtime.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    /// Why it did not pass.
    pub(super) why: String,
    /// All that it printed.
    pub(super) output: String,
}

impl Outcome {
    /// Whether a second attempt may go better: the test, or what it waited for, took too long, or the
    /// emulator lost a guest (tests/host/README.md, "Several emulated CPUs").
    pub(super) fn deserves_another(&self) -> bool {
        const SIGNS: [&str; 2] = [
            "timeout in waiting for the container status",
            "ended by itself",
        ];
        let unlucky = SIGNS.iter().any(|sign| self.output.contains(sign));
        self.verdict == Verdict::Fail && (unlucky || self.why.starts_with(HANGS))
    }

    fn broken(why: String) -> Self {
        Self {
            verdict: Verdict::Fail,
            why,
            output: String::new(),
        }
    }
}

/// What the process of one test tells its parent.
#[derive(Serialize, Deserialize)]
struct Ended {
    /// None: it hung.
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs a test in a process and a mount namespace of its own, so that nothing of it reaches others.
pub(super) fn run(suite: &Suite, test: &Test, runtime: Runtime) -> Outcome {
    confined(suite, test, runtime).map_or_else(
        |error| Outcome::broken(format!("the test could not be run: {error:#}")),
        |ended| {
            let output = format!("{}{}", ended.stdout, ended.stderr);
            let (verdict, why) = match ended.code {
                Some(code) => tap::judge(&ended.stdout, &ended.stderr, code),
                None => {
                    let why = format!("{HANGS}: no end after {} s", LONGEST.as_secs());
                    (Verdict::Fail, why)
                }
            };
            Outcome {
                verdict,
                why,
                output,
            }
        },
    )
}

fn confined(suite: &Suite, test: &Test, runtime: Runtime) -> Result<Ended> {
    let directory = tempfile::Builder::new()
        .prefix("bulkhead-conformance-")
        .tempdir()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([ONE, runtime.program(), &test.name])
        .args([suite.directory.as_path(), directory.path()]);
    let mut process = Process::spawn(command)?;
    process.close_stdin();
    // Its own clean-up waits with deadlines too.
    process.wait_within(LONGEST + Duration::from_secs(180))?;
    let output = process.output_at_end()?.ok()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Whether these are the arguments of the process of one test; then does its work.
pub(super) fn is_one(args: &[String]) -> Option<Result<()>> {
    match args {
        [_, first, runtime, name, suite, directory] if first == ONE => {
            Some(one(runtime, name, Path::new(suite), Path::new(directory)))
        }
        _ => None,
    }
}

/// The process of one test.
fn one(runtime: &str, name: &str, suite: &Path, directory: &Path) -> Result<()> {
    let runtime = Runtime::from_name(runtime)?;
    let suite = Suite::open(suite)?;
    let test = suite.tests.iter().find(|test| test.name == name);
    let test = test.context("no such test")?;
    let scene = Scene::enter(runtime, directory)?;
    let ended = attempt(&scene, test, &suite);
    scene::clean_up();
    if test.same_cgroup {
        remove_cgroups();
    }
    serde_json::to_writer(std::io::stdout(), &ended?)?;
    Ok(())
}

/// What is left at the places that several tests use: only one of them runs at a time.
fn remove_cgroups() {
    let mut cgroups = leftovers::cgroups("");
    cgroups.retain(|path| {
        let mut names = path.iter();
        names.any(|name| SAME_CGROUPS.iter().any(|same| name == *same))
    });
    // Their containers are gone, so all are empty; the deepest first.
    cgroups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for cgroup in cgroups {
        let _ = fs::remove_dir(cgroup);
    }
}

fn attempt(scene: &Scene, test: &Test, suite: &Suite) -> Result<Ended> {
    // The suite takes a program without arguments for the runtime.
    let line = format!(
        "exec {} --root '{}' \"$@\"",
        scene.runtime.program(),
        scene.root.display()
    );
    let wrapper = scene.script(scene.runtime.program(), &line)?;
    let bundles = scene.path("bundles");
    fs::create_dir(&bundles)?;
    let mut command = Command::new(suite.directory.join(&test.name));
    command
        .current_dir(&suite.directory)
        .env("RUNTIME", wrapper.as_os_str())
        .env("TMPDIR", OsStr::new(&bundles));
    let mut process = Process::spawn(command)?;
    process.close_stdin();
    let code = process.wait_within(LONGEST).ok().map(shell_code);
    Ok(Ended {
        code,
        stdout: process.stdout(),
        stderr: process.stderr(),
    })
}
