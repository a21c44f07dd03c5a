//! `bulkhead-engines [FILTER] [--engine LIST] [--runtime LIST] [--quick] [--list]`, run as root in
//! the test host: it starts a Docker daemon and removes containers.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_tests::engines_main()
}
