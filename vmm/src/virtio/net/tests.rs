//! The device against a driver with real queues. The other side of the tap is a socket that keeps
//! packets apart, or, in `real`, the kernel's own network behind a tap.

mod hostile;
mod real;
mod wire;

use std::time::Instant;

use vm_memory::GuestAddress;

use super::features as f;
use crate::threads::locked;
use crate::virtio::testing::{DEADLINE, Told, readable, writable};
use crate::virtio::{DeviceState, StateError, VirtioDevice};
use wire::{Guest, MAC, RECEIVE, TRANSMIT};

const ALL: u64 = u64::MAX;

#[test]
fn shows_its_configuration() {
    let guest = Guest::new(ALL);
    let mut config = [0xff; 14];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0xdc, 5, 0xff, 0xff]);
    assert_eq!(guest.device.features() & f::MQ, 0, "one pair of queues");
    assert_eq!(Guest::with_pairs(ALL, 2).device.features() & f::MQ, f::MQ);
}

#[test]
fn addresses() {
    assert!(MAC.parse::<super::MacAddress>().is_ok());
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:07:08",
        "01:00:00:00:00:07",
        "00:00:00:00:00:00",
        "2:0:0:0:0:7",
        "02:00:00:00:00:+7",
        "02:00:00:00:00:07\n",
        "ff:ff:ff:ff:ff:ff",
    ] {
        assert!(bad.parse::<super::MacAddress>().is_err(), "{bad:?}");
    }
}

#[test]
fn packets_go_out_as_they_are() {
    let mut guest = Guest::new(ALL);
    for length in [14, 60, 1514, 9000, super::LARGEST_PACKET] {
        let packet = guest.packet(length);
        guest.send(&packet);
        assert!(guest.wire().receive() == packet, "{length}");
    }
}

#[test]
fn a_packet_in_pieces_is_one() {
    let mut guest = Guest::new(ALL);
    let packet = guest.packet(600);
    let data = guest.data;
    guest.driver.space.write(data, &packet);
    let pieces = [
        readable(data, 3),
        readable(GuestAddress(data.0 + 3), 20),
        readable(GuestAddress(data.0 + 23), 589),
    ];
    guest.driver.queues[TRANSMIT].add(&pieces);
    guest.driver.queues[TRANSMIT].kick();
    assert!(guest.wire().receive() == packet);
}

#[test]
fn packets_fill_as_many_buffers_as_they_need() {
    let mut guest = Guest::new(ALL);
    guest.give_buffers(100, 1000);
    for length in [50, 1000 - 12, 1000 - 11, 30_000] {
        let packet = guest.packet(length);
        guest.wire().send(&packet);
        let got = guest.receive();
        assert_eq!(got.buffers, packet.len().div_ceil(1000), "{length}");
        assert_eq!(got.announced, got.buffers);
        assert!(got.bytes[12..] == packet[12..]);
    }
}

#[test]
fn without_mergeable_buffers_a_packet_has_one() {
    let mut guest = Guest::new(!(f::MRG_RXBUF | f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6));
    guest.give_buffers(4, 1600);
    let packet = guest.packet(1514);
    guest.wire().send(&packet);
    let got = guest.receive();
    assert_eq!((got.buffers, got.announced), (1, 1));
    assert!(got.bytes[12..] == packet[12..]);
}

#[test]
fn packets_wait_for_buffers() {
    let mut guest = Guest::new(ALL);
    let packets: Vec<_> = (0..5).map(|i| guest.packet(100 + i)).collect();
    for packet in &packets {
        guest.wire().send(packet);
    }
    // Too few for the largest packet: none is lost by trying.
    guest.give_buffers(2, 1600);
    assert!(!guest.driver.queues[RECEIVE].has_used());
    for packet in &packets {
        guest.give_buffers(60, 1600);
        let got = guest.receive();
        assert!(got.bytes[12..] == packet[12..]);
    }
}

#[test]
fn a_small_queue_works_with_what_it_has() {
    // All descriptors together hold less than the largest packet.
    let mut guest = Guest::new(ALL);
    guest.give_buffers(256, 200);
    let packet = guest.packet(1500);
    guest.wire().send(&packet);
    let got = guest.receive();
    assert_eq!(got.buffers, 8);
    assert!(got.bytes[12..] == packet[12..]);
}

#[test]
fn a_full_tap_loses_nothing() {
    let mut guest = Guest::new(ALL);
    let packet = guest.packet(1000);
    guest.driver.space.write(guest.data, &packet);
    let data = guest.data;
    let mut sent = 0;
    for _ in 0..200 {
        let length = u32::try_from(packet.len()).expect("small");
        guest.driver.queues[TRANSMIT].add(&[readable(data, length)]);
        guest.driver.queues[TRANSMIT].kick();
        sent += 1;
    }
    for _ in 0..sent {
        assert!(guest.wire().receive() == packet);
    }
    for _ in 0..sent {
        guest.driver.wait_used(TRANSMIT);
    }
}

