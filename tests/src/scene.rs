//! The surroundings of one test: a runtime with a state directory of its own, a tmpfs for bundles
//! in a private mount namespace, and the promise that all of it is gone afterwards.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::leftovers::{self, Before};
use crate::process::{Other, Output, Process};
use crate::runtime::Runtime;

/// A reason not to run a test here.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends the test as skipped.
pub(crate) fn skip<T>(why: impl Into<String>) -> Result<T> {
    Err(Skip(why.into()).into())
}

/// What `clean_up` needs, wherever the test is when it ends.
static CLEAN_UP: OnceLock<(Runtime, PathBuf)> = OnceLock::new();

/// What a test works with.
pub(crate) struct Scene {
    pub(crate) runtime: Runtime,
    /// A tmpfs that only this test sees.
    pub(crate) directory: PathBuf,
    /// The runtime's state directory.
    pub(crate) root: PathBuf,
    /// Begins the name of every container and cgroup.
    pub(crate) prefix: String,
    count: Cell<u32>,
    before: Before,
}

impl Scene {
    /// Prepares this process, which must have a single thread. `directory` is empty.
    pub(crate) fn enter(runtime: Runtime, directory: &Path) -> Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .context("adopting orphans")?;
        crate::sys::leave_mount_namespace().context("making a mount namespace (are you root?)")?;
        // Cut off from the host first, then shared again: a runtime that lets its mounts propagate
        // is found out as it would be on a host run by systemd.
        let recursive = MountPropagationFlags::REC;
        for kind in [
            MountPropagationFlags::PRIVATE,
            MountPropagationFlags::SHARED,
        ] {
            rustix::mount::mount_change("/", kind | recursive)?;
        }
        if runtime == Runtime::Crun && !crate::runtime::unified_cgroups() {
            // crun refuses hosts that have version 1 and a second, unified hierarchy.
            let _ = rustix::mount::unmount("/sys/fs/cgroup/unified", UnmountFlags::empty());
        }
        let data = Some(c"mode=755");
        rustix::mount::mount("tests", directory, "tmpfs", MountFlags::empty(), data)
            .with_context(|| format!("mounting a tmpfs on {}", directory.display()))?;
        let directory = fs::canonicalize(directory)?;
        let root = directory.join("state");
        let _ = CLEAN_UP.set((runtime, root.clone()));
        Ok(Self {
            runtime,
            directory,
            root,
            prefix: format!("bt{}-", std::process::id()),
            count: Cell::new(0),
            before: Before::take()?,
        })
    }

    /// A new name for a container.
    pub(crate) fn id(&self) -> String {
        self.count.set(self.count.get() + 1);
        format!("{}{}", self.prefix, self.count.get())
    }

    /// A new bundle; its cgroup is named after the test.
    pub(crate) fn bundle(&self) -> Result<Bundle> {
        let name = self.id();
        Bundle::new(
            self.directory.join("bundles").join(&name),
            &format!("/{name}"),
        )
    }

    /// A file of the test's own.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes an executable script on the host.
    pub(crate) fn script(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// The runtime with the test's state directory and these arguments.
    pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(self.runtime.program());
        command
            .arg("--root")
            .arg(&self.root)
            .args(args)
            .current_dir(&self.directory);
        command
    }

    /// Runs the runtime to its end; standard input is empty.
    pub(crate) fn call<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Result<Output> {
        Process::spawn(self.command(args))?.finish()
    }

    /// `run`s a bundle to its end.
    pub(crate) fn run(&self, bundle: &Bundle) -> Result<Output> {
        self.start_run(bundle)?.finish()
    }

    /// `run`s a bundle in the foreground; the streams are the test's.
    pub(crate) fn start_run(&self, bundle: &Bundle) -> Result<Process> {
        Ok(self.start_named(bundle)?.1)
    }

    /// The same, with the container's name.
    pub(crate) fn start_named(&self, bundle: &Bundle) -> Result<(String, Process)> {
        bundle.write()?;
        self.start_as_it_is(bundle)
    }

    /// The same, with the config.json that lies in the bundle.
    fn start_as_it_is(&self, bundle: &Bundle) -> Result<(String, Process)> {
        let id = self.id();
        let mut command = self.command(&["run", "--bundle"]);
        command.arg(&bundle.path).arg(&id);
        Ok((id, Process::spawn(command)?))
    }

    /// `run`s a bundle to its end, with the config.json that lies in it.
    pub(crate) fn run_as_it_is(&self, bundle: &Bundle) -> Result<Output> {
        self.start_as_it_is(bundle)?.1.finish()
    }

    /// `run`s a shell script in a fresh bundle to its end.
    pub(crate) fn run_script(&self, script: &str) -> Result<Output> {
        self.run(&self.bundle()?.shell(script))
    }

    /// `create`s a container; its streams are those of the returned process, which has ended.
    pub(crate) fn create(&self, bundle: &Bundle) -> Result<Created> {
        bundle.write()?;
        let id = self.id();
        let pid_file = self.path(&format!("{id}.pid"));
        let mut command = self.command(&["create", "--bundle"]);
        command
            .arg(&bundle.path)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(&id);
        let mut streams = Process::spawn(command)?;
        let status = streams.wait()?;
        ensure!(status.success(), "create: {status}: {}", streams.stderr());
        let pid = read_pid(&pid_file)?;
        Ok(Created { id, pid, streams })
    }

    /// Creates and starts a container.
    pub(crate) fn start(&self, bundle: &Bundle) -> Result<Created> {
        let created = self.create(bundle)?;
        self.call(&["start", &created.id])?.ok()?;
        Ok(created)
    }

    /// The `state` of a container.
    pub(crate) fn state(&self, id: &str) -> Result<Value> {
        let output = self.call(&["state", id])?.ok()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("no JSON: {output}"))
    }

    /// Checks the status in `state`.
    pub(crate) fn expect_status(&self, id: &str, status: &str) -> Result<()> {
        let state = self.state(id)?;
        ensure!(
            state["status"] == status,
            "expected the status {status}: {state}"
        );
        Ok(())
    }

    /// `delete --force`.
    pub(crate) fn destroy(&self, id: &str) -> Result<()> {
        self.call(&["delete", "--force", id])?.ok()?;
        Ok(())
    }

    /// Checks that nothing is left of the containers so far.
    pub(crate) fn expect_nothing_left(&self) -> Result<()> {
        self.before.check(&self.root, &self.prefix)
    }
}

