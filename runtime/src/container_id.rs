//! What a container may be called. runc's rule, and what keeps an id a plain file name.

use thiserror::Error;

/// The id cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IdError {
    /// Nothing was given.
    #[error("container id cannot be empty")]
    Empty,
    /// A character that may not be in it, or a name with a meaning to the file system.
    #[error(
        "invalid container ID format: {0:?} (letters, digits, \"_\", \"+\", \"-\" and \".\" are allowed)"
    )]
    Format(String),
    /// File names end at 255 bytes.
    #[error("invalid container ID format: {0} bytes are too long, 255 at most")]
    TooLong(usize),
}

/// Checks an id.
pub fn check(id: &str) -> Result<(), IdError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() {
        Err(IdError::Empty)
    } else if id == "." || id == ".." || !id.chars().all(allowed) {
        Err(IdError::Format(id.to_owned()))
    } else if id.len() > 255 {
        Err(IdError::TooLong(id.len()))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for id in ["a", "A_b+c-d.e", "...", "0123", &"x".repeat(255)] {
            assert_eq!(check(id), Ok(()), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            "a/b",
            "/",
            "a b",
            "é",
            "a\n",
            "a\0",
            &"x".repeat(256),
        ] {
            assert!(check(id).is_err(), "{id:?}");
        }
    }
}
