//! The cases, one file a subject.

mod build;
mod files;
mod lifecycle;
mod limits;
mod many;
mod network;
mod options;
mod output;
mod pods;
mod rootless;
mod security;

use anyhow::Result;

use super::engine::{Engine, Kind};

/// One case.
pub(crate) struct Case {
    /// `subject::what`.
    pub(crate) name: String,
    /// Which engines and runtimes it is for: words out of podman, docker, both, vm (Bulkhead alone),
    /// quick.
    words: &'static str,
    /// Whether it is one of those that `make test` runs.
    pub(crate) quick: bool,
    pub(crate) run: fn(&Engine) -> Result<()>,
}

impl Case {
    pub(crate) fn new(name: String, words: &'static str, run: fn(&Engine) -> Result<()>) -> Self {
        let quick = words.contains("quick");
        Self {
            name,
            words,
            quick,
            run,
        }
    }

    pub(crate) fn applies_to(&self, kind: Kind, bulkhead: bool) -> bool {
        let engine = self.words.contains("both") || self.words.contains(kind.program());
        engine && (bulkhead || !self.words.contains("vm"))
    }
}

/// All cases.
pub(crate) fn all() -> Vec<Case> {
    [
        output::cases(),
        lifecycle::cases(),
        options::cases(),
        limits::cases(),
        security::cases(),
        files::cases(),
        network::cases(),
        build::cases(),
        pods::cases(),
        many::cases(),
        rootless::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Defines `cases()` of a subject: `engine_cases!(subject; [both quick] a, b; [podman vm] c)`.
macro_rules! engine_cases {
    ($subject:ident; $($words:tt $($case:ident),+);+) => {
        pub(crate) fn cases() -> Vec<super::Case> {
            let mut cases = Vec::new();
            $(
                let some: &[(&str, fn(&crate::engines::engine::Engine) -> anyhow::Result<()>)] =
                    &[$((stringify!($case), $case)),+];
                for (name, run) in some {
                    let name = format!("{}::{name}", stringify!($subject));
                    cases.push(super::Case::new(name, stringify!($words), *run));
                }
            )+
            cases
        }
    };
}
use engine_cases;
