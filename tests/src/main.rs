//! `bulkhead-tests [FILTER] [--runtime LIST] [--list] [--test-threads N]`, run as root.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_tests::tests_main()
}
