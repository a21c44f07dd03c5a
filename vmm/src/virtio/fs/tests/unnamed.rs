//! Files without a name.

use super::*;
use crate::virtio::fs::unnamed::UnnamedFiles;

const FORGET: u32 = 2;
const SETATTR: u32 = 4;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const TMPFILE: u32 = 51;

const READ_WRITE: i32 = libc::O_TMPFILE | libc::O_RDWR;

impl Guest {
    /// Gives the node and the open file.
    fn unnamed(&mut self, flags: i32, mode: u32, mask: u32) -> Result<(u64, u64), i32> {
        self.unnamed_in(ROOT, flags.cast_unsigned(), mode, mask)
    }

    fn unnamed_in(
        &mut self,
        node: u64,
        flags: u32,
        mode: u32,
        mask: u32,
    ) -> Result<(u64, u64), i32> {
        let body = Body::new().u32(flags).u32(mode).u32(mask).u32(0);
        // Linux calls it so.
        let answer = self.ask(TMPFILE, node, &body.bytes(b"/\0").0)?;
        assert_eq!(answer.len(), 128 + 16);
        Ok((u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    fn link(&mut self, node: u64, name: &str) -> Result<u64, i32> {
        let body = Body::new().u64(node).bytes(name.as_bytes()).bytes(&[0]);
        Ok(u64_at(&self.ask(LINK, ROOT, &body.0)?, 0))
    }

    fn release(&mut self, node: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let body = Body::new().u64(handle).u32(0).u32(0).u64(0);
        self.ask(RELEASE, node, &body.0)
    }

    /// What has no answer.
    fn tell(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let length = u32::try_from(40 + body.len()).expect("small");
        let header = Body::new().u32(length).u32(opcode).u64(0x77).u64(node);
        let header = header.u32(0).u32(0).u32(1).u32(0).bytes(body);
        self.driver.space.write(self.request, &header.0);
        self.driver.queues[1].add(&[readable(self.request, length)]);
        self.driver.queues[1].kick();
        assert_eq!(self.driver.wait_used(1).1, 0);
    }

    pub(super) fn forget(&mut self, node: u64, count: u64) {
        self.tell(FORGET, node, &count.to_le_bytes());
    }

    /// Mode, links, size.
    fn attributes(&mut self, node: u64) -> Result<(u32, u32, u64), i32> {
        let known = self.ask(GETATTR, node, &[0; 16])?;
        Ok((u32_at(&known, 76), u32_at(&known, 80), u64_at(&known, 24)))
    }

    /// Descriptors of files of the share that have no name.
    fn kept(&self) -> usize {
        let directory = std::fs::canonicalize(self.directory.path()).expect("path");
        std::fs::read_dir("/proc/self/fd")
            .expect("read")
            .filter_map(|entry| std::fs::read_link(entry.expect("entry").path()).ok())
            .filter(|target| {
                let target = target.to_string_lossy();
                target.ends_with(" (deleted)") && target.starts_with(&*directory.to_string_lossy())
            })
            .count()
    }

    fn names(&self) -> usize {
        std::fs::read_dir(self.directory.path())
            .expect("read")
            .count()
    }
}

#[test]
fn a_file_gets_its_name_later() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.unnamed(READ_WRITE, 0o100_644, 0).expect("make");
    assert_eq!(guest.write(node, handle, b"content"), Ok(7));
    assert_eq!(guest.attributes(node), Ok((0o100_644, 0, 7)));
    assert_eq!(guest.names(), 0);
    // It is the same one under its name, and under another.
    assert_eq!(guest.link(node, "name"), Ok(node));
    assert_eq!(guest.lookup(ROOT, "name"), Ok(node));
    assert_eq!(guest.link(node, "other"), Ok(node));
    assert_eq!(guest.attributes(node), Ok((0o100_644, 2, 7)));
    assert_eq!(guest.link(node, "name"), Err(libc::EEXIST));
    assert_eq!(guest.write(node, handle, b"changed"), Ok(7));
    let content = std::fs::read(guest.path("other")).expect("read");
    assert_eq!(content, b"changed");
    // Opened by that name, beside the file that was opened first.
    let (second, _) = guest.open(node, libc::O_RDWR).expect("open");
    assert_eq!(guest.write(node, second, b"again"), Ok(5));
    assert_eq!(guest.read(node, handle, 0, 100).expect("read"), b"agained");
    assert_eq!(guest.release(node, handle), Ok(Vec::new()));
    assert!(guest.read(node, handle, 0, 100).is_err());
    assert_eq!(guest.read(node, second, 0, 100).expect("read"), b"agained");
    assert_eq!(guest.release(node, second), Ok(Vec::new()));
    assert_eq!(guest.kept(), 0);
    // Four references: from its making, two links, one look.
    guest.forget(node, 3);
    assert_eq!(guest.lookup(ROOT, "name"), Ok(node));
    guest.forget(node, 2);
    assert_eq!(guest.attributes(node), Err(libc::EBADF));
    let anew = guest.lookup(ROOT, "name").expect("lookup");
    assert_eq!(guest.attributes(anew), Ok((0o100_644, 2, 7)));
}

#[test]
fn nothing_is_left_of_a_file_without_a_name() {
    let mut guest = Guest::mounted();
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make"));
    }
    assert_eq!(guest.kept(), 8);
    for (node, handle) in &made {
        guest.write(*node, *handle, b"content").expect("write");
        guest.release(*node, *handle).expect("release");
        // Through /proc/self/fd of the guest.
        let (again, _) = guest.open(*node, libc::O_RDONLY).expect("open");
        assert_eq!(guest.read(*node, again, 0, 9).expect("read"), b"content");
        guest.release(*node, again).expect("release");
        assert_eq!(guest.release(*node, again), Err(libc::EBADF));
    }
    assert_eq!(guest.kept(), 4);
    guest.forget(made[0].0, 1);
    assert_eq!(guest.kept(), 3);
    let two = Body::new().u32(2).u32(0).u64(made[1].0).u64(1);
    guest.tell(BATCH_FORGET, 0, &two.u64(made[2].0).u64(1).0);
    assert_eq!(guest.kept(), 1);
    assert_eq!(guest.attributes(made[0].0), Err(libc::EBADF));
    // A guest that starts anew.
    guest.init();
    assert_eq!(guest.kept(), 0);
    assert_eq!(guest.names(), 0);
}

#[test]
fn it_belongs_to_who_makes_it() {
    let mut guest = Guest::mounted();
    guest.uid = 1234;
    let (node, _) = guest.unnamed(READ_WRITE, 0o100_666, 0o027).expect("make");
    guest.uid = 0;
    assert_eq!(guest.link(node, "mine"), Ok(node));
    let metadata = std::fs::metadata(guest.path("mine")).expect("stat");
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 1234));
    assert_eq!(metadata.mode(), 0o100_640);
    // The server goes on as itself.
    let (node, _) = guest.unnamed(READ_WRITE, 0o100_666, 0).expect("make");
    assert_eq!(guest.link(node, "other"), Ok(node));
    let metadata = std::fs::metadata(guest.path("other")).expect("stat");
    assert_eq!((metadata.uid(), metadata.mode()), (0, 0o100_666));
}

