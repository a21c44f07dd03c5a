//! The relay between pipes, sockets and files, and what happens when a reader goes away.

use super::*;
use std::{
    fs::File,
    io::{Read, Write},
    thread,
};

/// Runs a relay until its outputs have ended.
fn run(mut relay: Relay, until_input_ends: bool) {
    while !relay.outputs_ended() || (until_input_ends && relay.input.is_some()) {
        let mut descriptors: Vec<_> = relay.poll_fds().collect();
        crate::wait::poll(&mut descriptors, None).unwrap();
        let events: Vec<_> = descriptors.iter().map(PollFd::revents).collect();
        drop(descriptors);
        relay.advance(&events).unwrap();
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| u8::try_from(i * 31 % 251).unwrap())
        .collect()
}

fn streams() -> (Streams, UnixStream, UnixStream, UnixStream) {
    let (stdin, guest_stdin) = UnixStream::pair().unwrap();
    let (stdout, guest_stdout) = UnixStream::pair().unwrap();
    let (stderr, guest_stderr) = UnixStream::pair().unwrap();
    let streams = Streams {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: Some(stderr),
    };
    (streams, guest_stdin, guest_stdout, guest_stderr)
}

/// The guest copies its input to its output; the host's side is pipes, files or sockets.
fn round_trip<I, O>(host_in: I, mut feed: impl Write + Send + 'static, host_out: O) -> O
where
    I: AsFd + Send + 'static,
    O: AsFd + Send + 'static,
{
    const LENGTH: usize = 64 << 20;
    let (streams, mut guest_in, mut guest_out, guest_err) = streams();
    drop(guest_err);
    let feeder = thread::spawn(move || feed.write_all(&pattern(LENGTH)).unwrap());
    let guest = thread::spawn(move || io::copy(&mut guest_in, &mut guest_out).unwrap());
    let null = File::options().write(true).open("/dev/null").unwrap();
    let relay = Relay::between(
        host_in.as_fd(),
        host_out.as_fd(),
        Some(null.as_fd()),
        streams,
    )
    .unwrap();
    run(relay, true);
    feeder.join().unwrap();
    assert_eq!(guest.join().unwrap(), LENGTH as u64);
    host_out
}

#[test]
fn sixty_four_mib_through_pipes() {
    let (in_read, in_write) = io::pipe().unwrap();
    let (mut out_read, out_write) = io::pipe().unwrap();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        out_read.read_to_end(&mut all).unwrap();
        all
    });
    drop(round_trip(in_read, in_write, out_write));
    assert!(reader.join().unwrap() == pattern(64 << 20));
}

#[test]
fn sixty_four_mib_through_sockets() {
    let (in_read, in_write) = UnixStream::pair().unwrap();
    let (mut out_read, out_write) = UnixStream::pair().unwrap();
    let reader = thread::spawn(move || {
        let mut all = Vec::new();
        out_read.read_to_end(&mut all).unwrap();
        all
    });
    drop(round_trip(in_read, in_write, out_write));
    assert!(reader.join().unwrap() == pattern(64 << 20));
}

#[test]
fn files_at_both_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    std::fs::write(&input, pattern(3 << 20)).unwrap();
    let (streams, mut guest_in, mut guest_out, guest_err) = streams();
    drop(guest_err);
    let guest = thread::spawn(move || io::copy(&mut guest_in, &mut guest_out).unwrap());
    let host_in = File::open(&input).unwrap();
    let host_out = File::create(&output).unwrap();
    let relay = Relay::between(
        host_in.as_fd(),
        host_out.as_fd(),
        Some(host_out.as_fd()),
        streams,
    )
    .unwrap();
    run(relay, true);
    guest.join().unwrap();
    assert!(std::fs::read(&output).unwrap() == pattern(3 << 20));
}

#[test]
fn a_reader_that_goes_away_ends_its_stream_only() {
    let (in_read, _in_write) = io::pipe().unwrap();
    let (out_read, out_write) = io::pipe().unwrap();
    let (mut err_read, err_write) = io::pipe().unwrap();
    let (streams, _guest_in, mut guest_out, mut guest_err) = streams();
    let relay = Relay::between(
        in_read.as_fd(),
        out_write.as_fd(),
        Some(err_write.as_fd()),
        streams,
    )
    .unwrap();
    drop((out_read, out_write, err_write));
    let relay = thread::spawn(move || run(relay, false));
    // The guest hears of it as a write that fails.
    let error = loop {
        if let Err(error) = guest_out.write_all(&[0; 4096]) {
            break error;
        }
    };
    let kinds = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
    assert!(kinds.contains(&error.kind()), "{error}");
    guest_err.write_all(b"still here").unwrap();
    drop(guest_err);
    relay.join().unwrap();
    let mut text = String::new();
    err_read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
}

#[test]
fn a_slow_reader_holds_its_writer_back() {
    let (in_read, _in_write) = io::pipe().unwrap();
    let (mut out_read, out_write) = io::pipe().unwrap();
    let (streams, _guest_in, guest_out, guest_err) = streams();
    drop(guest_err);
    guest_out.set_nonblocking(true).unwrap();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let mut relay = Relay::between(
        in_read.as_fd(),
        out_write.as_fd(),
        Some(null.as_fd()),
        streams,
    )
    .unwrap();
    drop(out_write);
    let mut written = 0_usize;
    // Until neither the guest nor the relay gets any further.
    loop {
        let sent = (&guest_out).write(&[7; 4096]).unwrap_or(0);
        written += sent;
        let mut descriptors: Vec<_> = relay.poll_fds().collect();
        let now = crate::wait::Deadline::after(std::time::Duration::from_millis(50));
        let count = crate::wait::poll(&mut descriptors, Some(now)).unwrap();
        let events: Vec<_> = descriptors.iter().map(PollFd::revents).collect();
        drop(descriptors);
        relay.advance(&events).unwrap();
        if sent == 0 && count == 0 {
            break;
        }
        assert!(written < 16 << 20, "nothing held the writer back");
    }
    drop(guest_out);
    let relay = thread::spawn(move || run(relay, false));
    let mut all = Vec::new();
    out_read.read_to_end(&mut all).unwrap();
    relay.join().unwrap();
    assert_eq!(all.len(), written);
}

#[test]
fn a_process_that_ends_while_its_output_arrives_loses_none_of_it() {
    let (in_read, _in_write) = io::pipe().unwrap();
    let (mut out_read, out_write) = io::pipe().unwrap();
    let (streams, guest_in, mut guest_out, guest_err) = streams();
    let null = File::options().write(true).open("/dev/null").unwrap();
    let mut relay = Relay::between(
        in_read.as_fd(),
        out_write.as_fd(),
        Some(null.as_fd()),
        streams,
    )
    .unwrap();
    drop(out_write);
    // All at once, as on a busy host: the last output, the end of every stream, and, before the
    // relay has its turn, the word that the process has ended.
    guest_out.write_all(b"last words").unwrap();
    drop((guest_in, guest_out, guest_err));
    let mut descriptors: Vec<_> = relay.poll_fds().collect();
    crate::wait::poll(&mut descriptors, None).unwrap();
    let events: Vec<_> = descriptors.iter().map(PollFd::revents).collect();
    drop(descriptors);
    relay.end_input();
    relay.advance(&events).unwrap();
    run(relay, false);
    let mut text = String::new();
    out_read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
}
