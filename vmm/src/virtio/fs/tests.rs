//! The device against a driver that speaks FUSE as far as the tests need it.

mod by_vcpu;
mod delegations;
mod finish;
mod frames;
mod host;
mod recent;
mod unnamed;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;

use vm_memory::GuestAddress;

use super::service::{By, Stopped};
use super::{Filesystem, Share};
use crate::threads::locked;
use crate::virtio::host_connections::HostConnections;
use crate::virtio::testing::{DEADLINE, Directory, Driver, Random, Told, readable, writable};
use crate::virtio::{DeviceState, StateError, VirtioDevice};

const ROOT: u64 = 1;
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const AUTO_INVAL_DATA: u32 = 1 << 12;

struct Guest {
    device: Filesystem,
    driver: Driver,
    directory: Directory,
    request: GuestAddress,
    answer: GuestAddress,
    uid: u32,
}

fn share(directory: &Directory) -> Share {
    let proc_self_fd = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open("/proc/self/fd")
        .expect("open /proc/self/fd");
    Share {
        root: directory.path().into(),
        proc_self_fd,
        connections: HostConnections::default(),
    }
}

/// A FUSE request's body, put together from numbers and bytes.
struct Body(Vec<u8>);

impl Body {
    fn new() -> Self {
        Self(Vec::new())
    }
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn bytes(mut self, value: &[u8]) -> Self {
        self.0.extend(value);
        self
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

impl Guest {
    fn new() -> Self {
        Self::on(Directory::new())
    }

    fn on(directory: Directory) -> Self {
        let device = Filesystem::new("share", share(&directory)).expect("device");
        Self::with(device, directory)
    }

    fn with(mut device: Filesystem, directory: Directory) -> Self {
        let mut driver = Driver::new(16 << 20, device.queue_sizes());
        let request = driver.space.take(2 << 20);
        let answer = driver.space.take(2 << 20);
        let activation = driver.activation(device.features());
        device.activate(activation).expect("activate");
        Self {
            device,
            driver,
            directory,
            request,
            answer,
            uid: 0,
        }
    }

    fn mounted() -> Self {
        let mut guest = Self::new();
        guest.init();
        guest
    }

    /// FUSE_INIT with all features; gives those that the server took.
    fn init(&mut self) -> u32 {
        // Without FUSE_INIT_EXT (1 << 30) and FUSE_HANDLE_KILLPRIV_V2 and later bits.
        let body = Body::new().u32(7).u32(38).u32(128 << 10).u32((1 << 28) - 1);
        let answer = self.ask(INIT, 0, &body.0).expect("init");
        assert_eq!(u32_at(&answer, 0), 7);
        u32_at(&answer, 12)
    }

    /// Sends a request; gives the answer's body, or the error number.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let length = u32::try_from(40 + body.len()).expect("small");
        let header = Body::new()
            .u32(length)
            .u32(opcode)
            .u64(0x77)
            .u64(node)
            .u32(self.uid)
            .u32(self.uid)
            .u32(1)
            .u32(0);
        self.driver.space.write(self.request, &header.0);
        let at = GuestAddress(self.request.0 + 40);
        self.driver.space.write(at, body);
        let head = self.driver.queues[1].add(&[
            readable(self.request, length),
            writable(self.answer, 16),
            writable(GuestAddress(self.answer.0 + 16), (1 << 20) + 4096),
        ]);
        self.driver.queues[1].kick();
        let (used, written) = self.driver.wait_used(1);
        assert_eq!(used, head);
        let answer = self.driver.space.read(self.answer, written as usize);
        assert_eq!(u32_at(&answer, 0), written);
        assert_eq!(u64_at(&answer, 8), 0x77);
        match i32::from_le_bytes(answer[4..8].try_into().expect("four bytes")) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let body = Body::new().bytes(name.as_bytes()).bytes(&[0]);
        let entry = self.ask(LOOKUP, parent, &body.0)?;
        // Entries are valid for a second.
        assert_eq!(u64_at(&entry, 16), 1);
        Ok(u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<(u64, u32), i32> {
        let flags = u32::try_from(flags).expect("flags");
        let answer = self.ask(OPEN, node, &Body::new().u32(flags).u32(0).0)?;
        Ok((u64_at(&answer, 0), u32_at(&answer, 8)))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = Body::new().u64(handle).u64(offset).u32(size).u32(0);
        self.ask(READ, node, &body.u64(0).u32(0).u32(0).0)
    }

    fn write(&mut self, node: u64, handle: u64, data: &[u8]) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).expect("small");
        let body = Body::new().u64(handle).u64(0).u32(size).u32(0);
        let body = body.u64(0).u32(0).u32(0).bytes(data);
        Ok(u32_at(&self.ask(WRITE, node, &body.0)?, 0))
    }

    /// Goes on with another device that has the state of this one.
    fn restore(&mut self) {
        let queues = self.device.deactivate();
        let state = self.device.save().expect("save");
        // The one that was saved is gone, as its process would be.
        self.device = Filesystem::new("share", share(&self.directory)).expect("device");
        self.device.restore(state).expect("restore");
        let activation = self.driver.again(self.device.features(), queues);
        self.device.activate(activation).expect("activate");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

#[test]
fn configuration() {
    let guest = Guest::new();
    let mut config = [9; 41];
    guest.device.read_config(0, &mut config);
    assert_eq!(config[..6], *b"share\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 9]);
    let directory = Directory::new();
    for tag in ["", "a\0b", &"x".repeat(37)] {
        assert!(Filesystem::new(tag, share(&directory)).is_err());
    }
    assert!(Filesystem::new(&"x".repeat(36), share(&directory)).is_ok());
}

#[test]
fn reads_and_writes_files() {
    let mut guest = Guest::new();
    assert!(guest.init() & AUTO_INVAL_DATA != 0);
    let mut content = vec![0; 900_000];
    Random::new(4).fill(&mut content);
    std::fs::write(guest.path("file"), &content).expect("write");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, flags) = guest.open(node, libc::O_RDWR).expect("open");
    // FOPEN_KEEP_CACHE, and FOPEN_NOFLUSH if the directory for tests is on a disk of this machine.
    assert_eq!(flags & !0x20, 2);
    let (_, flags) = guest.open(node, libc::O_RDONLY).expect("open");
    assert_eq!(flags, 0x22);
    let got = guest.read(node, handle, 0, 1 << 20).expect("read");
    assert!(got == content);
    let got = guest.read(node, handle, 899_990, 100).expect("read");
    assert_eq!(got, content[899_990..]);
    assert_eq!(guest.write(node, handle, b"changed"), Ok(7));
    assert_eq!(
        std::fs::read(guest.path("file")).expect("read")[..7],
        *b"changed"
    );
    assert_eq!(guest.lookup(ROOT, "nothing"), Err(libc::ENOENT));
}

#[test]
fn files_belong_to_who_makes_them() {
    let mut guest = Guest::mounted();
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(guest.directory.path(), open).expect("chmod");
    guest.uid = 1234;
    // flags, mode, umask, open_flags
    let flags = u32::try_from(libc::O_CREAT | libc::O_WRONLY).expect("flags");
    let body = Body::new().u32(flags).u32(0o100_666).u32(0).u32(0);
    guest
        .ask(CREATE, ROOT, &body.bytes(b"mine\0").0)
        .expect("create");
    let metadata = std::fs::metadata(guest.path("mine")).expect("stat");
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 1234));
    // Neither the server's mask nor its user stick.
    assert_eq!(metadata.mode() & 0o777, 0o666);
    guest.uid = 0;
    let node = guest.lookup(ROOT, "mine").expect("lookup");
    guest.ask(GETATTR, node, &[0; 16]).expect("getattr");
}

#[test]
fn the_share_is_all_there_is() {
    let mut guest = Guest::mounted();
    std::os::unix::fs::symlink("/etc", guest.path("link")).expect("symlink");
    let link = guest.lookup(ROOT, "link").expect("lookup");
    // The link is not followed by the host, and nothing is above the root.
    assert_eq!(guest.lookup(link, "passwd"), Err(libc::ENOTDIR));
    assert!(guest.open(link, libc::O_RDONLY).is_err());
    std::fs::write(guest.path("file"), "x").expect("write");
    for name in ["..", ".", "/", "../x", "link/x", "a/../../x", ""] {
        let name = Body::new().bytes(name.as_bytes()).bytes(&[0]).0;
        let plain = b"file\0";
        for (opcode, body) in [
            (LOOKUP, name.clone()),
            (SYMLINK, [&name, &b"target\0"[..]].concat()),
            (MKNOD, [&[0; 16][..], &name].concat()),
            (MKDIR, [&[0; 8][..], &name].concat()),
            (UNLINK, name.clone()),
            (RMDIR, name.clone()),
            (RENAME, [&ROOT.to_le_bytes()[..], &name, plain].concat()),
            (RENAME, [&ROOT.to_le_bytes()[..], plain, &name].concat()),
            (LINK, [&ROOT.to_le_bytes()[..], &name].concat()),
            (CREATE, [&[0; 16][..], &name].concat()),
            (
                RENAME2,
                [&ROOT.to_le_bytes()[..], &[0; 8], plain, &name].concat(),
            ),
        ] {
            let answer = guest.ask(opcode, ROOT, &body);
            assert_eq!(answer, Err(libc::EINVAL), "{opcode} {name:?}");
        }
    }
    // A target may be anything.
    let body = b"other\0/etc/../passwd\0";
    guest.ask(SYMLINK, ROOT, body).expect("symlink");
    assert!(guest.path("file").exists());
}

#[test]
fn a_name_beyond_the_copy_is_refused() {
    let mut guest = Guest::mounted();
    for (length, error) in [(9000, libc::ENAMETOOLONG), (70_000, libc::EINVAL)] {
        let mut body = vec![b'x'; length];
        body.push(0);
        assert_eq!(guest.ask(MKDIR, ROOT, &body), Err(error));
    }
}

#[test]
fn long_writes_arrive_whole() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("file"), "").expect("write");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_WRONLY).expect("open");
    let mut data = vec![0; 1 << 20];
    Random::new(6).fill(&mut data);
    assert_eq!(guest.write(node, handle, &data), Ok(1 << 20));
    assert!(std::fs::read(guest.path("file")).expect("read") == data);

    // In pages, as Linux sends them, with room for what FUSE answers and no more.
    Random::new(7).fill(&mut data);
    let header = Body::new().u32(80 + (1 << 20)).u32(WRITE).u64(5).u64(node);
    let header = header.u64(0).u64(0);
    let body = Body::new().u64(handle).u64(0).u32(1 << 20).u32(0);
    let message = [&header.0[..], &body.u64(0).u64(0).0, &data].concat();
    guest.driver.space.write(guest.request, &message);
    let page = |number: u64| GuestAddress(guest.request.0 + 80 + number * 4096);
    let mut pieces = vec![
        readable(guest.request, 40),
        readable(GuestAddress(guest.request.0 + 40), 40),
    ];
    pieces.extend((0..256).map(|number| readable(page(number), 4096)));
    pieces.extend([
        writable(guest.answer, 16),
        writable(GuestAddress(guest.answer.0 + 16), 8),
    ]);
    guest.driver.queues[1].add(&pieces);
    guest.driver.queues[1].kick();
    assert_eq!(guest.driver.wait_used(1).1, 24);
    let answer = guest.driver.space.read(guest.answer, 24);
    assert_eq!((u32_at(&answer, 4), u32_at(&answer, 16)), (0, 1 << 20));
    assert!(std::fs::read(guest.path("file")).expect("read") == data);
}