#[test]
fn an_access_list_of_the_directory_comes_before_the_mask() {
    let mut guest = Guest::mounted();
    // acl(5) as an extended attribute: the version, then tag and permissions, and a number that is none.
    let entry = |tag: u32, mode: u32| [tag | mode << 16, u32::MAX];
    let list = [entry(0x01, 7), entry(0x04, 6), entry(0x20, 4)].concat();
    let list = list.into_iter().fold(Body::new().u32(2), Body::u32).0;
    let name = "system.posix_acl_default";
    let flags = rustix::fs::XattrFlags::empty();
    if rustix::fs::setxattr(guest.directory.path(), name, &list, flags).is_err() {
        println!("skipped: the directory for tests lies on a file system without access lists");
        return;
    }
    let (node, _) = guest.unnamed(READ_WRITE, 0o100_666, 0o077).expect("make");
    assert_eq!(guest.attributes(node), Ok((0o100_664, 0, 0)));
}

#[test]
fn exclusive_means_no_name_ever() {
    let mut guest = Guest::mounted();
    let flags = READ_WRITE | libc::O_EXCL;
    let (node, handle) = guest.unnamed(flags, 0o100_600, 0).expect("make");
    assert_eq!(guest.write(node, handle, b"x"), Ok(1));
    assert_eq!(guest.link(node, "name"), Err(libc::ENOENT));
    assert_eq!(guest.attributes(node), Ok((0o100_600, 0, 1)));
    assert_eq!(guest.names(), 0);
}

