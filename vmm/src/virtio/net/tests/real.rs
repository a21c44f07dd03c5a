//! Behind a real tap in a network namespace of the test's own, where that is permitted.

use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::fs::{Mode, OFlags, open};
use rustix::thread::UnshareFlags;

use super::wire::{Guest, MAC};
use super::{ALL, f};
use crate::sys;
use crate::virtio::VirtioDevice;
use crate::virtio::net::{Tap, TapError};

const HOST: [u8; 4] = [10, 9, 0, 1];
const GUEST: [u8; 4] = [10, 9, 0, 2];

fn ip(arguments: &str) -> bool {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    status.is_ok_and(|status| status.success())
}

fn queue(name: &str, flags: i32) -> std::io::Result<OwnedFd> {
    let fd = open(
        "/dev/net/tun",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    sys::tun::create(&fd, name, flags)?;
    Ok(fd)
}

const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Runs `test` in a new network namespace with the descriptors of a tap that is up, and with
/// the MAC address of its other side.
fn with_tap(queues: usize, test: impl FnOnce(Vec<OwnedFd>, [u8; 6]) + Send + 'static) {
    let body = move || {
        if let Err(error) = sys::unshare(UnshareFlags::NEWNET) {
            eprintln!("skipped: no network namespace: {error}");
            return;
        }
        let flags = TAP | if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let taps: std::io::Result<Vec<_>> = (0..queues).map(|_| queue("tap0", flags)).collect();
        let taps = match taps {
            Ok(taps) => taps,
            Err(error) => {
                eprintln!("skipped: no tap: {error}");
                return;
            }
        };
        let up = ip("link set tap0 address 02:00:00:00:00:99")
            && ip("addr add 10.9.0.1/24 dev tap0")
            && ip(&format!("neigh add 10.9.0.2 lladdr {MAC} dev tap0"))
            && ip("link set tap0 up");
        if !up {
            eprintln!("skipped: there is no program ip");
            return;
        }
        test(taps, [2, 0, 0, 0, 0, 0x99]);
    };
    // A thread of its own, since it cannot come back from the namespace.
    std::thread::spawn(body).join().expect("the test");
}

fn sum(words: &[u8]) -> u32 {
    words
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)))
        .sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