/// A container made by `create`.
pub(crate) struct Created {
    pub(crate) id: String,
    /// From the pid file.
    pub(crate) pid: i32,
    /// Holds the container's streams.
    pub(crate) streams: Process,
}

impl Created {
    /// Its process as the host sees it.
    pub(crate) fn process(&self) -> Result<Other> {
        Other::open(self.pid)
    }
}

/// The number in a pid file.
pub(crate) fn read_pid(path: &Path) -> Result<i32> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let Ok(pid) = text.trim().parse() else {
        bail!("{} holds {text:?}, not a process id", path.display());
    };
    ensure!(
        text.trim() == text,
        "{} holds more than a number: {text:?}",
        path.display()
    );
    Ok(pid)
}

/// Removes whatever the test has left, whatever state it is in.
pub(crate) fn clean_up() {
    let Some((runtime, root)) = CLEAN_UP.get() else {
        return;
    };
    for id in leftovers::entries(root) {
        let mut command = Command::new(runtime.program());
        command
            .arg("--root")
            .arg(root)
            .args(["delete", "--force", &id]);
        let silent = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Ok(mut child) = silent.spawn()
            && let Ok(pid) = i32::try_from(child.id())
        {
            let in_time = Other::open(pid).is_ok_and(|process| process.wait().is_ok());
            if !in_time {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
    leftovers::end_descendants();
    // Deepest first, and a cgroup that has just lost its last process goes at once.
    let mut cgroups = leftovers::cgroups(&format!("bt{}-", std::process::id()));
    cgroups.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for cgroup in cgroups {
        let _ = fs::remove_dir(cgroup);
    }
}
