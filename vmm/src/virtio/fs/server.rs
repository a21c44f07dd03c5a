//! The file server: what it may do and how it answers, and its state as bytes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::{MemfdFlags, Mode, memfd_create};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use virtiofsd::filesystem::SerializableFileSystem;
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, MigrationMode, MigrationOnError, NegotiationMode,
    PassthroughFs,
};
use virtiofsd::server::Server;

use super::host::HostSide;
use super::tree::Tree;
use super::unnamed::UnnamedFiles;
use crate::virtio::host_connections::HostConnections;

/// How long the guest may believe what it knows of a name or an inode. What the host changes is
/// seen after this at the latest.
const VALIDITY: Duration = Duration::from_secs(1);
/// Descriptors kept for the rest of the process: vsock connections, disks, vCPUs, events.
const RESERVED_FILES: u64 = 2048;
/// Descriptors that there is room for from the beginning (8 bytes each in the kernel).
const FILES_AT_ONCE: i32 = 4096;
/// The limit to aim for: Linux's default of fs.nr_open.
const MOST_FILES: u64 = 1 << 20;
/// Descriptors that the guest may always have.
const LEAST_FILES: u64 = 1024;
/// Descriptors of files without a name, of those that the guest may have.
const MOST_UNNAMED: u64 = 8192;
/// More than any snapshot of a server's state has a use for.
const MOST_STATE: u64 = 256 << 20;

/// What is served.
#[derive(Debug)]
pub struct Share {
    /// The directory that becomes the guest's root of the share, as the process sees it.
    pub root: PathBuf,
    /// `/proc/self/fd` of this process, opened with O_PATH before the jail hides it: files are
    /// opened for use through it.
    pub proc_self_fd: File,
    /// Where connections to sockets in the share wait for the guest.
    pub connections: HostConnections,
}

/// The file server.
pub(super) type FileServer = Server<Tree>;

/// Makes the server; to be called before the process has threads. Every inode that the guest knows
/// holds a descriptor: see [`raise_open_files`].
pub(super) fn new(share: Share) -> io::Result<(FileServer, Tree, HostSide)> {
    let root_dir = share.root.into_os_string().into_string().map_err(|path| {
        let message = format!("the path {} is not UTF-8", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })?;
    make_room_for_files(&share.proc_self_fd)?;
    let descriptors = share.proc_self_fd.try_clone()?;
    let available = open_files().saturating_sub(RESERVED_FILES);
    let unnamed = (available / 8).min(MOST_UNNAMED);
    let unnamed_files = UnnamedFiles::new(
        descriptors.try_clone()?,
        usize::try_from(unnamed).unwrap_or(0),
    );
    let config = Config {
        root_dir,
        proc_sfd_rawfd: Some(share.proc_self_fd),
        guest_fd_limit: (available - unnamed).max(LEAST_FILES),
        ..settings()
    };
    // The library clears the mask of the whole process: only the server's thread shall have that.
    let mask = umask(Mode::empty());
    let files = PassthroughFs::new(config);
    umask(mask);
    let tree = Tree::new(files?, unnamed_files, VALIDITY);
    let host = HostSide::new(tree.clone(), descriptors, share.connections);
    Ok((Server::new(tree.clone()), tree, host))
}

/// Settings that do not depend on what is shared; docs/decisions/0001 has the reasons.
fn settings() -> Config {
    Config {
        entry_timeout: VALIDITY,
        attr_timeout: VALIDITY,
        // Pages outlive an open. With AUTO_INVAL_DATA, which the library negotiates, the guest
        // drops them when it sees that a file has changed.
        cache_policy: CachePolicy::Always,
        writeback: false,
        xattr: true,
        posix_acl: NegotiationMode::Auto,
        killpriv_v2: true,
        announce_submounts: true,
        readdirplus: true,
        // Opening by handle needs CAP_DAC_READ_SEARCH, with which a process that is broken into
        // could open any file of the file systems that it sees a part of.
        inode_file_handles: InodeFileHandlesMode::Never,
        migration_mode: MigrationMode::FindPaths,
        migration_confirm_paths: true,
        // A file that is gone is an error to who uses it, not a reason to lose the snapshot.
        migration_on_error: MigrationOnError::GuestError,
        ..Config::default()
    }
}

/// The server's state: the inodes that the guest knows, by path, and its open files.
pub(super) fn save(server: &FileServer) -> io::Result<Vec<u8>> {
    server.prepare_serialization(Arc::new(AtomicBool::new(false)));
    let mut file = memory_file()?;
    server.serialize(file.try_clone()?)?;
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Puts the state back; files are found by their paths.
pub(super) fn restore(server: &FileServer, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() as u64 > MOST_STATE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut file = memory_file()?;
    file.write_all(bytes)?;
    file.seek(SeekFrom::Start(0))?;
    server.deserialize_and_apply(file)
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create("file server", MemfdFlags::CLOEXEC)?.into())
}

/// Makes the process's table of descriptors large now: in a process with threads each doubling waits
/// for an RCU grace period, which takes as long as the start of a container's process.
fn make_room_for_files(file: &File) -> io::Result<()> {
    match fcntl_dupfd_cloexec(file, FILES_AT_ONCE - 1) {
        Ok(_) => Ok(()),
        // A lower limit on open files: there is less to make room for.
        Err(Errno::INVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Raises the limit on open files: to what a share may need if the process may do that, else as far
/// as it may. To be called before the jail takes the capability.
pub fn raise_open_files() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: Some(MOST_FILES),
        maximum: Some(MOST_FILES),
    };
    let enough = limit.maximum.is_none_or(|maximum| maximum >= MOST_FILES);
    if !enough && setrlimit(Resource::Nofile, wanted).is_ok() {
        return Ok(());
    }
    let possible = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, possible)?;
    Ok(())
}

/// Descriptors that the process may have.
fn open_files() -> u64 {
    // No limit is `None`.
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
