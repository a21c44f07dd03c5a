//! Packets and chains that no driver should send: the device must refuse them and go on.

use vm_memory::GuestAddress;

use super::super::packet::{Header, Operation, TYPE_STREAM};
use super::guest::{CID, Guest, RX, TX, connect_to_guest};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{DEADLINE, Random, Told, readable, writable};

fn is_alive(guest: &mut Guest) {
    let client = connect_to_guest(guest, 31337);
    loop {
        let header = guest.expect_among_others(Operation::Request);
        if header.dst_port == 31337 {
            guest.answer(&header, Operation::Reset, 0, b"");
            break;
        }
    }
    drop(client);
}

#[test]
fn unknown_things_are_reset() {
    let mut guest = Guest::new();
    let good = Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: 1,
        dst_port: 2,
        socket_type: TYPE_STREAM,
        op: Operation::ReadWrite.number(),
        ..Header::default()
    };
    for bad in [
        good,
        Header { op: 0, ..good },
        Header { op: 99, ..good },
        Header {
            socket_type: 2,
            op: 1,
            ..good
        },
        Header {
            dst_cid: 7,
            op: 1,
            ..good
        },
        Header { op: 2, ..good },
        Header { op: 4, ..good },
        Header { op: 6, ..good },
    ] {
        guest.send(&bad, b"");
        let reset = guest.expect(Operation::Reset);
        assert_eq!((reset.src_port, reset.dst_port), (2, 1));
        assert_eq!(reset.socket_type, bad.socket_type);
    }
    // No answers: an RST, and a packet from someone else.
    guest.send(&Header { op: 3, ..good }, b"");
    guest.send(&Header { src_cid: 9, ..good }, b"");
    is_alive(&mut guest);
}

#[test]
fn more_resets_than_receive_buffers() {
    let mut guest = Guest::new();
    // All receive buffers get used and more, yet every packet is taken in the end.
    let bad = Header {
        src_cid: CID,
        dst_cid: 2,
        socket_type: TYPE_STREAM,
        op: 5,
        ..Header::default()
    };
    for _ in 0..100 {
        guest.send(&bad, b"");
    }
    for _ in 0..100 {
        guest.expect(Operation::Reset);
    }
    is_alive(&mut guest);
}

#[test]
fn malformed_chains_are_returned() {
    let mut guest = Guest::new();
    let memory = guest.driver.space.take(4096);
    let outside = GuestAddress(1 << 40);
    let tx = &mut guest.driver.queues[TX];
    // Too short, in the wrong direction, outside of memory, across its end.
    let mut heads = vec![
        tx.add(&[readable(memory, 43)]),
        tx.add(&[writable(memory, 100)]),
        tx.add(&[readable(memory, 44), writable(memory, 10)]),
        tx.add(&[readable(outside, 44)]),
        tx.add(&[readable(GuestAddress(u64::MAX - 10), 44)]),
        tx.add(&[readable(GuestAddress((8 << 20) - 40), 44)]),
        tx.add(&[readable(memory, u32::MAX), readable(memory, u32::MAX)]),
    ];
    // A loop, a next that does not exist, an indirect table that does not.
    tx.describe(100, memory, 44, 1, 100);
    tx.describe(101, memory, 44, 1, 9999);
    tx.describe(102, outside, 32, 4, 0);
    tx.describe(103, memory, 7, 4, 0);
    tx.describe(104, memory, 0, 4, 0);
    for head in 100..105 {
        tx.offer(head);
        heads.push(head);
    }
    tx.kick();
    for head in heads {
        assert_eq!(guest.driver.wait_used(TX), (head, 0));
    }
    is_alive(&mut guest);
}