/// A UDP packet to port 9 of the host whose checksum is left to the tap, behind its header.
fn udp(host: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
    packet[6..8].copy_from_slice(&(14u16 + 20).to_le_bytes());
    packet[8..10].copy_from_slice(&6u16.to_le_bytes());
    packet.extend(host);
    packet.extend([2, 0, 0, 0, 0, 7, 8, 0]);
    let length = u16::try_from(8 + payload.len()).expect("small");
    let mut header = vec![0x45, 0];
    header.extend((20 + length).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    header.extend(GUEST);
    header.extend(HOST);
    let check = !fold(sum(&header));
    header[10..12].copy_from_slice(&check.to_be_bytes());
    packet.extend(&header);
    packet.extend([0x12, 0x34, 0, 9]);
    packet.extend(length.to_be_bytes());
    let pseudo = sum(&GUEST) + sum(&HOST) + 17 + u32::from(length);
    packet.extend(fold(pseudo).to_be_bytes());
    packet.extend(payload);
    packet
}

#[test]
fn packets_reach_the_host_and_come_back() {
    with_tap(1, |taps, host| {
        let mut guest = Guest::of(Tap::new(taps).expect("tap"), vec![], ALL);
        guest.give_buffers(100, 1600);
        let socket = UdpSocket::bind("10.9.0.1:9").expect("bind");
        guest.send(&udp(host, b"from the guest"));
        let mut bytes = [0; 100];
        let (count, from) = socket.recv_from(&mut bytes).expect("receive");
        assert_eq!(bytes[..count], *b"from the guest");
        socket.send_to(b"to the guest", from).expect("send");
        loop {
            let got = guest.receive().bytes;
            if got.ends_with(b"to the guest") {
                // The host leaves the checksum to us, since the guest can do without.
                assert_eq!(got[0], 1, "VIRTIO_NET_HDR_F_NEEDS_CSUM");
                break;
            }
        }
    });
}

#[test]
fn without_offloads_checksums_are_whole() {
    with_tap(1, |taps, host| {
        let plain = !(f::GUEST_CSUM | f::GUEST_TSO4 | f::GUEST_TSO6);
        let mut guest = Guest::of(Tap::new(taps).expect("tap"), vec![], plain);
        guest.give_buffers(100, 1600);
        let socket = UdpSocket::bind("10.9.0.1:9").expect("bind");
        guest.send(&udp(host, b"hello"));
        let mut bytes = [0; 100];
        let (_, from) = socket.recv_from(&mut bytes).expect("receive");
        socket.send_to(b"to the guest", from).expect("send");
        loop {
            let got = guest.receive().bytes;
            if got.ends_with(b"to the guest") {
                assert_eq!(got[0] & 1, 0);
                break;
            }
        }
    });
}

/// Whatever a header says, the host's kernel refuses or takes it, and the device goes on.
#[test]
fn absurd_headers_are_survived() {
    use crate::virtio::testing::Random;
    with_tap(1, |taps, host| {
        let mut guest = Guest::of(Tap::new(taps).expect("tap"), vec![], ALL);
        let socket = UdpSocket::bind("10.9.0.1:9").expect("bind");
        let good = udp(host, &[7; 1000]);
        let mut random = Random::new(31);
        for round in 0..2000u32 {
            let mut packet = good.clone();
            random.fill(&mut packet[..12]);
            packet[0] &= 7;
            packet[1] = [0, 1, 3, 4, 5, 0x81, 0x84, 0xff][round as usize % 8];
            if round % 5 == 0 {
                packet[4..6].copy_from_slice(&0u16.to_le_bytes());
            }
            if round % 7 == 0 {
                packet[2..4].copy_from_slice(&u16::MAX.to_le_bytes());
            }
            guest.send(&packet);
            guest.driver.wait_used(super::TRANSMIT);
        }
        guest.send(&udp(host, b"still there"));
        let mut bytes = [0; 2000];
        loop {
            let count = socket.recv(&mut bytes).expect("receive");
            if bytes[..count] == *b"still there" {
                break;
            }
        }
    });
}

#[test]
fn queues_of_a_tap_are_used_as_the_driver_says() {
    with_tap(2, |taps, host| {
        let mut guest = Guest::of(Tap::new(taps).expect("tap"), vec![], ALL);
        for pairs in [1, 2, 1, 1, 2, 2] {
            assert_eq!(guest.control(&[4, 0, pairs, 0]), Some(0));
        }
        let socket = UdpSocket::bind("10.9.0.1:9").expect("bind");
        for pair in 0..2 {
            guest.send_on(pair, &udp(host, &[u8::try_from(pair).expect("small")]));
            let mut bytes = [9; 2];
            assert_eq!(socket.recv(&mut bytes).expect("receive"), 1);
            assert_eq!(usize::from(bytes[0]), pair);
        }
    });
}

#[test]
fn a_tap_that_is_deleted_takes_the_link_down() {
    use crate::virtio::testing::{DEADLINE, Told};
    with_tap(1, |taps, host| {
        let mut guest = Guest::of(Tap::new(taps).expect("tap"), vec![], ALL);
        guest.give_buffers(100, 1600);
        assert!(ip("link delete tap0"));
        loop {
            match guest.driver.told.recv_timeout(DEADLINE) {
                Ok(Told::Configuration) => break,
                Ok(Told::Used(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        guest.send(&udp(host, b"into the void"));
        guest.driver.wait_used(super::TRANSMIT);
        assert_eq!(guest.device.deactivate().len(), 3);
    });
}

#[test]
fn what_is_no_such_tap_is_refused() {
    let null = OwnedFd::from(std::fs::File::open("/dev/null").expect("open"));
    let no_tap = Tap::new(vec![null]).expect_err("no tap");
    assert!(matches!(no_tap, TapError::NoTap { index: 0, .. }));
    assert!(matches!(Tap::new(vec![]), Err(TapError::Count(0))));
    with_tap(1, |taps, _| {
        // Of IFF_NO_PI the kernel does not tell the truth.
        let flags = [
            libc::IFF_TAP | libc::IFF_NO_PI,
            libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
        ];
        for flags in flags {
            let wrong = queue("other0", flags).expect("tap");
            let refused = Tap::new(vec![wrong]);
            assert!(
                matches!(refused, Err(TapError::Flags(_))),
                "{flags:#x} {refused:?}"
            );
        }
        let multi = TAP | libc::IFF_MULTI_QUEUE;
        let two = vec![
            queue("one0", multi).expect("tap"),
            queue("two0", multi).expect("tap"),
        ];
        let error = Tap::new(two).expect_err("two taps");
        assert_eq!(
            error.to_string(),
            "the descriptors of an interface belong to two taps, one0 and two0"
        );
        drop(taps);
    });
}
