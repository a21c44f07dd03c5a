//! inotify(7) in a container.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

/// Everything but what reading causes.
const CHANGES: WatchFlags = WatchFlags::MODIFY
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);

/// The name of a file that ends the watching.
pub(crate) const LAST: &str = "last";

fn instance() -> Result<OwnedFd> {
    Ok(inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?)
}

/// Watches the paths and prints every event, until a file of the name [`LAST`] is made or nothing
/// happens for too long. Then reads the content of the file that changed last.
pub(super) fn watch(paths: &[&str]) -> Result<()> {
    let inotify = instance()?;
    let mut watched = Vec::new();
    for path in paths {
        let number = inotify::add_watch(&inotify, *path, CHANGES)
            .with_context(|| format!("watching {path}"))?;
        watched.push((number, *path));
    }
    println!("watching");
    print_until_last(&inotify, &watched)
}

fn print_until_last(inotify: &OwnedFd, watched: &[(i32, &str)]) -> Result<()> {
    let begun = Instant::now();
    let mut buffer = [MaybeUninit::uninit(); 8192];
    let mut reader = Reader::new(inotify.as_fd(), &mut buffer);
    let mut cookies = Vec::new();
    loop {
        let event = match reader.next() {
            Ok(event) => event,
            Err(Errno::AGAIN) => {
                if begun.elapsed() > Duration::from_secs(30) {
                    bail!("no file {LAST:?} was seen");
                }
                let second = Timespec {
                    tv_sec: 1,
                    tv_nsec: 0,
                };
                poll(&mut [PollFd::new(inotify, PollFlags::IN)], Some(&second))?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let path = watched.iter().find(|(number, _)| *number == event.wd());
        let path = path.map_or("?", |(_, path)| *path);
        let name = event.file_name().unwrap_or_default().to_string_lossy();
        let cookie = match event.cookie() {
            0 => String::new(),
            cookie => {
                if !cookies.contains(&cookie) {
                    cookies.push(cookie);
                }
                let index = cookies.iter().position(|known| *known == cookie);
                format!(" move {}", index.unwrap_or_default())
            }
        };
        let flags = describe(event.events());
        println!("{path} {flags} {name}{cookie}");
        // What an event tells of is there when it comes.
        if event.events().contains(ReadFlags::CLOSE_WRITE) && !name.is_empty() && name != LAST {
            let content = fs::read_to_string(Path::new(path).join(&*name)).unwrap_or_default();
            println!("content {content}");
        }
        if name == LAST && event.events().contains(ReadFlags::CREATE) {
            return Ok(());
        }
    }
}

fn describe(flags: ReadFlags) -> String {
    let names: Vec<_> = flags.iter_names().map(|(name, _)| name).collect();
    names.join("|")
}

/// Changes things itself, and prints how often it hears of each.
pub(super) fn own_changes(path: &Path) -> Result<()> {
    let inotify = instance()?;
    let watch = inotify::add_watch(&inotify, path, CHANGES)?;
    let name = path.to_string_lossy();
    fs::write(path.join("file"), "content")?;
    fs::rename(path.join("file"), path.join("renamed"))?;
    fs::create_dir(path.join("directory"))?;
    let readable = fs::metadata(path.join("renamed"))?.permissions();
    fs::set_permissions(path.join("renamed"), readable)?;
    fs::hard_link(path.join("renamed"), path.join("link"))?;
    fs::remove_file(path.join("renamed"))?;
    fs::remove_dir(path.join("directory"))?;
    println!("changed");
    print_until_last(&inotify, &[(watch, &name)])
}

/// Watches so many files, ends that, and watches them again: nothing adds up.
pub(super) fn many(path: &Path, count: usize) -> Result<()> {
    for round in 0..3 {
        let inotify = instance()?;
        for number in 0..count {
            let file = path.join(number.to_string());
            if round == 0 {
                fs::write(&file, "")?;
            }
            inotify::add_watch(&inotify, &file, CHANGES)
                .with_context(|| format!("watch {number} of round {round}"))?;
        }
    }
    println!("watched {count} files");
    Ok(())
}