#[test]
fn sent_buffers_come_back_soon_with_an_interrupt_late() {
    let mut guest = Guest::new(ALL);
    let packet = guest.packet(60);
    guest.driver.queues[TRANSMIT].used();
    guest.send(&packet);
    guest.wire().receive();
    let told = guest.driver.told.recv_timeout(DEADLINE);
    assert_eq!(told, Ok(Told::Used(1)));
    assert!(guest.driver.queues[TRANSMIT].used().is_some());
    assert!(guest.driver.queues[TRANSMIT].used().is_none());
    guest.send_on_vcpu(&packet);
    let told = guest.driver.told.recv_timeout(DEADLINE);
    assert_eq!(told, Ok(Told::Used(1)));
}

#[test]
fn a_vcpu_leaves_full_frames_to_the_thread() {
    let mut guest = Guest::new(ALL);
    let packet = guest.packet(1500);
    guest.driver.space.write(guest.data, &packet);
    let piece = readable(guest.data, u32::try_from(packet.len()).expect("small"));
    // The device's thread cannot be at it meanwhile.
    let (transmit, _) = &guest.device.transmits[0];
    let mut held = locked(transmit);
    guest.driver.queues[TRANSMIT].add(&[piece]);
    assert!(!held.run_on_vcpu().expect("run"), "there is more");
    assert!(!guest.wire().has_packet());
    drop(held);
    guest.device.notify(1);
    assert!(guest.wire().receive() == packet);
}

#[test]
fn a_vcpu_sends_small_packets_by_itself() {
    let mut guest = Guest::new(ALL);
    assert!(guest.device.notified_on_vcpu(1) && !guest.device.notified_on_vcpu(0));
    for _ in 0..50 {
        let packet = guest.packet(100);
        guest.send_on_vcpu(&packet);
        assert!(guest.wire().has_packet(), "when the guest goes on");
        assert!(guest.wire().receive() == packet);
        assert!(guest.driver.queues[TRANSMIT].used().is_some());
    }
    // The rest is the thread's.
    let packet = guest.packet(60_000);
    guest.send_on_vcpu(&packet);
    assert!(guest.wire().receive() == packet);
    let packet = guest.packet(100);
    for _ in 0..5 {
        let length = u32::try_from(packet.len()).expect("small");
        let piece = readable(guest.data, length);
        guest.driver.queues[TRANSMIT].add(&[piece]);
    }
    guest.driver.space.write(guest.data, &packet);
    guest.device.notify(1);
    for _ in 0..5 {
        assert!(guest.wire().receive() == packet);
    }
    // With several pairs of queues, vCPUs must not wait for one another.
    let mut pairs = Guest::with_pairs(ALL, 2);
    assert!(!pairs.device.notified_on_vcpu(1));
    // A device that does not work does not mind.
    pairs.device.deactivate();
    pairs.device.notify(1);
}

#[test]
fn an_interrupt_that_nobody_wants_does_not_come() {
    let mut guest = Guest::new(ALL);
    guest.give_buffers(100, 1600);
    let packet = guest.packet(60);
    // The driver looks at the queue and asks for an interrupt at the next.
    assert!(guest.driver.queues[RECEIVE].used().is_none());
    guest.wire().send(&packet);
    assert_eq!(guest.driver.told.recv_timeout(DEADLINE), Ok(Told::Used(0)));
    // It has not looked since.
    guest.wire().send(&packet);
    guest.wire().send(&packet);
    let queue = &mut guest.driver.queues[TRANSMIT];
    queue.used();
    guest.send(&packet);
    assert_eq!(
        guest.driver.told.recv_timeout(DEADLINE),
        Ok(Told::Used(1)),
        "no other in between"
    );
}

#[test]
fn goes_on_after_a_stop() {
    let mut guest = Guest::new(ALL);
    guest.give_buffers(100, 1600);
    for round in 0..20 {
        let queues = guest.device.deactivate();
        assert_eq!(queues.len(), 3);
        assert!(guest.device.deactivate().is_empty());
        let packet = guest.packet(100 + round);
        // While nobody listens.
        guest.wire().send(&packet);
        let activation = guest.driver.again(guest.features, queues);
        guest.device.activate(activation).expect("activate");
        guest.driver.queues[RECEIVE].kick();
        assert!(guest.receive().bytes[12..] == packet[12..]);
        let packet = guest.packet(100);
        guest.send(&packet);
        assert!(guest.wire().receive() == packet);
    }
}

