//! The results for people: the table on the terminal, docs/conformance.md, and the programs' output.

use std::fmt::Write as _;

use super::reasons::Reasons;
use super::results::Results;
use super::tap::Verdict;
use crate::runtime::Runtime;

/// The text on one line, and not longer than this.
pub(super) fn shortened(text: &str, longest: usize) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= longest {
        return line;
    }
    let begin: String = line.chars().take(longest).collect();
    format!("{begin}…")
}

/// The table on the terminal, and below it what Bulkhead does not pass.
pub(super) fn table(results: &Results, reasons: &Reasons) -> String {
    let mut text = String::new();
    let width = results.tests.iter().map(String::len).max().unwrap_or(0);
    let row = |name: &str, cell: &dyn Fn(Runtime) -> String| {
        let mut line = format!("{name:<width$}");
        for runtime in &results.runtimes {
            let _ = write!(line, "  {:<8}", cell(*runtime));
        }
        line.trim_end().to_owned() + "\n"
    };
    text += &row("test", &|runtime| runtime.program().to_owned());
    for name in &results.tests {
        text += &row(name, &|runtime| word(results, name, runtime));
    }
    for verdict in Verdict::ALL {
        text += &row(verdict.word(), &|runtime| {
            results.count(runtime, verdict).to_string()
        });
    }
    for name in &results.tests {
        let Some(outcome) = results.outcome(name, Runtime::Bulkhead) else {
            continue;
        };
        if outcome.verdict != Verdict::Pass {
            let mark = if results.differs(name) { "!" } else { " " };
            let _ = writeln!(text, "{mark} {name}: {}", shortened(&outcome.why, 200));
            if let Some(reason) = reasons.get(name) {
                let _ = writeln!(text, "      {reason}");
            }
        }
    }
    text
}

fn word(results: &Results, name: &str, runtime: Runtime) -> String {
    let verdict = results.verdict(name, runtime);
    verdict.map_or("", Verdict::word).to_owned()
}

const RULES: &str = "\
## What the words mean

Each test is a program of the suite that drives the runtime given to it and prints its points in the
[Test Anything Protocol](https://testanything.org/tap-version-13-specification.html).

| word | when |
|---|---|
| pass | all points are `ok` (or marked `TODO` or `SKIP`) and as many as announced, and the exit status is 0 |
| fail | a point is `not ok`, the exit status is not 0, fewer points came than announced, or no end came in time |
| skip | all points are marked `SKIP` |

Some programs have no points. Those that say what went wrong in a structured remark alone pass when there is none;
those that only try whether a container is refused say it by their exit status alone.

## How it is run

- The suite is built from Debian's source package as it is, but for three things: the TAP library, which Debian lacks,
  is a stand-in of our own (`tests/conformance/tap`); the root filesystem is unpacked once rather than in every test;
  and its program has 60 seconds in a container instead of ten, since the test host's CPU is emulated.
- Each test has a mount namespace, a temporary directory and a runtime's state directory of its own; what it leaves
  behind is removed. Several run beside each other, but those that use the same cgroup do not.
- A test that took too long, or whose guest the emulator lost, is tried once more, with nothing beside it.

";

/// docs/conformance.md, or docs/conformance-cgroup-v2.md. Nothing in it depends on the day, so that it
/// changes when the results do.
pub(super) fn markdown(results: &Results, reasons: &Reasons) -> String {
    let (title, command, other) = if results.record.unified_cgroups {
        (
            "OCI conformance with cgroup v2",
            "make conformance CGROUP=v2",
            "[With cgroup v1](conformance.md), which the suite's cgroup tests know alone, it says more.",
        )
    } else {
        (
            "OCI conformance",
            "make conformance",
            "[With cgroup v2](conformance-cgroup-v2.md) the suite's cgroup tests fail for every runtime.",
        )
    };
    let mut text = format!(
        "# {title}\n\n\
         <!-- Written by `{command}`; the reasons are kept in tests/conformance. -->\n\n\
         The OCI's own validation suite \
         ([runtime-tools](https://github.com/opencontainers/runtime-tools), {}) against Bulkhead and, beside it on the \
         same host, two runtimes whose containers are processes of the host. `{command}` repeats it.\n\n",
        results.record.suite
    );
    text += &host(results);
    for outcomes in results.record.runtimes.values() {
        let _ = writeln!(text, "- {}", outcomes.version);
    }
    let _ = writeln!(text, "\n{other}\n");
    let row = |name: &str, cell: &dyn Fn(Runtime) -> String| {
        let cells: Vec<_> = results.runtimes.iter().map(|r| cell(*r)).collect();
        format!("| {name} | {} |\n", cells.join(" | "))
    };
    text += &row("", &|runtime| runtime.program().to_owned());
    text += &row("---", &|_| "---".to_owned());
    for verdict in Verdict::ALL {
        text += &row(&format!("**{verdict}**"), &|runtime| {
            results.count(runtime, verdict).to_string()
        });
    }
    text += "\n";
    text += &explained(results, reasons);
    text += RULES;
    text += "## All tests\n\n";
    text += &row("test", &|runtime| runtime.program().to_owned());
    text += &row("---", &|_| "---".to_owned());
    for name in &results.tests {
        text += &row(name, &|runtime| match word(results, name, runtime) {
            word if word == "pass" => word,
            word => format!("**{word}**"),
        });
    }
    text
}

/// The sentences: first where others pass, then where nobody does.
fn explained(results: &Results, reasons: &Reasons) -> String {
    let mut text = String::new();
    let failing = |name: &&String| {
        results
            .verdict(name, Runtime::Bulkhead)
            .is_some_and(|verdict| verdict != Verdict::Pass)
    };
    for (title, differing) in [
        ("What others pass and Bulkhead does not", true),
        ("What no runtime passes here", false),
    ] {
        let names = results
            .tests
            .iter()
            .filter(failing)
            .filter(|name| results.differs(name) == differing);
        let lines: String = names
            .map(|name| {
                let reason = reasons.get(name).unwrap_or("(no reason given)");
                format!("- {name}: {reason}\n")
            })
            .collect();
        if !lines.is_empty() {
            let _ = write!(text, "## {title}\n\n{lines}\n");
        }
    }
    text
}

/// What the results depend on besides the runtimes.
fn host(results: &Results) -> String {
    let layout = if results.record.unified_cgroups {
        "cgroup v2 only; the suite's cgroup tests know v1 only, so they fail for everyone"
    } else {
        "cgroup v1 for every controller, which is what the suite's cgroup tests look at"
    };
    format!(
        "- host: Linux {}, two CPUs, {layout}\n",
        results.record.kernel
    )
}

/// All that the programs printed, for the search of a cause.
pub(super) fn output(results: &Results) -> String {
    let mut text = String::new();
    for name in &results.tests {
        for runtime in &results.runtimes {
            if let Some(outcome) = results.outcome(name, *runtime) {
                let _ = write!(
                    text,
                    "==== {name} with {}: {} {}\n{}\n",
                    runtime.program(),
                    outcome.verdict,
                    outcome.why,
                    outcome.output.trim_end()
                );
            }
        }
    }
    text
}
