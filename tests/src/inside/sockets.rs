//! Connections to sockets of the host.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// Connects, by and by: what the host changes may be seen a moment later.
fn connect(path: &Path) -> Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused
                ) && begun.elapsed() < Duration::from_secs(3) =>
            {
                thread::yield_now();
            }
            connected => return connected.context("connect"),
        }
    }
}

/// Asks a question, ends its half, and prints the answer.
pub(super) fn ask(path: &Path, question: &str) -> Result<()> {
    let mut stream = match question {
        // To see the error itself.
        "" => UnixStream::connect(path).context("connect")?,
        _ => connect(path)?,
    };
    let peer = stream.peer_addr()?;
    // It is the path by which the server knows itself.
    ensure!(
        peer.as_pathname().is_some(),
        "the peer's address is {peer:?}"
    );
    stream.write_all(question.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    print!("{answer}");
    Ok(())
}

/// Byte number `index` of a long stream.
fn pattern(index: usize) -> u8 {
    let mixed = index.wrapping_mul(0x9e37_79b9).rotate_right(13);
    mixed.to_le_bytes()[0]
}

/// Sends so many MiB and reads as many back at the same time.
pub(super) fn exchange(path: &Path, mib: usize) -> Result<()> {
    let mut stream = connect(path)?;
    let mut sender = stream.try_clone()?;
    let size = mib << 20;
    let sending = thread::spawn(move || -> std::io::Result<()> {
        let bytes: Vec<u8> = (0..size).map(pattern).collect();
        sender.write_all(&bytes)?;
        sender.shutdown(Shutdown::Write)
    });
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    ensure!(
        sending.join().is_ok_and(|sent| sent.is_ok()),
        "sending failed"
    );
    ensure!(received.len() == size, "{} bytes came back", received.len());
    let wrong = received
        .iter()
        .enumerate()
        .find(|(i, b)| **b != pattern(*i));
    ensure!(wrong.is_none(), "byte {wrong:?} is wrong");
    println!("all came back");
    Ok(())
}

/// Holds so many connections at once, each with its own question.
pub(super) fn many(path: &Path, count: usize) -> Result<()> {
    let threads: Vec<_> = (0..count)
        .map(|number| {
            let path = path.to_owned();
            thread::spawn(move || -> Result<UnixStream> {
                let mut stream = UnixStream::connect(&path).context("connect")?;
                stream.write_all(format!("{number}\n").as_bytes())?;
                let mut answer = [0; 64];
                let length = stream.read(&mut answer)?;
                ensure!(
                    answer[..length] == *format!("{number}\n").as_bytes(),
                    "the answer to {number} is {:?}",
                    String::from_utf8_lossy(&answer[..length])
                );
                Ok(stream)
            })
        })
        .collect();
    let mut streams = Vec::new();
    for thread in threads {
        let Ok(stream) = thread.join() else {
            bail!("a thread panicked");
        };
        streams.push(stream?);
    }
    println!("{} at once", streams.len());
    Ok(())
}

/// The other end goes: reads end, writes fail.
pub(super) fn abandoned(path: &Path) -> Result<()> {
    let mut stream = connect(path)?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest)?;
    let begun = Instant::now();
    loop {
        match stream.write_all(&[0; 1024]) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            Err(error) => bail!("writing failed with {error}"),
            Ok(()) if begun.elapsed() > Duration::from_secs(5) => bail!("writing does not fail"),
            Ok(()) => thread::yield_now(),
        }
    }
    println!("read {} bytes, then nobody was there", rest.len());
    Ok(())
}

/// A socket of the container's own on the same file system.
pub(super) fn own(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    let client = UnixStream::connect(path).context("connect")?;
    let (mut served, _) = listener.accept()?;
    served.write_all(b"from the same container")?;
    drop(served);
    let mut answer = String::new();
    (&client).read_to_string(&mut answer)?;
    println!("{answer}");
    drop(listener);
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        other => bail!("connecting to what is dead gave {other:?}"),
    }
}

/// Sends datagrams of an IPv4 port back where they came from, for ever.
pub(super) fn echo_datagrams(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    println!("ready");
    let mut datagram = [0; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut datagram)?;
        socket.send_to(&datagram[..length], from)?;
    }
}
