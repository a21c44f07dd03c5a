//! Files that the guest has for itself.

use std::fs;
use std::io::{ErrorKind, Write};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::super::delegations::RECALL;
use super::super::host::{EVENTS, RETURN};
use super::*;

const SETATTR: u32 = 4;
const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
/// In the answer to a write.
const OFFER: u32 = 1;

impl Guest {
    /// Writes a page; says whether the file is offered.
    fn write_page(&mut self, node: u64, handle: u64, flags: i32) -> bool {
        let flags = u32::try_from(flags).expect("flags");
        let body = Body::new().u64(handle).u64(0).u32(4096).u32(0).u64(0);
        let body = body.u32(flags).u32(0).bytes(&[b'x'; 4096]);
        let answer = self.ask(WRITE, node, &body.0).expect("write");
        assert_eq!(u32_at(&answer, 0), 4096);
        u32_at(&answer, 4) == OFFER
    }

    /// Writes again and again; says whether the file is offered at last.
    fn is_offered(&mut self, node: u64, handle: u64) -> bool {
        (0..8).any(|_| self.write_page(node, handle, 0))
    }

    fn file(&mut self, name: &str, flags: i32) -> (u64, u64) {
        fs::write(self.path(name), "").expect("write");
        let node = self.lookup(ROOT, name).expect("lookup");
        let (handle, _) = self.open(node, flags).expect("open");
        (node, handle)
    }

    /// The nodes that the guest is asked for next.
    fn recalls(&mut self) -> Vec<u64> {
        let body = Body::new().u32(0).u32(0);
        let events = self.ask(EVENTS, ROOT, &body.0).expect("events");
        let recalls = events.chunks(24).map(|event| {
            assert_eq!(u32_at(event, 8), RECALL);
            u64_at(event, 0)
        });
        recalls.collect()
    }

    /// Somebody else opens the file, and says how that ended.
    fn others_open(&self, name: &str) -> Receiver<()> {
        let (said, opened) = mpsc::channel();
        let path = self.path(name);
        thread::spawn(move || {
            let mut file = OpenOptions::new().append(true).open(path).expect("open");
            file.write_all(b"y").expect("write");
            said.send(())
        });
        opened
    }

    /// Somebody else would have to wait.
    fn is_given(&self, name: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        match rustix::fs::open(self.path(name), flags, Mode::empty()) {
            Ok(_) => false,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                true
            }
        }
    }
}

#[test]
fn a_file_that_is_written_to_is_offered() {
    let mut guest = Guest::mounted();
    for flags in [libc::O_RDWR, libc::O_WRONLY] {
        let (node, handle) = guest.file("file", flags);
        let offers: Vec<bool> = (0..5).map(|_| guest.write_page(node, handle, 0)).collect();
        assert_eq!(offers, [false, false, false, true, true]);
        assert!(guest.is_given("file"));
        assert_eq!(guest.recalls(), [node]);
        let body = Body::new().u64(handle).u32(0).u32(0).u64(0);
        guest.ask(RELEASE, node, &body.0).expect("release");
        assert!(!guest.is_given("file"));
    }
}

#[test]
fn what_others_have_open_is_not_offered() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("file", libc::O_RDWR);
    let reader = File::open(guest.path("file")).expect("open");
    assert!(!guest.is_offered(node, handle));
    drop(reader);
    // Not tried again so soon.
    assert!(!guest.is_offered(node, handle));
    let (node, first) = guest.file("twice", libc::O_RDWR);
    guest.open(node, libc::O_RDONLY).expect("open");
    assert!(!guest.is_offered(node, first));
}

#[test]
fn what_must_not_wait_is_not_offered() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("later", libc::O_RDWR);
    for flag in [libc::O_APPEND, libc::O_DIRECT, libc::O_SYNC, libc::O_DSYNC] {
        assert!((0..8).all(|_| !guest.write_page(node, handle, flag)));
    }
    assert!(!guest.is_given("later"));
}

#[test]
fn others_wait_until_it_is_returned() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("file", libc::O_RDWR);
    assert!(guest.is_offered(node, handle));
    let opened = guest.others_open("file");
    assert_eq!(guest.recalls(), [node]);
    assert!(opened.try_recv().is_err());
    guest.ask(RETURN, node, &[]).expect("return");
    opened.recv_timeout(DEADLINE).expect("opened");
    // And can be had again, but not soon.
    assert!(!guest.is_offered(node, handle));
}

#[test]
fn others_do_not_wait_for_ever() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("file", libc::O_RDWR);
    assert!(guest.is_offered(node, handle));
    let begun = Instant::now();
    let opened = guest.others_open("file");
    opened.recv_timeout(DEADLINE).expect("opened");
    assert!(begun.elapsed() >= Duration::from_millis(900));
    // Too late does no harm.
    guest.ask(RETURN, node, &[]).expect("return");
    assert_eq!(guest.ask(RETURN, 12345, &[]), Ok(Vec::new()));
}

#[test]
fn each_file_has_its_own_second() {
    let mut guest = Guest::mounted();
    let (first, handle) = guest.file("first", libc::O_RDWR);
    assert!(guest.is_offered(first, handle));
    let (second, handle) = guest.file("second", libc::O_RDWR);
    assert!(guest.is_offered(second, handle));
    let first_opened = guest.others_open("first");
    assert_eq!(guest.recalls(), [first]);
    thread::sleep(Duration::from_millis(500));
    let begun = Instant::now();
    let second_opened = guest.others_open("second");
    first_opened.recv_timeout(DEADLINE).expect("opened");
    second_opened.recv_timeout(DEADLINE).expect("opened");
    assert!(begun.elapsed() >= Duration::from_millis(900));
}

#[test]
fn the_guest_does_not_wait_for_itself() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("file", libc::O_RDWR);
    assert!(guest.is_offered(node, handle));
    // It has to return it first, and is asked for it.
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EAGAIN));
    assert_eq!(guest.recalls(), [node]);
    guest.ask(RETURN, node, &[]).expect("return");
    guest.open(node, libc::O_RDONLY).expect("open");
}

#[test]
fn what_the_server_opens_itself_is_taken_back() {
    for what in ["size", "attribute"] {
        let mut guest = Guest::mounted();
        let (node, handle) = guest.file("file", libc::O_RDWR);
        assert!(guest.is_offered(node, handle));
        if what == "size" {
            let mut body = [0; 88];
            body[0] = 1 << 3;
            guest.ask(SETATTR, node, &body).expect("truncate");
            assert_eq!(fs::metadata(guest.path("file")).expect("stat").len(), 0);
        } else {
            let body = Body::new().u32(0).u32(0).bytes(b"user.x\0");
            let answer = guest.ask(GETXATTR, node, &body.0);
            assert!(answer != Err(libc::EAGAIN), "{answer:?}");
        }
        assert!(!guest.is_given("file"));
        assert_eq!(guest.recalls(), [node]);
    }
}

#[test]
fn a_guest_that_is_restored_returns_what_it_had() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.file("file", libc::O_RDWR);
    assert!(guest.is_offered(node, handle));
    guest.restore();
    assert_eq!(guest.recalls(), [node]);
    assert!(!guest.is_given("file"));
}
