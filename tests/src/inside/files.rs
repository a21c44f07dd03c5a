//! What POSIX and Linux promise about files, tried in a directory. Each check cleans up nothing:
//! it has the directory for itself.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Timespec,
    Timestamps, XattrFlags, fallocate, flock, futimens, getxattr, listxattr, mknodat, removexattr,
    renameat_with, setxattr, statvfs,
};

use crate::sys::{LockOf, Mapped, lock};

/// A check.
type Check = fn(&Path) -> Result<()>;

const CHECKS: [(&str, Check); 19] = [
    ("locks", locks),
    ("open-and-gone", open_and_gone),
    ("renames", renames),
    ("unnamed", unnamed),
    ("links", links),
    ("attributes", attributes),
    ("access-lists", access_lists),
    ("mapped", mapped),
    ("allocated", allocated),
    ("sparse", sparse),
    ("copied", copied),
    ("synced", synced),
    ("large-directory", large_directory),
    ("times", times),
    ("space", space),
    ("appended", appended),
    ("direct", direct),
    ("names", names),
    ("special", special),
];

/// The names of all checks.
pub(crate) const NAMES: [&str; 19] = {
    let mut names = [""; 19];
    let mut index = 0;
    while index < names.len() {
        names[index] = CHECKS[index].0;
        index += 1;
    }
    names
};

/// Does one check in a new directory.
pub(super) fn check(name: &str, path: &Path) -> Result<()> {
    // Becomes the other process of the checks that need one.
    if let Some(held) = name.strip_prefix("try-lock-") {
        return try_lock(held, path);
    }
    let Some((_, check)) = CHECKS.iter().find(|(known, _)| *known == name) else {
        bail!("there is no check {name}");
    };
    let directory = path.join(name);
    fs::create_dir(&directory)?;
    check(&directory).with_context(|| name.to_owned())
}

fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create_new(true);
    Ok(options.open(path)?)
}

fn expect<T>(result: io::Result<T>, errno: i32) -> Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        Err(error) => bail!("expected error {errno}, got {error}"),
        Ok(_) => bail!("expected error {errno}, but it worked"),
    }
}

