//! The guest's life as the agent shapes it: ports and greeting first, then mounts, at the end the
//! reset. Only what the greeting promises is done before it; the rest overlaps with the host's
//! first request, which waits in the listener's queue meanwhile.

use std::{io::Write, os::fd::OwnedFd, path::Path, sync::Arc};

use bulkhead_agent_protocol::{Greeting, READY_PORT, RPC_PORT, SHARE_TAG, STDIO_PORT};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{Resource, Rlimit, setrlimit},
    system::{RebootCommand, reboot},
    time::{ClockId, clock_gettime},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr};
use tracing::level_filters::LevelFilter;

use crate::{
    container::{self, CGROUP_MOUNT_POINT, Disks, Surroundings},
    error::{Attempt, Result},
    network::{Bus, Host},
    reaper::Reaper,
    sandbox::Sandbox,
    service, sockets,
    stdio::Streams,
    sys,
};

/// Where the share is mounted in the guest.
const SHARE: &str = "/run/share";

/// How many files the agent may have open: a process takes about six.
const OPEN_FILES: u64 = 65_536;

/// The kernel's own bound (fs.nr_open), for processes whose spec wants more.
const MOST_OPEN_FILES: u64 = 1 << 20;

/// CLOCK_MONOTONIC in microseconds.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let microseconds = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
    u64::try_from(microseconds).unwrap_or(0)
}

/// The level of the agent's log, `BULKHEAD_LOG` in its environment (the kernel passes on what the
/// kernel command line sets).
pub fn log_level() -> LevelFilter {
    std::env::var("BULKHEAD_LOG")
        .ok()
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::WARN)
}

/// Runs the guest, for ever.
pub async fn run(started_us: u64) -> Result<()> {
    let rpc = listen(RPC_PORT)?;
    let stdio = listen(STDIO_PORT)?;
    tokio::spawn(sockets::serve(sockets::listen()?));
    greet(started_us)?;
    prepare()?;
    let surroundings = surroundings(Path::new(SHARE), mount_share(), Path::new("/sys"))?;
    let surroundings = Arc::new(surroundings);
    let sandbox = Arc::new(Sandbox::new(surroundings));
    service::serve(sandbox, rpc.into(), stdio).await
}

fn listen(port: u32) -> Result<OwnedFd> {
    let address = VsockAddr::new(VMADDR_CID_ANY, port);
    let listener = vsock::VsockListener::bind(&address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .or_cannot(|| format!("listen on vsock port {port}"))?;
    Ok(listener.into())
}

fn greet(started_us: u64) -> Result<()> {
    let action = || format!("greet the host at vsock port {READY_PORT}");
    let mut host = vsock::VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, READY_PORT))
        .or_cannot(action)?;
    let greeting = Greeting {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started_us,
        ready_us: monotonic_us(),
    };
    let mut line = serde_json::to_vec(&greeting)
        .map_err(std::io::Error::from)
        .or_cannot(action)?;
    line.push(b'\n');
    host.write_all(&line).or_cannot(action)
}

/// Mounts what containers are made with.
pub fn prepare() -> Result<()> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_once("proc", "/proc", "proc", safe, "")?;
    mount_once("sysfs", "/sys", "sysfs", safe, "")?;
    mount_once(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        "mode=0755",
    )?;
    mount_once("cgroup2", CGROUP_MOUNT_POINT, "cgroup2", safe, "nsdelegate")?;
    mount_once("tmpfs", "/run", "tmpfs", safe, "mode=0755")?;
    mount_once("tmpfs", "/tmp", "tmpfs", safe, "mode=1777")?;
    container::delegate_controllers().or_cannot(|| "hand controllers to cgroups of containers")?;
    sys::raise_loopback().or_cannot(|| "raise the loopback interface")?;
    let files = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(MOST_OPEN_FILES),
    };
    setrlimit(Resource::Nofile, files).or_cannot(|| "raise the limit of open files")
}

/// Mounts unless the kernel has done so.
fn mount_once(source: &str, target: &str, kind: &str, flags: MountFlags, data: &str) -> Result<()> {
    let data = std::ffi::CString::new(data).unwrap_or_default();
    match mount(source, target, kind, flags, data.as_c_str()) {
        Err(Errno::BUSY) => Ok(()),
        mounted => mounted.or_cannot(|| format!("mount {kind} at {target}")),
    }
}

fn mount_share() -> Result<()> {
    let action = || format!("mount the share {SHARE_TAG:?}");
    std::fs::create_dir_all(SHARE).or_cannot(action)?;
    // Root filesystems lie there: their set-user-id programs and devices must work.
    let flags = MountFlags::empty();
    mount(SHARE_TAG, SHARE, "virtiofs", flags, None::<&std::ffi::CStr>).or_cannot(action)
}

/// What set-ups of containers use. A guest may lack a share: then its containers are what fails.
/// Devices are found in the sysfs at `sys`.
pub fn surroundings(share: &Path, mounted: Result<()>, sys: &Path) -> Result<Surroundings> {
    let open = |path: &Path, flags: OFlags| {
        openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty())
            .or_cannot(|| format!("open {}", path.display()))
    };
    Ok(Surroundings {
        share: mounted.map(|()| share.to_owned()),
        proc: open(Path::new("/proc"), OFlags::PATH | OFlags::DIRECTORY)?,
        pid_namespace: open(Path::new("/proc/self/ns/pid"), OFlags::RDONLY)?,
        network: Host {
            namespace: open(Path::new("/proc/self/ns/net"), OFlags::RDONLY)?,
            bus: Bus::new(sys),
        },
        disks: Disks::new(sys),
        reaper: Arc::new(Reaper::default()),
        streams: Arc::new(Streams::default()),
    })
}

/// Ends the guest: what is written is on the host when the machine resets.
pub fn reset() -> Result<()> {
    rustix::fs::sync();
    // Busy or absent, either way its data has just been written out.
    let _ = unmount(SHARE, UnmountFlags::DETACH);
    reboot(RebootCommand::Restart).or_cannot(|| "reset the machine")
}
