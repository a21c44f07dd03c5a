//! What is known about containers, on disk: one directory each under the state root.
//!
//! ```text
//! <root>/<id>/state.json    the record; replaced by rename, so it is never half written
//!             config.json   the bundle's configuration as it was at `create`, with the resources
//!                           of the last `update`
//!             sockets/      the VM's vsock sockets
//!             vmm.log       what the VMM wrote to its standard error; locked while it lives
//!             monitor.lock  locked by a monitor whose pid is not recorded yet
//! ```
//!
//! A directory without a record is a container whose creation was cut short. Everything is
//! reached through a descriptor of the directory: when the directory has been removed meanwhile,
//! every operation fails, even if another of the same name exists by now.

mod process;
mod record;
mod status;

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use thiserror::Error;

pub use process::{LiveProcess, ProcessIdentity, parent};
pub use record::{Record, View};
pub use status::{ContainerStatus, Event};

use crate::container_id::{self, IdError};

/// Name of the directory of vsock sockets.
pub const SOCKETS: &str = "sockets";
/// Name of the copy of the bundle's configuration.
pub const CONFIG: &str = "config.json";
/// Name of the VMM's log.
pub const VMM_LOG: &str = "vmm.log";
/// Locked by a monitor that waits for its order.
pub const MONITOR_LOCK: &str = "monitor.lock";
const RECORD: &str = "state.json";
const NEW_RECORD: &str = "state.json.new";
const NEW_CONFIG: &str = "config.json.new";

/// A container's state could not be read or written.
#[derive(Debug, Error)]
pub enum StateError {
    /// The id is not one.
    #[error(transparent)]
    Id(#[from] IdError),
    /// runc's words.
    #[error("container with given ID already exists: {0:?}")]
    Exists(String),
    /// runc's words.
    #[error("container does not exist: {0:?}")]
    Missing(String),
    /// Creation was cut short.
    #[error("container {0:?} was never completed; remove it with `delete --force`")]
    Incomplete(String),
    /// The record makes no sense.
    #[error("{0} is damaged; remove the container with `delete --force`")]
    Damaged(PathBuf, #[source] serde_json::Error),
    /// The file system said no.
    #[error("cannot {operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn io_error(
    operation: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> StateError {
    let path = path.into();
    move |source| StateError::Io {
        operation,
        path,
        source,
    }
}

/// The directory that holds all containers.
#[derive(Clone, Debug)]
pub struct StateRoot {
    path: PathBuf,
}

impl StateRoot {
    /// The state root at this path, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directory of a new container; at most one caller can.
    pub fn create(&self, id: &str) -> Result<Container, StateError> {
        use std::os::unix::fs::DirBuilderExt;
        container_id::check(id)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(io_error("create the state directory", &self.path))?;
        let path = self.path.join(id);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| {
                if error.kind() == io::ErrorKind::AlreadyExists {
                    StateError::Exists(id.to_owned())
                } else {
                    io_error("create the container's directory", &path)(error)
                }
            })?;
        let sockets = path.join(SOCKETS);
        let container = self.open(id).and_then(|container| {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&sockets)
                .map_err(io_error("create the directory of sockets", &sockets))?;
            Ok(container)
        });
        if container.is_err() {
            // Empty, and nobody else's: what it is for could not be begun.
            let _ = fs::remove_dir(&path);
        }
        container
    }

    /// The container of this id.
    pub fn open(&self, id: &str) -> Result<Container, StateError> {
        container_id::check(id)?;
        let path = self.path.join(id);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(directory) => Ok(Container {
                id: id.to_owned(),
                path,
                directory,
            }),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
                Err(StateError::Missing(id.to_owned()))
            }
            Err(error) => Err(io_error("open", path)(error.into())),
        }
    }

    /// All containers, by id.
    pub fn list(&self) -> Result<Vec<Container>, StateError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", &self.path)(error)),
        };
        let mut containers = Vec::new();
        for entry in entries {
            let name = entry.map_err(io_error("read", &self.path))?.file_name();
            // What is not a container's directory, or has gone since, is not listed.
            match name.to_str().map(|id| self.open(id)) {
                Some(Ok(container)) => containers.push(container),
                Some(Err(StateError::Missing(_) | StateError::Id(_))) | None => {}
                Some(Err(error)) => return Err(error),
            }
        }
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(containers)
    }
}

/// One container's directory.
#[derive(Debug)]
pub struct Container {
    id: String,
    path: PathBuf,
    directory: OwnedFd,
}

