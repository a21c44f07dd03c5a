//! Bulkhead's integration tests and benchmarks. They drive built programs only, as a user or an
//! engine would, and know nothing of how those work inside.

mod bench;
mod bundle;
mod cases;
mod conformance;
mod engines;
mod inside;
mod leftovers;
mod mutation;
mod process;
mod runner;
mod runtime;
mod scene;
mod sys;
mod terminal;
mod watch;

pub use bench::main as bench_main;
pub use conformance::main as conformance_main;
pub use engines::main as engines_main;
pub use runner::main as tests_main;
