//! The device against a driver with real queues and clients with real sockets.

mod guest;
mod hostile;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use super::packet::{Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::host_connections::HostConnections;
use crate::virtio::testing::{Random, may_open};
use crate::virtio::{DeviceState, VirtioDevice};
use guest::{CID, Guest, connect_to_guest};

const WINDOW: u32 = 256 << 10;

#[test]
fn host_connects_to_guest() {
    let mut guest = Guest::new();
    let mut client = connect_to_guest(&guest, 1024);
    let request = guest.expect(Operation::Request);
    assert_eq!((request.dst_cid, request.dst_port), (CID, 1024));
    assert_eq!(request.buf_alloc, WINDOW);
    guest.answer(&request, Operation::Response, 0, b"");
    let mut line = [0; 64];
    let count = client.read(&mut line).expect("read");
    assert_eq!(
        line[..count],
        *format!("OK {}\n", request.src_port).as_bytes()
    );

    guest.answer(&request, Operation::ReadWrite, 0, b"from the guest");
    let mut bytes = [0; 14];
    client.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"from the guest");
    client.write_all(b"from the host").expect("write");
    let (header, data) = guest.packet();
    assert_eq!(header.op, Operation::ReadWrite.number());
    assert_eq!(data, b"from the host");
}

#[test]
fn refused_by_the_guest() {
    let mut guest = Guest::new();
    let mut client = connect_to_guest(&guest, 9);
    let request = guest.expect(Operation::Request);
    guest.answer(&request, Operation::Reset, 0, b"");
    assert_eq!(client.read(&mut [0; 8]).expect("read"), 0);
}

#[test]
fn client_that_leaves_before_the_answer() {
    let mut guest = Guest::new();
    drop(connect_to_guest(&guest, 9));
    // The client may be gone before its line is read, or after.
    let request = guest.expect(Operation::Request);
    guest.answer(&request, Operation::Response, 0, b"");
    guest.expect(Operation::Reset);
}

#[test]
fn bad_lines_are_refused() {
    let guest = Guest::new();
    for said in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'9'; 100]] {
        let mut client = UnixStream::connect(guest.listener_path()).expect("connect");
        client.write_all(said).expect("write");
        // Data that nobody read makes a reset of the close.
        assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
}

#[test]
fn guest_connects_to_host() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.host_path(77)).expect("bind");
    let port = guest.connect(77);
    let response = guest.expect(Operation::Response);
    assert_eq!((response.src_port, response.dst_port), (77, port));
    let (mut server, _) = listener.accept().expect("accept");
    guest.answer(&response, Operation::ReadWrite, 0, b"hello");
    guest.answer(&response, Operation::Shutdown, SHUTDOWN_SEND, b"");
    let mut said = String::new();
    server.read_to_string(&mut said).expect("read");
    assert_eq!(said, "hello");
    server.write_all(b"bye").expect("write");
    drop(server);
    assert_eq!(guest.packet().1, b"bye");
    let shutdown = guest.expect_shutdown(SHUTDOWN_BOTH);
    guest.answer(&shutdown, Operation::Reset, 0, b"");
    // The ports are free again.
    guest.request(77, port);
    guest.expect(Operation::Response);
}

#[test]
fn nobody_listens() {
    let mut guest = Guest::new();
    let port = guest.connect(78);
    let reset = guest.expect(Operation::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (78, port));
}

#[test]
fn full_backlog_of_a_listener_is_a_refusal() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.host_path(5)).expect("bind");
    rustix::net::listen(&listener, 0).expect("listen");
    guest.connect(5);
    guest.expect(Operation::Response);
    guest.connect(5);
    guest.expect(Operation::Reset);
}

#[test]
fn half_close_by_the_host() {
    let (mut guest, mut client, request) = Guest::with_connection();
    client.write_all(b"question").expect("write");
    client.shutdown(Shutdown::Write).expect("shutdown");
    assert_eq!(guest.packet().1, b"question");
    let shutdown = guest.expect(Operation::Shutdown);
    assert_eq!(shutdown.flags, SHUTDOWN_SEND);
    guest.answer(&request, Operation::ReadWrite, 0, b"answer");
    guest.answer(&request, Operation::Shutdown, SHUTDOWN_BOTH, b"");
    let mut answer = String::new();
    client.read_to_string(&mut answer).expect("read");
    assert_eq!(answer, "answer");
    guest.expect(Operation::Reset);
}