/// What another process finds: "free" or "taken".
fn seen_by_another(kind: &str, path: &Path) -> Result<String> {
    let output = Command::new("/proc/self/exe")
        .args([super::INSIDE, "files", &format!("try-lock-{kind}")])
        .arg(path)
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn try_lock(kind: &str, path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let result = match kind {
        "process" => lock(&file, LockOf::Process, true, (0, 10)),
        "open-file" => lock(&file, LockOf::OpenFile, true, (0, 10)),
        _ => Ok(flock(&file, FlockOperation::NonBlockingLockExclusive)?),
    };
    match result {
        Ok(()) => println!("free"),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            println!("taken");
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn locks(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    let file = create(&path)?;
    lock(&file, LockOf::Process, true, (5, 1))?;
    ensure!(
        seen_by_another("process", &path)? == "taken",
        "of a process"
    );
    ensure!(
        seen_by_another("open-file", &path)? == "taken",
        "of another kind"
    );
    lock(&file, LockOf::Process, false, (0, 0))?;
    ensure!(seen_by_another("process", &path)? == "free", "given up");
    lock(&file, LockOf::OpenFile, true, (0, 0))?;
    ensure!(
        seen_by_another("open-file", &path)? == "taken",
        "of an open file"
    );
    let again = OpenOptions::new().write(true).open(&path)?;
    expect(lock(&again, LockOf::OpenFile, true, (3, 1)), libc::EAGAIN)?;
    // The lock goes with the open file, not with a close of another.
    drop(again);
    ensure!(
        seen_by_another("open-file", &path)? == "taken",
        "after a close"
    );
    drop(file);
    ensure!(
        seen_by_another("open-file", &path)? == "free",
        "after the last close"
    );
    let file = File::open(&path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    if let "free" = seen_by_another("whole", &path)
        .as_deref()
        .unwrap_or("taken")
    {
        bail!("a lock of the whole file is not seen");
    }
    Ok(())
}

fn open_and_gone(directory: &Path) -> Result<()> {
    let (path, other) = (directory.join("file"), directory.join("other"));
    let mut file = create(&path)?;
    file.write_all(b"before")?;
    fs::rename(&path, &other)?;
    file.write_all(b", after")?;
    ensure!(
        fs::read_to_string(&other)? == "before, after",
        "after a rename"
    );
    fs::remove_file(&other)?;
    ensure!(file.metadata()?.nlink() == 0, "links of what is gone");
    file.write_all(b", gone")?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "before, after, gone", "{text}");
    file.set_len(3)?;
    ensure!(file.metadata()?.len() == 3, "length of what is gone");
    // Replaced while it is open.
    let mut old = create(&path)?;
    old.write_all(b"old")?;
    fs::write(&other, "new")?;
    fs::rename(&other, &path)?;
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0)?;
    ensure!(&bytes == b"old" && fs::read(&path)? == b"new", "replaced");
    // A directory that is open.
    let inner = directory.join("inner");
    fs::create_dir(&inner)?;
    let open = File::open(&inner)?;
    fs::remove_dir(&inner)?;
    ensure!(open.metadata()?.is_dir(), "a directory that is gone");
    ensure!(fs::read_dir(directory)?.count() == 1, "what is left");
    Ok(())
}

fn renames(directory: &Path) -> Result<()> {
    let (one, two) = (directory.join("one"), directory.join("two"));
    fs::write(&one, "1")?;
    fs::write(&two, "2")?;
    let with = |flags| renameat_with(CWD, &one, CWD, &two, flags).map_err(io::Error::from);
    expect(with(RenameFlags::NOREPLACE), libc::EEXIST)?;
    with(RenameFlags::EXCHANGE)?;
    ensure!(
        fs::read(&one)? == b"2" && fs::read(&two)? == b"1",
        "exchange"
    );
    fs::create_dir_all(directory.join("a/b"))?;
    expect(
        fs::rename(directory.join("a"), directory.join("a/b/c")),
        libc::EINVAL,
    )?;
    fs::create_dir(directory.join("full"))?;
    fs::write(directory.join("full/x"), "")?;
    expect(
        fs::rename(directory.join("a"), directory.join("full")),
        libc::ENOTEMPTY,
    )?;
    expect(fs::rename(&one, directory.join("a")), libc::EISDIR)?;
    fs::rename(directory.join("a"), directory.join("moved"))?;
    ensure!(directory.join("moved/b").is_dir(), "a directory moved");
    Ok(())
}

/// Files without a name, where the file system has them.
fn unnamed(directory: &Path) -> Result<()> {
    let flags = OFlags::RDWR | OFlags::TMPFILE;
    match rustix::fs::open(directory, flags, Mode::from(0o600)) {
        Ok(fd) => {
            let mut file = File::from(fd);
            file.write_all(b"x")?;
            ensure!(file.metadata()?.nlink() == 0, "links");
        }
        // What programs go by to make one with a name.
        Err(rustix::io::Errno::OPNOTSUPP) => println!("no unnamed files"),
        Err(error) => return Err(error.into()),
    }
    ensure!(fs::read_dir(directory)?.count() == 0, "something is left");
    Ok(())
}

fn links(directory: &Path) -> Result<()> {
    let (file, link) = (directory.join("file"), directory.join("link"));
    fs::write(&file, "content")?;
    fs::hard_link(&file, &link)?;
    let (one, two) = (fs::metadata(&file)?, fs::metadata(&link)?);
    ensure!(
        one.ino() == two.ino() && two.nlink() == 2,
        "one file by two names"
    );
    fs::write(&link, "changed")?;
    ensure!(fs::read(&file)? == b"changed", "content by the other name");
    expect(fs::hard_link(&file, &link), libc::EEXIST)?;
    fs::remove_file(&file)?;
    ensure!(fs::metadata(&link)?.nlink() == 1, "links that are left");
    std::os::unix::fs::symlink("link", directory.join("symbolic"))?;
    ensure!(
        fs::read(directory.join("symbolic"))? == b"changed",
        "through a link"
    );
    std::os::unix::fs::symlink("loop", directory.join("loop"))?;
    expect(fs::read(directory.join("loop")), libc::ELOOP)?;
    Ok(())
}

fn attributes(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    fs::write(&path, "")?;
    setxattr(&path, "user.one", b"first", XattrFlags::CREATE)?;
    let again = setxattr(&path, "user.one", b"x", XattrFlags::CREATE);
    expect(again.map_err(io::Error::from), libc::EEXIST)?;
    setxattr(&path, "user.two", &[7; 2000], XattrFlags::empty())?;
    let mut value = vec![0; 4000];
    let length = getxattr(&path, "user.one", &mut value)?;
    ensure!(&value[..length] == b"first", "value");
    ensure!(
        getxattr(&path, "user.two", &mut value)? == 2000,
        "length of a long value"
    );
    let short = getxattr(&path, "user.two", &mut [0; 10]);
    expect(short.map_err(io::Error::from), libc::ERANGE)?;
    let length = listxattr(&path, &mut value)?;
    let list = String::from_utf8_lossy(&value[..length]).into_owned();
    ensure!(
        list.contains("user.one\0") && list.contains("user.two\0"),
        "{list:?}"
    );
    removexattr(&path, "user.one")?;
    let gone = getxattr(&path, "user.one", &mut value);
    expect(gone.map_err(io::Error::from), libc::ENODATA)?;
    Ok(())
}

/// POSIX access control lists, as the kernel takes them: version, then tag, permissions and id of
/// each entry.
fn access_lists(directory: &Path) -> Result<()> {
    let list = |mask: u16| {
        let mut bytes = 2u32.to_le_bytes().to_vec();
        // user, user 4711, group, mask, others
        let entries = [
            (1u16, 6u16, u32::MAX),
            (2, 4, 4711),
            (4, 4, u32::MAX),
            (0x10, mask, u32::MAX),
            (0x20, 0, u32::MAX),
        ];
        for (tag, permissions, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    };
    let file = directory.join("file");
    fs::write(&file, "")?;
    let flags = XattrFlags::empty();
    setxattr(&file, "system.posix_acl_access", &list(4), flags)?;
    let mode = fs::metadata(&file)?.mode() & 0o777;
    ensure!(mode == 0o640, "mode {mode:o} of a file with a list");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o660))?;
    let mut value = [0; 100];
    let length = getxattr(&file, "system.posix_acl_access", &mut value)?;
    ensure!(value[..length] == list(6)[..], "the mask follows the mode");
    setxattr(directory, "system.posix_acl_default", &list(4), flags)?;
    fs::write(directory.join("inherits"), "")?;
    let inherits = directory.join("inherits");
    let length = getxattr(&inherits, "system.posix_acl_access", &mut value)?;
    ensure!(length == 44, "a list of {length} bytes is inherited");
    Ok(())
}

fn mapped(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    let file = create(&path)?;
    file.set_len(3 * 4096)?;
    let shared = Mapped::new(&file, 3 * 4096, true)?;
    let private = Mapped::new(&file, 3 * 4096, false)?;
    shared.write(5000, 7);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000)?;
    ensure!(byte == [7], "a read after a write to the mapping");
    file.write_all_at(&[9], 9000)?;
    ensure!(shared.read(9000) == 9, "the mapping after a write");
    private.write(100, 1);
    ensure!(
        shared.read(100) == 0,
        "a private mapping keeps what is written"
    );
    shared.sync()?;
    drop((shared, private));
    let content = fs::read(&path)?;
    ensure!(
        (content[5000], content[9000], content[100]) == (7, 9, 0),
        "content"
    );
    Ok(())
}

