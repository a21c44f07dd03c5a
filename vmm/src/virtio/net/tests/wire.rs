//! A guest with its interface, and the other end of what stands in for its tap.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vm_memory::GuestAddress;

use crate::virtio::VirtioDevice;
use crate::virtio::net::{LARGEST_PACKET, Net, Tap};
use crate::virtio::testing::{Driver, Random, readable, writable};

pub(super) const MAC: &str = "02:00:00:00:00:07";
pub(super) const MTU: u16 = 1500;
pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;

/// The host's end: packets with their headers.
pub(super) struct Wire(OwnedFd);

impl Wire {
    pub(super) fn pair() -> (OwnedFd, Self) {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("socket pair");
        (ours, Self(theirs))
    }

    pub(super) fn send(&self, packet: &[u8]) {
        send(&self.0, packet, SendFlags::NOSIGNAL).expect("send");
    }

    /// Sends if there is room.
    pub(super) fn try_send(&self, packet: &[u8]) {
        let _ = send(&self.0, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }

    /// Whether a packet has come.
    pub(super) fn has_packet(&self) -> bool {
        let mut events = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut events, Some(&Timespec::default())) == Ok(1)
    }

    /// Drops what has come.
    fn drain(&self) {
        let mut bytes = [0];
        while recv(&self.0, &mut bytes, RecvFlags::DONTWAIT).is_ok() {}
    }

    pub(super) fn receive(&self) -> Vec<u8> {
        let minute = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let mut events = [PollFd::new(&self.0, PollFlags::IN)];
        assert_eq!(poll(&mut events, Some(&minute)), Ok(1), "no packet comes");
        let mut bytes = vec![0; 12 + LARGEST_PACKET + 1];
        let (count, _) = recv(&self.0, &mut bytes, RecvFlags::empty()).expect("receive");
        bytes.truncate(count);
        bytes
    }
}

/// A packet that the guest received.
pub(super) struct Received {
    pub(super) bytes: Vec<u8>,
    /// Buffers that it filled, and how many its header says.
    pub(super) buffers: usize,
    pub(super) announced: usize,
}

pub(super) struct Guest {
    pub(super) device: Net,
    pub(super) driver: Driver,
    pub(super) wires: Vec<Wire>,
    pub(super) features: u64,
    pub(super) data: GuestAddress,
    room: GuestAddress,
    /// Receive buffers by head.
    given: Vec<Option<(GuestAddress, usize)>>,
    random: Random,
}

impl Guest {
    pub(super) fn new(accepted: u64) -> Self {
        Self::with_pairs(accepted, 1)
    }

    pub(super) fn with_pairs(accepted: u64, pairs: usize) -> Self {
        let (ours, wires): (Vec<_>, Vec<_>) = (0..pairs).map(|_| Wire::pair()).unzip();
        let tap = Tap::stand_in(ours);
        Self::of(tap, wires, accepted)
    }

    pub(super) fn of(tap: Tap, wires: Vec<Wire>, accepted: u64) -> Self {
        let mut device = Net::new(0, tap, MAC.parse().expect("address"), MTU);
        let features = device.features() & accepted;
        let needed = device.needed_queues(features);
        let mut driver = Driver::new(16 << 20, &device.queue_sizes()[..needed]);
        let data = driver.space.take(128 << 10);
        let room = driver.space.take(8 << 20);
        let activation = driver.activation(features);
        device.activate(activation).expect("activate");
        Self {
            device,
            driver,
            wires,
            features,
            data,
            room,
            given: vec![None; 256],
            random: Random::new(11),
        }
    }

    /// The same device with a driver that begins anew.
    pub(super) fn restarted(mut self) -> Self {
        let sizes = self.device.queue_sizes().to_vec();
        self.driver = Driver::new(16 << 20, &sizes);
        self.data = self.driver.space.take(128 << 10);
        self.room = self.driver.space.take(8 << 20);
        self.given = vec![None; 256];
        for wire in &self.wires {
            wire.drain();
        }
        let activation = self.driver.activation(self.features);
        self.device.activate(activation).expect("activate");
        self
    }

    pub(super) fn wire(&self) -> &Wire {
        &self.wires[0]
    }

    /// A packet of random bytes behind a header of zeroes.
    pub(super) fn packet(&mut self, length: usize) -> Vec<u8> {
        let mut packet = vec![0; 12 + length];
        self.random.fill(&mut packet[12..]);
        packet
    }

    pub(super) fn send(&mut self, packet: &[u8]) {
        self.send_on(0, packet);
    }

    pub(super) fn send_on(&mut self, pair: usize, packet: &[u8]) {
        self.driver.space.write(self.data, packet);
        let length = u32::try_from(packet.len()).expect("small");
        let queue = &mut self.driver.queues[2 * pair + TRANSMIT];
        queue.add(&[readable(self.data, length)]);
        queue.kick();
    }

    /// As [`Self::send`], but the driver's notification comes on the vCPU's thread.
    pub(super) fn send_on_vcpu(&mut self, packet: &[u8]) {
        self.driver.space.write(self.data, packet);
        let length = u32::try_from(packet.len()).expect("small");
        self.driver.queues[TRANSMIT].add(&[readable(self.data, length)]);
        self.device.notify(1);
    }

    /// Gives receive buffers as long as there are free descriptors.
    pub(super) fn give_buffers(&mut self, count: usize, length: usize) {
        for _ in 0..count {
            if self.given.iter().flatten().count() == self.given.len() {
                break;
            }
            let place = self.room;
            self.room = GuestAddress(self.room.0 + length as u64);
            let piece = writable(place, u32::try_from(length).expect("small"));
            let head = self.driver.queues[RECEIVE].add(&[piece]);
            self.given[usize::from(head)] = Some((place, length));
        }
        self.driver.queues[RECEIVE].kick();
    }

    /// Waits for a packet.
    pub(super) fn receive(&mut self) -> Received {
        let mut bytes = Vec::new();
        let (mut buffers, mut announced) = (0, 1);
        while buffers < announced {
            let (head, length) = if buffers == 0 {
                self.driver.wait_used(RECEIVE)
            } else {
                // All of a packet become visible together.
                self.driver.queues[RECEIVE].used().expect("the rest")
            };
            let (place, _) = self.given[usize::from(head)].take().expect("a buffer");
            bytes.extend(self.driver.space.read(place, length as usize));
            buffers += 1;
            announced = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
        }
        Received {
            bytes,
            buffers,
            announced,
        }
    }

    /// Gives a control command; the answer, if there is one.
    pub(super) fn control(&mut self, command: &[u8]) -> Option<u8> {
        let queue = self.driver.queues.len() - 1;
        let answer = GuestAddress(self.data.0 + 0x1_0000);
        self.driver.space.write(self.data, command);
        self.driver.space.write(answer, &[0xee]);
        let length = u32::try_from(command.len()).expect("small");
        let pieces = [readable(self.data, length), writable(answer, 1)];
        self.driver.queues[queue].add(&pieces);
        self.driver.queues[queue].kick();
        let (_, written) = self.driver.wait_used(queue);
        (written == 1).then(|| self.driver.space.read(answer, 1)[0])
    }
}