#[test]
fn state_goes_to_another_device() {
    let mut guest = Guest::with_pairs(ALL, 2);
    assert_eq!(guest.control(&[4, 0, 2, 0]), Some(0));
    let bits = f::GUEST_CSUM | f::GUEST_TSO4;
    let mut command = vec![5, 0];
    command.extend(bits.to_le_bytes());
    assert_eq!(guest.control(&command), Some(0));
    guest.device.deactivate();
    let state = guest.device.save().expect("save");
    let json = serde_json::to_string(&state).expect("json");
    let mut second = Guest::with_pairs(ALL, 2);
    second.device.deactivate();
    second
        .device
        .restore(serde_json::from_str(&json).expect("json"))
        .expect("restore");
    assert_eq!(second.device.save().expect("save"), state);

    let mut single = Guest::new(ALL);
    single.device.deactivate();
    let refused = single.device.restore(state.clone());
    assert!(matches!(refused, Err(StateError::Mismatch(_))));
    let refused = single.device.restore(DeviceState::Entropy);
    assert!(matches!(refused, Err(StateError::WrongDevice { .. })));
    let DeviceState::Network(mut network) = state else {
        panic!("another state");
    };
    network.mtu += 1;
    let refused = second.device.restore(DeviceState::Network(network));
    assert!(matches!(refused, Err(StateError::Mismatch(_))));
}

#[test]
fn control_commands() {
    let mut guest = Guest::with_pairs(ALL, 2);
    for (command, answer) in [
        (&[4u8, 0, 1, 0][..], 0),
        (&[4, 0, 2, 0], 0),
        (&[4, 0, 0, 0], 1),
        (&[4, 0, 3, 0], 1),
        (&[4, 0, 2], 1),
        (&[4, 0, 2, 0, 0], 1),
        (&[4, 1, 2, 0], 1),
        (&[0, 0, 1], 1),
        (&[5, 0, 3, 0, 0, 0, 0, 0, 0, 0], 1),
        (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], 0),
        (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0], 1),
        (&[5, 0, 2], 1),
        (&[5], 1),
        (&[7; 4000], 1),
    ] {
        assert_eq!(guest.control(command), Some(answer), "{command:?}");
    }
    // A reset takes all of it back.
    guest.device.reset();
    let DeviceState::Network(state) = guest.device.save().expect("save") else {
        panic!("another state");
    };
    assert_eq!((state.pairs_in_use, state.guest_offloads), (1, None));
}

#[test]
fn every_pair_of_queues_carries_packets() {
    let mut guest = Guest::with_pairs(ALL, 2);
    assert_eq!(guest.control(&[4, 0, 2, 0]), Some(0));
    for pair in 0..2 {
        let packet = guest.packet(200 + pair);
        guest.send_on(pair, &packet);
        assert!(guest.wires[pair].receive() == packet);
    }
}

#[test]
fn a_driver_takes_only_the_queues_that_it_knows() {
    for (accepted, queues) in [
        (ALL, 5),
        (!f::MQ, 3),
        (!(f::MQ | f::CTRL_VQ), 2),
        (!f::CTRL_VQ, 4),
    ] {
        let mut guest = Guest::with_pairs(accepted, 2);
        assert_eq!(guest.device.needed_queues(guest.features), queues);
        let packet = guest.packet(99);
        guest.send(&packet);
        assert!(guest.wire().receive() == packet);
        assert_eq!(guest.device.deactivate().len(), queues);
    }
}

#[test]
fn a_tap_that_goes_takes_the_link_down() {
    let mut guest = Guest::new(ALL);
    guest.give_buffers(100, 1600);
    guest.wires.clear();
    let told = guest.driver.told.recv_timeout(DEADLINE);
    assert_eq!(told, Ok(Told::Configuration));
    let mut status = [0xff; 2];
    guest.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    // What is sent is lost, and comes back.
    let packet = guest.packet(60);
    guest.send(&packet);
    guest.driver.wait_used(TRANSMIT);
}

/// Waiting packets without buffers, and buffers without packets, cost no processor time.
#[test]
fn idles_quietly() {
    let mut guest = Guest::new(ALL);
    let packet = guest.packet(100);
    guest.wire().send(&packet);
    guest.give_buffers(1, 100);
    let before = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let start = Instant::now();
    let told = guest
        .driver
        .told
        .recv_timeout(std::time::Duration::from_millis(300));
    assert!(told.is_err(), "{told:?}");
    let after = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let spent = (after.tv_sec - before.tv_sec) * 1_000_000_000 + after.tv_nsec - before.tv_nsec;
    // Other tests may run in this process; a loop in this one would take all of a CPU.
    if std::env::var_os("RUST_TEST_THREADS").is_some() {
        let all = i64::try_from(start.elapsed().as_nanos()).expect("short");
        assert!(spent < all / 2, "{spent} of {all} ns");
    }
}

#[test]
fn buffers_of_wrong_direction_come_back() {
    let mut guest = Guest::new(ALL);
    let data = guest.data;
    guest.driver.queues[RECEIVE].add(&[readable(data, 1600)]);
    guest.driver.queues[RECEIVE].kick();
    assert_eq!(guest.driver.wait_used(RECEIVE).1, 0);
    guest.driver.queues[TRANSMIT].add(&[writable(data, 1600)]);
    guest.driver.queues[TRANSMIT].kick();
    assert_eq!(guest.driver.wait_used(TRANSMIT).1, 0);
}