fn allocated(directory: &Path) -> Result<()> {
    let file = create(&directory.join("file"))?;
    file.write_all_at(&[1; 5 * 4096], 0)?;
    let keep = FallocateFlags::KEEP_SIZE;
    fallocate(&file, keep, 0, 10 * 4096)?;
    ensure!(file.metadata()?.len() == 5 * 4096, "the size is kept");
    ensure!(file.metadata()?.blocks() >= 10 * 8, "space is there");
    fallocate(&file, FallocateFlags::empty(), 0, 12 * 4096)?;
    ensure!(file.metadata()?.len() == 12 * 4096, "the size grows");
    fallocate(&file, FallocateFlags::PUNCH_HOLE | keep, 4096, 2 * 4096)?;
    let mut bytes = [9; 4 * 4096];
    file.read_exact_at(&mut bytes, 0)?;
    let sums: Vec<usize> = bytes
        .chunks(4096)
        .map(|c| c.iter().map(|b| usize::from(*b)).sum())
        .collect();
    ensure!(sums == [4096, 0, 0, 4096], "a hole: {sums:?}");
    match fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096) {
        Ok(()) => {
            file.read_exact_at(&mut bytes, 0)?;
            ensure!(bytes[..4096].iter().all(|b| *b == 0), "zeroed");
        }
        // Not on every file system.
        Err(rustix::io::Errno::OPNOTSUPP) => println!("no zeroing of ranges"),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

fn sparse(directory: &Path) -> Result<()> {
    let file = create(&directory.join("file"))?;
    let data: u64 = 64 << 20;
    file.write_all_at(b"data", data)?;
    ensure!(file.metadata()?.len() == data + 4, "length");
    ensure!(
        file.metadata()?.blocks() * 512 < 1 << 20,
        "it takes little space"
    );
    let seek = |from| rustix::fs::seek(&file, from).map_err(io::Error::from);
    let found = seek(rustix::fs::SeekFrom::Data(0))?;
    ensure!(found <= data && found > data - (2 << 20), "data at {found}");
    ensure!(seek(rustix::fs::SeekFrom::Hole(0))? == 0, "the hole");
    let end = seek(rustix::fs::SeekFrom::Hole(data))?;
    ensure!(end >= data + 4, "the end at {end}");
    expect(seek(rustix::fs::SeekFrom::Data(data + 4096)), libc::ENXIO)?;
    file.set_len(1 << 40)?;
    ensure!(file.metadata()?.len() == 1 << 40, "a large file");
    Ok(())
}

fn copied(directory: &Path) -> Result<()> {
    let (source, target) = (
        create(&directory.join("source"))?,
        create(&directory.join("target"))?,
    );
    let content: Vec<u8> = (0..300_000u32)
        .map(|i| i.to_le_bytes()[i as usize % 3])
        .collect();
    source.write_all_at(&content, 0)?;
    let mut offset = 1000;
    let mut done = 0;
    while offset < content.len() as u64 {
        let copied =
            rustix::fs::copy_file_range(&source, Some(&mut offset), &target, None, 1 << 20)?;
        ensure!(copied > 0, "copying ends early");
        done += copied;
    }
    ensure!(
        fs::read(directory.join("target"))? == content[1000..],
        "what was copied"
    );
    ensure!(done == content.len() - 1000, "how much was copied");
    fs::copy(directory.join("source"), directory.join("third"))?;
    ensure!(
        fs::read(directory.join("third"))? == content,
        "a whole copy"
    );
    Ok(())
}

fn synced(directory: &Path) -> Result<()> {
    let mut file = create(&directory.join("file"))?;
    file.write_all(b"x")?;
    file.sync_data()?;
    file.sync_all()?;
    File::open(directory)?.sync_all()?;
    rustix::fs::syncfs(&file)?;
    rustix::fs::sync();
    Ok(())
}

fn large_directory(directory: &Path) -> Result<()> {
    const COUNT: usize = 50_000;
    for number in 0..COUNT {
        File::create(directory.join(format!("entry-{number}")))?;
    }
    let mut seen = vec![false; COUNT];
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name().into_string().unwrap_or_default();
        let number: usize = name.trim_start_matches("entry-").parse()?;
        ensure!(
            !std::mem::replace(&mut seen[number], true),
            "{name} is there twice"
        );
    }
    ensure!(seen.iter().all(|seen| *seen), "an entry is missing");
    for number in 0..COUNT {
        fs::remove_file(directory.join(format!("entry-{number}")))?;
    }
    ensure!(fs::read_dir(directory)?.count() == 0, "an entry is left");
    Ok(())
}

