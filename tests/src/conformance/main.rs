//! `bulkhead-conformance run …` and `bulkhead-conformance report …`; `run` as root.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_tests::conformance_main()
}
