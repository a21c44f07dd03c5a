//! What the server keeps at hand is never in the way.

use std::fs;

use super::*;

const SETATTR: u32 = 4;
const FORGET: u32 = 2;
const RELEASE: u32 = 18;
const MODE: u32 = 1;

impl Guest {
    fn set_mode(&mut self, node: u64, mode: u32) {
        let body = Body::new().u32(MODE).u32(0).bytes(&[0; 60]).u32(mode);
        self.ask(SETATTR, node, &body.bytes(&[0; 16]).0)
            .expect("setattr");
    }

    fn mode(&self, name: &str) -> u32 {
        let known = fs::metadata(self.path(name)).expect("stat");
        known.permissions().mode() & 0o7777
    }

    fn unlink(&mut self, parent: u64, name: &str) -> Result<Vec<u8>, i32> {
        self.ask(UNLINK, parent, &[name.as_bytes(), b"\0"].concat())
    }
}

#[test]
fn names_go_from_the_directory_that_the_guest_means() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).expect("mkdir");
    for name in ["dir/a", "dir/b"] {
        fs::write(guest.path(name), "").expect("write");
    }
    let dir = guest.lookup(ROOT, "dir").expect("lookup");
    guest.unlink(dir, "a").expect("unlink");
    assert_eq!(guest.unlink(dir, "a"), Err(libc::ENOENT));
    // Another takes its name.
    fs::rename(guest.path("dir"), guest.path("moved")).expect("rename");
    fs::create_dir(guest.path("dir")).expect("mkdir");
    fs::write(guest.path("dir/b"), "").expect("write");
    guest.unlink(dir, "b").expect("unlink");
    assert!(!guest.path("moved/b").exists());
    assert!(guest.path("dir/b").exists());
    let dir = guest.lookup(ROOT, "dir").expect("lookup");
    guest.unlink(dir, "b").expect("unlink");
    assert_eq!(guest.unlink(dir, "."), Err(libc::EINVAL));
    let removed = guest.ask(RMDIR, ROOT, b"dir\0");
    assert_eq!(removed, Ok(Vec::new()));
    assert_eq!(guest.unlink(ROOT, "moved"), Err(libc::EISDIR));
    assert_eq!(guest.ask(RMDIR, ROOT, b"moved\0"), Ok(Vec::new()));
}

#[test]
fn attributes_are_the_nodes_own() {
    let mut guest = Guest::mounted();
    for name in ["one", "two"] {
        fs::write(guest.path(name), "").expect("write");
    }
    let one = guest.lookup(ROOT, "one").expect("lookup");
    let two = guest.lookup(ROOT, "two").expect("lookup");
    let (handle, _) = guest.open(one, libc::O_WRONLY).expect("open");
    guest.set_mode(one, 0o600);
    guest.set_mode(two, 0o640);
    assert_eq!((guest.mode("one"), guest.mode("two")), (0o600, 0o640));
    let release = Body::new().u64(handle).u32(0).u32(0).u64(0);
    guest.ask(RELEASE, one, &release.0).expect("release");
    guest.set_mode(one, 0o644);
    assert_eq!(guest.mode("one"), 0o644);
}

#[test]
fn a_directory_that_is_forgotten_is_let_go() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("dir")).expect("mkdir");
    fs::write(guest.path("dir/a"), "").expect("write");
    let dir = guest.lookup(ROOT, "dir").expect("lookup");
    guest.unlink(dir, "a").expect("unlink");
    let open = |path: &std::path::Path| {
        let descriptors = fs::read_dir("/proc/self/fd").expect("descriptors");
        let targets = descriptors.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        targets.filter(|target| target == path).count()
    };
    let path = guest.path("dir");
    assert_eq!(open(&path), 2);
    // No answer comes to this.
    let body = Body::new()
        .u32(48)
        .u32(FORGET)
        .u64(1)
        .u64(dir)
        .u64(0)
        .u64(0);
    guest.driver.space.write(guest.request, &body.u64(1).0);
    guest.driver.queues[0].add(&[readable(guest.request, 48)]);
    guest.driver.queues[0].kick();
    guest.driver.wait_used(0);
    assert_eq!(open(&path), 0);
}
