//! `bulkhead-conformance`: the public OCI validation suite against the runtimes that are installed,
//! side by side. `run` records how each test goes, inside of a test host; `report` presents the
//! records. How the suite is built and what the results mean: docs/conformance.md.

mod reasons;
mod record;
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
use record::Record;
use results::Results;
use suite::{Outcome, Suite, Test};

/// Tests that run beside each other. While one waits for its container to end, which the suite asks
/// for once a second, another has the CPU; with more of them, an emulated CPU is too slow for the
/// suite's patience.
const JOBS: usize = 2;

const USAGE: &str = "\
usage: bulkhead-conformance run --suite DIR --record FILE [--runtime LIST] [--jobs N] [FILTER]
       bulkhead-conformance report --suite DIR --reasons FILE... --record FILE... [--json FILE]
           [--markdown FILE] [--output FILE]";

/// The program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let result = match suite::is_one(&args) {
        Some(ended) => ended.map(|()| true),
        None => Options::read(args).and_then(|options| match options.verb {
            Verb::Run => run(&options).map(|()| true),
            Verb::Report => report(&options),
        }),
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

#[derive(Clone, Copy)]
enum Verb {
    Run,
    Report,
}

struct Options {
    verb: Verb,
    suite: PathBuf,
    records: Vec<PathBuf>,
    reasons: Vec<PathBuf>,
    json: Option<PathBuf>,
    markdown: Option<PathBuf>,
    output: Option<PathBuf>,
    runtimes: Vec<Runtime>,
    jobs: usize,
    filter: Option<String>,
}

impl Options {
    fn read(args: Vec<String>) -> Result<Self> {
        let mut args = args.into_iter().skip(1);
        let verb = match args.next().as_deref() {
            Some("run") => Verb::Run,
            Some("report") => Verb::Report,
            _ => bail!("run or report?\n{USAGE}"),
        };
        let installed = Runtime::ALL
            .into_iter()
            .filter(|runtime| runtime.installed())
            .collect();
        let mut options = Self {
            verb,
            suite: PathBuf::new(),
            records: Vec::new(),
            reasons: Vec::new(),
            json: None,
            markdown: None,
            output: None,
            runtimes: installed,
            jobs: JOBS,
            filter: None,
        };
        while let Some(arg) = args.next() {
            if !arg.starts_with('-') {
                options.filter = Some(arg);
                continue;
            }
            let value = args
                .next()
                .with_context(|| format!("{arg} wants a value"))?;
            options.take(&arg, value)?;
        }
        ensure!(
            options.suite != Path::new("") && !options.records.is_empty(),
            "--suite and --record are needed\n{USAGE}"
        );
        ensure!(options.jobs > 0, "--jobs must be 1 or more");
        Ok(options)
    }

    fn take(&mut self, name: &str, value: String) -> Result<()> {
        match (name, self.verb) {
            ("--suite", _) => self.suite = std::path::absolute(value)?,
            ("--record", Verb::Run) => self.records = vec![value.into()],
            ("--record", Verb::Report) => self.records.push(value.into()),
            ("--runtime", Verb::Run) => self.runtimes = Runtime::list(&value)?,
            ("--jobs", Verb::Run) => self.jobs = value.parse().context("--jobs wants a number")?,
            ("--reasons", Verb::Report) => self.reasons.push(value.into()),
            ("--json", Verb::Report) => self.json = Some(value.into()),
            ("--markdown", Verb::Report) => self.markdown = Some(value.into()),
            ("--output", Verb::Report) => self.output = Some(value.into()),
            _ => bail!("{name} is unknown here\n{USAGE}"),
        }
        Ok(())
    }
}

/// `run`: the tests, and a record of them.
fn run(options: &Options) -> Result<()> {
    let suite = Suite::open(&options.suite)?;
    let filter = options.filter.as_deref();
    let tests = suite.tests.iter();
    let tests: Vec<_> = tests
        .filter(|test| filter.is_none_or(|part| test.name.contains(part)))
        .collect();
    ensure!(!tests.is_empty(), "no test has such a name");
    // What a test's process leaves to its parent when it is killed must not outlive this one.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut record = Record::new(&suite, &options.runtimes)?;
    run_all(&suite, &tests, options, &mut record);
    try_again(&suite, &tests, options, &mut record);
    record.write(&options.records[0])
}

/// `report`: false where something is not explained as it must be.
fn report(options: &Options) -> Result<bool> {
    let suite = Suite::open(&options.suite)?;
    let mut reasons = Reasons::default();
    for path in &options.reasons {
        reasons.put_first(Reasons::open(path, &suite.tests)?);
    }
    let mut record = Record::read(&options.records[0])?;
    for path in &options.records[1..] {
        record.join(Record::read(path)?)?;
    }
    let results = Results::new(record);
    print!("{}", report::table(&results, &reasons));
    let write = |path: &Option<PathBuf>, text: String| match path {
        Some(path) => fs::write(path, text).with_context(|| format!("writing {}", path.display())),
        None => Ok(()),
    };
    let json = serde_json::to_string_pretty(&results.json())? + "\n";
    write(&options.json, json)?;
    write(&options.markdown, report::markdown(&results, &reasons))?;
    write(&options.output, report::output(&results))?;
    let unexplained = results.unexplained(&reasons);
    for line in &unexplained {
        println!("conformance: {line}");
    }
    Ok(unexplained.is_empty())
}

/// Every test against every runtime; the tests that share a cgroup one after the other.
fn run_all(suite: &Suite, tests: &[&Test], options: &Options, record: &mut Record) {
    let mut alone = VecDeque::new();
    let mut beside = VecDeque::new();
    for test in tests {
        for runtime in &options.runtimes {
            let queue = if test.same_cgroup {
                &mut alone
            } else {
                &mut beside
            };
            queue.push_back((*test, *runtime));
        }
    }
    let total = alone.len() + beside.len();
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
            record.add(&test.name, runtime, outcome);
        }
    });
}

/// A second attempt, with nothing beside it, at what may have failed for the slowness of an emulated
/// CPU only.
fn try_again(suite: &Suite, tests: &[&Test], options: &Options, record: &mut Record) {
    for test in tests {
        for runtime in &options.runtimes {
            if record
                .get(&test.name, *runtime)
                .is_some_and(Outcome::deserves_another)
            {
                let outcome = suite::run(suite, test, *runtime);
                progress("second attempt", test, *runtime, &outcome);
                record.add(&test.name, *runtime, outcome);
            }
        }
    }
}

/// A line as it goes: a whole run takes minutes.
fn progress(mark: &str, test: &Test, runtime: Runtime, outcome: &Outcome) {
    eprintln!(
        "[{mark}] {} with {}: {} {}",
        test.name,
        runtime.program(),
        outcome.verdict,
        report::shortened(&outcome.why, 120)
    );
}
