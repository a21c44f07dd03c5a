//! `bulkhead-conformance`: the public OCI validation suite against the runtimes that are installed,
//! side by side. How it is built and what its results mean: docs/conformance.md.

mod reasons;
mod report;
mod results;
mod suite;
mod tap;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::runtime::Runtime;
use crate::scene;
use reasons::Reasons;
use results::Results;
use suite::{Outcome, Suite, Test};
use tap::Verdict;

/// Tests that run beside each other. Most of their time they wait for a container to end, which the
/// suite asks for once a second; starting a guest takes a good part of one.
const JOBS: usize = 4;

/// The program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let result = match suite::is_one(&args) {
        Some(ended) => ended.map(|()| true),
        None => Options::read(args).and_then(|options| compare(&options)),
    };
    scene::clean_up();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead-conformance: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[derive(Default)]
struct Options {
    suite: PathBuf,
    reasons: Option<PathBuf>,
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
    output: Option<PathBuf>,
    runtimes: Vec<Runtime>,
    jobs: usize,
    filter: Option<String>,
}

impl Options {
    fn read(args: Vec<String>) -> Result<Self> {
        let mut options = Self {
            jobs: JOBS,
            ..Self::default()
        };
        let mut args = args.into_iter().skip(1);
        while let Some(arg) = args.next() {
            if !arg.starts_with('-') {
                options.filter = Some(arg);
                continue;
            }
            let value = args
                .next()
                .with_context(|| format!("{arg} wants a value"))?;
            match arg.as_str() {
                "--suite" => options.suite = std::path::absolute(value)?,
                "--reasons" => options.reasons = Some(value.into()),
                "--json" => options.json = Some(value.into()),
                "--markdown" => options.markdown = Some(value.into()),
                "--output" => options.output = Some(value.into()),
                "--runtime" => options.runtimes = Runtime::list(&value)?,
                "--jobs" => options.jobs = value.parse().context("--jobs wants a number")?,
                _ => bail!(
                    "{arg} is unknown: use --suite DIR, --reasons FILE, --json FILE, \
                     --markdown FILE, --output FILE, --runtime LIST, --jobs N, FILTER"
                ),
            }
        }
        ensure!(
            options.suite != Path::new(""),
            "--suite DIR is needed: what tests/conformance/build-suite made"
        );
        ensure!(options.jobs > 0, "--jobs must be 1 or more");
        if options.runtimes.is_empty() {
            options.runtimes = Runtime::ALL
                .into_iter()
                .filter(|runtime| runtime.installed())
                .collect();
        }
        Ok(options)
    }
}

/// Runs what is asked for and presents it. False: something is not explained as it must be.
fn compare(options: &Options) -> Result<bool> {
    let suite = Suite::open(&options.suite)?;
    let reasons = match &options.reasons {
        Some(path) => Reasons::open(path, &suite.tests)?,
        None => Reasons::default(),
    };
    let tests: Vec<_> = suite
        .tests
        .iter()
        .filter(|test| {
            let filter = options.filter.as_deref();
            filter.is_none_or(|part| test.name.contains(part))
        })
        .cloned()
        .collect();
    ensure!(!tests.is_empty(), "no test has such a name");
    // What a test's process leaves to its parent when it is killed must not outlive this one.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut results = run_all(&suite, &tests, options);
    if crate::runner::emulated() {
        try_again(&suite, &tests, &mut results);
    }

    print!("{}", report::table(&results, &reasons));
    let write = |path: &Option<PathBuf>, text: &dyn Fn() -> Result<String>| match path {
        Some(path) => {
            fs::write(path, text()?).with_context(|| format!("writing {}", path.display()))
        }
        None => Ok(()),
    };
    write(&options.json, &|| {
        Ok(serde_json::to_string_pretty(&results.json())? + "\n")
    })?;
    write(&options.markdown, &|| {
        report::markdown(&results, &reasons, &suite)
    })?;
    write(&options.output, &|| Ok(report::output(&results)))?;

    let unexplained = results.unexplained(&reasons);
    for line in &unexplained {
        eprintln!("conformance: {line}");
    }
    Ok(unexplained.is_empty())
}

/// Every test against every runtime; the tests that share a cgroup one after the other.
fn run_all(suite: &Suite, tests: &[Test], options: &Options) -> Results {
    let mut alone = VecDeque::new();
    let mut beside = VecDeque::new();
    for test in tests {
        for runtime in &options.runtimes {
            let queue = if test.same_cgroup {
                &mut alone
            } else {
                &mut beside
            };
            queue.push_back((test, *runtime));
        }
    }
    let total = alone.len() + beside.len();
    let mut results = Results::new(&options.runtimes);
    let beside = Mutex::new(beside);
    let next = || beside.lock().ok().and_then(|mut queue| queue.pop_front());
    let (sender, outcomes) = mpsc::channel();
    thread::scope(|scope| {
        for worker in 0..options.jobs {
            let sender = sender.clone();
            // The first one works through those that share a cgroup before it helps the others.
            let mut own = if worker == 0 {
                std::mem::take(&mut alone)
            } else {
                VecDeque::new()
            };
            scope.spawn(move || {
                while let Some((test, runtime)) = own.pop_front().or_else(next) {
                    let outcome = suite::run(suite, test, runtime);
                    if sender.send((test, runtime, outcome)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for (count, (test, runtime, outcome)) in outcomes.iter().enumerate() {
            progress(&format!("{}/{total}", count + 1), test, runtime, &outcome);
            results.add(&test.name, runtime, outcome);
        }
    });
    results
}

/// A second attempt at what one runtime passes and another does not. The suite waits for ten seconds
/// only, and an emulated CPU loses a guest now and then (tests/host/README.md): this time nothing runs
/// beside it. What is really broken fails again.
fn try_again(suite: &Suite, tests: &[Test], results: &mut Results) {
    let disputed: Vec<_> = tests
        .iter()
        .filter(|test| results.disagree(&test.name))
        .collect();
    for test in disputed {
        for runtime in results.runtimes.clone() {
            if results.verdict(&test.name, runtime) == Some(Verdict::Fail) {
                let outcome = suite::run(suite, test, runtime);
                progress("second attempt", test, runtime, &outcome);
                results.add(&test.name, runtime, outcome);
            }
        }
    }
}

/// A line as it goes: a whole run takes minutes.
fn progress(mark: &str, test: &Test, runtime: Runtime, outcome: &Outcome) {
    let why = report::shortened(&outcome.why, 120);
    eprintln!(
        "[{mark}] {} with {}: {} {why}",
        test.name,
        runtime.program(),
        outcome.verdict
    );
}
