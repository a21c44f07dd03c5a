//! What POSIX and Linux promise about files, tried in a directory. Each check cleans up nothing:
//! it has the directory for itself.

mod content;
mod entries;
mod unnamed;

pub(crate) use entries::MANY;
pub(crate) use unnamed::HELD;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// A check.
type Check = fn(&Path) -> Result<()>;

const CHECKS: [(&str, Check); 19] = [
    ("locks", content::locks),
    ("open-and-gone", open_and_gone),
    ("renames", renames),
    ("without-name", unnamed::without_name),
    ("named-later", unnamed::named_later),
    ("links", entries::links),
    ("attributes", entries::attributes),
    ("access-lists", entries::access_lists),
    ("mapped", content::mapped),
    ("allocated", content::allocated),
    ("sparse", content::sparse),
    ("copied", content::copied),
    ("synced", content::synced),
    ("times", entries::times),
    ("space", entries::space),
    ("appended", content::appended),
    ("direct", content::direct),
    ("names", entries::names),
    ("special", entries::special),
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
        return content::try_lock(held, path);
    }
    if name == "unnamed-held" {
        return unnamed::held(path);
    }
    if name == "large-directory" {
        return entries::large(path);
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
