//! Connections to sockets of the host that the file server has made for the guest, and that the
//! guest has not come for yet. The file server names each by a mark; the guest comes for it by a
//! vsock connection to the host port of that mark.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

/// Host ports from here on stand for connections.
pub const FIRST_PORT: u32 = 1 << 31;
/// Connections that wait at a time. A guest that does not come for them loses the oldest.
const MOST_WAITING: usize = 128;

/// The connections that wait.
#[derive(Clone, Debug, Default)]
pub struct HostConnections(Arc<Mutex<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    connections: VecDeque<(u32, OwnedFd)>,
    last: u32,
}

impl HostConnections {
    /// Keeps a connection; gives its mark, which is a host port and never 0.
    pub fn put(&self, connection: OwnedFd) -> u32 {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.connections.len() >= MOST_WAITING {
            waiting.connections.pop_front();
        }
        waiting.last = waiting.last.wrapping_add(1) | FIRST_PORT;
        let mark = waiting.last;
        waiting.connections.push_back((mark, connection));
        mark
    }

    /// Gives the connection of a mark away.
    pub fn take(&self, mark: u32) -> Option<OwnedFd> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = waiting.connections.iter().position(|(m, _)| *m == mark)?;
        waiting.connections.remove(index).map(|(_, fd)| fd)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn each_is_given_away_once() {
        let connections = HostConnections::default();
        let (ours, _theirs) = UnixStream::pair().expect("pair");
        let mark = connections.put(ours.into());
        assert!(mark >= FIRST_PORT);
        assert!(connections.take(mark + 1).is_none());
        assert!(connections.take(mark).is_some());
        assert!(connections.take(mark).is_none());
    }

    #[test]
    fn those_that_nobody_comes_for_are_dropped() {
        let connections = HostConnections::default();
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let first = connections.put(ours.into());
        for _ in 0..MOST_WAITING {
            connections.put(UnixStream::pair().expect("pair").0.into());
        }
        assert!(connections.take(first).is_none());
        assert_eq!(theirs.read(&mut [0]).expect("closed"), 0);
    }
}
