//! `bulkhead-bench [--json FILE] [--runs N] [--runtime LIST]`, run as root.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_tests::bench_main()
}
