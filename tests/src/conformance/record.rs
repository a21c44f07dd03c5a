//! What one test host found out, as it is handed to `report`. Several hosts, each with some of the
//! runtimes, may work beside each other.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::suite::{Outcome, Suite};
use crate::runtime::{Runtime, unified_cgroups};

/// The outcomes and what they depend on.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// The suite's version.
    pub(super) suite: String,
    /// The host's kernel release.
    pub(super) kernel: String,
    /// Whether the host has cgroup v2 alone.
    pub(super) unified_cgroups: bool,
    /// By the program's name.
    pub(super) runtimes: BTreeMap<String, Outcomes>,
}

/// The outcomes of one runtime.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Outcomes {
    /// What it says about itself.
    pub(super) version: String,
    /// By the test's name.
    pub(super) tests: BTreeMap<String, Outcome>,
}

impl Record {
    /// A record of this host, without outcomes.
    pub(super) fn new(suite: &Suite, runtimes: &[Runtime]) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("reading the kernel's release")?;
        let mut outcomes = BTreeMap::new();
        for runtime in runtimes {
            let entry = Outcomes {
                version: version(*runtime)?,
                tests: BTreeMap::new(),
            };
            outcomes.insert(runtime.program().to_owned(), entry);
        }
        Ok(Self {
            suite: suite.version.clone(),
            kernel: kernel.trim().to_owned(),
            unified_cgroups: unified_cgroups(),
            runtimes: outcomes,
        })
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_vec(self)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    pub(super) fn add(&mut self, test: &str, runtime: Runtime, outcome: Outcome) {
        let entry = self
            .runtimes
            .entry(runtime.program().to_owned())
            .or_default();
        entry.tests.insert(test.to_owned(), outcome);
    }

    pub(super) fn get(&self, test: &str, runtime: Runtime) -> Option<&Outcome> {
        self.runtimes.get(runtime.program())?.tests.get(test)
    }

    /// Adds another host's record. Only the same suite on hosts of the same kind compares.
    pub(super) fn join(&mut self, other: Self) -> Result<()> {
        ensure!(
            (&self.suite, &self.kernel, self.unified_cgroups)
                == (&other.suite, &other.kernel, other.unified_cgroups),
            "the records are of different suites or hosts"
        );
        self.runtimes.extend(other.runtimes);
        Ok(())
    }
}

/// The first line of `--version`.
fn version(runtime: Runtime) -> Result<String> {
    let output = Command::new(runtime.program())
        .arg("--version")
        .output()
        .with_context(|| format!("asking {} for its version", runtime.program()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
