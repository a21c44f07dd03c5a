//! What containers may leave behind anywhere on the host: processes, mounts, cgroups, sockets,
//! network interfaces and namespaces, traffic control, files.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

use crate::leftovers;
use crate::process::{DEADLINE, Other, Process};

/// Where runtimes and engines keep a file or directory for each container, and where a mistake
/// would show. Not `/run/docker/netns`, which Docker tidies once a minute only.
const PLACES: [&str; 15] = [
    "/run",
    "/tmp",
    "/root",
    "/run/bulkhead",
    "/run/crun",
    "/run/netns",
    "/run/lock",
    "/run/libpod/exits",
    "/run/containers/storage/overlay-containers",
    "/var/lib/containers/storage/overlay",
    "/var/lib/containers/storage/overlay-containers",
    "/var/lib/containers/storage/volumes",
    "/run/docker/runtime-runc/moby",
    "/run/docker/runtime-bulkhead/moby",
    "/var/lib/docker/containers",
];

/// Podman's own, made with its first volume and kept.
const DEVICE: &str = "/var/lib/containers/storage/volumes/backingFsBlockDev";

/// Podman binds its storage to itself, and keeps that or not.
const PODMANS: &str = "/var/lib/containers/storage/overlay";
/// The host's own network namespace, which Docker binds for the first container in it.
const DOCKERS: &str = "/run/docker/netns/default";

/// RTMGRP_LINK of linux/rtnetlink.h.
const LINKS: u32 = 1;

/// The host at one moment.
pub(crate) struct Host(BTreeSet<String>);

impl Host {
    pub(crate) fn look() -> Result<Self> {
        let mut all = BTreeSet::new();
        all.extend(processes()?.into_iter().map(|(_, text)| text));
        all.extend(lines("/proc/1/mountinfo", "mount", |line| {
            // Ids change, and the order of peer groups does.
            let mut fields = line.split(' ').skip(3);
            let (root, place) = (fields.next()?, fields.next()?);
            let own = [PODMANS, DOCKERS].contains(&place);
            (!own).then(|| format!("{root} at {place}"))
        })?);
        all.extend(lines("/proc/net/unix", "socket", |line| {
            line.split_whitespace().nth(7).map(str::to_owned)
        })?);
        all.extend(
            leftovers::cgroups("")
                .iter()
                .map(|path| format!("cgroup {}", path.display())),
        );
        all.extend(
            leftovers::entries(Path::new("/sys/class/net"))
                .into_iter()
                .map(|name| format!("interface {name}")),
        );
        for place in PLACES {
            let paths = leftovers::entries(Path::new(place)).into_iter();
            let paths = paths.map(|name| format!("{place}/{name}"));
            // A directory of all containers comes with the first and stays.
            all.extend(paths.filter(|path| !PLACES.contains(&path.as_str()) && path != DEVICE));
        }
        let mut control = std::process::Command::new("tc");
        control.args(["qdisc", "show"]);
        let queues = Process::spawn(control)?.finish()?.ok()?.text();
        // `qdisc noqueue 0: dev lo root refcnt 2`: what there is on which interface.
        all.extend(queues.lines().map(|line| {
            format!(
                "traffic control: {}",
                line.split(" root ").next().unwrap_or(line)
            )
        }));
        Ok(Self(all))
    }

    /// Waits until all that has come since then is gone, and tells what is not.
    pub(crate) fn expect_same(&self) -> Result<()> {
        let changes = Changes::watch()?;
        let end = Instant::now() + DEADLINE;
        loop {
            for (pid, text) in processes()? {
                // One that was told to end, or that cleans up behind a container.
                if !self.0.contains(&text)
                    && let Ok(process) = Other::open(pid)
                {
                    process
                        .wait()
                        .with_context(|| format!("left behind: {text}"))?;
                }
            }
            let now = Self::look()?;
            let left: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if left.is_empty() {
                return Ok(());
            }
            // The kernel takes a network namespace apart some time after its last process.
            let time = end
                .saturating_duration_since(Instant::now())
                .min(Duration::from_secs(10));
            ensure!(changes.wait(time)?, "left behind: {}", left.join("; "));
        }
    }
}

/// The ids of the host's processes and how they are called in what is left; kernel threads and
/// zombies are none.
fn processes() -> Result<Vec<(i32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // Kernel threads, their parent 2 and what has ended have no memory, so no command line.
        let line = leftovers::command_line(pid);
        if !line.trim().is_empty() {
            found.push((pid, format!("process {pid}: {line}")));
        }
    }
    Ok(found)
}

fn lines(path: &str, what: &str, name: impl Fn(&str) -> Option<String>) -> Result<Vec<String>> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    Ok(text
        .lines()
        .filter_map(name)
        .map(|name| format!("{what} {name}"))
        .collect())
}

/// Hears of interfaces and mounts that come and go.
struct Changes {
    links: OwnedFd,
    mounts: fs::File,
}

impl Changes {
    fn watch() -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let links = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::bind(&links, &SocketAddrNetlink::new(0, LINKS))?;
        Ok(Self {
            links,
            mounts: fs::File::open("/proc/1/mountinfo")?,
        })
    }

    /// Waits for a change; false: there was none.
    fn wait(&self, time: Duration) -> Result<bool> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.links.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.mounts.as_fd(), PollFlags::PRI),
        ];
        let ready = poll(&mut fds, Some(&Timespec::try_from(time)?))?;
        let mut buffer = [0; 8192];
        while rustix::net::recv(&self.links, &mut buffer, RecvFlags::empty()).is_ok() {}
        Ok(ready > 0)
    }
}
