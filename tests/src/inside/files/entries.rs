//! Directories, and what stands beside the content of files: names, links, attributes, times.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags, futimens, getxattr,
    listxattr, mknodat, removexattr, setxattr, statvfs,
};

use super::{create, expect};

pub(super) fn times(directory: &Path) -> Result<()> {
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

pub(super) fn space(directory: &Path) -> Result<()> {
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

pub(super) fn names(directory: &Path) -> Result<()> {
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
    let long = "d".repeat(255);
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

pub(super) fn special(directory: &Path) -> Result<()> {
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

/// Entries of a directory that the host has filled.
pub(crate) const MANY: usize = 50_000;

/// Reads all names of a directory with so many, while some come and go.
pub(super) fn large(directory: &Path) -> Result<()> {
    let mut seen = vec![false; MANY];
    for (index, entry) in fs::read_dir(directory)?.enumerate() {
        let name = entry?.file_name().into_string().unwrap_or_default();
        if index % 500 == 0 {
            fs::write(directory.join(format!("new-{index}")), "")?;
        }
        let Some(number) = name.strip_prefix("entry-") else {
            continue;
        };
        let number: usize = number.parse()?;
        ensure!(
            !std::mem::replace(&mut seen[number], true),
            "{name} is there twice"
        );
    }
    ensure!(seen.iter().all(|seen| *seen), "an entry is missing");
    for index in (0..MANY).step_by(500) {
        fs::remove_file(directory.join(format!("entry-{index}")))?;
    }
    let left = fs::read_dir(directory)?.count();
    ensure!(left >= MANY, "{left} entries are left");
    println!("all {MANY} were there");
    Ok(())
}

/// POSIX access control lists, as the kernel takes them: version, then tag, permissions and id of
/// each entry.
pub(super) fn access_lists(directory: &Path) -> Result<()> {
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

pub(super) fn attributes(directory: &Path) -> Result<()> {
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

pub(super) fn links(directory: &Path) -> Result<()> {
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
