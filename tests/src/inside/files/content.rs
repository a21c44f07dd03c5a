//! The content of files: reading, writing, mapping, locking.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use super::{create, expect};
use crate::sys::{LockOf, Mapped, lock};

/// What another process finds: "free" or "taken".
fn seen_by_another(kind: &str, path: &Path) -> Result<String> {
    let output = Command::new("/proc/self/exe")
        .args([super::super::INSIDE, "files", &format!("try-lock-{kind}")])
        .arg(path)
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub(super) fn try_lock(kind: &str, path: &Path) -> Result<()> {
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

pub(super) fn mapped(directory: &Path) -> Result<()> {
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

pub(super) fn allocated(directory: &Path) -> Result<()> {
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

pub(super) fn sparse(directory: &Path) -> Result<()> {
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

pub(super) fn copied(directory: &Path) -> Result<()> {
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

pub(super) fn synced(directory: &Path) -> Result<()> {
    let mut file = create(&directory.join("file"))?;
    file.write_all(b"x")?;
    file.sync_data()?;
    file.sync_all()?;
    File::open(directory)?.sync_all()?;
    rustix::fs::syncfs(&file)?;
    rustix::fs::sync();
    Ok(())
}

pub(super) fn appended(directory: &Path) -> Result<()> {
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

pub(super) fn direct(directory: &Path) -> Result<()> {
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

pub(super) fn locks(directory: &Path) -> Result<()> {
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