fn times(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    let file = create(&path)?;
    let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
    let wanted = Timestamps {
        last_access: time(1_000_000_001, 123_456_789),
        last_modification: time(2_147_483_650, 987_654_321),
    };
    futimens(&file, &wanted)?;
    let data = fs::metadata(&path)?;
    ensure!(
        (data.atime(), data.atime_nsec()) == (1_000_000_001, 123_456_789),
        "access"
    );
    ensure!(
        (data.mtime(), data.mtime_nsec()) == (2_147_483_650, 987_654_321),
        "modification"
    );
    let before = data.ctime() * 1_000_000_000 + data.ctime_nsec();
    let omit = Timestamps {
        last_access: time(0, rustix::fs::UTIME_OMIT),
        last_modification: time(0, rustix::fs::UTIME_NOW),
    };
    rustix::fs::utimensat(CWD, &path, &omit, AtFlags::empty())?;
    let data = fs::metadata(&path)?;
    ensure!(data.atime() == 1_000_000_001, "what is left out stays");
    ensure!(
        data.mtime() > 1_700_000_000 && data.mtime() < 2_147_483_650,
        "now"
    );
    ensure!(
        data.ctime() * 1_000_000_000 + data.ctime_nsec() >= before,
        "change"
    );
    let old = fs::metadata(directory)?;
    fs::write(directory.join("another"), "")?;
    let new = fs::metadata(directory)?;
    ensure!(
        (new.mtime(), new.mtime_nsec()) >= (old.mtime(), old.mtime_nsec()),
        "the directory's"
    );
    Ok(())
}

