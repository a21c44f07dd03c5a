//! The name server that Docker has in a container's network namespace, for the guest: whoever asks
//! there at 127.0.0.11 is connected to the Unix socket of a vsock port, and a thread in the
//! namespace passes the question on. Questions come from the guest: what is not one ends its own
//! connection.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

use bulkhead_agent_protocol::{RESOLVE_DATAGRAM, RESOLVE_STREAM, RESOLVER_ADDRESS, RESOLVER_PORT};

use crate::{agent, state::Container};

/// From where the name server asks others, on the container's own interfaces; guests choose ports
/// below by themselves, so that the port tells whose an answer is.
pub(super) const FIRST_PORT: u16 = 0xf000;
const NAME_SERVER: SocketAddrV4 = SocketAddrV4::new(RESOLVER_ADDRESS, 53);
/// Connections of the guest at a time; more wait.
const MOST: usize = 32;
/// Longer than the name server takes at most (three servers, four seconds each).
const PATIENCE: Duration = Duration::from_secs(15);

/// Whether the namespace that the thread is in has one: Docker's is bound to a port of its own, to
/// which rules in the namespace lead from port 53.
pub(super) fn is_there() -> bool {
    fs::read_to_string("/proc/thread-self/net/udp")
        .is_ok_and(|table| listens(&table, RESOLVER_ADDRESS))
}

/// Whether a table of sockets (`/proc/net/udp`) has one of this address.
fn listens(table: &str, address: Ipv4Addr) -> bool {
    let address = format!("{:08X}:", u32::from_ne_bytes(address.octets()));
    table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1))
        .any(|local| local.starts_with(&address))
}

/// Passes questions on as long as the process lives, in the namespace that the calling thread is in,
/// which is made ready for a name server that asks others: it is Docker's, for this container alone.
pub(super) fn serve(container: &Container) -> io::Result<()> {
    fs::write(
        "/proc/sys/net/ipv4/ip_local_port_range",
        format!("{FIRST_PORT} {}", u16::MAX),
    )?;
    let sockets = agent::sockets(container).map_err(io::Error::other)?;
    // Relative to the directory: see `agent::connect`.
    let directory = sockets.as_fd().as_raw_fd();
    let listener = UnixListener::bind(format!(
        "/proc/self/fd/{directory}/vsock.sock_{RESOLVER_PORT}"
    ))?;
    thread::Builder::new()
        .name("resolver".to_owned())
        .spawn(move || accept(&listener))?;
    Ok(())
}

fn accept(listener: &UnixListener) {
    let places = Arc::new(Places::default());
    loop {
        let place = places.clone().take();
        let spawned = listener.accept().and_then(|(guest, _)| {
            thread::Builder::new()
                .name("question".to_owned())
                .spawn(move || {
                    if let Err(error) = answer(guest) {
                        tracing::debug!("a question to the name server failed: {error}");
                    }
                    drop(place);
                })
        });
        if let Err(error) = spawned {
            // For want of descriptors or threads, with the listener as it was: the next one tries
            // again, and waits for those that are under way.
            tracing::warn!("cannot take a question to the name server: {error}");
            places.wait_for_one();
        }
    }
}

/// How many connections there are.
#[derive(Default)]
struct Places {
    taken: Mutex<usize>,
    given_back: Condvar,
}

struct Place(Arc<Places>);

impl Places {
    fn take(self: Arc<Self>) -> Place {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self
            .given_back
            .wait_while(taken, |taken| *taken >= MOST)
            .unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        drop(taken);
        Place(self)
    }

    /// Waits until one ends, at most for [`PATIENCE`].
    fn wait_for_one(&self) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.given_back.wait_timeout(taken, PATIENCE));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken -= 1;
        self.0.given_back.notify_one();
    }
}

fn answer(mut guest: UnixStream) -> io::Result<()> {
    guest.set_read_timeout(Some(PATIENCE))?;
    guest.set_write_timeout(Some(PATIENCE))?;
    let mut kind = [0];
    guest.read_exact(&mut kind)?;
    match kind {
        [RESOLVE_DATAGRAM] => {
            let question = read_message(&mut guest)?;
            // The kernel gives it a port of its own, so that nobody guesses it.
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(NAME_SERVER)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send(&question)?;
            let mut answer = vec![0; usize::from(u16::MAX)];
            let length = socket.recv(&mut answer)?;
            write_message(&mut guest, &answer[..length])
        }
        [RESOLVE_STREAM] => {
            let mut server = TcpStream::connect_timeout(&NAME_SERVER.into(), PATIENCE)?;
            server.set_read_timeout(Some(PATIENCE))?;
            server.set_write_timeout(Some(PATIENCE))?;
            loop {
                let question = read_message(&mut guest)?;
                write_message(&mut server, &question)?;
                write_message(&mut guest, &read_message(&mut server)?)?;
            }
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// RFC 1035, 4.2.2: a message after its length.
fn read_message(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    from.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    from.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(to: &mut impl Write, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    to.write_all(&[&length.to_be_bytes()[..], message].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_server_is_found_among_sockets() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            \x20 123: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n";
        assert!(!listens(table, RESOLVER_ADDRESS));
        let docker = format!(
            "{table}  124: 0B00007F:9C40 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0\n"
        );
        assert!(listens(&docker, RESOLVER_ADDRESS));
    }

    #[test]
    fn messages_have_their_length_before_them() {
        let mut bytes = Vec::new();
        write_message(&mut bytes, b"abc").unwrap();
        assert_eq!(bytes, b"\0\x03abc");
        assert_eq!(read_message(&mut &bytes[..]).unwrap(), b"abc");
        assert!(read_message(&mut &bytes[..4]).is_err());
        assert!(write_message(&mut bytes, &[0; 65_536]).is_err());
    }
}
