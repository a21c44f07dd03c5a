//! Reads what a program of the suite printed (Test Anything Protocol, version 13), and decides
//! from that and its exit status whether it passed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Pass,
    Fail,
    Skip,
}

impl Verdict {
    pub(super) const ALL: [Self; 3] = [Self::Pass, Self::Fail, Self::Skip];

    /// The word for it in the table and in results.json.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// What the lines of one program say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Report {
    /// Version lines: some programs print several reports; those that only try whether a container is
    /// refused print none.
    begun: usize,
    /// Plans, and the number of points that they announce together.
    plans: usize,
    planned: usize,
    ok: usize,
    skipped: usize,
    /// Descriptions of the points that are "not ok" and not to do.
    broken: Vec<String>,
    /// The first structured remark, which is all that some programs say about a failure.
    remark: Option<String>,
}

impl Report {
    fn read(text: &str) -> Self {
        let mut report = Self::default();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if line.starts_with("TAP version") {
                report.begun += 1;
            } else if let Some(plan) = line.strip_prefix("1..") {
                let points = plan.split_whitespace().next().unwrap_or_default();
                report.plans += 1;
                report.planned += points.parse().unwrap_or(0);
            } else if let Some(point) = line.strip_prefix("not ok") {
                report.point(false, point);
            } else if let Some(point) = line.strip_prefix("ok") {
                report.point(true, point);
            } else if line == "  ---" {
                let block: Vec<_> = lines.by_ref().take_while(|line| *line != "  ...").collect();
                report.remark.get_or_insert_with(|| block.join("\n"));
            }
        }
        report
    }

    /// `rest` is what follows "ok": the number, the description and maybe a directive.
    fn point(&mut self, ok: bool, rest: &str) {
        let directive = rest
            .rsplit_once("# ")
            .filter(|(before, _)| !before.ends_with('\\'))
            .map(|(_, directive)| directive.to_ascii_uppercase());
        let is = |word: &str| {
            directive
                .as_ref()
                .is_some_and(|text| text.starts_with(word))
        };
        if is("SKIP") {
            self.skipped += 1;
        } else if ok || is("TODO") {
            self.ok += 1;
        } else {
            let text = rest.trim_start_matches(|c: char| c.is_ascii_digit() || " -".contains(c));
            self.broken.push(text.to_owned());
        }
    }

    fn points(&self) -> usize {
        self.ok + self.skipped + self.broken.len()
    }
}

/// Decides, and says why where a test did not pass. docs/conformance.md explains these rules.
pub(super) fn judge(stdout: &str, stderr: &str, code: i32) -> (Verdict, String) {
    let report = Report::read(stdout);
    let fail = |why: String| (Verdict::Fail, why);
    if [stdout, stderr]
        .iter()
        .any(|text| text.contains("panicked at"))
    {
        return fail("the runtime panicked".to_owned());
    }
    if let [first, more @ ..] = report.broken.as_slice() {
        let count = if more.is_empty() {
            String::new()
        } else {
            format!(" (and {} more points)", more.len())
        };
        return fail(format!("{first}{count}"));
    }
    if code != 0 {
        let words = telling(stderr).map_or(String::new(), |line| format!(": {line}"));
        return fail(format!("exit status {code}{words}"));
    }
    if (report.plans, report.planned) != (report.begun, report.points()) {
        return fail(format!(
            "it ended early: {} points of {} announced in {} of {} reports",
            report.points(),
            report.planned,
            report.plans,
            report.begun
        ));
    }
    if report.points() == 0 {
        return match report.remark {
            Some(remark) => fail(remark.split_whitespace().collect::<Vec<_>>().join(" ")),
            None => (Verdict::Pass, String::new()),
        };
    }
    if report.ok == 0 {
        return (Verdict::Skip, "all its points are skipped".to_owned());
    }
    (Verdict::Pass, String::new())
}

/// The line of standard error that says most: the first that names an error, else the last. The suite
/// adds "exit status N" of the runtime, which says nothing.
fn telling(stderr: &str) -> Option<&str> {
    let lines = || {
        let lines = stderr.lines().map(str::trim);
        lines.filter(|line| !line.is_empty() && !line.starts_with("exit status"))
    };
    lines()
        .find(|line| line.contains("error"))
        .or(lines().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(stdout: &str, code: i32) -> Verdict {
        judge(stdout, "", code).0
    }

    #[test]
    fn points_decide() {
        let head = "TAP version 13\n";
        let passes = [
            "ok 1 - a\n1..1\n",
            "1..2\nok 1 - a\nok 2 # SKIP b\n",
            "ok 1 - a\nnot ok 2 # TODO - later\n1..2\n",
            "ok 1 - a\n1..1\nTAP version 13\n1..0\n",
        ];
        for text in passes {
            assert_eq!(
                verdict(&format!("{head}{text}"), 0),
                Verdict::Pass,
                "{text}"
            );
        }
        let fails = [
            "ok 1 - a\nnot ok 2 - b\n1..2\n",
            "ok 1 - a\n",
            "ok 1 - a\n1..2\n",
            "not ok 1 - 3 \\# TODO\n1..1\n",
            "ok 1 - a\n1..1\nTAP version 13\n",
            "",
        ];
        for text in fails {
            assert_eq!(
                verdict(&format!("{head}{text}"), 0),
                Verdict::Fail,
                "{text}"
            );
        }
        assert_eq!(
            verdict(&format!("{head}ok 1 # SKIP a\n1..1\n"), 0),
            Verdict::Skip
        );
    }

    #[test]
    fn exit_status_decides_where_all_points_are_ok() {
        assert_eq!(
            verdict("TAP version 13\nok 1 - a\n1..1\n", 1),
            Verdict::Fail
        );
        // A program that says nothing: its status is its answer.
        assert_eq!(verdict("", 0), Verdict::Pass);
        assert_eq!(verdict("", 1), Verdict::Fail);
    }

    #[test]
    fn a_remark_without_points_is_a_failure() {
        assert_eq!(verdict("TAP version 13\n1..0\n", 0), Verdict::Pass);
        let remark = "TAP version 13\n  ---\n  {\"error\": \"x\"}\n  ...\n1..0\n";
        assert_eq!(
            judge(remark, "", 0),
            (Verdict::Fail, "{\"error\": \"x\"}".to_owned())
        );
    }

    #[test]
    fn what_a_remark_holds_is_no_point() {
        let text = "TAP version 13\nok 1 - a\n  ---\n  not ok 2\nnot ok 3\n  ...\n1..1\n";
        assert_eq!(verdict(text, 0), Verdict::Pass);
    }

    #[test]
    fn the_reason_names_the_first_broken_point_or_the_error() {
        let text = "TAP version 13\nnot ok 1 - cpu shares\nnot ok 2 - b\n1..2\n";
        assert_eq!(judge(text, "", 0).1, "cpu shares (and 1 more points)");
        let stderr = "failed to create the container\nlevel=error msg=\"no\"\nexit status 1\n";
        assert_eq!(
            judge("", stderr, 1).1,
            "exit status 1: level=error msg=\"no\""
        );
        assert_eq!(
            judge(
                "TAP version 13\nok 1\n1..1\n",
                "thread 'x' panicked at y",
                0
            )
            .0,
            Verdict::Fail
        );
    }
}
