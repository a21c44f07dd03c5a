//! What this program's processes say to each other: lines of JSON over a Unix socket, and descriptors
//! with them.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::{
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// The most descriptors that a line brings.
const DESCRIPTORS: usize = 4;

/// Sends a line; its descriptors go with the first byte.
pub(super) fn send(
    mut socket: &UnixStream,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [IoSlice::new(&line)];
    let sent = rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    socket.write_all(&line[sent..])
}

/// What of the other side has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received<T> {
    /// A line.
    Line(T),
    /// Nothing yet.
    Nothing,
    /// It has ended.
    End,
}

/// The lines that come from a socket.
#[derive(Debug)]
pub(super) struct Lines {
    socket: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Lines {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            received: Vec::new(),
            descriptors: VecDeque::new(),
        }
    }

    /// For sending, and for polling.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(super) fn into_socket(self) -> UnixStream {
        self.socket
    }

    /// The next descriptor that has come with a line.
    pub(super) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    /// Waits for a line; `None` at the end.
    pub(super) fn wait<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        match self.next(RecvFlags::empty())? {
            Received::Line(line) => Ok(Some(line)),
            Received::Nothing | Received::End => Ok(None),
        }
    }

    /// A line that is there.
    pub(super) fn progress<T: DeserializeOwned>(&mut self) -> io::Result<Received<T>> {
        self.next(RecvFlags::DONTWAIT)
    }

    fn next<T: DeserializeOwned>(&mut self, flags: RecvFlags) -> io::Result<Received<T>> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                return Ok(Received::Line(serde_json::from_slice(&line)?));
            }
            let mut buffer = [0; 4096];
            match self.receive(&mut buffer, flags) {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(Received::End),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn receive(&mut self, buffer: &mut [u8], flags: RecvFlags) -> Result<usize, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(buffer)],
            &mut control,
            flags | RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights);
            }
        }
        Ok(received.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn lines_come_one_by_one_with_their_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(theirs);
        assert_eq!(lines.progress::<u32>().unwrap(), Received::Nothing);
        let file = std::fs::File::open("/dev/null").unwrap();
        send(&ours, &7, &[file.as_fd()]).unwrap();
        send(&ours, &"a\nb", &[]).unwrap();
        assert_eq!(lines.wait().unwrap(), Some(7));
        assert!(lines.descriptor().is_some() && lines.descriptor().is_none());
        let text = Received::Line("a\nb".to_owned());
        assert_eq!(lines.progress().unwrap(), text);
        drop(ours);
        assert_eq!(lines.progress::<u32>().unwrap(), Received::End);
    }
}