#[test]
fn files_are_synced() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("file"), "x").expect("write");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_RDWR).expect("open");
    let body = Body::new().u64(handle).u32(0).u32(0);
    assert_eq!(guest.ask(FSYNC, node, &body.0), Ok(Vec::new()));
}

#[test]
fn directories_are_told_whole() {
    let mut guest = Guest::mounted();
    let names: Vec<_> = (0..50).map(|number| "n".repeat(number + 1)).collect();
    for name in &names {
        std::fs::write(guest.path(name), name).expect("write");
    }
    let opened = guest.ask(OPENDIR, ROOT, &[0; 8]).expect("open");
    let handle = u64_at(&opened, 0);
    let (mut seen, mut offset) = (Vec::new(), 0);
    loop {
        let body = Body::new().u64(handle).u64(offset).u32(1000).u32(0);
        let answer = guest.ask(READDIRPLUS, ROOT, &body.u64(0).u64(0).0);
        let answer = answer.expect("entries");
        assert!(answer.len() <= 1000);
        let mut rest = &answer[..];
        while !rest.is_empty() {
            let (node, size) = (u64_at(rest, 0), u64_at(rest, 48));
            offset = u64_at(rest, 128 + 8);
            let length = u32_at(rest, 128 + 16) as usize;
            let name = &rest[128 + 24..128 + 24 + length];
            rest = &rest[(128 + 24 + length).next_multiple_of(8)..];
            if name.starts_with(b".") {
                assert_eq!(node, 0);
                continue;
            }
            assert_eq!(size, length as u64);
            let known = guest.ask(GETATTR, node, &[0; 16]).expect("known");
            assert_eq!(u64_at(&known, 24), size);
            seen.push(String::from_utf8(name.to_vec()).expect("a name"));
        }
        if answer.is_empty() {
            break;
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, names);
}

#[test]
fn malformed_requests_are_refused() {
    let mut guest = Guest::mounted();
    // A name without its NUL, an unknown operation, a body that is too short.
    assert_eq!(guest.ask(LOOKUP, ROOT, b"x"), Err(libc::EINVAL));
    assert_eq!(guest.ask(9999, ROOT, b""), Err(libc::ENOSYS));
    assert!(guest.ask(READ, ROOT, b"").is_err());
    assert!(guest.ask(GETATTR, 12345, &[0; 16]).is_err());
    let space = guest.driver.space.take(4096);
    let queue = &mut guest.driver.queues[1];
    let heads = [
        queue.add(&[readable(space, 10)]),
        queue.add(&[writable(space, 100)]),
        queue.add(&[readable(GuestAddress(1 << 55), 100), writable(space, 100)]),
        queue.add(&[readable(GuestAddress((16 << 20) - 8), 100)]),
    ];
    queue.kick();
    for head in heads {
        assert_eq!(guest.driver.wait_used(1), (head, 0));
    }
    assert_eq!(guest.lookup(ROOT, "still-there"), Err(libc::ENOENT));
}

#[test]
fn random_requests() {
    let mut random = Random::new(0xf5);
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("a"), [1; 5000]).expect("write");
    std::fs::create_dir(guest.path("d")).expect("mkdir");
    for _ in 0..2000 {
        let mut body = vec![0; usize::try_from(random.below(200)).expect("small")];
        match random.below(3) {
            0 => random.fill(&mut body),
            1 => body = b"a\0".to_vec(),
            _ => {}
        }
        let opcode = u32::try_from(random.below(60)).expect("small");
        // FORGET, INTERRUPT, DESTROY and BATCH_FORGET have no answer.
        if [2, 36, 38, 42].contains(&opcode) {
            continue;
        }
        let _ = guest.ask(opcode, random.below(4), &body);
    }
    guest.init();
    assert!(guest.lookup(ROOT, "no-such-name").is_err());
}

