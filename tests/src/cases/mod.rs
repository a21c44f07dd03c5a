//! The tests, one file a subject. Those marked `common` hold for every OCI runtime and run against
//! crun and runc too, which proves the tests; those marked `vm` are about Bulkhead alone.

mod bad_input;
mod block;
mod broken_host;
mod config;
mod crash;
mod creations;
mod events;
mod exec;
mod hooks;
mod host;
mod inotify;
mod isolation;
mod lifecycle;
mod limits;
mod mutants;
mod network;
mod pods;
mod pressure;
mod process;
mod roots;
mod security;
mod share;
mod signals;
mod sockets;
mod states;
mod stdio;
mod tty;
mod update;
mod vm;
mod volumes;
pub(crate) mod workloads;
mod writes;

use std::time::Duration;

use anyhow::Result;

use crate::runner;
use crate::runtime::Runtime;
use crate::scene::Scene;

/// What a test does.
type Run = Box<dyn Fn(&Scene) -> Result<()>>;

/// One test.
pub(crate) struct Case {
    /// `subject::what`.
    pub(crate) name: String,
    /// Whether it is about Bulkhead alone.
    vm: bool,
    pub(crate) run: Run,
}

impl Case {
    pub(crate) fn applies_to(&self, runtime: Runtime) -> bool {
        runtime == Runtime::Bulkhead || !self.vm
    }

    /// How long it may take.
    pub(crate) fn longest(&self) -> Duration {
        if self.name.starts_with("workloads::") {
            workloads::LONGEST
        } else {
            runner::LONGEST
        }
    }
}

/// All tests.
pub(crate) fn all() -> Vec<Case> {
    [
        lifecycle::cases(),
        states::cases(),
        stdio::cases(),
        tty::cases(),
        exec::cases(),
        update::cases(),
        events::cases(),
        hooks::cases(),
        config::cases(),
        signals::cases(),
        limits::cases(),
        isolation::cases(),
        process::cases(),
        security::cases(),
        volumes::cases(),
        roots::cases(),
        sockets::cases(),
        share::cases(),
        writes::cases(),
        creations::cases(),
        inotify::cases(),
        block::cases(),
        host::cases(),
        bad_input::cases(),
        mutants::cases(),
        network::cases(),
        pods::cases(),
        pressure::cases(),
        broken_host::cases(),
        vm::cases(),
        crash::cases(),
        workloads::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Defines `cases()` of a subject: `cases!(subject; common: a, b; vm: c)`.
macro_rules! cases {
    ($subject:ident; common: $($common:ident),*; vm: $($vm:ident),*) => {
        pub(crate) fn cases() -> Vec<crate::cases::Case> {
            let subject = stringify!($subject);
            vec![
                $(crate::cases::Case {
                    name: format!("{subject}::{}", stringify!($common)), vm: false,
                    run: Box::new($common),
                },)*
                $(crate::cases::Case {
                    name: format!("{subject}::{}", stringify!($vm)), vm: true,
                    run: Box::new($vm),
                },)*
            ]
        }
    };
}
pub(crate) use cases;
