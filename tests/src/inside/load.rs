//! Work on files, timed: prints a line with its name and milliseconds for each part.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::time::{Instant, UNIX_EPOCH};

use anyhow::{Result, ensure};
use rustix::process::{getegid, geteuid};

/// Directories and files in each of a tree like that of a program's source.
const DIRECTORIES: usize = 20;
const FILES: usize = 25;
/// Bytes of the file for reads and writes.
const SIZE: usize = 16 << 20;
/// Bytes at a time, one after the other and anywhere.
const LARGE: usize = 128 << 10;
const SMALL: usize = 4 << 10;
/// How often anywhere.
const TIMES: usize = 2000;

fn timed(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    work()?;
    println!("{name} {:.3}", begun.elapsed().as_secs_f64() * 1000.0);
    Ok(())
}

/// All of it, in a directory that is empty before and after.
pub(super) fn work(directory: &Path) -> Result<()> {
    timed("unpack", || unpack(directory))?;
    timed("look", || look(directory))?;
    timed("remove", || {
        for number in 0..DIRECTORIES {
            fs::remove_dir_all(directory.join(number.to_string()))?;
        }
        Ok(())
    })?;
    let path = directory.join("file");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    let mut large = vec![1; LARGE];
    timed("write", || {
        for offset in (0..SIZE).step_by(LARGE) {
            file.write_all_at(&large, offset as u64)?;
        }
        Ok(())
    })?;
    timed("read", || {
        for offset in (0..SIZE).step_by(LARGE) {
            file.read_exact_at(&mut large, offset as u64)?;
        }
        Ok(())
    })?;
    let mut small = [2; SMALL];
    timed("random_write", || {
        anywhere(|offset| Ok(file.write_all_at(&small, offset)?))
    })?;
    timed("random_read", || {
        anywhere(|offset| Ok(file.read_exact_at(&mut small, offset)?))
    })?;
    timed("sync", || Ok(file.sync_all()?))?;
    drop(file);
    fs::remove_file(path)?;
    Ok(())
}

/// What `tar` does as root: it names each file's owner, and completes directories at the end.
fn unpack(directory: &Path) -> Result<()> {
    let owner = (Some(geteuid().as_raw()), Some(getegid().as_raw()));
    for number in 0..DIRECTORIES {
        let inner = directory.join(number.to_string());
        fs::create_dir(&inner)?;
        for file in 0..FILES {
            let path = inner.join(format!("{file}.c"));
            let open = File::create_new(&path)?;
            open.write_all_at(&[b'x'; 3000], 0)?;
            complete(&open, owner, 0o640)?;
        }
    }
    for number in 0..DIRECTORIES {
        let inner = File::open(directory.join(number.to_string()))?;
        complete(&inner, owner, 0o750)?;
    }
    Ok(())
}

fn complete(file: &File, (user, group): (Option<u32>, Option<u32>), mode: u32) -> Result<()> {
    file.set_modified(UNIX_EPOCH)?;
    fchown(file, user, group)?;
    Ok(file.set_permissions(Permissions::from_mode(mode))?)
}

/// What a build that has nothing to do does.
fn look(directory: &Path) -> Result<()> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory)? {
        for file in fs::read_dir(entry?.path())? {
            bytes += fs::metadata(file?.path())?.size();
        }
    }
    ensure!(
        bytes == (DIRECTORIES * FILES * 3000) as u64,
        "{bytes} bytes"
    );
    Ok(())
}

fn anywhere(mut each: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..TIMES {
        each((random.usize(..SIZE / SMALL) * SMALL) as u64)?;
    }
    Ok(())
}