#[test]
fn random_chains() {
    let mut random = Random::new(0xc4a2);
    for _ in 0..10 {
        let mut guest = Guest::mounted();
        for _ in 0..300 {
            let head = u16::try_from(random.below(512)).expect("small");
            for index in 0..4 {
                let address = match random.below(3) {
                    0 => random.below(17 << 20),
                    1 => random.number(),
                    _ => guest.request.0,
                };
                let length = match random.below(2) {
                    0 => random.below(200),
                    _ => random.number() & 0xffff_ffff,
                };
                guest.driver.queues[1].describe(
                    (head + index) % 512,
                    GuestAddress(address),
                    u32::try_from(length).expect("masked"),
                    u16::try_from(random.below(8)).expect("small"),
                    (head + index + 1) % 520,
                );
            }
            guest.driver.queues[1].offer(head);
            if random.below(2) == 0 {
                guest.device.notify(1);
            } else {
                guest.driver.queues[1].kick();
            }
        }
        assert_eq!(guest.device.deactivate().len(), 2);
    }
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let mut guest = Guest::new();
    guest.driver.queues[0].claim(200);
    guest.driver.queues[0].kick();
    assert_eq!(
        guest.driver.told.recv_timeout(DEADLINE),
        Ok(Told::NeedsReset)
    );
    assert_eq!(guest.device.deactivate().len(), 2);
}

