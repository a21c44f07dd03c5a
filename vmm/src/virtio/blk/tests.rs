//! The device against a driver with real queues and disks that are files.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vm_memory::GuestAddress;

use super::{Block, Disk, DiskError, Serial};
use crate::virtio::testing::{
    DEADLINE, Directory, Driver, Piece, Random, Told, readable, writable,
};
use crate::virtio::{DeviceState, StateError, VirtioDevice};

const SECTORS: u64 = 2048;

struct Guest {
    device: Block,
    driver: Driver,
    path: PathBuf,
    _directory: Directory,
    header: GuestAddress,
    data: GuestAddress,
    status: GuestAddress,
}

fn open(path: &PathBuf, read_only: bool) -> Disk {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .expect("open");
    Disk::new(path, file, read_only).expect("disk")
}

impl Guest {
    fn new(read_only: bool) -> Self {
        Self::with_features(read_only, u64::MAX)
    }

    fn with_features(read_only: bool, accepted: u64) -> Self {
        let directory = Directory::new();
        let path = directory.path().join("disk");
        let mut content = vec![0; 2048 * 512];
        Random::new(3).fill(&mut content);
        std::fs::write(&path, content).expect("write");
        let mut device = Block::new(
            0,
            Serial::new("a-disk").expect("serial"),
            open(&path, read_only),
        );
        let mut driver = Driver::new(8 << 20, device.queue_sizes());
        let header = driver.space.take(16);
        let data = driver.space.take(2 << 20);
        let status = driver.space.take(1);
        let activation = driver.activation(device.features() & accepted);
        device.activate(activation).expect("activate");
        Self {
            device,
            driver,
            path,
            _directory: directory,
            header,
            data,
            status,
        }
    }

    /// A request with the given data buffers; gives its status and the length used.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.space.write(self.header, &header);
        self.driver.space.write(self.status, &[0xee]);
        let mut pieces = vec![readable(self.header, 16)];
        pieces.extend(data);
        pieces.push(writable(self.status, 1));
        let head = self.driver.queues[0].add(&pieces);
        self.driver.queues[0].kick();
        let (used, length) = self.driver.wait_used(0);
        assert_eq!(used, head);
        (self.driver.space.read(self.status, 1)[0], length)
    }

    fn content(&self, sector: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        File::open(&self.path)
            .and_then(|file| file.read_exact_at(&mut bytes, sector * 512))
            .expect("read");
        bytes
    }

    fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

#[test]
fn reads_in_pieces() {
    let mut guest = Guest::new(true);
    let data = guest.data;
    // Buffers of odd sizes that make whole sectors together.
    let pieces = [
        writable(data, 100),
        writable(GuestAddress(data.0 + 100), 924),
        writable(GuestAddress(data.0 + 8192), 1024),
    ];
    assert_eq!(guest.request(0, 5, &pieces), (0, 2049));
    let mut got = guest.driver.space.read(data, 1024);
    got.extend(guest.driver.space.read(GuestAddress(data.0 + 8192), 1024));
    assert!(got == guest.content(5, 2048));
}

#[test]
fn writes_and_flushes() {
    let mut guest = Guest::new(false);
    let mut bytes = vec![0; 1 << 20];
    Random::new(9).fill(&mut bytes);
    guest.driver.space.write(guest.data, &bytes);
    let pieces: Vec<_> = (0..126u64)
        .map(|i| readable(GuestAddress(guest.data.0 + i * 4096), 4096))
        .collect();
    assert_eq!(guest.request(1, 8, &pieces), (0, 1));
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
    assert!(guest.content(8, 126 * 4096) == bytes[..126 * 4096]);
}

#[test]
fn driver_without_flush() {
    let mut guest = Guest::with_features(false, !(1 << 9));
    let piece = readable(guest.data, 512);
    assert_eq!(guest.request(1, 0, &[piece]), (0, 1));
    assert_eq!(guest.content(0, 512), [0; 512]);
}

#[test]
fn name() {
    let mut guest = Guest::new(false);
    let piece = writable(guest.data, 20);
    assert_eq!(guest.request(8, 0, &[piece]), (0, 21));
    let name = guest.driver.space.read(guest.data, 20);
    assert_eq!(name[..7], *b"a-disk\0");
}

#[test]
fn read_only_refuses_changes() {
    let mut guest = Guest::new(true);
    assert!(guest.device.features() & 1 << 5 != 0);
    assert_eq!(guest.device.features() & (1 << 13 | 1 << 14), 0);
    let before = guest.content(0, 4096);
    let data = readable(guest.data, 512);
    assert_eq!(guest.request(1, 0, &[data]), (1, 1));
    let mut segment = [0; 16];
    segment[8] = 8;
    guest.driver.space.write(guest.data, &segment);
    let segment = readable(guest.data, 16);
    assert_eq!(guest.request(11, 0, &[segment]), (2, 1));
    assert_eq!(guest.request(13, 0, &[segment]), (2, 1));
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
    assert!(before == guest.content(0, 4096));
}

