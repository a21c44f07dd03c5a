//! What goes beyond FUSE: watches, and sockets of the host.

use std::fs;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::sockopt::socket_peercred;

use super::super::host::{CONNECT, EVENTS, WATCH};
use super::*;

const MODIFY: u32 = 0x2;
const CLOSE_WRITE: u32 = 0x8;
const MOVED: u32 = 0xc0;
const CREATED: u32 = 0x100;
const DELETED: u32 = 0x200;
const DELETED_SELF: u32 = 0x400;

/// An event as the guest reads it.
#[derive(Debug, PartialEq, Eq)]
struct Event(u64, u32, String);

fn events(mut bytes: &[u8]) -> Vec<Event> {
    let mut events = Vec::new();
    while !bytes.is_empty() {
        let length = u32_at(bytes, 16) as usize;
        let name = String::from_utf8_lossy(&bytes[24..24 + length]).into_owned();
        events.push(Event(u64_at(bytes, 0), u32_at(bytes, 8), name));
        bytes = &bytes[24 + length.next_multiple_of(8)..];
    }
    events
}

impl Guest {
    fn watch(&mut self, node: u64, mask: u32) -> Result<Vec<u8>, i32> {
        self.ask(WATCH, node, &Body::new().u32(mask).u32(0).0)
    }

    /// Asks for events; they must be there.
    fn events(&mut self) -> Vec<Event> {
        let body = Body::new().u32(0).u32(0);
        events(&self.ask(EVENTS, ROOT, &body.0).expect("events"))
    }
}

#[test]
fn changes_of_others_are_told() {
    let mut guest = Guest::mounted();
    fs::write(guest.path("file"), "x").expect("write");
    guest
        .watch(ROOT, MODIFY | CREATED | DELETED | MOVED)
        .expect("watch");
    let file = guest.lookup(ROOT, "file").expect("lookup");
    guest
        .watch(file, CLOSE_WRITE | DELETED_SELF)
        .expect("watch");
    fs::write(guest.path("file"), "").expect("write");
    fs::write(guest.path("new"), "").expect("write");
    fs::rename(guest.path("new"), guest.path("newer")).expect("rename");
    fs::remove_file(guest.path("file")).expect("remove");
    let named = |mask, name: &str| Event(ROOT, mask, name.into());
    let of_file = |mask| Event(file, mask, String::new());
    assert_eq!(
        guest.events(),
        [
            named(MODIFY, "file"),
            of_file(CLOSE_WRITE),
            named(CREATED, "new"),
            named(0x40, "new"),
            named(0x80, "newer"),
            // The guest still knows it: the host's own event would come only when it does not.
            of_file(DELETED_SELF),
            named(DELETED, "file"),
        ]
    );
}

#[test]
fn what_the_guest_does_is_not_told() {
    let mut guest = Guest::mounted();
    guest.watch(ROOT, 0xfff).expect("watch");
    let file = Body::new()
        .u32(0o102)
        .u32(0o100_644)
        .u32(0)
        .u32(0)
        .bytes(b"file\0");
    let answer = guest.ask(CREATE, ROOT, &file.0).expect("create");
    let (node, handle) = (u64_at(&answer, 0), u64_at(&answer, 128));
    guest.write(node, handle, b"content").expect("write");
    let rename = Body::new().u64(ROOT).bytes(b"file\0renamed\0");
    guest.ask(RENAME, ROOT, &rename.0).expect("rename");
    let release = Body::new().u64(handle).u32(0).u32(0).u64(0);
    guest.ask(18, node, &release.0).expect("release");
    let mkdir = Body::new().u32(0o755).u32(0).bytes(b"directory\0");
    guest.ask(MKDIR, ROOT, &mkdir.0).expect("mkdir");
    guest.ask(UNLINK, ROOT, b"renamed\0").expect("unlink");
    guest.ask(RMDIR, ROOT, b"directory\0").expect("rmdir");
    // The first that is told is what another did.
    fs::write(guest.path("other"), "").expect("write");
    let told = guest.events();
    assert_eq!(told[0], Event(ROOT, CREATED, "other".into()), "{told:?}");
}

