//! Podman and Docker with Bulkhead as their runtime, and with the one that they come with, which
//! tests the tests. Each case says what a user types; afterwards the host must be as it was before.

mod cases;
mod engine;
mod host;
mod setup;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use libtest_mimic::{Arguments, Trial};

use crate::inside;
use crate::runner;
use cases::Case;
use engine::Engine;
pub(crate) use engine::{IMAGE, Kind};
pub(crate) use setup::Prepared;

const BULKHEAD: &str = "bulkhead";

/// What of the command line is ours.
struct Wanted {
    engines: Vec<Kind>,
    /// None: Bulkhead and what the engine comes with.
    runtimes: Option<Vec<String>>,
    quick: bool,
}

impl Wanted {
    /// Takes our options out of the arguments.
    fn take(args: &mut Vec<String>) -> Result<Self> {
        let engines = match value(args, "--engine")? {
            None => Kind::ALL.to_vec(),
            Some(names) => names
                .split(',')
                .map(Kind::from_name)
                .collect::<Result<_>>()?,
        };
        let runtimes = value(args, "--runtime")?
            .map(|names| names.split(',').map(str::to_owned).collect::<Vec<_>>());
        let before = args.len();
        args.retain(|arg| arg != "--quick");
        let quick = args.len() < before;
        Ok(Self {
            engines,
            runtimes,
            quick,
        })
    }

    /// Engine, runtime and case of each test.
    fn tests(&self) -> Vec<(Kind, String, Case)> {
        let mut tests = Vec::new();
        for &kind in &self.engines {
            let usual = || vec![BULKHEAD.to_owned(), kind.own_runtime().to_owned()];
            for runtime in self.runtimes.clone().unwrap_or_else(usual) {
                let wanted = |case: &Case| {
                    case.applies_to(kind, runtime == BULKHEAD) && (case.quick || !self.quick)
                };
                let cases = cases::all().into_iter().filter(wanted);
                tests.extend(cases.map(|case| (kind, runtime.clone(), case)));
            }
        }
        tests
    }
}

fn value(args: &mut Vec<String>, option: &str) -> Result<Option<String>> {
    let Some(at) = args.iter().position(|arg| arg == option) else {
        return Ok(None);
    };
    args.remove(at);
    anyhow::ensure!(at < args.len(), "{option} wants a list");
    Ok(Some(args.remove(at)))
}

/// The program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, first, rest @ ..] = args.as_slice()
        && first == inside::INSIDE
    {
        return inside::main(rest);
    }
    match start(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bulkhead-engines: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn start(mut args: Vec<String>) -> Result<ExitCode> {
    if let [_, first, engine, runtime, name, directory] = args.as_slice()
        && first == runner::ONE
    {
        return Ok(runner::verdict(attempt(
            engine,
            runtime,
            name,
            Path::new(directory),
        )));
    }
    let wanted = Wanted::take(&mut args)?;
    let arguments = Arguments::from_iter(args);
    let tests = wanted.tests();
    if arguments.list {
        return Ok(
            libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit_code(),
        );
    }
    // What the engines' processes leave to their parent must not outlive this one.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let mut prepared = Prepared::default();
    for &kind in &wanted.engines {
        let title =
            |test: &&(Kind, String, Case)| test.0 == kind && passes(&arguments, &titled(test));
        if tests.iter().any(|test| title(&test)) {
            prepared
                .engine(kind)
                .with_context(|| format!("setting up {}", kind.program()))?;
        }
    }
    // One at a time: each looks at the whole host.
    let arguments = Arguments {
        test_threads: Some(1),
        ..arguments
    };
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect());
    prepared.end()?;
    Ok(conclusion.exit_code())
}

/// Whether the harness will run a test of this title.
fn passes(arguments: &Arguments, title: &str) -> bool {
    let wanted = arguments.filter.as_ref().is_none_or(|filter| {
        if arguments.exact {
            title == filter
        } else {
            title.contains(filter)
        }
    });
    wanted && !arguments.skip.iter().any(|skipped| title.contains(skipped))
}

fn titled((kind, runtime, case): &(Kind, String, Case)) -> String {
    format!("{} [{} {runtime}]", case.name, kind.program())
}

fn trial(test: (Kind, String, Case)) -> Trial {
    let title = titled(&test);
    let (kind, runtime, case) = test;
    runner::confined_trial(title, vec![kind.program().to_owned(), runtime, case.name])
}

fn attempt(engine: &str, runtime: &str, name: &str, directory: &Path) -> Result<()> {
    let kind = Kind::from_name(engine)?;
    let Some(case) = cases::all().into_iter().find(|case| case.name == name) else {
        bail!("no such test");
    };
    // Orphans of the case stay the program's, so that they are found.
    let engine = Engine::new(kind, runtime, directory)?;
    runner::guarded(
        runner::LONGEST,
        move || engine::clean_up(kind),
        || (case.run)(&engine).and_then(|()| engine.expect_nothing_left()),
    )
}