#[test]
fn open_files_survive_a_restore() {
    let mut guest = Guest::mounted();
    std::fs::create_dir(guest.path("dir")).expect("mkdir");
    std::fs::write(guest.path("dir/file"), b"before").expect("write");
    let dir = guest.lookup(ROOT, "dir").expect("lookup");
    let node = guest.lookup(dir, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_RDWR).expect("open");
    let queues = guest.device.deactivate();
    let state = guest.device.save().expect("save");

    // The state goes through serde, as it will in a snapshot, to another server.
    let json = serde_json::to_vec(&state).expect("serialise");
    let state: DeviceState = serde_json::from_slice(&json).expect("deserialise");
    let mut other = Filesystem::new("share", share(&guest.directory)).expect("device");
    other.restore(state.clone()).expect("restore");
    let activation = guest.driver.again(other.features(), queues);
    guest.device = other;
    guest.device.activate(activation).expect("activate");
    assert_eq!(guest.read(node, handle, 0, 100).expect("read"), b"before");
    assert_eq!(guest.lookup(dir, "file"), Ok(node));

    // The same device goes on as well.
    let queues = guest.device.deactivate();
    guest.device.save().expect("save");
    let activation = guest.driver.again(guest.device.features(), queues);
    guest.device.activate(activation).expect("activate");
    assert_eq!(guest.write(node, handle, b"after!"), Ok(6));
    assert_eq!(guest.read(node, handle, 0, 100).expect("read"), b"after!");

    // A driver that starts anew does not.
    let queues = guest.device.deactivate();
    let activation = guest.driver.again(guest.device.features(), queues);
    guest.device.activate(activation).expect("activate");
    assert!(guest.read(node, handle, 0, 100).is_err());

    let mut tagged = Filesystem::new("other", share(&guest.directory)).expect("device");
    assert!(matches!(
        tagged.restore(state),
        Err(StateError::Mismatch(_))
    ));
    assert!(matches!(
        tagged.restore(DeviceState::Entropy),
        Err(StateError::WrongDevice { .. })
    ));
}

#[test]
fn nonsense_is_no_state() {
    let directory = Directory::new();
    let mut device = Filesystem::new("share", share(&directory)).expect("device");
    let mut bytes = vec![0; 1000];
    Random::new(1).fill(&mut bytes);
    for server in [vec![], bytes] {
        let state = crate::virtio::state::FilesystemState {
            tag: "share".into(),
            server,
            watches: Vec::new(),
            delegated: Vec::new(),
        };
        assert!(device.restore(DeviceState::Filesystem(state)).is_err());
    }
}

#[test]
fn a_share_that_is_not_there() {
    let directory = Directory::new();
    let missing = Share {
        root: directory.path().join("missing"),
        proc_self_fd: File::open("/proc/self/fd").expect("open"),
        connections: HostConnections::default(),
    };
    // The library opens the root when the guest mounts it.
    let mut device = Filesystem::new("share", missing).expect("device");
    let driver = Driver::new(8 << 20, device.queue_sizes());
    let activation = driver.activation(device.features());
    device.activate(activation).expect("activate");
    driver.queues[1].kick();
    assert_eq!(device.deactivate().len(), 2);
}
