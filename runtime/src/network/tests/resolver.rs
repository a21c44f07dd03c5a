//! Docker's name server in the namespace, and a guest that asks it.

use std::{
    io::{Read, Write},
    net::{TcpListener, UdpSocket},
    os::unix::net::UnixStream,
    thread,
};

use super::{Obedient, PAIR, attached, output, with_network};

/// Answers one question as a datagram and one on a connection with the question itself, reversed.
fn name_server() -> thread::JoinHandle<()> {
    let datagrams = UdpSocket::bind("127.0.0.11:53").unwrap();
    let connections = TcpListener::bind("127.0.0.11:53").unwrap();
    thread::spawn(move || {
        let mut question = [0; 512];
        let (length, from) = datagrams.recv_from(&mut question).unwrap();
        question[..length].reverse();
        datagrams.send_to(&question[..length], from).unwrap();
        let (mut client, _) = connections.accept().unwrap();
        let mut message = [0; 5];
        client.read_exact(&mut message).unwrap();
        message[2..].reverse();
        client.write_all(&message).unwrap();
    })
}

#[test]
fn a_guest_asks_the_name_server() {
    let commands = format!("ip link set lo up; {PAIR}; ip address add 10.0.0.2/24 dev eth0");
    with_network(&commands, |network, container| {
        let mut vm = Obedient::new();
        let server = name_server();
        assert!(network.refresh(&mut vm).unwrap().is_empty());
        for (id, place) in [("net1", 4), ("net2", 5)] {
            network.on_event(&attached(id, place), &mut vm).unwrap();
        }
        assert!(network.request().unwrap().resolver);
        for (kind, question) in [(1, b"abc"), (2, b"def")] {
            let mut stream =
                UnixStream::connect(container.path().join("sockets/vsock.sock_1025")).unwrap();
            stream.write_all(&[kind, 0, 3]).unwrap();
            stream.write_all(question).unwrap();
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer[..2], [0, 3]);
            assert!(answer[2..].iter().eq(question.iter().rev()), "{answer:?}");
        }
        server.join().unwrap();
        // Its own questions get answers: of name servers, and of ARP.
        let filters = output("tc filter show dev eth0 ingress");
        for part in [
            "pref 47698",
            "Egress Mirror",
            "pref 47699",
            "0035f000/fffff000",
        ] {
            assert!(filters.contains(part), "{part} in {filters}");
        }
        let ports = output("cat /proc/sys/net/ipv4/ip_local_port_range");
        assert_eq!(ports.split_whitespace().next(), Some("61440"));
    });
}
