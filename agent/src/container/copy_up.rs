//! Copies what a directory holds into a new tmpfs that is about to cover it (mount option
//! `tmpcopyup`): files, directories and links with owner and mode. Links are not followed.

use std::{io, os::fd::OwnedFd};

use rustix::fs::{self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, openat};

/// Copies the content of the directory `from` into `to`.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = openat(from, ".", flags, Mode::empty())?;
    let to = openat(to, ".", flags, Mode::empty())?;
    copy_directory(&from, &to)
}

fn copy_directory(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let status = fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(status.st_mode);
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => {
                fs::mkdirat(to, name, mode)?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let below = openat(to, name, flags, Mode::empty())?;
                copy_directory(&openat(from, name, flags, Mode::empty())?, &below)?;
                own(to, name, &status)?;
                fs::fchmod(&below, mode)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut source = std::fs::File::from(openat(from, name, flags, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let target = openat(to, name, flags, mode)?;
                own(to, name, &status)?;
                fs::fchmod(&target, mode)?;
                io::copy(&mut source, &mut std::fs::File::from(target))?;
            }
            FileType::Symlink => {
                let target = fs::readlinkat(from, name, Vec::new())?;
                fs::symlinkat(&target, to, name)?;
                own(to, name, &status)?;
            }
            kind => {
                fs::mknodat(to, name, kind, mode, status.st_rdev)?;
                own(to, name, &status)?;
            }
        }
    }
    Ok(())
}

fn own(directory: &OwnedFd, name: &std::ffi::CStr, status: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    Ok(chownat(
        directory,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}
