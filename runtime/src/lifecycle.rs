//! Ending a container from outside and removing all that is left of it, whatever state it or its
//! processes were left in.

use std::time::Duration;

use thiserror::Error;

use crate::{
    cgroup::{self, CgroupError},
    hooks::{self, Namespaces},
    network::NetworkError,
    pod::{self, LeaveError, PodError},
    spec::Loaded,
    state::{
        Container, ContainerStatus, Event, MONITOR_LOCK, ProcessIdentity, Record, StateError,
        VMM_LOG,
    },
};

/// How long killed processes may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Something is left.
#[derive(Debug, Error)]
pub enum DestroyError {
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The cgroup failed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The network namespace's interfaces cannot be restored.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Others in the VM cannot be looked for.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// Something is left in the VM, which others keep.
    #[error(transparent)]
    Leave(#[from] LeaveError),
    /// A process that was never recorded does not end.
    #[error("a process of container {0:?} is still there")]
    Left(String),
    /// A process cannot be ended.
    #[error("cannot end the {what}, process {pid}")]
    Process {
        /// Which process.
        what: &'static str,
        /// Its id.
        pid: u32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Ends whatever lives of the container and removes everything of it. Harmless to repeat, and to
/// do twice at once.
pub fn destroy(container: &Container) -> Result<(), DestroyError> {
    let locked = match container.lock() {
        Ok(locked) => locked,
        Err(StateError::Missing(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let record = match container.record() {
        Ok(record) => Some(record),
        // Creation stopped before there was anything but a directory; or nothing is known.
        Err(StateError::Incomplete(_)) => None,
        Err(StateError::Damaged(path, error)) => {
            tracing::warn!(
                "{} is damaged, so nothing of it is used: {error}",
                path.display()
            );
            None
        }
        Err(error) => return Err(error.into()),
    };
    let mut others = Vec::new();
    if let Some(record) = &record {
        // The monitor first: it would report the VM's end as an accident. And before others are
        // looked for, so that of two containers that are removed at once one finds itself the last.
        end("monitor", record.monitor)?;
        end("stand-in", record.process)?;
        others = pod::others(container, record)?;
        if others.is_empty() {
            end("virtual machine", record.vmm)?;
        } else {
            pod::leave(container, record)?;
            pod::pass_on(container, record, &others)?;
        }
        if let Some(traces) = &record.network {
            traces.undo()?;
        }
        cgroup::remove(&record.cgroups)?;
    }
    let config = container.config().ok();
    // A VM that others keep goes on.
    let held = if others.is_empty() {
        &[MONITOR_LOCK, VMM_LOG][..]
    } else {
        &[MONITOR_LOCK]
    };
    let holders: Vec<_> = held
        .iter()
        .filter_map(|name| container.holders(name))
        .collect();
    locked.remove()?;
    // Released first: whoever waits for it finds the container gone, and ends.
    drop(locked);
    for holders in holders {
        if !holders.wait(END_LIMIT) {
            return Err(DestroyError::Left(container.id().to_owned()));
        }
    }
    if let (Some(record), Some(config)) = (record, config) {
        poststop(record, config);
    }
    Ok(())
}

fn end(what: &'static str, process: Option<ProcessIdentity>) -> Result<(), DestroyError> {
    let Some(identity) = process.filter(|process| process.pid != std::process::id()) else {
        return Ok(());
    };
    let failed = |source| DestroyError::Process {
        what,
        pid: identity.pid,
        source,
    };
    if let Some(process) = identity.open().map_err(failed)? {
        process.kill().map_err(failed)?;
        if !process.wait(END_LIMIT).map_err(failed)? {
            return Err(failed(std::io::ErrorKind::TimedOut.into()));
        }
    }
    Ok(())
}

/// runtime-spec, "Lifecycle" 13: after the container is gone; failures are warnings.
fn poststop(mut record: Record, config: Vec<u8>) {
    let Ok(loaded) = Loaded::parse(record.bundle.clone(), config) else {
        return;
    };
    if let Some(next) = record.status.next(Event::Ended) {
        record.status = next;
    }
    let mut view = record.view();
    view.status = ContainerStatus::Stopped;
    view.pid = 0;
    if let Some(hooks) = loaded.spec.hooks() {
        let list = hooks.poststop().as_deref();
        hooks::run_all("poststop", list, &view, Namespaces::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateRoot;
    use std::{path::Path, process::Command};

    #[test]
    fn everything_goes_whatever_was_left() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path().join("state"));
        let cgroup = directory.path().join("cgroup");
        // Cut short at every step of a creation.
        for step in 0..5 {
            let container = root.create("one").unwrap();
            let own = ProcessIdentity::own().unwrap();
            let mut record = Record::new("one", Path::new("/b"), "1.0.0", own);
            let mut children: Vec<_> = (0..2)
                .map(|_| Command::new("sleep").arg("1000").spawn().unwrap())
                .collect();
            let identity = |index: usize| Some(ProcessIdentity::of(children[index].id()).unwrap());
            if step > 1 {
                record.monitor = identity(0);
            }
            if step > 2 {
                std::fs::create_dir(&cgroup).unwrap();
                record.cgroups = vec![cgroup.clone()];
            }
            if step > 3 {
                record.vmm = identity(1);
                std::fs::write(container.path().join("sockets/vsock.sock"), b"").unwrap();
            }
            if step > 0 {
                container.lock().unwrap().write(&record).unwrap();
            }
            destroy(&container).unwrap();
            assert!(!container.path().exists() && !cgroup.exists());
            assert!(step < 2 || children[0].try_wait().unwrap().is_some());
            assert!(step < 4 || children[1].try_wait().unwrap().is_some());
            for child in &mut children {
                let _ = child.kill();
                let _ = child.wait();
            }
            destroy(&container).unwrap();
        }
    }

    #[test]
    fn a_reused_pid_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let container = StateRoot::new(directory.path()).create("one").unwrap();
        let mut stranger = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut other = ProcessIdentity::of(stranger.id()).unwrap();
        other.start_time -= 1;
        let mut record = Record::new(
            "one",
            Path::new("/b"),
            "1.0.0",
            ProcessIdentity::own().unwrap(),
        );
        (record.monitor, record.vmm) = (Some(other), Some(other));
        container.lock().unwrap().write(&record).unwrap();
        destroy(&container).unwrap();
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