fn space(directory: &Path) -> Result<()> {
    let before = statvfs(directory)?;
    ensure!(
        before.f_blocks > 0 && before.f_bfree > 0 && before.f_namemax == 255,
        "a place of {} blocks",
        before.f_blocks
    );
    let file = create(&directory.join("file"))?;
    file.write_all_at(&[1; 4 << 20], 0)?;
    file.sync_all()?;
    let after = statvfs(directory)?;
    let used = (before.f_bfree - after.f_bfree) * after.f_frsize;
    ensure!(used >= 3 << 20, "4 MiB took {used} bytes");
    Ok(())
}

fn appended(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    fs::write(&path, "0")?;
    let append = || OpenOptions::new().append(true).open(&path);
    let (mut one, mut two) = (append()?, append()?);
    for number in 0..100 {
        one.write_all(format!("a{number};").as_bytes())?;
        two.write_all(format!("b{number};").as_bytes())?;
    }
    let text = fs::read_to_string(&path)?;
    ensure!(
        text.matches(';').count() == 200,
        "{} writes are left",
        text.matches(';').count()
    );
    ensure!(text.starts_with("0a0;b0;a1;"), "in their order");
    Ok(())
}

fn direct(directory: &Path) -> Result<()> {
    let path = directory.join("file");
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true);
    let file = match options.custom_flags(libc::O_DIRECT).open(&path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("no direct access");
            return Ok(());
        }
        file => file?,
    };
    let mut space = vec![0; 3 * 4096];
    let start = space.as_ptr().align_offset(4096);
    let buffer = &mut space[start..start + 2 * 4096];
    buffer.fill(3);
    file.write_all_at(buffer, 0)?;
    ensure!(
        fs::read(&path)? == vec![3; 2 * 4096],
        "written directly, read otherwise"
    );
    OpenOptions::new()
        .write(true)
        .open(&path)?
        .write_all_at(&[4; 4096], 4096)?;
    file.read_exact_at(buffer, 0)?;
    ensure!(
        buffer[4095..4097] == [3, 4],
        "written otherwise, read directly"
    );
    Ok(())
}

