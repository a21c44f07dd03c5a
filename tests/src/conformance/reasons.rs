//! Why Bulkhead does not pass what others pass: a sentence a test, kept in tests/conformance/reasons, and what
//! another host changes of that in a second file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::suite::Test;

/// Reasons by the name of the test.
#[derive(Debug, Default)]
pub(super) struct Reasons(BTreeMap<String, Reason>);

#[derive(Debug)]
struct Reason {
    sentence: String,
    /// The test is a race, which may be won too.
    race: bool,
}

impl Reasons {
    /// Reads lines `NAME: sentence`, or `NAME (race): sentence` where the test passes now and then; those
    /// that begin with `#` are remarks.
    pub(super) fn open(path: &Path, tests: &[Test]) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Self::read(path, &text, tests)
    }

    /// The same from its text; `path` is for messages.
    pub(super) fn read(path: &Path, text: &str, tests: &[Test]) -> Result<Self> {
        Self::parse(text, tests).with_context(|| path.display().to_string())
    }

    fn parse(text: &str, tests: &[Test]) -> Result<Self> {
        let mut reasons = BTreeMap::new();
        let lines = text.lines().enumerate();
        for (number, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
            let number = number + 1;
            let Some((name, sentence)) = line.split_once(": ") else {
                bail!("line {number} is not `NAME: sentence`");
            };
            let (name, race) = match name.strip_suffix(" (race)") {
                Some(name) => (name, true),
                None => (name, false),
            };
            ensure!(
                tests.iter().any(|test| test.name == name),
                "line {number}: the suite has no test {name}"
            );
            ensure!(
                sentence.trim().ends_with('.'),
                "line {number}: the reason for {name} is not a sentence"
            );
            let reason = Reason {
                sentence: sentence.trim().to_owned(),
                race,
            };
            let known = reasons.insert(name.to_owned(), reason);
            ensure!(known.is_none(), "line {number}: a second reason for {name}");
        }
        Ok(Self(reasons))
    }

    /// Others, which come before those that are there.
    pub(super) fn put_first(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|reason| reason.sentence.as_str())
    }

    /// Whether there is a reason for a test that can only fail.
    pub(super) fn is_certain(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|reason| !reason.race)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Reasons> {
        let test = |name: &str| Test {
            name: name.to_owned(),
            same_cgroup: false,
        };
        Reasons::parse(text, &[test("create"), test("kill")])
    }

    #[test]
    fn a_sentence_a_test() {
        let reasons = read("# remark\n\ncreate: It is so.\n").expect("correct");
        assert_eq!(reasons.get("create"), Some("It is so."));
        assert_eq!(reasons.get("kill"), None);
        assert!(reasons.is_certain("create"));
        let reasons = read("kill (race): Now and then.\n").expect("correct");
        assert_eq!(reasons.get("kill"), Some("Now and then."));
        assert!(!reasons.is_certain("kill"));
    }

    #[test]
    fn later_files_come_first() {
        let mut reasons = read("create: One.\nkill: Two.\n").expect("correct");
        reasons.put_first(read("kill (race): Three.\n").expect("correct"));
        assert_eq!(reasons.get("create"), Some("One."));
        assert_eq!(reasons.get("kill"), Some("Three."));
        assert!(!reasons.is_certain("kill"));
    }

    #[test]
    fn what_is_no_reason_is_refused() {
        for text in [
            "create",
            "create: no sentence",
            "unknown: It is so.",
            "create: One.\ncreate: Two.",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
