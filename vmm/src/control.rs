//! The VMM's side of the conversation over standard input that [`crate::config`] describes.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::FileType;
use serde::de::DeserializeOwned;

use crate::config::{VmCommand, VmConfig, VmEvent};

/// The longest line that is read.
const LONGEST: usize = 4 << 20;

/// Why the conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not started by a runtime.
    #[error(
        "standard input is not a Unix stream socket: bulkhead-vmm is started by bulkhead, it is not a command for people"
    )]
    NotASocket,
    /// The socket failed.
    #[error("{0} the control socket")]
    Socket(&'static str, #[source] io::Error),
    /// The other side has closed it.
    #[error("the control socket was closed")]
    Closed,
    /// A line that cannot be understood.
    #[error("a line on the control socket is no valid {what}")]
    Line {
        /// What was expected.
        what: &'static str,
        /// Cause.
        #[source]
        source: serde_json::Error,
    },
    /// A line without end.
    #[error("a line on the control socket is longer than {LONGEST} bytes")]
    TooLong,
    /// A command out of turn.
    #[error("the command {0:?} comes out of turn")]
    Unexpected(VmCommand),
}

/// The control socket.
#[derive(Debug)]
pub struct Control {
    socket: UnixStream,
    /// Read, but not yet understood.
    buffer: Vec<u8>,
}

impl Control {
    /// Takes standard input.
    pub fn from_stdin() -> Result<Self, ControlError> {
        let stdin = rustix::stdio::stdin();
        let kind = rustix::fs::fstat(stdin).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if kind != Ok(FileType::Socket) {
            return Err(ControlError::NotASocket);
        }
        let socket = stdin
            .try_clone_to_owned()
            .map_err(|error| ControlError::Socket("open", error))?;
        Ok(Self::new(socket.into()))
    }

    /// Takes a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
        }
    }

    /// Waits for the configuration.
    pub fn read_config(&mut self) -> Result<VmConfig, ControlError> {
        self.wait("VM configuration")
    }

    /// Waits for [`VmCommand::Go`]. Gives false for [`VmCommand::Stop`].
    pub fn wait_for_go(&mut self) -> Result<bool, ControlError> {
        Ok(self.wait::<VmCommand>("command")? == VmCommand::Go)
    }

    /// Reads what has come; gives the next command if one is whole. To be called when the socket
    /// is readable, until it gives none.
    pub fn next_command(&mut self) -> Result<Option<VmCommand>, ControlError> {
        if let Some(command) = self.take("command")? {
            return Ok(Some(command));
        }
        self.fill()?;
        self.take("command")
    }

    /// Writes an event.
    pub fn send(&mut self, event: &VmEvent) -> Result<(), ControlError> {
        let mut line = serde_json::to_vec(event)
            .map_err(|error| ControlError::Socket("write to", error.into()))?;
        line.push(b'\n');
        self.socket
            .write_all(&line)
            .map_err(|error| ControlError::Socket("write to", error))
    }

    fn wait<T: DeserializeOwned>(&mut self, what: &'static str) -> Result<T, ControlError> {
        loop {
            if let Some(value) = self.take(what)? {
                return Ok(value);
            }
            self.fill()?;
        }
    }

    /// Takes a whole line from the buffer.
    fn take<T: DeserializeOwned>(&mut self, what: &'static str) -> Result<Option<T>, ControlError> {
        let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        serde_json::from_slice(&line)
            .map(Some)
            .map_err(|source| ControlError::Line { what, source })
    }

    /// Reads once.
    fn fill(&mut self) -> Result<(), ControlError> {
        if self.buffer.len() > LONGEST {
            return Err(ControlError::TooLong);
        }
        let mut bytes = [0; 8192];
        loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(ControlError::Closed),
                Ok(count) => {
                    self.buffer.extend_from_slice(&bytes[..count]);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The other side was killed with bytes of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ControlError::Closed);
                }
                Err(error) => return Err(ControlError::Socket("read from", error)),
            }
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_may_come_in_pieces() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let mut control = Control::new(ours);
        theirs
            .write_all(b"{\"command\":\"go\"}\n{\"comm")
            .expect("write");
        assert!(control.wait_for_go().expect("go"));
        theirs.write_all(b"and\":").expect("write");
        assert_eq!(control.next_command().expect("half"), None);
        theirs.write_all(b"\"stop\"}\n").expect("write");
        assert_eq!(
            control.next_command().expect("whole"),
            Some(VmCommand::Stop)
        );
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for line in ["{}\n", "go\n", "{\"command\":\"fly\"}\n", "\n"] {
            let (ours, mut theirs) = UnixStream::pair().expect("pair");
            theirs.write_all(line.as_bytes()).expect("write");
            let error = Control::new(ours).wait_for_go().expect_err(line);
            assert!(matches!(error, ControlError::Line { .. }), "{line}");
        }
    }

    #[test]
    fn notices_the_end() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        assert!(matches!(
            Control::new(ours).read_config(),
            Err(ControlError::Closed)
        ));
    }

    #[test]
    fn a_line_must_end_some_time() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let writer = std::thread::spawn(move || while theirs.write_all(&[b' '; 8192]).is_ok() {});
        let mut control = Control::new(ours);
        assert!(matches!(control.read_config(), Err(ControlError::TooLong)));
        drop(control);
        writer.join().expect("writer");
    }
}