#[test]
fn bounds() {
    let mut guest = Guest::new(false);
    let (inn, out) = (writable(guest.data, 1024), readable(guest.data, 1024));
    assert_eq!(guest.request(0, SECTORS - 2, &[inn]), (0, 1025));
    for sector in [SECTORS - 1, SECTORS, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
        assert_eq!(guest.request(0, sector, &[inn]), (1, 1), "{sector}");
        assert_eq!(guest.request(1, sector, &[out]), (1, 1), "{sector}");
    }
    // Not whole sectors.
    let odd = [writable(guest.data, 513)];
    assert_eq!(guest.request(0, 0, &odd), (1, 1));
    assert_eq!(
        std::fs::metadata(&guest.path).expect("stat").len(),
        SECTORS * 512
    );
}

#[test]
fn zeroes_and_discards() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.config(48), 1 << 17);
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let (before, after) = (guest.content(7, 512), guest.content(24, 512));
    let mut two = segment(8, 8, 0);
    two.extend(segment(16, 8, 1));
    guest.driver.space.write(guest.data, &two);
    let piece = readable(guest.data, 32);
    assert_eq!(guest.request(13, 0, &[piece]), (0, 1));
    assert_eq!(guest.content(8, 8192), [0; 8192]);
    assert!(before == guest.content(7, 512) && after == guest.content(24, 512));

    for (bad, status) in [
        (segment(SECTORS - 1, 2, 0), 1),
        (segment(u64::MAX, 1, 0), 1),
        (segment(0, 1 << 18, 0), 1),
        (segment(0, 1, 2), 2),
        (segment(0, 1, 0)[..15].to_vec(), 2),
    ] {
        guest.driver.space.write(guest.data, &bad);
        let piece = readable(guest.data, u32::try_from(bad.len()).expect("small"));
        assert_eq!(guest.request(13, 0, &[piece]), (status, 1), "{bad:?}");
    }
    if guest.device.features() & 1 << 13 != 0 {
        guest.driver.space.write(guest.data, &segment(32, 8, 0));
        let piece = readable(guest.data, 16);
        assert_eq!(guest.request(11, 0, &[piece]), (0, 1));
        // Unmap has no meaning in a discard.
        guest.driver.space.write(guest.data, &segment(32, 8, 1));
        assert_eq!(guest.request(11, 0, &[piece]), (2, 1));
    }
}

#[test]
fn unknown_requests() {
    let mut guest = Guest::new(false);
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[]), (2, 1));
    }
}

#[test]
fn truncated_under_our_feet() {
    let mut guest = Guest::new(true);
    OpenOptions::new()
        .write(true)
        .open(&guest.path)
        .and_then(|file| file.set_len(4096))
        .expect("truncate");
    let piece = writable(guest.data, 8192);
    assert_eq!(guest.request(0, 0, &[piece]), (1, 1));
}

#[test]
fn malformed_chains_are_returned() {
    let mut guest = Guest::new(false);
    let (header, status) = (guest.header, guest.status);
    let queue = &mut guest.driver.queues[0];
    let heads = [
        queue.add(&[readable(header, 16)]),
        queue.add(&[writable(status, 1)]),
        queue.add(&[readable(header, 15), writable(status, 1)]),
        queue.add(&[writable(status, 1), readable(header, 16)]),
        queue.add(&[readable(GuestAddress(1 << 60), 16), writable(status, 1)]),
    ];
    queue.kick();
    for head in heads {
        assert_eq!(guest.driver.wait_used(0), (head, 0));
    }
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
}

