//! What the tests' own program does when it runs in a container: the calls that no applet of
//! busybox makes. Prints what it finds; fails with the reason.

mod files;
mod load;
mod making;
mod sockets;
mod watching;
mod writing;

pub(crate) use files::{HELD, MANY, NAMES as FILE_CHECKS};
pub(crate) use making::{check_many, parts};
pub(crate) use watching::LAST;
pub(crate) use writing::{digest, pages};

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::bundle::Bundle;

/// First argument of the program in a container.
pub(crate) const INSIDE: &str = "--inside";
/// Where it lies there.
const PROGRAM: &str = "/bin/inside";

impl Bundle {
    /// The container's process is this program, with these arguments.
    pub(crate) fn inside(self, args: &[&str]) -> Result<Self> {
        let rootfs = self.rootfs();
        let place = rootfs.join(PROGRAM.trim_start_matches('/'));
        std::fs::copy("/proc/self/exe", place).context("copying this program into a container")?;
        Ok(self.args(&[&[PROGRAM, INSIDE], args].concat()))
    }
}

/// The program in a container.
pub(crate) fn main(args: &[String]) -> ExitCode {
    match perform(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(args: &[String]) -> Result<()> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["files", check, path] => files::check(check, Path::new(path)),
        ["load", path] => load::work(Path::new(path)),
        ["ask", path, question] => sockets::ask(Path::new(path), question),
        ["exchange", path, mib] => sockets::exchange(Path::new(path), mib.parse()?),
        ["many", path, count] => sockets::many(Path::new(path), count.parse()?),
        ["abandoned", path] => sockets::abandoned(Path::new(path)),
        ["echo-datagrams", port] => sockets::echo_datagrams(port.parse()?),
        ["own-socket", path] => sockets::own(Path::new(path)),
        ["watch", paths @ ..] => watching::watch(paths),
        ["watch-own-changes", path] => watching::own_changes(Path::new(path)),
        ["watch-many", path, count] => watching::many(Path::new(path), count.parse()?),
        ["make", path] => making::obey(Path::new(path)),
        ["write", path] => writing::obey(Path::new(path)),
        ["write-randomly", path, seed] => writing::random(Path::new(path), seed.parse()?),
        _ => bail!("{args:?} is nothing that this program does in a container"),
    }
}