/// Holds a container's lock; dropped, releases it.
#[derive(Debug)]
pub struct Locked<'a> {
    container: &'a Container,
    _lock: OwnedFd,
}

impl Container {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of all containers.
    pub fn root(&self) -> StateRoot {
        StateRoot::new(self.path.parent().unwrap_or(&self.path))
    }

    /// Its directory, open.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Its record as it was written last.
    pub fn record(&self) -> Result<Record, StateError> {
        let bytes = self.read(RECORD).map_err(|error| match error {
            StateError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                StateError::Incomplete(self.id.clone())
            }
            error => error,
        })?;
        serde_json::from_slice(&bytes)
            .map_err(|error| StateError::Damaged(self.path.join(RECORD), error))
    }

    /// The bundle's configuration as it was at `create`.
    pub fn config(&self) -> Result<Vec<u8>, StateError> {
        self.read(CONFIG)
    }

    /// Keeps the bundle's configuration.
    pub fn write_config(&self, bytes: &[u8]) -> Result<(), StateError> {
        self.write(CONFIG, bytes)
    }

    /// Waits for the lock, flock(2) of the directory itself: locking, and so removing, works even
    /// where there is no room for another file.
    pub fn lock(&self) -> Result<Locked<'_>, StateError> {
        let failed = |error: rustix::io::Errno| io_error("lock", &self.path)(error.into());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock =
            rustix::fs::openat(&self.directory, ".", flags, Mode::empty()).map_err(failed)?;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::LockExclusive) {
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(failed(error)),
                Ok(()) => break,
            }
        }
        // It may have been removed meanwhile, and a new one may go by its name.
        if rustix::fs::fstat(&lock).map_err(failed)?.st_nlink == 0 {
            return Err(StateError::Missing(self.id.clone()));
        }
        Ok(Locked {
            container: self,
            _lock: lock,
        })
    }

    /// Opens a file of the directory for appending, made if need be, and locks it for as long as
    /// the open file lives, wherever it is inherited to.
    pub fn open_held(&self, name: &str) -> Result<File, StateError> {
        let flags =
            OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|file| {
                rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                Ok(File::from(file))
            })
            .map_err(|error| io_error("open", self.path.join(name))(error.into()))
    }

    /// The holders of such a file, to be waited for even after it has been removed.
    pub fn holders(&self, name: &str) -> Option<Holders> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty()).ok()?;
        Some(Holders { file })
    }

    /// Reads a file of the directory.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, StateError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut bytes = Vec::new();
        rustix::fs::openat(&self.directory, name, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).read_to_end(&mut bytes))
            .map_err(io_error("read", self.path.join(name)))?;
        Ok(bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let flags =
            OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(io::Error::from)
            .and_then(|file| {
                let mut file = File::from(file);
                file.write_all(bytes)?;
                file.sync_all()
            })
            .map_err(io_error("write", self.path.join(name)))
    }
}

/// Processes that hold a file of [`Container::open_held`].
#[derive(Debug)]
pub struct Holders {
    file: OwnedFd,
}

impl Holders {
    /// Waits until there are none; false when there still are after this time.
    pub fn wait(self, limit: Duration) -> bool {
        // Mostly there are none.
        if rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return true;
        }
        // flock(2) knows no time limit, so a thread waits; it ends with the process.
        let (done, gone) = mpsc::channel();
        thread::spawn(move || {
            while rustix::fs::flock(&self.file, FlockOperation::LockExclusive)
                == Err(rustix::io::Errno::INTR)
            {}
            // Nobody may be waiting any more.
            let _ = done.send(());
        });
        gone.recv_timeout(limit).is_ok()
    }
}

/// Removes what somebody may still put something into: a VMM whose creator was killed before it wrote
/// the VMM down makes its few sockets before it notices.
fn until_empty(mut remove: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    const MOST: usize = 4;
    for _ in 0..MOST {
        match remove() {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            ended => return ended,
        }
    }
    remove()
}

