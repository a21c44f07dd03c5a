//! The serving side: PID 1 of its namespaces.

use std::{
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    sync::Arc,
};

use bulkhead_agent::{container::CGROUP_MOUNT_POINT, guest, sandbox::Sandbox, service};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Serves until killed.
pub(crate) fn run(directory: &Path) -> ! {
    mount(
        "proc",
        "/proc",
        "proc",
        MountFlags::empty(),
        None::<&std::ffi::CStr>,
    )
    .expect("proc");
    enter_cgroup(directory);
    // As in a guest, the share has no flags, whatever the directory's filesystem has.
    let share = directory.join("share");
    mount_bind(&share, &share).expect("bound");
    mount_remount(&share, MountFlags::BIND, "").expect("remounted");
    let listen = |name: &str| {
        let listener = UnixListener::bind(directory.join(name)).expect("bound");
        listener.set_nonblocking(true).expect("set");
        OwnedFd::from(listener)
    };
    let (rpc, stdio) = (listen("rpc"), listen("stdio"));
    println!("ready");
    let surroundings =
        guest::surroundings(&share, Ok(()), &directory.join("sys")).expect("surroundings");
    let sandbox = Arc::new(Sandbox::new(Arc::new(surroundings)));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let served = service::serve(sandbox, service::RpcListener::Unix(rpc), stdio);
    let ended = runtime.expect("runtime").block_on(served);
    eprintln!("{ended:?}");
    std::process::exit(1);
}

/// Makes a cgroup the root of what the agent sees, and mounts it where a guest has its cgroups.
fn enter_cgroup(directory: &Path) {
    let mounted = directory.join("cgroup");
    std::fs::create_dir(&mounted).expect("made");
    let none = None::<&std::ffi::CStr>;
    mount("cgroup2", &mounted, "cgroup2", MountFlags::empty(), none).expect("cgroup2");
    // One per process: emptied cgroups of ended runs are removed on the way.
    for entry in std::fs::read_dir(&mounted).expect("read").flatten() {
        if entry
            .file_name()
            .to_string_lossy()
            .starts_with("bulkhead-test-")
        {
            for below in std::fs::read_dir(entry.path()).expect("read").flatten() {
                let _ = std::fs::remove_dir(below.path());
            }
            let _ = std::fs::remove_dir(entry.path());
        }
    }
    let top = mounted.join(format!("bulkhead-test-{}", monotonic()));
    std::fs::create_dir(&top).expect("made");
    std::fs::write(top.join("cgroup.procs"), "0").expect("moved");
    // SAFETY: only the cgroup namespace changes; there is one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }.expect("cgroup namespace");
    std::fs::create_dir_all(CGROUP_MOUNT_POINT).expect("made");
    // The same filesystem cannot be mounted over itself.
    let _ = unmount(CGROUP_MOUNT_POINT, UnmountFlags::DETACH);
    mount(
        "cgroup2",
        CGROUP_MOUNT_POINT,
        "cgroup2",
        MountFlags::empty(),
        none,
    )
    .expect("cgroup2");
    let agent = Path::new(CGROUP_MOUNT_POINT).join("agent");
    std::fs::create_dir(&agent).expect("made");
    std::fs::write(agent.join("cgroup.procs"), "0").expect("moved");
    bulkhead_agent::container::delegate_controllers().expect("controllers");
}

fn monotonic() -> u64 {
    guest::monotonic_us()
}
