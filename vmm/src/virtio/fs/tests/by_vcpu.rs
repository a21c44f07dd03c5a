//! Requests that a vCPU answers while it notifies, and those that it must not.

use super::*;

const FORGET: u32 = 2;
const FSYNC: u32 = 20;
const SETATTR: u32 = 4;

impl Guest {
    /// Sends a request on a vCPU's thread; gives the used head and length, if it is answered when the
    /// notification is over.
    fn ask_on_vcpu(&mut self, opcode: u32, node: u64, body: &[u8]) -> Option<(u16, u32)> {
        let length = u32::try_from(40 + body.len()).expect("small");
        let header = Body::new().u32(length).u32(opcode).u64(0x77).u64(node);
        let header = header.u32(0).u32(0).u32(1).u32(0).bytes(body);
        self.driver.space.write(self.request, &header.0);
        self.driver.queues[1].add(&[
            readable(self.request, length),
            writable(self.answer, (1 << 20) + 4096),
        ]);
        self.device.notify(1);
        self.driver.queues[1].used()
    }

    /// Sends a request that a vCPU must not answer; the device's thread hears of it only when that is sure.
    fn ask_device(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let length = u32::try_from(40 + body.len()).expect("small");
        let header = Body::new().u32(length).u32(opcode).u64(0x77).u64(node);
        let header = header.u32(0).u32(0).u32(1).u32(0).bytes(body);
        self.driver.space.write(self.request, &header.0);
        let (service, _) = self.device.service.as_ref().expect("active");
        // The device's thread may be about to look for more.
        let mut held = locked(service);
        self.driver.queues[1].add(&[
            readable(self.request, length),
            writable(self.answer, (1 << 20) + 4096),
        ]);
        let stopped = held.serve(By::Vcpu, 1).expect("serve");
        assert_eq!(stopped, Stopped::More, "{opcode}");
        assert!(!self.driver.queues[1].has_used(), "{opcode}");
        drop(held);
        self.driver.queues[1].kick();
        self.driver.wait_used(1);
    }

    fn answer(&self, written: u32) -> (i32, Vec<u8>) {
        let answer = self.driver.space.read(self.answer, written as usize);
        let error = i32::from_le_bytes(answer[4..8].try_into().expect("four bytes"));
        (-error, answer[16..].to_vec())
    }
}

fn read_body(handle: u64, size: u32) -> Vec<u8> {
    let body = Body::new().u64(handle).u64(0).u32(size).u32(0);
    body.u64(0).u32(0).u32(0).0
}

/// The host may be slow once; not always.
fn at_least_once(mut attempt: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + DEADLINE;
    while !attempt() {
        assert!(std::time::Instant::now() < deadline, "never answered");
    }
}

#[test]
fn what_is_short_is_answered_at_once() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("file"), "content").expect("write");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_RDWR).expect("open");
    let asked = [
        (LOOKUP, ROOT, b"file\0".to_vec()),
        (GETATTR, node, vec![0; 16]),
        (READ, node, read_body(handle, 4096)),
    ];
    for (opcode, node, body) in asked {
        at_least_once(|| match guest.ask_on_vcpu(opcode, node, &body) {
            Some((_, written)) => {
                assert_eq!(guest.answer(written).0, 0);
                true
            }
            None => {
                guest.driver.wait_used(1);
                false
            }
        });
    }
}

#[test]
fn what_may_take_long_is_left_to_the_device() {
    let mut guest = Guest::mounted();
    let file = File::create(guest.path("file")).expect("create");
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 32 << 20], 0).expect("write");
    // How much a file takes on a disk is not known to all file systems before.
    file.sync_all().expect("sync");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_RDWR).expect("open");
    let truncation = Body::new().u32(1 << 3).bytes(&[0; 84]).0;
    for (opcode, body) in [
        (FSYNC, Body::new().u64(handle).u64(0).0),
        (READ, read_body(handle, 1 << 20)),
        (INIT, Body::new().u32(7).u32(38).u64(0).0),
        (SETATTR, truncation),
        (9999, Vec::new()),
    ] {
        guest.ask_device(opcode, node, &body);
    }
}

#[test]
fn a_slow_host_is_not_waited_for_again() {
    let mut guest = Guest::mounted();
    let (service, _) = guest.device.service.as_ref().expect("active");
    let later = std::time::Instant::now() + DEADLINE;
    locked(service).patience.rest(later);
    guest.ask_device(GETATTR, ROOT, &[0; 16]);
}

