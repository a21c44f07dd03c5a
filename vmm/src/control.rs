//! The VMM's side of the conversation over standard input that [`crate::config`] describes.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::de::DeserializeOwned;

use crate::config::{VmCommand, VmConfig, VmEvent};

/// The longest line that is read.
const LONGEST: usize = 4 << 20;
/// Descriptors that may come with one line.
const MOST_DESCRIPTORS: usize = 16;

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
    /// Descriptors with a line that has no use for them.
    #[error("a {0} on the control socket came with file descriptors, which it has no use for")]
    Descriptors(&'static str),
    /// Too many descriptors.
    #[error(
        "a line on the control socket came with more than {MOST_DESCRIPTORS} file descriptors (or this process may not have so many open)"
    )]
    TooManyDescriptors,
}

/// A command with what came along.
#[derive(Debug)]
pub struct Received {
    /// The command.
    pub command: VmCommand,
    /// Its descriptors.
    pub descriptors: Vec<OwnedFd>,
}

/// The control socket.
#[derive(Debug)]
pub struct Control {
    socket: UnixStream,
    /// Read, but not yet understood.
    buffer: Vec<u8>,
    /// Descriptors, each with its place in `buffer`: that of a byte of its line.
    descriptors: Vec<(usize, OwnedFd)>,
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
            descriptors: Vec::new(),
        }
    }

    /// Waits for the configuration.
    pub fn read_config(&mut self) -> Result<VmConfig, ControlError> {
        self.wait("VM configuration")
    }

    /// Waits for [`VmCommand::Go`]. Gives false for [`VmCommand::Stop`].
    pub fn wait_for_go(&mut self) -> Result<bool, ControlError> {
        match self.wait("command")? {
            VmCommand::Go => Ok(true),
            VmCommand::Stop => Ok(false),
            command => Err(ControlError::Unexpected(command)),
        }
    }

    /// Gives the next command of those that were read already.
    pub fn next_command(&mut self) -> Result<Option<Received>, ControlError> {
        let line = self.take("command")?;
        Ok(line.map(|(command, descriptors)| Received {
            command,
            descriptors,
        }))
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
            match self.take(what)? {
                Some((value, descriptors)) if descriptors.is_empty() => return Ok(value),
                Some(_) => return Err(ControlError::Descriptors(what)),
                None => self.fill()?,
            }
        }
    }

    /// Takes a whole line from the buffer, with its descriptors.
    fn take<T: DeserializeOwned>(
        &mut self,
        what: &'static str,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        let count = self
            .descriptors
            .iter()
            .take_while(|(place, _)| *place <= end)
            .count();
        let descriptors = self.descriptors.drain(..count).map(|(_, fd)| fd).collect();
        for (place, _) in &mut self.descriptors {
            *place -= line.len();
        }
        let value =
            serde_json::from_slice(&line).map_err(|source| ControlError::Line { what, source })?;
        Ok(Some((value, descriptors)))
    }

    /// Reads once: waits unless the socket is readable.
    pub fn fill(&mut self) -> Result<(), ControlError> {
        if self.buffer.len() > LONGEST {
            return Err(ControlError::TooLong);
        }
        let mut bytes = [0; 8192];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut vectors = [IoSliceMut::new(&mut bytes)];
            match recvmsg(
                &self.socket,
                &mut vectors,
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                // The other side was killed with bytes of ours unread.
                Err(Errno::CONNRESET) => return Err(ControlError::Closed),
                Err(error) => return Err(ControlError::Socket("read from", error.into())),
            }
        };
        self.buffer.extend_from_slice(&bytes[..received.bytes]);
        // A read ends with the first bytes that descriptors came with (unix(7)), so that they
        // belong to the line that the last byte is of.
        let place = self.buffer.len().saturating_sub(1);
        let before = self.descriptors.len();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights.map(|fd| (place, fd)));
            }
        }
        let count = self.descriptors.len() - before;
        if count > MOST_DESCRIPTORS || received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ControlError::TooManyDescriptors);
        }
        if received.bytes == 0 {
            return Err(ControlError::Closed);
        }
        Ok(())
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

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
        control.fill().expect("read");
        assert!(control.next_command().expect("half").is_none());
        theirs.write_all(b"\"stop\"}\n").expect("write");
        control.fill().expect("read");
        let received = control.next_command().expect("whole").expect("a command");
        assert_eq!(received.command, VmCommand::Stop);
        assert!(received.descriptors.is_empty());
    }

    /// Sends bytes with copies of a descriptor.
    fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        let vectors = [IoSlice::new(bytes)];
        let sent = sendmsg(socket, &vectors, &mut ancillary, SendFlags::empty()).expect("send");
        assert_eq!(sent, bytes.len());
    }

    #[test]
    fn descriptors_belong_to_their_line() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let (read, write) = io::pipe().expect("pipe");
        let mut control = Control::new(ours);
        let detach = |id: &str| format!("{{\"command\":\"detach\",\"id\":\"{id}\"}}\n");
        let long = detach(&"x".repeat(9000));
        send(&theirs, detach("a").as_bytes(), &[]);
        send(&theirs, long.as_bytes(), &[write.as_fd(), write.as_fd()]);
        send(&theirs, detach("b").as_bytes(), &[]);
        send(&theirs, detach("c").as_bytes(), &[write.as_fd()]);
        drop(write);
        let mut counts = Vec::new();
        while counts.len() < 4 {
            match control.next_command().expect("a command") {
                Some(received) => counts.push(received.descriptors.len()),
                None => control.fill().expect("read"),
            }
        }
        assert_eq!(counts, [0, 2, 0, 1]);
        // All copies are closed again.
        assert_eq!(io::Read::read(&mut { read }, &mut [0]).expect("read"), 0);
    }

    #[test]
    fn descriptors_out_of_place_are_errors() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let (read, write) = io::pipe().expect("pipe");
        send(&theirs, b"{\"command\":\"go\"}\n", &[write.as_fd()]);
        let mut control = Control::new(ours);
        let error = control.wait_for_go().expect_err("no use for it");
        assert!(matches!(error, ControlError::Descriptors(_)));
        send(
            &theirs,
            b"{\"command\":\"stop\"}\n",
            &[write.as_fd(); MOST_DESCRIPTORS + 1],
        );
        let error = control.fill().expect_err("too many");
        assert!(matches!(error, ControlError::TooManyDescriptors));
        drop((control, write));
        assert_eq!(io::Read::read(&mut { read }, &mut [0]).expect("read"), 0);
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