#[test]
fn no_flag_opens_anything_else() {
    let mut guest = Guest::mounted();
    std::fs::write(guest.path("file"), "x").expect("write");
    let writing = libc::O_RDWR.cast_unsigned();
    let flags = (0..32).map(|bit| 1 << bit | writing);
    for flags in flags.chain([u32::MAX, !libc::O_EXCL.cast_unsigned()]) {
        let (node, _) = guest.unnamed_in(ROOT, flags, u32::MAX, 0).expect("make");
        // A regular file of no name, whatever mode was asked for.
        assert_eq!(guest.attributes(node), Ok((0o107_777, 0, 0)), "{flags:x}");
    }
    assert_eq!(guest.names(), 1);
    let reading = guest.unnamed(libc::O_TMPFILE, 0o600, 0);
    assert_eq!(reading, Err(libc::EINVAL));
    let file = guest.lookup(ROOT, "file").expect("lookup");
    let writing = READ_WRITE.cast_unsigned();
    let nowhere = [(file, libc::ENOTDIR), (12345, libc::EBADF)];
    for (node, error) in nowhere {
        let made = guest.unnamed_in(node, writing, 0o600, 0);
        assert_eq!(made, Err(error));
    }
    let (unnamed, _) = guest.unnamed(READ_WRITE, 0o600, 0).expect("make");
    let made = guest.unnamed_in(unnamed, writing, 0o600, 0);
    assert_eq!(made, Err(libc::ENOTDIR));
    assert!(guest.lookup(unnamed, "file").is_err());
    for body in [&[0; 8][..], &[0xff; 16], &[0xff; 20], &[2; 17]] {
        assert_eq!(guest.ask(TMPFILE, ROOT, body), Err(libc::EINVAL));
    }
    // What follows the name would be for us to understand.
    let body = Body::new().u32(writing).u32(0o600).u64(0).bytes(b"/\0more");
    assert_eq!(guest.ask(TMPFILE, ROOT, &body.0), Err(libc::EINVAL));
}

#[test]
fn attributes_are_set_without_a_name() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make");
    guest.write(node, handle, b"content").expect("write");
    // MODE, UID, GID, SIZE, ATIME, MTIME
    let wanted = Body::new().u32(0x3f).u32(0).u64(0).u64(3).u64(0);
    let wanted = wanted.u64(11).u64(22).u64(0).u32(5).u32(6).u32(0);
    let wanted = wanted.u32(0o4711).u32(0).u32(7).u32(8).u32(0);
    guest.ask(SETATTR, node, &wanted.0).expect("set");
    // No user has the greatest number.
    let nobody = Body::new().u32(6).bytes(&[0xff; 84]);
    guest.ask(SETATTR, node, &nobody.0).expect("set");
    guest
        .ask(
            SETXATTR,
            node,
            &Body::new().u32(4).u32(0).bytes(b"user.a\0four").0,
        )
        .expect("set");
    let size = |size| Body::new().u32(size).u32(0);
    let asked = guest.ask(GETXATTR, node, &size(100).bytes(b"user.a\0").0);
    assert_eq!(asked.expect("get"), b"four");
    let asked = guest.ask(GETXATTR, node, &size(0).bytes(b"user.a\0").0);
    assert_eq!(u32_at(&asked.expect("length"), 0), 4);
    let small = guest.ask(GETXATTR, node, &size(2).bytes(b"user.a\0").0);
    assert_eq!(small, Err(libc::ERANGE));
    assert_eq!(
        guest.ask(LISTXATTR, node, &size(100).0).expect("list"),
        b"user.a\0"
    );
    assert_eq!(guest.link(node, "name"), Ok(node));
    let metadata = std::fs::metadata(guest.path("name")).expect("stat");
    assert_eq!((metadata.uid(), metadata.gid()), (7, 8));
    // Its set-user-id bit went with the owner, as anywhere.
    assert_eq!((metadata.mode(), metadata.size()), (0o100_711, 3));
    let times = (metadata.atime(), metadata.atime_nsec());
    assert_eq!(times, (11, 5));
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (22, 6));
    let node = guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make").0;
    let value = Body::new().u32(1).u32(0).bytes(b"user.b\0x");
    guest.ask(SETXATTR, node, &value.0).expect("set");
    let asked = guest.ask(LISTXATTR, node, &size(0).0);
    assert_eq!(u32_at(&asked.expect("length"), 0), 7);
    guest.ask(REMOVEXATTR, node, b"user.b\0").expect("remove");
    assert_eq!(guest.ask(LISTXATTR, node, &size(100).0).expect("list"), b"");
}

