//! How errors are shown: one line, each cause once.

use std::error::Error;
use std::fmt;

/// An error with its causes, joined by `: `.
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = self.0.to_string();
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let next = error.to_string();
            // Some libraries repeat their cause in their own text.
            if !text.ends_with(&next) {
                text = format!("{text}: {next}");
            }
            cause = error.source();
        }
        // Whatever a library puts into its text: one line.
        f.write_str(&text.replace(['\n', '\r'], " "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer{}", if self.repeat { ": inner" } else { "" })]
    struct Outer {
        repeat: bool,
        source: std::io::Error,
    }

    #[test]
    fn each_cause_once() {
        for repeat in [false, true] {
            let error = Outer {
                repeat,
                source: std::io::Error::other("inner"),
            };
            assert_eq!(Chain(&error).to_string(), "outer: inner");
        }
    }
}
