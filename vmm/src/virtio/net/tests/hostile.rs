//! Drivers that do what drivers must not.

use vm_memory::GuestAddress;

use super::wire::{Guest, RECEIVE, TRANSMIT};
use super::{ALL, f};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{DEADLINE, Random, Told, readable, writable};

/// The device still carries packets both ways.
fn works(guest: &mut Guest) {
    guest.give_buffers(100, 1600);
    let packet = guest.packet(77);
    guest.wire().send(&packet);
    assert!(guest.receive().bytes[12..] == packet[12..]);
    guest.send(&packet);
    assert!(guest.wire().receive() == packet);
}

#[test]
fn what_cannot_be_sent_comes_back() {
    let mut guest = Guest::new(ALL);
    let data = guest.data;
    let chains = [
        vec![readable(data, 0)],
        vec![readable(data, 11)],
        vec![readable(data, 25)],
        vec![readable(data, 70_000)],
        vec![readable(data, u32::MAX)],
        vec![readable(data, 60), writable(data, 60)],
        vec![writable(data, 60), readable(data, 60)],
        vec![readable(GuestAddress(1 << 40), 60)],
        vec![readable(GuestAddress(u64::MAX - 5), 60)],
        vec![readable(GuestAddress((16 << 20) - 10), 60)],
    ];
    for chain in chains {
        guest.driver.queues[TRANSMIT].add(&chain);
        guest.driver.queues[TRANSMIT].kick();
        assert_eq!(guest.driver.wait_used(TRANSMIT).1, 0, "{chain:?}");
    }
    works(&mut guest);
}

#[test]
fn what_cannot_be_filled_comes_back() {
    let mut guest = Guest::new(ALL);
    let data = guest.data;
    let chains = [
        vec![writable(data, 0)],
        vec![writable(data, 11)],
        vec![readable(data, 1600)],
        vec![writable(data, 100), readable(data, 1600)],
        vec![writable(GuestAddress(1 << 40), 1600)],
        vec![writable(data, 100), writable(GuestAddress(u64::MAX), 1600)],
        vec![writable(GuestAddress((16 << 20) - 10), 1600)],
    ];
    for chain in chains {
        guest.driver.queues[RECEIVE].add(&chain);
        guest.driver.queues[RECEIVE].kick();
        assert_eq!(guest.driver.wait_used(RECEIVE).1, 0, "{chain:?}");
    }
    works(&mut guest);
}

#[test]
fn chains_in_a_circle_come_back() {
    for (queue, flags) in [(RECEIVE, 1 | 2), (TRANSMIT, 1)] {
        let mut guest = Guest::new(ALL);
        let data = guest.data;
        guest.driver.queues[queue].describe(0, data, 40, flags, 0);
        guest.driver.queues[queue].offer(0);
        guest.driver.queues[queue].kick();
        assert_eq!(guest.driver.wait_used(queue), (0, 0));
        // An index that is none ends the chain.
        guest.driver.queues[queue].describe(1, data, 40, flags, 999);
        guest.driver.queues[queue].offer(1);
        guest.driver.queues[queue].kick();
        assert_eq!(guest.driver.wait_used(queue), (1, 0));
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    for queue in 0..3 {
        let mut guest = Guest::new(ALL);
        guest.driver.queues[queue].claim(300);
        guest.driver.queues[queue].kick();
        let told = guest.driver.told.recv_timeout(DEADLINE);
        assert_eq!(told, Ok(Told::NeedsReset), "{queue}");
        assert_eq!(guest.device.deactivate().len(), 3);
    }
}

#[test]
fn a_ring_that_is_broken_under_a_vcpu_needs_a_reset() {
    let mut guest = Guest::new(ALL);
    guest.driver.queues[TRANSMIT].claim(300);
    guest.device.notify(1);
    let told = guest.driver.told.recv_timeout(DEADLINE);
    assert_eq!(told, Ok(Told::NeedsReset));
    guest.device.notify(1);
    assert_eq!(guest.device.deactivate().len(), 3);
}

#[test]
fn control_rubbish_is_survived() {
    let mut guest = Guest::new(ALL);
    let data = guest.data;
    for chain in [
        vec![readable(data, 4)],
        vec![writable(data, 1)],
        vec![writable(data, 1), readable(data, 4)],
        vec![readable(GuestAddress(1 << 50), 4), writable(data, 1)],
        vec![readable(data, 4), writable(GuestAddress(1 << 50), 1)],
        vec![readable(data, 1 << 20), writable(data, 1)],
    ] {
        guest.driver.queues[2].add(&chain);
        guest.driver.queues[2].kick();
        let (_, written) = guest.driver.wait_used(2);
        assert!(written <= 1, "{chain:?}");
    }
    let mut random = Random::new(5);
    for _ in 0..500 {
        let mut command = vec![0; usize::try_from(random.below(40)).expect("small")];
        random.fill(&mut command);
        if let Some(class) = command.first_mut() {
            *class %= 8;
        }
        assert!(guest.control(&command).is_none_or(|answer| answer <= 1));
    }
    works(&mut guest);
}

/// Random descriptors, indirect ones too, in all queues.
#[test]
fn random_rings_are_survived() {
    let mut random = Random::new(23);
    for round in 0..60 {
        let accepted = if round % 3 == 0 { !f::MRG_RXBUF } else { ALL };
        let mut guest = Guest::new(accepted);
        for _ in 0..60 {
            let queue = usize::try_from(random.below(3)).expect("small");
            let size = if queue == 2 { 16 } else { 256 };
            let head = u16::try_from(random.below(u64::from(size))).expect("small");
            for index in 0..3u16 {
                let address = match random.below(4) {
                    0 => random.below(17 << 20),
                    1 => random.number(),
                    _ => guest.data.0,
                };
                let length = match random.below(3) {
                    0 => 16 * random.below(20),
                    1 => random.number() & 0xffff_ffff,
                    _ => 1600,
                };
                guest.driver.queues[queue].describe(
                    (head + index) % size,
                    GuestAddress(address),
                    u32::try_from(length).expect("masked"),
                    u16::try_from(random.below(8)).expect("small"),
                    (head + index + 1) % (size + 2),
                );
            }
            guest.driver.queues[queue].offer(head);
            if queue == TRANSMIT && random.below(2) == 0 {
                guest.device.notify(1);
            } else {
                guest.driver.queues[queue].kick();
            }
            if random.below(4) == 0 {
                let length = usize::try_from(random.below(3000)).expect("small");
                let packet = guest.packet(length);
                guest.wire().send(&packet);
            }
        }
        assert_eq!(guest.device.deactivate().len(), 3);
    }
}

/// Resets come while packets flow both ways, and nobody waits for the other.
#[test]
fn resets_amid_traffic() {
    let mut guest = Guest::new(ALL);
    for round in 0..50 {
        guest.give_buffers(100, 1600);
        let packet = guest.packet(500);
        for _ in 0..20 {
            // Packets that were left over in earlier rounds may use up the buffers.
            guest.wire().try_send(&packet);
        }
        for _ in 0..10 {
            guest.send(&packet);
        }
        if round % 2 == 0 {
            guest.device.reset();
        } else {
            guest.device.deactivate();
        }
        // Nobody serves the queues now: they begin anew, as a driver's do after a reset.
        guest = guest.restarted();
    }
    let packet = guest.packet(77);
    guest.send(&packet);
    assert!(guest.wire().receive() == packet);
    guest.give_buffers(100, 1600);
    guest.receive();
}