#[test]
fn guest_that_takes_no_more() {
    let (mut guest, mut client, request) = Guest::with_connection();
    guest.answer(&request, Operation::Shutdown, SHUTDOWN_RECEIVE, b"");
    // Ordered behind the shutdown, so that it is in force when this arrives.
    guest.answer(&request, Operation::ReadWrite, 0, b"x");
    client.read_exact(&mut [0]).expect("read");
    let error = client.write_all(b"unheard").expect_err("write");
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn end_of_stream_despite_unread_bytes() {
    let (mut guest, mut client, request) = Guest::with_connection();
    guest.stop_credit(&request);
    client.write_all(&[7; 5000]).expect("write");
    guest.answer(&request, Operation::ReadWrite, 0, b"last words");
    guest.answer(&request, Operation::Shutdown, SHUTDOWN_BOTH, b"");
    let mut said = String::new();
    client.read_to_string(&mut said).expect("no reset");
    assert_eq!(said, "last words");
}

#[test]
fn slow_reader_gets_all_even_after_a_reset() {
    let (mut guest, mut client, request) = Guest::with_connection();
    let mut random = Random::new(7);
    let mut bytes = vec![0; WINDOW as usize];
    random.fill(&mut bytes);
    // All credit at once: more than the socket's buffer holds.
    for chunk in bytes.chunks(32 << 10) {
        guest.answer(&request, Operation::ReadWrite, 0, chunk);
    }
    guest.answer(&request, Operation::Shutdown, SHUTDOWN_BOTH, b"");
    guest.answer(&request, Operation::Reset, 0, b"");
    // The device still takes packets: the connection does not hold it up.
    guest.connect(1);
    guest.expect_among_others(Operation::Reset);
    let mut said = Vec::new();
    client.read_to_end(&mut said).expect("read");
    assert!(said == bytes);
}

#[test]
fn host_that_vanishes_with_a_backlog() {
    let (mut guest, client, request) = Guest::with_connection();
    for _ in 0..8 {
        guest.answer(&request, Operation::ReadWrite, 0, &[1; 32 << 10]);
    }
    drop(client);
    let shutdown = guest.expect_shutdown(SHUTDOWN_BOTH);
    // What is still sent is dropped, with its credit returned.
    assert_eq!(shutdown.fwd_cnt, WINDOW);
    guest.answer(&request, Operation::ReadWrite, 0, &[1; 1000]);
    guest.answer(&request, Operation::Reset, 0, b"");
}

#[test]
fn credit_runs_out_and_is_asked_for() {
    let (mut guest, mut client, request) = Guest::with_connection();
    guest.set_window(10_000);
    guest.answer(&request, Operation::CreditUpdate, 0, b"");
    client.write_all(&[3; 25_000]).expect("write");
    let mut got = 0;
    while got < 10_000 {
        let (header, data) = guest.packet();
        assert_eq!(header.op, Operation::ReadWrite.number());
        got += data.len();
    }
    assert_eq!(got, 10_000);
    guest.expect(Operation::CreditRequest);
    guest.forward(&request, 10_000);
    while got < 20_000 {
        got += guest.packet().1.len();
    }
    assert_eq!(got, 20_000);
    guest.expect(Operation::CreditRequest);
    guest.forward(&request, 10_000);
    while got < 25_000 {
        got += guest.packet().1.len();
    }
}

#[test]
fn credit_is_told_on_request_and_when_half_is_used() {
    let (mut guest, mut client, request) = Guest::with_connection();
    guest.answer(&request, Operation::CreditRequest, 0, b"");
    assert_eq!(guest.expect(Operation::CreditUpdate).fwd_cnt, 0);
    let mut bytes = vec![0; 32 << 10];
    for _ in 0..4 {
        guest.answer(&request, Operation::ReadWrite, 0, &bytes);
        client.read_exact(&mut bytes).expect("read");
    }
    let update = guest.expect(Operation::CreditUpdate);
    assert_eq!((update.fwd_cnt, update.buf_alloc), (128 << 10, WINDOW));
}

#[test]
fn sending_without_credit_resets() {
    let (mut guest, client, request) = Guest::with_connection();
    for _ in 0..9 {
        guest.answer(&request, Operation::ReadWrite, 0, &[1; 64 << 10]);
    }
    guest.expect_among_others(Operation::Reset);
    drop(client);
}

#[test]
fn sending_after_shutdown_resets() {
    let (mut guest, _client, request) = Guest::with_connection();
    guest.answer(&request, Operation::Shutdown, SHUTDOWN_SEND, b"");
    guest.answer(&request, Operation::ReadWrite, 0, b"one more thing");
    guest.expect(Operation::Reset);
}

#[test]
fn bulk_both_ways_is_exact() {
    const TOTAL: usize = 64 << 20;
    let (mut guest, client, request) = Guest::with_connection();
    let mut reader = client.try_clone().expect("clone");
    let mut writer = client;
    let sender = thread::spawn(move || {
        let mut random = Random::new(1);
        let mut bytes = vec![0; 48 << 10];
        for _ in 0..TOTAL / bytes.len() {
            random.fill(&mut bytes);
            writer.write_all(&bytes).expect("write");
        }
        writer.shutdown(Shutdown::Write).expect("shutdown");
    });
    let receiver = thread::spawn(move || {
        let mut random = Random::new(2);
        let (mut expected, mut bytes) = (vec![0; 40 << 10], vec![0; 40 << 10]);
        let mut count = 0;
        while reader.read_exact(&mut bytes).is_ok() {
            random.fill(&mut expected);
            assert!(bytes == expected, "after {count}");
            count += bytes.len();
        }
        count
    });
    let (sent, received) = guest.echo_bulk(&request, TOTAL, 40 << 10);
    sender.join().expect("sender");
    assert_eq!(receiver.join().expect("receiver"), sent);
    assert_eq!(received, TOTAL / (48 << 10) * (48 << 10));
}

#[test]
fn many_connections_at_once() {
    let mut guest = Guest::new();
    let mut clients = Vec::new();
    for port in 0..200 {
        let client = connect_to_guest(&guest, port);
        let request = guest.expect(Operation::Request);
        guest.answer(&request, Operation::Response, 0, b"");
        clients.push((client, request));
    }
    // The first windows are large, the rest small.
    assert_eq!(clients[0].1.buf_alloc, WINDOW);
    assert_eq!(clients[199].1.buf_alloc, 16 << 10);
    for (client, request) in &mut clients {
        let mut ok = [0; 14];
        client.read_exact(&mut ok).expect("read");
        client
            .write_all(&request.src_port.to_le_bytes())
            .expect("write");
    }
    for _ in 0..clients.len() {
        let (header, data) = guest.packet();
        assert_eq!(data, header.src_port.to_le_bytes());
    }
}

#[test]
fn connections_are_limited() {
    if !may_open(4096) {
        eprintln!("skipped: fewer than 4096 files may be open");
        return;
    }
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.host_path(1)).expect("bind");
    rustix::net::listen(&listener, 4096).expect("listen");
    let mut refused = 0;
    for _ in 0..1100 {
        guest.connect(1);
        let (header, _) = guest.packet();
        if header.op == Operation::Reset.number() {
            refused += 1;
        }
    }
    assert_eq!(refused, 1100 - 1024);
    // One that ends makes room for a client that waits.
    let client = connect_to_guest(&guest, 5);
    guest.reset_first(1);
    let request = guest.expect(Operation::Request);
    assert_eq!(request.dst_port, 5);
    drop(client);
}