#[test]
fn random_chains() {
    let mut random = Random::new(0xb10c);
    for _ in 0..20 {
        let mut guest = Guest::new(false);
        for _ in 0..300 {
            let head = u16::try_from(random.below(128)).expect("small");
            let mut header = [0; 16];
            random.fill(&mut header);
            header[0] &= 15;
            header[1..4].fill(0);
            header[10..].fill(0);
            guest.driver.space.write(guest.header, &header);
            for index in 0..4 {
                let address = match random.below(4) {
                    0 => random.below(9 << 20),
                    1 => random.number(),
                    2 => guest.header.0,
                    _ => guest.data.0,
                };
                let length = match random.below(3) {
                    0 => 16,
                    1 => random.number() & 0xffff_ffff,
                    _ => 512 * random.below(20),
                };
                guest.driver.queues[0].describe(
                    (head + index) % 128,
                    GuestAddress(address),
                    u32::try_from(length).expect("masked"),
                    u16::try_from(random.below(8)).expect("small"),
                    (head + index + 1) % 130,
                );
            }
            guest.driver.queues[0].offer(head);
            guest.driver.queues[0].kick();
        }
        assert_eq!(guest.device.deactivate().len(), 1);
        assert_eq!(
            std::fs::metadata(&guest.path).expect("stat").len(),
            SECTORS * 512
        );
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut guest = Guest::new(true);
    guest.driver.queues[0].claim(200);
    guest.driver.queues[0].kick();
    assert_eq!(
        guest.driver.told.recv_timeout(DEADLINE),
        Ok(Told::NeedsReset)
    );
    assert_eq!(guest.device.deactivate().len(), 1);
}

#[test]
fn state_fits_the_same_disk_only() {
    let mut guest = Guest::new(false);
    let queues = guest.device.deactivate();
    let state = guest.device.save().expect("save");
    guest.device.restore(state.clone()).expect("restore");
    let activation = guest.driver.again(guest.device.features(), queues);
    guest.device.activate(activation).expect("activate");
    assert_eq!(guest.request(4, 0, &[]), (0, 1));

    let mut other = Guest::new(true);
    assert!(matches!(
        other.device.restore(state),
        Err(StateError::Mismatch(_))
    ));
    assert!(matches!(
        other.device.restore(DeviceState::Entropy),
        Err(StateError::WrongDevice { .. })
    ));
}

#[test]
fn serials() {
    for good in ["a", "disk-0.1_2:3", "12345678901234567890"] {
        Serial::new(good).expect(good);
    }
    for bad in ["", "a b", "é", "a\0", "123456789012345678901"] {
        assert!(matches!(Serial::new(bad), Err(DiskError::Serial(_))));
    }
}

/// The image shrinks, grows and goes under the guest, whose requests fail or do not.
#[test]
fn an_image_that_changes_under_the_guest() {
    let mut guest = Guest::new(false);
    let (inn, out) = (writable(guest.data, 1024), readable(guest.data, 1024));
    let file = OpenOptions::new().write(true).open(&guest.path);
    let file = file.expect("open");
    file.set_len(10 * 512 + 100).expect("truncate");
    assert_eq!(guest.request(0, 8, &[inn]), (0, 1025));
    for sector in [9, 10, 11, SECTORS - 2] {
        assert_eq!(guest.request(0, sector, &[inn]), (1, 1), "{sector}");
    }
    assert_eq!(guest.request(4, 0, &[]), (0, 1));
    // Larger than it was: the disk is not.
    file.set_len(2 * SECTORS * 512).expect("extend");
    assert_eq!(guest.request(0, SECTORS - 2, &[inn]), (0, 1025));
    assert_eq!(guest.request(0, SECTORS, &[inn]), (1, 1));
    assert_eq!(guest.request(1, SECTORS, &[out]), (1, 1));
    // Without a name it is still there.
    std::fs::remove_file(&guest.path).expect("remove");
    assert_eq!(guest.request(1, 0, &[out]), (0, 1));
    assert_eq!(guest.request(0, 0, &[inn]), (0, 1025));
}

/// What is more than whole sectors does not belong to the disk.
#[test]
fn an_image_of_odd_size() {
    let directory = Directory::new();
    let path = directory.path().join("disk");
    for (bytes, sectors) in [(512u16, 1), (1023, 1), (1025, 2), (5000, 9)] {
        std::fs::write(&path, vec![1; bytes.into()]).expect("write");
        assert_eq!(open(&path, false).sectors(), sectors, "{bytes}");
        assert_eq!(
            std::fs::metadata(&path).expect("stat").len(),
            u64::from(bytes),
            "looking at it changes nothing"
        );
    }
    std::fs::write(&path, [1; 511]).expect("write");
    let file = File::open(&path).expect("open");
    let error = Disk::new(&path, file, true).expect_err("less than a sector");
    assert!(matches!(error, DiskError::Empty { .. }));
}

#[test]
fn a_disk_is_open_for_what_the_guest_may_do() {
    let directory = Directory::new();
    let path = directory.path().join("disk");
    std::fs::write(&path, [1; 512]).expect("write");
    let append = OpenOptions::new().read(true).append(true).open(&path);
    for file in [File::open(&path), append] {
        let error = Disk::new(&path, file.expect("open"), false).expect_err("refused");
        assert!(matches!(error, DiskError::Access { .. }));
    }
}

#[test]
fn what_cannot_be_a_disk() {
    let directory = Directory::new();
    let empty = directory.path().join("empty");
    File::create(&empty).expect("create");
    for path in [empty.as_path(), directory.path()] {
        let file = File::open(path).expect("open");
        Disk::new(path, file, true).expect_err("no disk");
    }
}

#[test]
fn a_disk_that_is_written_to_is_attached_once() {
    let directory = Directory::new();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 4096]).expect("write");
    let again = |read_only: bool| {
        let file = OpenOptions::new().read(true).write(!read_only).open(&path);
        Disk::new(&path, file.expect("open"), read_only)
    };
    let writer = open(&path, false);
    for read_only in [true, false] {
        let error = again(read_only).expect_err("in use").to_string();
        assert!(error.contains("in use"), "{error}");
    }
    drop(writer);
    let _reader = open(&path, true);
    again(true).expect("a second reader");
    again(false).expect_err("a writer beside readers");
}
