//! How errors are shown and which exit codes they give: the one place for both.

use std::{error::Error, fmt::Write};

use bulkhead_agent_protocol::ErrorKind;

use crate::{agent::rpc::RpcError, monitor::HandoverError};

/// Exit code of a command that failed for no special reason.
pub const FAILURE: u8 = 1;
/// Shells' exit code for a program that may not be executed.
const NOT_EXECUTABLE: u8 = 126;
/// Shells' exit code for a program that was not found.
const NOT_FOUND: u8 = 127;

/// The error and its causes on one line, each once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// Prints an error the way runc does: to the log, and when that is a file to standard error too.
pub fn print(error: &dyn Error, log_is_a_file: bool) {
    let text = chain(error);
    tracing::error!("{text}");
    if log_is_a_file {
        eprintln!("{text}");
    }
}

/// The exit code that an error gives.
pub fn exit_code(error: &(dyn Error + 'static)) -> u8 {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(RpcError::Refused { kind, .. }) = error.downcast_ref() {
            return of_kind(*kind);
        }
        // What failed in a monitor was judged there.
        if let Some(HandoverError::Failed { exit_code, .. }) = error.downcast_ref() {
            return *exit_code;
        }
        next = error.source();
    }
    FAILURE
}

fn of_kind(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::ProgramNotFound => NOT_FOUND,
        ErrorKind::ProgramNotExecutable => NOT_EXECUTABLE,
        _ => FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::LaunchError;

    fn refused(kind: ErrorKind) -> LaunchError {
        LaunchError::Agent(RpcError::Refused {
            kind,
            message: "exec: \"foo\": executable file not found in $PATH".to_owned(),
        })
    }

    #[test]
    fn the_chain_is_one_line_in_runcs_words() {
        assert_eq!(
            chain(&refused(ErrorKind::ProgramNotFound)),
            "unable to start container process: exec: \"foo\": executable file not found in $PATH"
        );
    }

    #[test]
    fn exit_codes() {
        assert_eq!(exit_code(&refused(ErrorKind::ProgramNotFound)), 127);
        assert_eq!(exit_code(&refused(ErrorKind::ProgramNotExecutable)), 126);
        assert_eq!(exit_code(&refused(ErrorKind::Internal)), 1);
        assert_eq!(exit_code(&LaunchError::Boot), 1);
    }
}
