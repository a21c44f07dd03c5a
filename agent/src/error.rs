//! The one error of the agent: what a caller can tell apart ([`ErrorKind`]), and the text for
//! people. Turning it into a ttrpc status happens here and nowhere else.

use std::{fmt::Write as _, io};

use bulkhead_agent_protocol::ErrorKind;
use serde::{Deserialize, Serialize};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of the spec has a value that cannot be used.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path of the field in config.json.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of the spec that this version does not honour, so that it refuses it.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// Path of the field in config.json.
        field: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The kernel refused an operation.
    #[error("cannot {action}")]
    System {
        /// The operation and its operand.
        action: String,
        /// The kernel's answer.
        #[source]
        cause: io::Error,
    },
    /// An error whose kind and text are settled: also what the set-up of a process reports from
    /// its own process.
    #[error("{}", .0.message)]
    Reported(Report),
}

/// Kind and text of an error, as they cross a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What the caller can tell apart.
    #[serde(with = "kind_as_code")]
    pub kind: ErrorKind,
    /// One line, causes included.
    pub message: String,
}

/// Shorthand of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A wrong value in the field.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// A field that is refused.
    pub fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// An error of the given kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Reported(Report {
            kind,
            message: message.into(),
        })
    }

    /// What the caller can tell apart.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::InvalidSpec,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::System { .. } => ErrorKind::Internal,
            Self::Reported(report) => report.kind,
        }
    }

    /// The text with its causes, on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            let _ = write!(text, ": {cause}");
            next = cause.source();
        }
        text
    }

    /// Kind and text, to be sent on.
    pub fn report(&self) -> Report {
        Report {
            kind: self.kind(),
            message: self.chain(),
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.kind().code(), error.chain()))
    }
}

/// Adds what was attempted to the kernel's answer.
pub trait Attempt<T> {
    /// `action` completes the sentence "cannot …".
    fn or_cannot<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for std::result::Result<T, E> {
    fn or_cannot<S: Into<String>>(self, action: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error::System {
            action: action().into(),
            cause: cause.into(),
        })
    }
}

/// [`ErrorKind`] crosses the socket as its number among all kinds.
mod kind_as_code {
    use bulkhead_agent_protocol::ErrorKind::{self, *};
    use serde::{Deserialize, Deserializer, Serializer};

    const KINDS: [ErrorKind; 7] = [
        ProgramNotFound,
        ProgramNotExecutable,
        InvalidSpec,
        Unsupported,
        NoSuchProcess,
        WrongState,
        Internal,
    ];

    pub(super) fn serialize<S: Serializer>(kind: &ErrorKind, to: S) -> Result<S::Ok, S::Error> {
        let index = KINDS.iter().position(|k| k == kind).unwrap_or(6);
        to.serialize_u64(index as u64)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<ErrorKind, D::Error> {
        let index = usize::deserialize(from)?;
        Ok(KINDS.get(index).copied().unwrap_or(Internal))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_printed_once() {
        let result: std::result::Result<(), _> = Err(io::Error::from_raw_os_error(libc::ENOENT));
        let error = result
            .or_cannot(|| "open /x".to_string())
            .expect_err("failed");
        assert_eq!(
            error.chain(),
            "cannot open /x: No such file or directory (os error 2)"
        );
        assert_eq!(error.kind(), ErrorKind::Internal);
    }

    #[test]
    fn reports_survive_the_socket() {
        for kind in [ErrorKind::ProgramNotFound, ErrorKind::Internal] {
            let report = Error::new(kind, "text").report();
            let sent = serde_json::to_vec(&report).expect("JSON");
            assert_eq!(
                serde_json::from_slice::<Report>(&sent).expect("JSON"),
                report
            );
        }
    }
}