#[test]
fn survives_a_save_but_not_a_reset() {
    let (mut guest, mut client, request) = Guest::with_connection();
    guest.pause();
    assert_eq!(
        guest.device.save().expect("save"),
        DeviceState::Vsock(crate::virtio::state::VsockState { guest_cid: CID })
    );
    client.write_all(b"while paused").expect("write");
    guest.resume();
    assert_eq!(guest.packet().1, b"while paused");
    guest.answer(&request, Operation::ReadWrite, 0, b"!");
    client.read_exact(&mut [0]).expect("read");

    guest.pause();
    guest.resume();
    assert_eq!(client.read(&mut [0]).expect("read"), 0);
}

#[test]
fn restored_device_resets_the_transport() {
    let mut guest = Guest::new();
    guest.pause();
    let state = guest.device.save().expect("save");
    guest.device.restore(state).expect("restore");
    guest.resume();
    assert_eq!(guest.event(), [0; 4]);
    guest
        .device
        .restore(DeviceState::Entropy)
        .expect_err("another device's state");
}

#[test]
fn context_ids() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let directory = crate::virtio::testing::Directory::new();
        let listener = UnixListener::bind(directory.path().join("vsock.sock")).expect("bind");
        assert!(
            super::Vsock::new(cid, listener, directory.path(), HostConnections::default()).is_err()
        );
    }
}
