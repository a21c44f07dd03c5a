//! Files that are made here, and told of to whoever looks at them from elsewhere.

use std::collections::HashMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{BufRead, ErrorKind, Write, stdin};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{getegid, geteuid};

/// Files of [`many`].
const FILES: usize = 150;
/// Bytes that a file gets with each `write`.
pub(crate) const PART: usize = 3000;

/// How one of many files looks.
struct Kind {
    length: usize,
    mode: u32,
    changed: SystemTime,
    used: SystemTime,
}

impl Kind {
    fn of(number: usize) -> Self {
        let seconds = |number: usize| Duration::new(number as u64 * 1000 + 1, 123_456_000);
        let lengths = [0, 1, 100, 4095, 4096, 4097, 40_000, 200_000];
        Self {
            length: lengths[number % lengths.len()],
            mode: [0o600, 0o644, 0o755, 0o4711, 0o2755][number % 5],
            changed: SystemTime::UNIX_EPOCH + seconds(number),
            used: SystemTime::UNIX_EPOCH + seconds(2 * number),
        }
    }
}

fn content(number: usize, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at * 7 + at / 256 + number).to_le_bytes()[0])
        .collect()
}

/// As an archive is unpacked: in several orders.
fn many(directory: &Path) -> Result<()> {
    for number in 0..FILES {
        let kind = Kind::of(number);
        let file = File::create_new(directory.join(number.to_string()))?;
        let bytes = content(number, kind.length);
        let set = |file: &File| -> Result<()> {
            file.set_permissions(Permissions::from_mode(kind.mode))?;
            let times = FileTimes::new().set_modified(kind.changed);
            Ok(file.set_times(times.set_accessed(kind.used))?)
        };
        match number % 3 {
            0 => file.write_all_at(&bytes, 0)?,
            1 => {
                // The last part first.
                let middle = bytes.len() / 2;
                file.write_all_at(&bytes[middle..], middle as u64)?;
                file.write_all_at(&bytes[..middle], 0)?;
            }
            _ => {
                file.set_permissions(Permissions::from_mode(0o666))?;
                file.write_all_at(&bytes, 0)?;
                let again = file.try_clone()?;
                set(&again)?;
            }
        }
        // The owner that it has already, before and after the rest: bits of the mode may go with that.
        if number % 2 == 0 {
            own(&file)?;
        } else {
            set(&file)?;
            own(&file)?;
        }
        set(&file)?;
    }
    Ok(())
}

fn own(file: &File) -> Result<()> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    Ok(fchown(file, Some(user), Some(group))?)
}

/// Whether they are all there, as they are to be; for `fresh`, nobody has read them yet.
pub(crate) fn check_many(directory: &Path, fresh: bool) -> Result<()> {
    for number in 0..FILES {
        let kind = Kind::of(number);
        let path = directory.join(number.to_string());
        // Before the file is opened, which may make who has it say more.
        let known = fs::metadata(&path).with_context(|| format!("file {number}"))?;
        let found = (known.len(), known.mode() & 0o7777, known.modified()?);
        let expected = (kind.length as u64, kind.mode, kind.changed);
        ensure!(
            found == expected,
            "file {number}: {found:?} in place of {expected:?}"
        );
        let is_used = !fresh || known.accessed()? == kind.used;
        ensure!(is_used, "file {number}: last use");
        ensure!(
            fs::read(&path)? == content(number, kind.length),
            "file {number}: another content"
        );
    }
    Ok(())
}

/// Bytes of so many parts.
pub(crate) fn parts(count: usize) -> Vec<u8> {
    content(0, count * PART)
}

/// Does what it is told, a line each, and says so by the line's number.
pub(super) fn obey(directory: &Path) -> Result<()> {
    let mut open: HashMap<String, (File, usize)> = HashMap::new();
    for (number, line) in (1..).zip(stdin().lock().lines()) {
        let line: String = line?;
        let mut words = line.split(' ');
        let (verb, name) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
        let path = directory.join(name);
        let file = || open.get(name).context("no such file is open");
        match verb {
            "many" => many(directory)?,
            "check" => check_many(Path::new(name), false)?,
            "create" => {
                open.insert(name.into(), (File::create_new(&path)?, 0));
            }
            "write" => {
                let (file, written) = open.get_mut(name).context("no such file is open")?;
                let bytes = parts(*written + 1);
                file.write_all_at(&bytes[*written * PART..], (*written * PART) as u64)?;
                *written += 1;
            }
            "hide" => file()?.0.set_permissions(Permissions::from_mode(0o600))?,
            "set-id" => file()?.0.set_permissions(Permissions::from_mode(0o6755))?,
            "own" => own(&file()?.0)?,
            "sync" => file()?.0.sync_all()?,
            "close" => drop(open.remove(name)),
            "steady" => steady(file()?, &path)?,
            "replace" => {
                let new = directory.join("new");
                File::create_new(&new)?.write_all(&parts(1))?;
                fs::rename(new, path)?;
            }
            "rename" => fs::rename(&path, directory.join(words.next().unwrap_or("")))?,
            "link" => fs::hard_link(&path, directory.join(words.next().unwrap_or("")))?,
            "fill" => println!("{}", fill(&path)?),
            other => bail!("{other:?}"),
        }
        println!("{number} done");
    }
    Ok(())
}

/// What a program has been told of a file that it has open stays so when it closes it (git's index relies on that).
fn steady((file, _): &(File, usize), path: &Path) -> Result<()> {
    let state = |known: fs::Metadata| {
        let changed = (known.ctime(), known.ctime_nsec());
        (known.len(), known.mtime(), known.mtime_nsec(), changed)
    };
    let before = state(file.metadata()?);
    std::thread::sleep(Duration::from_millis(1500));
    let after = state(fs::metadata(path)?);
    ensure!(before == after, "{before:?} has become {after:?}");
    Ok(())
}

/// Writes until there is no room; says who was told.
fn fill(path: &Path) -> Result<&'static str> {
    let mut file = File::create_new(path)?;
    let full = |error: &std::io::Error| error.kind() == ErrorKind::StorageFull;
    for _ in 0..64 {
        match file.write_all(&[1; 256 << 10]) {
            Ok(()) => {}
            Err(error) if full(&error) => return Ok("full at write"),
            Err(error) => return Err(error.into()),
        }
    }
    match file.sync_all() {
        Err(error) if full(&error) => Ok("full at sync"),
        other => {
            other?;
            Ok("never full")
        }
    }
}