#[test]
fn it_is_a_file_like_others() {
    let mut guest = Guest::mounted();
    let (node, handle) = guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make");
    guest.write(node, handle, b"content").expect("write");
    let sync = Body::new().u64(handle).u32(1).u32(0);
    assert_eq!(guest.ask(FSYNC, node, &sync.0), Ok(Vec::new()));
    let flush = Body::new().u64(handle).u64(0).u64(0);
    assert_eq!(guest.ask(FLUSH, node, &flush.0), Ok(Vec::new()));
    let room = Body::new().u64(handle).u64(0).u64(9000).u64(0);
    guest.ask(FALLOCATE, node, &room.0).expect("allocate");
    assert_eq!(guest.attributes(node), Ok((0o100_600, 0, 9000)));
    let end = Body::new().u64(handle).u64(0);
    let found = guest.ask(LSEEK, node, &end.u32(4).u32(0).0).expect("seek");
    assert!(u64_at(&found, 0) > 0);
    let known = guest.ask(STATFS, node, &[]).expect("statfs");
    let root = guest.ask(STATFS, ROOT, &[]).expect("statfs");
    // Blocks, size of one and of a name.
    assert_eq!(known[..8], root[..8]);
    assert_eq!(known[40..48], root[40..48]);
    // To another file without a name, and to one that has one.
    std::fs::write(guest.path("file"), "").expect("write");
    let named = guest.lookup(ROOT, "file").expect("lookup");
    let (opened, _) = guest.open(named, libc::O_RDWR).expect("open");
    let other = guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make");
    for (node_to, to) in [(named, opened), other] {
        let copy = Body::new().u64(handle).u64(0).u64(node_to).u64(to).u64(0);
        let copied = guest.ask(COPY_FILE_RANGE, node, &copy.u64(7).u64(0).0);
        assert_eq!(u32_at(&copied.expect("copy"), 0), 7);
        assert_eq!(guest.read(node_to, to, 0, 100).expect("read"), b"content");
    }
    // An open file belongs to its node.
    assert_eq!(guest.read(other.0, handle, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(node, opened, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(named, handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn others_are_told_of_what_has_a_name() {
    let mut guest = Guest::mounted();
    let watch = Body::new().u32(0xfff).u32(0);
    let watching = super::super::host::WATCH;
    guest.ask(watching, ROOT, &watch.0).expect("watch");
    let (node, handle) = guest.unnamed(READ_WRITE, 0o100_600, 0).expect("make");
    guest.write(node, handle, b"content").expect("write");
    guest.link(node, "name").expect("link");
    guest.write(node, handle, b"changed").expect("write");
    guest.release(node, handle).expect("release");
    // The first that is told is what another did.
    std::fs::write(guest.path("other"), "").expect("write");
    let events = super::super::host::EVENTS;
    let told = guest.ask(events, ROOT, &Body::new().u32(0).u32(0).0);
    let told = told.expect("events");
    assert_eq!(told[24..29], *b"other", "{told:?}");
}

#[test]
fn their_number_is_limited() {
    let directory = Directory::new();
    let descriptors = File::open("/proc/self/fd").expect("open");
    let files = UnnamedFiles::new(descriptors, 5);
    let root = File::open(directory.path()).expect("open");
    let request = crate::virtio::fs::unnamed::Request {
        context: virtiofsd::filesystem::Context {
            uid: 0.into(),
            gid: 0.into(),
            pid: 0,
        },
        flags: READ_WRITE.cast_unsigned(),
        mode: 0o600,
        mask: 0,
    };
    let make = || files.make(std::os::fd::AsFd::as_fd(&root), &request);
    let first = make().expect("first");
    make().expect("second");
    let refused = make().map(drop).expect_err("too many");
    assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
    assert!(files.release(first.node, first.handle));
    make().expect("third");
}

#[test]
fn a_directory_is_not_opened_so() {
    let mut guest = Guest::mounted();
    let opened = guest.open(ROOT, libc::O_TMPFILE | libc::O_RDWR);
    assert_eq!(opened, Err(libc::EISDIR));
}
