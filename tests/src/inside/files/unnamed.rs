//! Files without a name: open(2), O_TMPFILE.

use std::fs::{self, File};
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, XattrFlags};

use super::expect;
use crate::sys::Mapped;

/// Bytes of a file that is held while somebody looks at the free space.
pub(crate) const HELD: usize = 4 << 20;

fn make(directory: &Path, flags: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC | flags;
    Ok(rustix::fs::open(directory, flags, Mode::from(0o640))?.into())
}

/// Gives a file a name, by its descriptor or by /proc.
fn link(file: &File, path: &Path, by_descriptor: bool) -> io::Result<()> {
    if by_descriptor {
        rustix::fs::linkat(file.as_fd(), c"", CWD, path, AtFlags::EMPTY_PATH)?;
    } else {
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
    }
    Ok(())
}

fn all_of(mut file: impl Read + Seek) -> Result<String> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    Ok(text)
}

pub(super) fn without_name(directory: &Path) -> Result<()> {
    let mut file = make(directory, OFlags::empty())?;
    file.write_all(b"written")?;
    let metadata = file.metadata()?;
    ensure!(metadata.nlink() == 0, "links: {}", metadata.nlink());
    ensure!(metadata.mode() == 0o100_640, "mode {:o}", metadata.mode());
    ensure!(all_of(&file)? == "written", "what was written");
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.set_len(3)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 8192)?;
    file.sync_all()?;
    let mapped = Mapped::new(&file, 8192, true)?;
    mapped.write(5000, 7);
    mapped.sync()?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000)?;
    ensure!(byte == [7], "a read after a write to the mapping");
    ensure!(mapped.read(1) == b'r', "the mapping");
    rustix::fs::fstatvfs(&file)?;
    // The mapping alone keeps it, then a descriptor that is open for nothing.
    let metadata = file.metadata()?;
    ensure!(metadata.mode() == 0o100_600, "mode {:o}", metadata.mode());
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    let kept = rustix::fs::open(&own, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    drop(file);
    ensure!(mapped.read(5000) == 7, "the mapping of what is closed");
    drop(mapped);
    let again = File::open(format!("/proc/self/fd/{}", kept.as_raw_fd()))?;
    ensure!(again.metadata()?.ino() == metadata.ino(), "opened again");
    ensure!(again.metadata()?.len() == 8192, "length");
    ensure!(fs::read_dir(directory)?.count() == 0, "a name");

    let reading = OFlags::TMPFILE | OFlags::RDONLY;
    let reading = rustix::fs::open(directory, reading, Mode::empty());
    expect(reading.map_err(io::Error::from), libc::EINVAL)?;
    fs::write(directory.join("file"), "")?;
    let of_file = make(&directory.join("file"), OFlags::empty());
    expect(of_file, libc::ENOTDIR)?;
    expect(make(&directory.join("none"), OFlags::empty()), libc::ENOENT)
}

pub(super) fn named_later(directory: &Path) -> Result<()> {
    for by_descriptor in [false, true] {
        let path = directory.join(format!("name-{by_descriptor}"));
        let mut file = make(directory, OFlags::empty())?;
        file.write_all(b"before")?;
        rustix::fs::fsetxattr(&file, "user.kept", b"value", XattrFlags::empty())?;
        // Two of the same file at once.
        let mapped = Mapped::new(&file, 4096, true)?;
        link(&file, &path, by_descriptor)?;
        let (by_name, opened) = (fs::metadata(&path)?, file.metadata()?);
        ensure!(by_name.ino() == opened.ino(), "another file");
        ensure!(by_name.dev() == opened.dev(), "another file system");
        ensure!(by_name.nlink() == 1 && opened.nlink() == 1, "links");
        ensure!(fs::read(&path)? == b"before", "content");
        file.write_all(b", after")?;
        ensure!(
            fs::read(&path)? == b"before, after",
            "what is written later"
        );
        fs::OpenOptions::new()
            .write(true)
            .open(&path)?
            .write_all_at(b"BEFORE", 0)?;
        ensure!(mapped.read(0) == b'B', "the mapping");
        ensure!(all_of(&file)? == "BEFORE, after", "what another wrote");
        file.set_len(6)?;
        ensure!(fs::metadata(&path)?.len() == 6, "length by name");
        let mut value = [0; 5];
        rustix::fs::getxattr(&path, "user.kept", &mut value[..])?;
        ensure!(&value == b"value", "the extended attribute");
        let other = directory.join("other");
        link(&file, &other, by_descriptor)?;
        ensure!(file.metadata()?.nlink() == 2, "a second name");
        expect(link(&file, &other, by_descriptor), libc::EEXIST)?;
        fs::rename(&other, directory.join("moved"))?;
        fs::remove_file(directory.join("moved"))?;
        drop(file);
        ensure!(fs::read(&path)? == b"BEFORE", "after the close");
    }
    // Never, if that was asked for.
    let file = make(directory, OFlags::EXCL)?;
    let name = directory.join("never");
    for by_descriptor in [false, true] {
        expect(link(&file, &name, by_descriptor), libc::ENOENT)?;
    }
    // A name that is gone does not come back.
    let file = make(directory, OFlags::empty())?;
    link(&file, &name, false)?;
    fs::remove_file(&name)?;
    ensure!(file.metadata()?.nlink() == 0, "links of what is gone");
    expect(link(&file, &name, false), libc::ENOENT)?;
    // A program may be written so.
    let program = directory.join("program");
    let mut file = make(directory, OFlags::empty())?;
    io::copy(&mut File::open("/proc/self/exe")?, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    link(&file, &program, false)?;
    drop(file);
    let output = Command::new(&program).arg("--list").output()?;
    ensure!(output.status.success(), "the program: {output:?}");
    Ok(())
}

/// Holds such a file until it is told to close it, then answers each line.
pub(super) fn held(directory: &Path) -> Result<()> {
    let read_only = Path::new("/read-only");
    expect(make(read_only, OFlags::empty()), libc::EROFS)?;
    let mut file = make(directory, OFlags::EXCL)?;
    file.write_all(&vec![1; HELD])?;
    println!("held");
    let mut lines = io::stdin().lock().lines();
    lines.next();
    drop(file);
    println!("closed");
    for _ in lines {
        fs::read_dir(directory)?.count();
        println!("looked");
    }
    Ok(())
}
