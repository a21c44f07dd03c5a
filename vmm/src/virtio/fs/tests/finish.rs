//! Files that the guest has for itself from the moment when it makes them.

use std::fs;
use std::time::{Duration, SystemTime};

use super::super::finish::FINISH;
use super::super::host::RETURN;
use super::*;

/// In a request to make a file, and in the answer.
const GIVE: u32 = 1 << 31;
const CLOSE: u32 = 1;
// `valid` of `struct fuse_setattr_in`
const MODE: u32 = 1;
const ATIME: u32 = 1 << 4;
const MTIME: u32 = 1 << 5;
/// Bytes of an answer before the open file: `struct fuse_entry_out`.
const ENTRY: usize = 128;

/// A file that was made: its node and handle, and whether it was given.
struct Made {
    node: u64,
    handle: u64,
    given: bool,
}

/// All that is told of it.
struct Said<'a> {
    valid: u32,
    mode: u32,
    data: &'a [u8],
    size: usize,
    flags: u32,
}

impl Guest {
    fn make(&mut self, name: &str, flags: i32, wishes: u32) -> Result<Made, i32> {
        let flags = (flags | libc::O_CREAT).unsigned_abs();
        let body = Body::new().u32(flags).u32(0o100_644).u32(0o022);
        let body = body.u32(wishes).bytes(name.as_bytes()).bytes(&[0]);
        let answer = self.ask(CREATE, ROOT, &body.0)?;
        Ok(Made {
            node: u64_at(&answer, 0),
            handle: u64_at(&answer, ENTRY),
            given: u32_at(&answer, ENTRY + 8) & GIVE != 0,
        })
    }

    fn made(&mut self, name: &str) -> Made {
        let made = self.make(name, libc::O_WRONLY | libc::O_EXCL, GIVE);
        let made = made.expect("create");
        assert!(made.given);
        made
    }

    fn finish(&mut self, node: u64, handle: u64, said: &Said<'_>) -> Result<Vec<u8>, i32> {
        let body = Body::new().u64(handle).u64(1000).u64(2000).u32(5).u32(6);
        let body = body.u32(said.valid).u32(said.mode).u32(said.flags);
        let size = u32::try_from(said.size).expect("size");
        self.ask(FINISH, node, &body.u32(size).bytes(said.data).0)
    }

    /// Somebody else would have to wait for it.
    fn has(&self, name: &str) -> bool {
        let options = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(self.path(name));
        options.is_err()
    }
}

const ALL: Said<'_> = Said {
    valid: MODE | ATIME | MTIME,
    mode: 0o640,
    data: b"content",
    size: 7,
    flags: CLOSE,
};

#[test]
fn a_new_file_is_given_and_told_of_at_once() {
    let mut guest = Guest::mounted();
    let Made { node, handle, .. } = guest.made("file");
    assert!(guest.has("file"));
    let answer = guest.finish(node, handle, &ALL).expect("finish");
    assert_eq!(u64_at(&answer, 16 + 8), 7, "size");
    assert!(!guest.has("file"));
    assert_eq!(fs::read(guest.path("file")).expect("read"), b"content");
    let known = fs::metadata(guest.path("file")).expect("stat");
    assert_eq!(known.mode() & 0o7777, 0o640);
    let changed = SystemTime::UNIX_EPOCH + Duration::new(2000, 6);
    assert_eq!(known.modified().expect("time"), changed);
    // It is closed.
    assert_eq!(guest.finish(node, handle, &ALL), Err(libc::EBADF));
}

#[test]
fn what_is_not_asked_for_is_not_given() {
    let mut guest = Guest::mounted();
    let exclusive = libc::O_WRONLY | libc::O_EXCL;
    let cases = [
        (exclusive, 0),
        (libc::O_WRONLY, GIVE),
        (libc::O_RDONLY | libc::O_EXCL, GIVE),
        (exclusive | libc::O_APPEND, GIVE),
        (exclusive | libc::O_SYNC, GIVE),
    ];
    for (number, (flags, wishes)) in (0..).zip(cases) {
        let name = format!("{number}");
        let made = guest.make(&name, flags, wishes).expect("create");
        assert!(!made.given, "case {number}");
        assert!(!guest.has(&name));
    }
    assert_eq!(
        guest.make("0", exclusive, GIVE).err(),
        Some(libc::EEXIST),
        "a file that is there"
    );
}

#[test]
fn only_so_many_are_given() {
    let mut guest = Guest::mounted();
    let made: Vec<_> = (0..40)
        .map(|number| {
            let flags = libc::O_WRONLY | libc::O_EXCL;
            guest.make(&format!("{number}"), flags, GIVE)
        })
        .map(|made| made.expect("create"))
        .collect();
    assert_eq!(made.iter().filter(|made| made.given).count(), 32);
    guest
        .finish(made[0].node, made[0].handle, &ALL)
        .expect("finish");
    guest.made("another");
}

#[test]
fn a_file_that_was_taken_back_is_told_of_all_the_same() {
    let mut guest = Guest::mounted();
    let Made { node, handle, .. } = guest.made("file");
    guest.ask(RETURN, node, &[]).expect("return");
    assert!(!guest.has("file"));
    guest.finish(node, handle, &ALL).expect("finish");
    assert_eq!(fs::read(guest.path("file")).expect("read"), b"content");
}

#[test]
fn a_file_may_stay_open() {
    let mut guest = Guest::mounted();
    let Made { node, handle, .. } = guest.made("file");
    let part = Said { flags: 0, ..ALL };
    guest.finish(node, handle, &part).expect("finish");
    assert!(!guest.has("file"));
    let attributes_only = Said {
        valid: MTIME,
        data: b"",
        size: 0,
        ..ALL
    };
    guest
        .finish(node, handle, &attributes_only)
        .expect("finish");
    assert_eq!(fs::read(guest.path("file")).expect("read"), b"content");
}

#[test]
fn a_restored_guest_tells_of_its_new_files() {
    let mut guest = Guest::mounted();
    let Made { node, handle, .. } = guest.made("file");
    guest.restore();
    guest.finish(node, handle, &ALL).expect("finish");
    assert_eq!(fs::read(guest.path("file")).expect("read"), b"content");
}

#[test]
fn absurd_requests_are_refused() {
    let mut guest = Guest::mounted();
    let Made { node, handle, .. } = guest.made("file");
    for size in [0, 6, 8, 1 << 31] {
        let said = Said { size, ..ALL };
        assert_eq!(guest.finish(node, handle, &said), Err(libc::EINVAL));
    }
    let short = Body::new().u64(handle);
    assert_eq!(guest.ask(FINISH, node, &short.0), Err(libc::EINVAL));
    assert!(guest.has("file"));
    for (node, handle) in [(ROOT, handle), (node, handle + 1), (u64::MAX, u64::MAX)] {
        assert_eq!(guest.finish(node, handle, &ALL), Err(libc::EBADF));
    }
    assert_eq!(fs::metadata(guest.path("file")).expect("stat").len(), 0);
    guest.finish(node, handle, &ALL).expect("finish");
}