#[test]
fn many_requests_do_not_hold_a_vcpu() {
    let mut guest = Guest::mounted();
    let length = 40 + 16;
    let header = Body::new().u32(length).u32(GETATTR).u64(0x77).u64(ROOT);
    let header = header.u32(0).u32(0).u32(1).u32(0).bytes(&[0; 16]);
    guest.driver.space.write(guest.request, &header.0);
    // The device's thread is kept off.
    let (service, events) = guest.device.service.as_ref().expect("active");
    let mut held = locked(service);
    for _ in 0..200 {
        guest.driver.queues[1].add(&[
            readable(guest.request, length),
            writable(guest.answer, 4096),
        ]);
    }
    let stopped = held.serve(By::Vcpu, 1).expect("serve");
    assert_eq!(stopped, Stopped::More);
    events[1].write(1).expect("signal");
    drop(held);
    for _ in 0..200 {
        guest.driver.wait_used(1);
    }
}

#[test]
fn a_write_tells_of_the_file_before_and_after() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("file"), "four").expect("write");
    let before = std::fs::metadata(guest.path("file")).expect("stat");
    let node = guest.lookup(ROOT, "file").expect("lookup");
    let (handle, _) = guest.open(node, libc::O_RDWR).expect("open");
    let body = Body::new().u64(handle).u64(0).u32(6).u32(0);
    let body = body.u64(0).u32(0).u32(0).bytes(b"longer").0;
    let answer = guest.ask(WRITE, node, &body).expect("write");
    let after = std::fs::metadata(guest.path("file")).expect("stat");
    assert_eq!(answer.len(), 40);
    assert_eq!((u32_at(&answer, 0), u64_at(&answer, 8)), (6, 4));
    let nanoseconds = |at| i64::from(u32_at(&answer, at));
    let seconds = |at| i64::try_from(u64_at(&answer, at)).expect("small");
    assert_eq!(
        (seconds(16), nanoseconds(32)),
        (before.mtime(), before.mtime_nsec())
    );
    assert_eq!(
        (seconds(24), nanoseconds(36)),
        (after.mtime(), after.mtime_nsec())
    );
    assert_eq!(after.size(), 6);
}

#[test]
fn a_ring_that_is_broken_under_a_vcpu_needs_a_reset() {
    let mut guest = Guest::new();
    guest.driver.queues[0].claim(200);
    guest.device.notify(0);
    let told = guest.driver.told.recv_timeout(DEADLINE);
    assert_eq!(told, Ok(Told::NeedsReset));
    guest.device.notify(0);
    guest.device.notify(1);
    guest.device.notify(7);
    assert_eq!(guest.device.deactivate().len(), 2);
    guest.device.notify(0);
}

#[test]
fn random_requests_on_a_vcpu() {
    let mut random = Random::new(0x7c);
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("a"), [1; 5000]).expect("write");
    for _ in 0..2000 {
        let mut body = vec![0; usize::try_from(random.below(200)).expect("small")];
        match random.below(3) {
            0 => random.fill(&mut body),
            1 => body = b"a\0".to_vec(),
            _ => {}
        }
        let opcode = u32::try_from(random.below(60)).expect("small");
        // DESTROY would begin all anew.
        if opcode == 38 {
            continue;
        }
        if guest.ask_on_vcpu(opcode, random.below(4), &body).is_none() {
            guest.driver.wait_used(1);
        }
    }
    if guest.ask_on_vcpu(FORGET, 2, &[0xff; 8]).is_none() {
        guest.driver.wait_used(1);
    }
    guest.init();
    assert!(guest.lookup(ROOT, "no-such-name").is_err());
}

#[test]
fn a_write_takes_set_user_id_away() {
    const KILL_PRIVILEGES: u32 = 4;
    let mut guest = Guest::mounted();
    for (mode, flags, left) in [
        (0o4755, libc::O_RDWR, 0o755),
        (0o2755, libc::O_RDWR, 0o755),
        (0o4755, libc::O_RDWR | libc::O_APPEND, 0o755),
        (0o640, libc::O_RDWR, 0o640),
    ] {
        std::fs::write(guest.path("file"), "content").expect("write");
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(guest.path("file"), permissions).expect("chmod");
        let node = guest.lookup(ROOT, "file").expect("lookup");
        let (handle, _) = guest.open(node, flags).expect("open");
        let body = Body::new().u64(handle).u64(0).u32(3).u32(KILL_PRIVILEGES);
        let body = body.u64(0).u32(flags.unsigned_abs()).u32(0).bytes(b"new").0;
        let answer = guest.ask(WRITE, node, &body).expect("write");
        assert_eq!(u32_at(&answer, 0), 3);
        let metadata = std::fs::metadata(guest.path("file")).expect("stat");
        assert_eq!(metadata.mode() & 0o7777, left, "{mode:o}");
        let expected = if flags & libc::O_APPEND != 0 {
            "contentnew"
        } else {
            "newtent"
        };
        let content = std::fs::read_to_string(guest.path("file")).expect("read");
        assert_eq!(content, expected);
        std::fs::remove_file(guest.path("file")).expect("remove");
    }
}
