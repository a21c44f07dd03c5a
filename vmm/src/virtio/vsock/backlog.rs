//! Bytes that came from the guest and that the host does not take yet: a ring of fixed size, made
//! when it is first needed and given back once the host has caught up.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vm_memory::VolatileSlice;

/// A ring of bytes.
#[derive(Debug)]
pub(super) struct Backlog {
    ring: Box<[u8]>,
    start: usize,
    length: usize,
    capacity: usize,
}

impl Backlog {
    /// An empty ring that will hold up to `capacity` bytes; takes no memory yet.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            ring: Box::default(),
            start: 0,
            length: 0,
            capacity,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes in it.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Appends; false, with nothing appended, if the bytes do not fit.
    #[must_use]
    pub(super) fn push(&mut self, pieces: &[VolatileSlice<'_>]) -> bool {
        let count: usize = pieces.iter().map(VolatileSlice::len).sum();
        if count > self.capacity - self.length {
            return false;
        }
        if self.ring.is_empty() && count > 0 {
            self.ring = vec![0; self.capacity].into();
            self.start = 0;
        }
        for piece in pieces {
            let mut done = 0;
            while done < piece.len() {
                let end = (self.start + self.length) % self.capacity;
                let room = (self.capacity - end).min(self.capacity - self.length);
                let Ok(rest) = piece.offset(done) else { break };
                let copied = rest.copy_to(&mut self.ring[end..end + room]);
                self.length += copied;
                done += copied;
            }
        }
        true
    }

    /// Sends what the socket takes without waiting; gives how many bytes that was.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut done = 0;
        while self.length > 0 {
            let end = (self.start + self.length).min(self.capacity);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(socket, &self.ring[self.start..end], flags) {
                Ok(count) => {
                    self.start = (self.start + count) % self.capacity;
                    self.length -= count;
                    done += count;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.is_empty() {
            self.clear();
        }
        Ok(done)
    }

    /// Forgets what is in it and gives the memory back.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn push(backlog: &mut Backlog, bytes: &mut [u8]) -> bool {
        backlog.push(&[VolatileSlice::from(bytes)])
    }

    #[test]
    fn keeps_order_round_the_ring() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let mut backlog = Backlog::new(10);
        let mut numbers = (0..=u8::MAX).cycle();
        let mut seen = Vec::new();
        for round in 0..50usize {
            let count = round % 10 + 1;
            let mut bytes: Vec<u8> = numbers.by_ref().take(count).collect();
            assert!(push(&mut backlog, &mut bytes));
            assert_eq!(backlog.send(ours.as_fd()).expect("send"), count);
            let mut got = vec![0; count];
            theirs.read_exact(&mut got).expect("read");
            seen.extend(got);
        }
        assert!(backlog.is_empty());
        assert!(seen.into_iter().eq((0..=u8::MAX).cycle().take(275)));
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut backlog = Backlog::new(4);
        assert!(push(&mut backlog, &mut [1, 2, 3]));
        assert!(!push(&mut backlog, &mut [4, 5]));
        assert!(push(&mut backlog, &mut [4]));
        assert!(!push(&mut backlog, &mut [5]));
        assert!(push(&mut backlog, &mut []));
        backlog.clear();
        assert!(backlog.is_empty());
    }
}
