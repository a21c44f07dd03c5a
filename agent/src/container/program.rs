//! From a program's name to `execve`: the search in PATH, HOME, and errors in the words that
//! users of other runtimes know. Runs in the container's root, as the container's user.

use std::{
    ffi::{CStr, CString, OsStr},
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::ErrorKind;
use rustix::{
    fs::{self, Access, AtFlags, CWD, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    error::{Error, Result},
    sys::{self, Never},
};

/// Most of a /etc/passwd that is read.
const PASSWD_LIMIT: u64 = 1 << 20;

/// Finds the file that `name` stands for.
pub(super) fn find(name: &CStr, environment: &[CString]) -> Result<CString> {
    let shown = name.to_string_lossy();
    if name.is_empty() {
        return Err(not_found(&shown, "executable file not found in $PATH"));
    }
    if name.to_bytes().contains(&b'/') {
        return match check(Path::new(OsStr::from_bytes(name.to_bytes()))) {
            Ok(()) => Ok(name.to_owned()),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(not_found(
                &shown,
                &format!("stat {shown}: no such file or directory"),
            )),
            Err(error) => Err(not_executable(&shown, error)),
        };
    }
    let path = value_of(environment, b"PATH").unwrap_or_default();
    let mut refused = None;
    for directory in path.split(|byte| *byte == b':').filter(|d| !d.is_empty()) {
        let candidate =
            PathBuf::from(OsStr::from_bytes(directory)).join(OsStr::from_bytes(name.to_bytes()));
        match check(&candidate) {
            Ok(()) => {
                let candidate = candidate.into_os_string().into_encoded_bytes();
                return CString::new(candidate)
                    .map_err(|_| Error::invalid("process.env PATH", "holds a null character"));
            }
            Err(Errno::ACCESS) => refused = refused.or(Some(candidate)),
            Err(_) => {}
        }
    }
    match refused {
        Some(path) => Err(not_executable(&path.to_string_lossy(), Errno::ACCESS)),
        None => Err(not_found(&shown, "executable file not found in $PATH")),
    }
}

/// Whether the path leads to something that the caller may execute.
fn check(path: &Path) -> rustix::io::Result<()> {
    let status = fs::stat(path)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        return Err(Errno::ISDIR);
    }
    // root passes the kernel's check where any of the three bits is set.
    match fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // The container's filter knows no faccessat2, as profiles of before 2021: execve decides.
        Err(Errno::PERM | Errno::NOSYS) => Ok(()),
        result => result,
    }
}

fn not_found(name: &str, why: &str) -> Error {
    Error::new(ErrorKind::ProgramNotFound, format!("exec: {name:?}: {why}"))
}

fn not_executable(name: &str, error: Errno) -> Error {
    let why = match error {
        Errno::ACCESS | Errno::PERM => "permission denied".to_owned(),
        // Docker knows programs that cannot be run by the last words.
        Errno::ISDIR => "is a directory: permission denied".to_owned(),
        Errno::NOEXEC => "exec format error".to_owned(),
        Errno::LOOP => "too many levels of symbolic links".to_owned(),
        other => other.to_string(),
    };
    Error::new(
        ErrorKind::ProgramNotExecutable,
        format!("exec: {name:?}: {why}"),
    )
}

/// Replaces this process by the program.
pub(super) fn execute(
    program: &CStr,
    arguments: &[CString],
    environment: &[CString],
) -> Result<Never> {
    let error = sys::execute(program, arguments, environment);
    let shown = program.to_string_lossy();
    Err(match Errno::from_io_error(&error) {
        // The file is there (it was found), so its interpreter is not.
        Some(Errno::NOENT) => Error::new(
            ErrorKind::ProgramNotFound,
            format!("exec {shown}: no such file or directory (its interpreter is missing)"),
        ),
        Some(errno) => not_executable(&shown, errno),
        None => not_executable(&shown, Errno::IO),
    })
}

/// The environment, with HOME from /etc/passwd where the spec gives none.
pub(super) fn with_home(mut environment: Vec<CString>, uid: u32) -> Vec<CString> {
    if value_of(&environment, b"HOME").is_none_or(<[u8]>::is_empty) {
        environment.retain(|entry| !entry.to_bytes().starts_with(b"HOME="));
        let home = passwd()
            .ok()
            .and_then(|passwd| home_in(&passwd, uid).map(ToOwned::to_owned))
            .unwrap_or_else(|| "/".to_owned());
        environment.extend(CString::new(format!("HOME={home}")));
    }
    environment
}

fn passwd() -> io::Result<String> {
    // The container's file may be anything: a pipe must not block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = fs::open("/etc/passwd", flags, Mode::empty())?;
    if FileType::from_raw_mode(fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file)
        .take(PASSWD_LIMIT)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The sixth field of the user's line (passwd(5)).
fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.nth(2)? == uid).then(|| fields.nth(2))?
    })
}

fn value_of<'e>(environment: &'e [CString], name: &[u8]) -> Option<&'e [u8]> {
    environment
        .iter()
        .rev()
        .find_map(|entry| entry.to_bytes().strip_prefix(name)?.strip_prefix(b"="))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> CString {
        CString::new(text).expect("text")
    }

    #[test]
    fn programs_are_searched_in_path() {
        let environment = [text("PATH=/nowhere::/bin:/usr/bin")];
        assert_eq!(find(c"sh", &environment).expect("found"), text("/bin/sh"));
        assert_eq!(find(c"/bin/sh", &[]).expect("found"), text("/bin/sh"));
    }

    #[test]
    fn errors_have_the_usual_words() {
        let environment = [text("PATH=/bin")];
        for (name, message, kind) in [
            (
                c"no-such-program",
                r#"exec: "no-such-program": executable file not found in $PATH"#,
                ErrorKind::ProgramNotFound,
            ),
            (
                c"/no/such",
                r#"exec: "/no/such": stat /no/such: no such file or directory"#,
                ErrorKind::ProgramNotFound,
            ),
            (
                c"/etc",
                r#"exec: "/etc": is a directory: permission denied"#,
                ErrorKind::ProgramNotExecutable,
            ),
            (
                c"/etc/passwd",
                r#"exec: "/etc/passwd": permission denied"#,
                ErrorKind::ProgramNotExecutable,
            ),
        ] {
            let error = find(name, &environment).expect_err("not found");
            assert_eq!(error.chain(), message);
            assert_eq!(error.kind(), kind);
        }
    }

    #[test]
    fn home_comes_from_passwd() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33:,,,:/var/www:/bin/sh\n";
        assert_eq!(home_in(passwd, 33), Some("/var/www"));
        assert_eq!(home_in(passwd, 34), None);
        let given = with_home(vec![text("HOME=/given")], 0);
        assert_eq!(given, [text("HOME=/given")]);
    }
}
