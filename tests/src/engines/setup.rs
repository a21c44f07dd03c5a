//! What an engine needs before the first case: a daemon, an image made here, and everything that it
//! makes once and keeps.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Signal;

use super::engine::{IMAGE, Kind};
use crate::process::Process;
use crate::watch::Watch;

/// What was started, and ends with the program.
#[derive(Default)]
pub(crate) struct Prepared {
    daemon: Option<Process>,
}

impl Prepared {
    /// Makes an engine ready.
    pub(crate) fn engine(&mut self, kind: Kind) -> Result<()> {
        let directory = tempfile::Builder::new()
            .prefix("bulkhead-engines-")
            .tempdir()?;
        let archive = directory.path().join("image.tar");
        image(&directory.path().join("root"), &archive)?;
        if kind == Kind::Docker && self.daemon.is_none() {
            self.daemon = Some(daemon()?);
        }
        let archive = archive.to_str().context("a path of letters")?;
        engine(
            kind,
            &["import", "--change", "CMD [\"sh\"]", archive, IMAGE],
        )?;
        // With its first container an engine makes a bridge, chains of rules and cgroups.
        let first = [
            "run",
            "--rm",
            "--publish",
            "127.0.0.1:65000:80",
            IMAGE,
            "true",
        ];
        match kind {
            Kind::Podman => {
                engine(kind, &[&["--runtime", "crun"], &first[..]].concat())?;
                // With its first pod Podman makes an image for the container that holds one.
                engine(
                    kind,
                    &["pod", "create", "--name", "made-first", "--network", "none"],
                )?;
                engine(kind, &["pod", "rm", "made-first"])
            }
            Kind::Docker => engine(kind, &[&["run", "--runtime", "runc"], &first[1..]].concat()),
        }
    }

    /// Ends what was started.
    pub(crate) fn end(self) -> Result<()> {
        if let Some(mut daemon) = self.daemon {
            daemon.signal(Signal::TERM)?;
            daemon.wait().context("ending the Docker daemon")?;
        }
        Ok(())
    }
}

fn engine(kind: Kind, args: &[&str]) -> Result<()> {
    let mut command = Command::new(kind.program());
    command.args(args);
    Process::spawn(command)?.finish()?.ok()?;
    Ok(())
}

/// A root filesystem of busybox with a few users, as an archive.
fn image(root: &Path, archive: &Path) -> Result<()> {
    for directory in [
        "bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var",
    ] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("copying busybox")?;
    let mut list = Command::new("/bin/busybox");
    list.arg("--list");
    for applet in Process::spawn(list)?.finish()?.ok()?.text().lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home:/bin/sh\n",
    )?;
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nuser:x:1000:\nextra:x:2000:user\n",
    )?;
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(root).arg("-cf").arg(archive).arg(".");
    Process::spawn(tar)?.finish()?.ok()?;
    Ok(())
}

/// A Docker daemon that knows every runtime. Bulkhead is its default, since that is what it builds
/// images with.
fn daemon() -> Result<Process> {
    let log = "/var/log/dockerd.log";
    fs::write(log, "")?;
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec dockerd \"$@\" >{log} 2>&1"), "dockerd"]);
    command.args([
        "--exec-opt",
        "native.cgroupdriver=cgroupfs",
        "--add-runtime",
        "crun=/usr/bin/crun",
    ]);
    command.args([
        "--add-runtime",
        "bulkhead=/opt/bulkhead/bin/bulkhead",
        "--default-runtime",
        "bulkhead",
    ]);
    let changes = Watch::new(Path::new(log))?;
    let mut daemon = Process::spawn(command)?;
    daemon.close_stdin();
    changes
        .wait_until(|| fs::read_to_string(log).is_ok_and(|text| text.contains("API listen on")))
        .with_context(|| {
            format!(
                "waiting for the Docker daemon: {}",
                fs::read_to_string(log).unwrap_or_default()
            )
        })?;
    Ok(daemon)
}