#[test]
fn malformed_receive_buffers_are_returned() {
    let mut guest = Guest::new();
    let memory = guest.driver.space.take(4096);
    let more = guest.driver.space.take(4096);
    // Take the good buffers out of the way: each carries an RST.
    for _ in 0..64 {
        guest.connect(1);
        let (head, _) = guest.driver.wait_used(RX);
        assert!(head < 128);
    }
    let rx = &mut guest.driver.queues[RX];
    let bad = [
        rx.add(&[writable(memory, 44)]),
        rx.add(&[readable(memory, 4096)]),
        rx.add(&[writable(GuestAddress(1 << 50), 4096)]),
    ];
    let good = rx.add(&[writable(memory, 10), writable(more, 100)]);
    rx.kick();
    guest.connect(1);
    for head in bad {
        assert_eq!(guest.driver.wait_used(RX), (head, 0));
    }
    assert_eq!(guest.driver.wait_used(RX), (good, 44));
    let mut header = guest.driver.space.read(memory, 10);
    header.extend(guest.driver.space.read(more, 34));
    let header = Header::parse(header.as_slice().try_into().expect("44 bytes"));
    assert_eq!(header.op, Operation::Reset.number());
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut guest = Guest::new();
    guest.driver.queues[TX].claim(500);
    guest.driver.queues[TX].kick();
    loop {
        match guest.driver.told.recv_timeout(DEADLINE).expect("told") {
            Told::NeedsReset => break,
            Told::Used(_) | Told::Configuration => {}
        }
    }
    assert_eq!(guest.device.deactivate().len(), 3);
}

#[test]
fn random_packets() {
    let mut random = Random::new(0x5eed);
    let mut guest = Guest::new();
    let _listener = std::os::unix::net::UnixListener::bind(guest.host_path(1)).expect("bind");
    let mut clients = Vec::new();
    for round in 0..3000 {
        let data = vec![7; usize::try_from(random.below(5000)).expect("small")];
        let pick = |random: &mut Random, likely: u64| {
            if random.below(20) == 0 {
                random.number()
            } else {
                likely
            }
        };
        let mut raw = Header {
            src_cid: pick(&mut random, CID),
            dst_cid: pick(&mut random, 2),
            socket_type: 1,
            ..Header::default()
        };
        raw.src_port = u32::try_from(random.below(4)).expect("small");
        raw.dst_port = 1 + u32::try_from(random.below(2)).expect("small") * ((1 << 30) - 1);
        raw.op = u16::try_from(random.below(9)).expect("small");
        raw.flags = u32::try_from(random.below(5)).expect("small");
        raw.buf_alloc = u32::try_from(pick(&mut random, 4096) & 0xffff_ffff).expect("masked");
        raw.fwd_cnt = u32::try_from(pick(&mut random, 0) & 0xffff_ffff).expect("masked");
        raw.len = u32::try_from(data.len() as u64 & pick(&mut random, u64::MAX)).expect("small");
        guest.send(&raw, &data);
        if round % 100 == 0 {
            clients.push(connect_to_guest(&guest, round % 4));
        }
        while guest.driver.queues[RX].has_used() {
            guest.packet();
        }
    }
    is_alive(&mut guest);
}

#[test]
fn random_chains() {
    let mut random = Random::new(0xc4a1);
    for _ in 0..20 {
        let mut guest = Guest::new();
        for _ in 0..200 {
            for queue in [RX, TX] {
                let head = u16::try_from(random.below(128)).expect("small");
                for index in 0..4 {
                    let address = match random.below(3) {
                        0 => random.below(9 << 20),
                        1 => random.number(),
                        _ => 0x4000,
                    };
                    let length = match random.below(3) {
                        0 => random.below(100),
                        1 => random.number() & 0xffff_ffff,
                        _ => 4096,
                    };
                    guest.driver.queues[queue].describe(
                        (head + index) % 128,
                        GuestAddress(address),
                        u32::try_from(length).expect("masked"),
                        u16::try_from(random.below(8)).expect("small"),
                        u16::try_from(random.below(140)).expect("small"),
                    );
                }
                guest.driver.queues[queue].offer(head);
                guest.driver.queues[queue].kick();
            }
        }
        // It may have given up, but it must end, with its queues.
        assert_eq!(guest.device.deactivate().len(), 3);
    }
}