fn names(directory: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let long = "n".repeat(255);
    fs::write(directory.join(&long), "x")?;
    ensure!(fs::read(directory.join(&long))? == b"x", "255 bytes");
    expect(
        fs::write(directory.join("n".repeat(256)), ""),
        libc::ENAMETOOLONG,
    )?;
    for name in [
        &b"\xff\xfe not text"[..],
        "schön 中".as_bytes(),
        b"new\nline",
        b"-",
        b"...",
    ] {
        fs::write(directory.join(std::ffi::OsStr::from_bytes(name)), name)?;
    }
    ensure!(fs::read_dir(directory)?.count() == 6, "entries");
    // Deeper than a path can say at once.
    let mut current =
        rustix::fs::open(directory, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty())?;
    for _ in 0..30 {
        rustix::fs::mkdirat(&current, &long, Mode::from(0o755))?;
        let flags = OFlags::DIRECTORY | OFlags::RDONLY;
        current = rustix::fs::openat(&current, &long, flags, Mode::empty())?;
        if File::from(current.try_clone()?).metadata()?.nlink() < 2 {
            bail!("links of a directory");
        }
        // Only the first of each name is the file from above.
        if rustix::fs::statat(&current, "end", AtFlags::empty()).is_ok() {
            bail!("a file that is not there");
        }
    }
    rustix::fs::openat(
        &current,
        "end",
        OFlags::CREATE | OFlags::WRONLY,
        Mode::from(0o644),
    )?;
    Ok(())
}

fn special(directory: &Path) -> Result<()> {
    let place = |name: &str| -> PathBuf { directory.join(name) };
    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        mknodat(CWD, place(name), kind, Mode::from(0o600), 0)?;
    }
    ensure!(fs::metadata(place("fifo"))?.file_type().is_fifo(), "FIFO");
    ensure!(
        fs::metadata(place("socket"))?.file_type().is_socket(),
        "socket"
    );
    let writer = place("fifo");
    let writing = std::thread::spawn(move || fs::write(writer, "through a FIFO"));
    ensure!(
        fs::read_to_string(place("fifo"))? == "through a FIFO",
        "FIFO"
    );
    ensure!(
        writing.join().is_ok_and(|written| written.is_ok()),
        "writing to a FIFO"
    );
    let number = rustix::fs::makedev(1, 3);
    match mknodat(
        CWD,
        place("null"),
        FileType::CharacterDevice,
        Mode::from(0o666),
        number,
    ) {
        Ok(()) => ensure!(
            fs::metadata(place("null"))?.rdev() == number,
            "device number"
        ),
        Err(rustix::io::Errno::PERM) => println!("no devices"),
        Err(error) => return Err(error.into()),
    }
    // Privileges do not survive a change of the content or the owner by others than root.
    let program = place("program");
    fs::write(&program, "x")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o6755))?;
    std::os::unix::fs::chown(&program, Some(1000), Some(1000))?;
    let mode = fs::metadata(&program)?.mode() & 0o7777;
    ensure!(mode == 0o755, "mode {mode:o} after a change of the owner");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o6777))?;
    let file = OpenOptions::new().write(true).open(&program)?;
    as_user(1000, || file.write_all_at(b"y", 0))?;
    let mode = fs::metadata(&program)?.mode() & 0o7777;
    ensure!(mode == 0o777, "mode {mode:o} after a write by a user");
    Ok(())
}

/// Does something on a thread that has become a user without privileges.
fn as_user<T: Send>(uid: u32, task: impl FnOnce() -> io::Result<T> + Send) -> Result<T> {
    let thread = || {
        let (user, group) = (
            rustix::fs::Uid::from_raw(uid),
            rustix::fs::Gid::from_raw(uid),
        );
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)?;
        task()
    };
    let result = std::thread::scope(|scope| scope.spawn(thread).join());
    match result {
        Ok(result) => Ok(result?),
        Err(_) => bail!("a thread panicked"),
    }
}