#[test]
fn a_watch_ends() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("quiet")).expect("mkdir");
    let quiet = guest.lookup(ROOT, "quiet").expect("lookup");
    guest.watch(quiet, CREATED).expect("watch");
    guest.watch(quiet, 0).expect("end");
    guest.watch(ROOT, CREATED).expect("watch");
    fs::write(guest.path("quiet/a"), "").expect("write");
    fs::write(guest.path("b"), "").expect("write");
    assert_eq!(guest.events(), [Event(ROOT, CREATED, "b".into())]);
    assert_eq!(guest.watch(12345, CREATED), Err(libc::EBADF));
}

#[test]
fn watches_survive_a_restore() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).expect("mkdir");
    let dir = guest.lookup(ROOT, "dir").expect("lookup");
    guest.watch(dir, CREATED).expect("watch");
    guest.restore();
    // Any request: watches are taken up before the first.
    guest.ask(GETATTR, dir, &[0; 16]).expect("getattr");
    fs::write(guest.path("dir/new"), "").expect("write");
    assert_eq!(guest.events(), [Event(dir, CREATED, "new".into())]);
}

#[test]
fn no_request_is_lost_with_the_queues() {
    let mut guest = Guest::mounted();
    let header = Body::new().u32(48).u32(EVENTS).u64(7).u64(ROOT);
    let request = header.u32(0).u32(0).u32(1).u32(0).u64(0);
    guest.driver.space.write(guest.request, &request.0);
    let waits =
        guest.driver.queues[1].add(&[readable(guest.request, 48), writable(guest.answer, 4096)]);
    guest.driver.queues[1].kick();
    // One at a time.
    let second = guest.driver.space.take(4096);
    guest.driver.space.write(second, &request.0);
    let refused = guest.driver.queues[1].add(&[
        readable(second, 48),
        writable(GuestAddress(second.0 + 1024), 1024),
    ]);
    guest.driver.queues[1].kick();
    assert_eq!(guest.driver.wait_used(1), (refused, 16));
    assert_eq!(guest.device.deactivate().len(), 2);
    assert_eq!(guest.driver.wait_used(1), (waits, 16));
    let answer = guest.driver.space.read(guest.answer, 16);
    assert_eq!((u32_at(&answer, 4), u64_at(&answer, 8)), (0, 7));
}

#[test]
fn events_are_cancelled_for_good() {
    let mut guest = Guest::mounted();
    guest
        .ask(EVENTS, ROOT, &Body::new().u32(1).u32(0).0)
        .expect("cancel");
    let again = guest.ask(EVENTS, ROOT, &Body::new().u32(0).u32(0).0);
    assert_eq!(again, Err(libc::ENODEV));
}

#[test]
fn connects_to_sockets_of_the_share() {
    let directory = Directory::new();
    let share = share(&directory);
    let connections = share.connections.clone();
    let mut guest = Guest::with(Filesystem::new("share", share).expect("device"), directory);
    guest.init();
    let listener = UnixListener::bind(guest.path("s")).expect("bind");
    guest.uid = 1234;
    let mark = guest.ask(CONNECT, ROOT, b"s\0").expect("connect");
    let (mut served, _) = listener.accept().expect("accept");
    assert_eq!(socket_peercred(&served).expect("peer").uid.as_raw(), 1234);
    let client = connections.take(u32_at(&mark, 0)).expect("connection");
    std::io::Write::write_all(&mut UnixStream::from(client), b"hello").expect("write");
    let mut heard = String::new();
    served.read_to_string(&mut heard).expect("read");
    assert_eq!(heard, "hello");
    // As root again, with a working directory of before.
    assert!(guest.lookup(ROOT, "s").is_ok());

    fs::write(guest.path("file"), "").expect("write");
    std::os::unix::fs::symlink("s", guest.path("link")).expect("symlink");
    for (name, error) in [
        (&b"file\0"[..], libc::ECONNREFUSED),
        (b"link\0", libc::ECONNREFUSED),
        (b"none\0", libc::ENOENT),
        (b"../s\0", libc::EINVAL),
        (b"\0", libc::EINVAL),
        (b"s", libc::EINVAL),
    ] {
        assert_eq!(guest.ask(CONNECT, ROOT, name), Err(error), "{name:?}");
    }
    drop(listener);
    assert_eq!(guest.ask(CONNECT, ROOT, b"s\0"), Err(libc::ECONNREFUSED));
    let node = guest.lookup(ROOT, "file").expect("lookup");
    assert_eq!(guest.ask(CONNECT, node, b"s\0"), Err(libc::ENOTDIR));
}
