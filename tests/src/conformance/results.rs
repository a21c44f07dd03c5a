//! All verdicts, what follows from them, and results.json.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::reasons::Reasons;
use super::record::Record;
use super::suite::Outcome;
use super::tap::Verdict;
use crate::runtime::Runtime;

/// The outcomes of all tests with all runtimes.
pub(super) struct Results {
    pub(super) record: Record,
    pub(super) runtimes: Vec<Runtime>,
    pub(super) tests: BTreeSet<String>,
}

impl Results {
    pub(super) fn new(record: Record) -> Self {
        let runtimes = Runtime::ALL
            .into_iter()
            .filter(|runtime| record.runtimes.contains_key(runtime.program()))
            .collect();
        let outcomes = record.runtimes.values();
        let tests = outcomes.flat_map(|one| one.tests.keys().cloned()).collect();
        Self {
            record,
            runtimes,
            tests,
        }
    }

    pub(super) fn outcome(&self, test: &str, runtime: Runtime) -> Option<&Outcome> {
        self.record.get(test, runtime)
    }

    pub(super) fn verdict(&self, test: &str, runtime: Runtime) -> Option<Verdict> {
        self.outcome(test, runtime).map(|outcome| outcome.verdict)
    }

    pub(super) fn count(&self, runtime: Runtime, verdict: Verdict) -> usize {
        let same = |test: &&String| self.verdict(test, runtime) == Some(verdict);
        self.tests.iter().filter(same).count()
    }

    /// `{"runtimes": {"bulkhead": {"pass": N, "fail": N, "skip": N, "tests": {NAME: "pass"}}}}`.
    pub(super) fn json(&self) -> Value {
        let mut runtimes = Map::new();
        for runtime in &self.runtimes {
            let mut entry = Map::new();
            for verdict in Verdict::ALL {
                let count = self.count(*runtime, verdict);
                entry.insert(verdict.word().to_owned(), count.into());
            }
            let tests: Map<String, Value> = self
                .tests
                .iter()
                .filter_map(|name| {
                    let verdict = self.verdict(name, *runtime)?;
                    Some((name.clone(), verdict.word().into()))
                })
                .collect();
            entry.insert("tests".to_owned(), tests.into());
            runtimes.insert(runtime.program().to_owned(), entry.into());
        }
        json!({ "runtimes": runtimes })
    }

    /// Whether another runtime passes what Bulkhead does not.
    pub(super) fn differs(&self, test: &str) -> bool {
        let passes = |runtime: Runtime| self.verdict(test, runtime) == Some(Verdict::Pass);
        let others = [Runtime::Crun, Runtime::Runc];
        self.verdict(test, Runtime::Bulkhead).is_some()
            && !passes(Runtime::Bulkhead)
            && others.into_iter().any(passes)
    }

    /// Differences without a reason, and reasons without a difference.
    pub(super) fn unexplained(&self, reasons: &Reasons) -> Vec<String> {
        let mut lines = Vec::new();
        for name in &self.tests {
            let passes = self.verdict(name, Runtime::Bulkhead) == Some(Verdict::Pass);
            match reasons.get(name) {
                None if self.differs(name) => lines.push(format!(
                    "{name}: another runtime passes and bulkhead does not, and \
                     tests/conformance/reasons does not say why"
                )),
                Some(_) if passes && reasons.is_certain(name) => lines.push(format!(
                    "{name}: bulkhead passes; remove its line from tests/conformance/reasons"
                )),
                _ => {}
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;
    use crate::conformance::suite::Test;

    fn results(verdicts: &[(&str, Verdict, Verdict)]) -> Results {
        let mut record = Record {
            suite: "1".to_owned(),
            kernel: "6.1".to_owned(),
            unified_cgroups: false,
            runtimes: BTreeMap::new(),
        };
        for (name, ours, theirs) in verdicts {
            for (runtime, verdict) in [(Runtime::Bulkhead, *ours), (Runtime::Crun, *theirs)] {
                let outcome = Outcome {
                    verdict,
                    why: String::new(),
                    output: String::new(),
                };
                record.add(name, runtime, outcome);
            }
        }
        Results::new(record)
    }

    fn reasons(names: &[&str]) -> Reasons {
        let test = |name: &&str| Test {
            name: (*name).to_owned(),
            same_cgroup: false,
        };
        let tests: Vec<_> = names.iter().map(test).collect();
        let text: String = names.iter().map(|name| format!("{name}: So.\n")).collect();
        Reasons::read(Path::new("reasons"), &text, &tests).expect("correct")
    }

    #[test]
    fn the_json_has_counts_and_verdicts() {
        let results = results(&[
            ("create", Verdict::Pass, Verdict::Pass),
            ("kill", Verdict::Skip, Verdict::Fail),
        ]);
        assert_eq!(
            results.json(),
            json!({ "runtimes": {
                "bulkhead": { "pass": 1, "fail": 0, "skip": 1,
                    "tests": { "create": "pass", "kill": "skip" } },
                "crun": { "pass": 1, "fail": 1, "skip": 0,
                    "tests": { "create": "pass", "kill": "fail" } },
            } })
        );
    }

    #[test]
    fn records_of_different_hosts_do_not_join() {
        let mut one = results(&[("create", Verdict::Pass, Verdict::Pass)]).record;
        let mut other = results(&[("create", Verdict::Pass, Verdict::Pass)]).record;
        other.unified_cgroups = true;
        assert!(one.join(other).is_err());
    }

    #[test]
    fn a_difference_wants_a_reason_and_a_pass_none() {
        let results = results(&[
            ("create", Verdict::Fail, Verdict::Pass),
            ("kill", Verdict::Fail, Verdict::Fail),
            ("state", Verdict::Pass, Verdict::Fail),
        ]);
        assert_eq!(results.unexplained(&reasons(&["create"])).len(), 0);
        assert_eq!(results.unexplained(&reasons(&["create", "kill"])).len(), 0);
        assert!(results.unexplained(&Reasons::default())[0].starts_with("create: "));
        let stale = results.unexplained(&reasons(&["create", "state"]));
        assert!(stale[0].starts_with("state: bulkhead passes"), "{stale:?}");
    }
}
