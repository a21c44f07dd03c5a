//! `bulkhead-conformance --suite DIR [--reasons FILE] [--json FILE] [--markdown FILE]
//! [--output FILE] [--runtime LIST] [--jobs N] [FILTER]`, run as root.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_tests::conformance_main()
}
