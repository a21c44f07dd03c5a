//! Frames, which take the mark of a mount from what is in them. Of the mounts themselves, which take a
//! privilege to make, the integration tests tell.

use std::fs;

use super::*;
use crate::config::FRAME_MODE;

const SYNCFS: u32 = 50;
const SUBMOUNT: u32 = 1 << 0;

impl Guest {
    fn frame(&mut self, path: &str) {
        fs::create_dir(self.path(path)).expect("mkdir");
        let mode = fs::Permissions::from_mode(FRAME_MODE);
        fs::set_permissions(self.path(path), mode).expect("chmod");
    }

    /// The node, and whether it is called a mount.
    fn find(&mut self, parent: u64, name: &str) -> (u64, bool) {
        let body = Body::new().bytes(name.as_bytes()).bytes(&[0]);
        let entry = self.ask(LOOKUP, parent, &body.0).expect("lookup");
        (u64_at(&entry, 0), u32_at(&entry, 124) & SUBMOUNT != 0)
    }
}

#[test]
fn a_frame_is_called_a_mount() {
    let mut guest = Guest::mounted();
    fs::create_dir(guest.path("one")).expect("mkdir");
    guest.frame("one/0");
    fs::create_dir(guest.path("one/0/etc")).expect("mkdir");
    fs::write(guest.path("one/0/etc/hosts"), "x").expect("write");
    let (one, mount) = guest.find(ROOT, "one");
    assert!(!mount);
    // Twice: the second time by the server's memory, which goes in between.
    for _ in 0..2 {
        let (frame, mount) = guest.find(one, "0");
        assert!(mount);
        let (etc, mount) = guest.find(frame, "etc");
        assert!(!mount);
        assert!(!guest.find(etc, "hosts").1);
        guest.forget(frame, 1);
    }
    // The guest knows it still, as one that goes on with a server that was restored.
    guest.find(ROOT, "one");
    guest.forget(one, 1);
    assert!(guest.find(one, "0").1);
}

#[test]
fn syncing_a_frame_syncs_what_is_in_it() {
    let mut guest = Guest::mounted();
    guest.frame("0");
    fs::create_dir(guest.path("0/etc")).expect("mkdir");
    let (frame, _) = guest.find(ROOT, "0");
    let sync = |guest: &mut Guest| guest.ask(SYNCFS, frame, &Body::new().u64(0).0);
    assert_eq!(sync(&mut guest), Ok(vec![]));
    // It is opened for that.
    fs::remove_dir(guest.path("0/etc")).expect("rmdir");
    std::os::unix::fs::symlink("nowhere", guest.path("0/etc")).expect("symlink");
    assert!(sync(&mut guest).is_err());
    assert_eq!(guest.ask(SYNCFS, ROOT, &Body::new().u64(0).0), Ok(vec![]));
}