impl Locked<'_> {
    /// Replaces the record.
    pub fn write(&self, record: &Record) -> Result<(), StateError> {
        let container = self.container;
        let path = || container.path.join(RECORD);
        let bytes =
            serde_json::to_vec(record).map_err(|error| StateError::Damaged(path(), error))?;
        container.write(NEW_RECORD, &bytes)?;
        let directory = &container.directory;
        rustix::fs::renameat(directory, NEW_RECORD, directory, RECORD)
            .and_then(|()| rustix::fs::fsync(directory))
            .map_err(|error| io_error("replace", path())(error.into()))
    }

    /// Replaces the configuration: what holds now is no longer what the bundle said.
    pub fn write_config(&self, bytes: &[u8]) -> Result<(), StateError> {
        let container = self.container;
        container.write(NEW_CONFIG, bytes)?;
        let directory = &container.directory;
        rustix::fs::renameat(directory, NEW_CONFIG, directory, CONFIG)
            .and_then(|()| rustix::fs::fsync(directory))
            .map_err(|error| io_error("replace", container.path.join(CONFIG))(error.into()))
    }

    /// Removes the directory. The record goes last, so that a removal that was cut short can be
    /// taken up again.
    pub fn remove(&self) -> Result<(), StateError> {
        let container = self.container;
        let failed = |error| io_error("remove", &container.path)(error);
        let names: Vec<_> = fs::read_dir(&container.path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .map_err(failed)?;
        for name in names.iter().filter(|name| *name != RECORD) {
            let path = container.path.join(name);
            if fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
                until_empty(|| fs::remove_dir_all(&path)).map_err(io_error("remove", path))?;
            } else {
                fs::remove_file(&path).map_err(io_error("remove", path))?;
            }
        }
        match rustix::fs::unlinkat(&container.directory, RECORD, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => {
                return Err(io_error("remove", container.path.join(RECORD))(
                    error.into(),
                ));
            }
        }
        fs::remove_dir(&container.path).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record::new(
            "one",
            Path::new("/b"),
            "1.2.0",
            ProcessIdentity::own().unwrap(),
        )
    }

    #[test]
    fn what_is_put_in_during_removal_is_removed_too() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = directory.path().join("sockets");
        fs::create_dir(&sockets).unwrap();
        let mut late = 2;
        until_empty(|| {
            // As seen by whoever has listed the directory before.
            if late > 0 {
                late -= 1;
                fs::write(sockets.join(late.to_string()), "").unwrap();
                return fs::remove_dir(&sockets);
            }
            fs::remove_dir_all(&sockets)
        })
        .unwrap();
        assert!(!sockets.exists());
        fs::create_dir(&sockets).unwrap();
        fs::write(sockets.join("kept"), "").unwrap();
        assert!(until_empty(|| fs::remove_dir(&sockets)).is_err());
    }

    #[test]
    fn create_find_and_remove() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path().join("deep/root"));
        assert!(root.list().unwrap().is_empty());
        assert!(matches!(root.open("one"), Err(StateError::Missing(_))));
        let container = root.create("one").unwrap();
        assert!(matches!(root.create("one"), Err(StateError::Exists(_))));
        assert!(matches!(container.record(), Err(StateError::Incomplete(_))));
        container.lock().unwrap().write(&record()).unwrap();
        container.write_config(b"{}").unwrap();
        assert_eq!(root.open("one").unwrap().record().unwrap(), record());
        assert_eq!(root.list().unwrap().len(), 1);
        container.lock().unwrap().remove().unwrap();
        assert!(root.list().unwrap().is_empty());
        assert!(!directory.path().join("deep/root/one").exists());
    }

    #[test]
    fn a_removed_container_cannot_be_written_even_if_its_name_is_used_again() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path());
        let old = root.create("one").unwrap();
        old.lock().unwrap().write(&record()).unwrap();
        old.lock().unwrap().remove().unwrap();
        let new = root.create("one").unwrap();
        assert!(matches!(old.lock(), Err(StateError::Missing(_))));
        assert!(matches!(new.record(), Err(StateError::Incomplete(_))));
    }

    #[test]
    fn a_write_that_was_cut_short_leaves_the_old_record() {
        let directory = tempfile::tempdir().unwrap();
        let root = StateRoot::new(directory.path());
        let container = root.create("one").unwrap();
        container.lock().unwrap().write(&record()).unwrap();
        fs::write(container.path().join(NEW_RECORD), b"{\"half").unwrap();
        assert_eq!(container.record().unwrap(), record());
        container.lock().unwrap().remove().unwrap();
        assert!(!container.path().exists());
    }

    #[test]
    fn a_damaged_record_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let container = StateRoot::new(directory.path()).create("one").unwrap();
        fs::write(container.path().join(RECORD), b"{").unwrap();
        assert!(matches!(container.record(), Err(StateError::Damaged(..))));
    }

    #[test]
    fn names_in_the_root_that_are_no_containers_are_left_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), b"").unwrap();
        std::os::unix::fs::symlink("/etc", directory.path().join("link")).unwrap();
        fs::create_dir(directory.path().join("a b")).unwrap();
        assert!(StateRoot::new(directory.path()).list().unwrap().is_empty());
    }
}
