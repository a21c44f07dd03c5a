//! What of the host's file system a container's guest gets to see: its root filesystem and the
//! sources of its bind mounts, each under the container's own directory of the share.

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::AsRawFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::oci::MOUNT_OPTIONS;
use bulkhead_vmm::config::ShareEntry;
use oci_spec::runtime::{Mount, Spec};
use rustix::{
    fs::{Mode, OFlags, open},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

use crate::spec::SpecError;

/// A container's part of the share.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// For the VMM.
    pub entries: Vec<ShareEntry>,
    /// Mounted by the host for the guest, once the VM runs.
    pub overlays: Vec<Overlay>,
    /// For the agent: where the root filesystem lies; empty when it is on a disk.
    pub rootfs: String,
    /// For the agent: where the source of each bind mount (index in `mounts`) lies.
    pub bind_sources: HashMap<u32, String>,
    /// The mounts that become memory of the guest, [`crate::shm`].
    pub memory: Vec<(usize, u64)>,
    /// The source of one of those on the host, canonical.
    pub memory_source: Option<PathBuf>,
    /// The mounts (index in `mounts`) that are to be the memory that another container has there.
    pub joined_memory: Vec<u32>,
}

/// An overlay of directories of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Where it appears, as [`ShareEntry::target`].
    pub target: String,
    /// One of its directories.
    pub lower: PathBuf,
    /// Its own options (the host kernel's overlayfs.rst), joined by commas.
    pub options: String,
}

impl Share {
    /// Leaves out the mounts of /dev/shm whose source is this one: the guest has memory in its place,
    /// with the container whose IPC namespace is joined.
    pub fn join_memory(&mut self, source: Option<&Path>, bundle: &Path, spec: &Spec) {
        let Some(source) = source else { return };
        for index in crate::shm::of_source(source, bundle, spec) {
            if let Some(target) = self.bind_sources.remove(&index) {
                self.entries.retain(|entry| entry.place() != target);
                self.joined_memory.push(index);
                self.memory_source = Some(source.to_owned());
            }
        }
    }
}

/// Collects the share of a container, in a directory of the whole.
pub fn collect(id: &str, bundle: &Path, rootfs: &Path, spec: &Spec) -> Result<Share, SpecError> {
    let mut share = Share {
        entries: Vec::new(),
        overlays: Vec::new(),
        rootfs: String::new(),
        bind_sources: HashMap::new(),
        memory: Vec::new(),
        memory_source: None,
        joined_memory: Vec::new(),
    };
    if !crate::disks::is_disk(rootfs) {
        share.rootfs = format!("{id}/rootfs");
        share.entries.push(ShareEntry {
            source: rootfs.to_owned(),
            target: share.rootfs.clone(),
            name: None,
            // `root.readonly` is applied in the guest, after the mount points that are missing
            // have been made, as other runtimes do.
            read_only: false,
            // Storage drivers may have put mounts below it.
            recursive: true,
        });
    }
    share.memory = crate::shm::of_guest(bundle, spec);
    share.memory_source = share
        .memory
        .first()
        .and_then(|(index, _)| crate::shm::source(bundle, spec.mounts().as_ref()?.get(*index)?));
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let (bind, overlay) = (is_bind(mount), is_overlay(mount));
        if !(bind || overlay) || share.memory.iter().any(|(own, _)| *own == index) {
            continue;
        }
        let number = u32::try_from(index).map_err(|_| SpecError::Invalid {
            field: "mounts".to_owned(),
            reason: "there are too many".to_owned(),
        })?;
        let target = format!("{id}/{index}");
        let place = if bind {
            let source = bind_source(index, mount, bundle)?;
            let entry = ShareEntry {
                name: name_in_guest(&source),
                source,
                target,
                read_only: has_option(mount, &["ro", "rro"]),
                recursive: has_option(mount, &["rbind", "rro"]),
            };
            let place = entry.place();
            share.entries.push(entry);
            place
        } else {
            share.overlays.push(overlay_of(index, mount, &target)?);
            target
        };
        share.bind_sources.insert(number, place);
    }
    Ok(share)
}

/// runc takes a mount for a bind mount by its type or by its options.
pub(crate) fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

/// Of directories of the host: engines make such mounts of images, and of volumes that a container
/// changes for itself alone.
fn is_overlay(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("overlay") && !is_bind(mount)
}

fn overlay_of(index: usize, mount: &Mount, target: &str) -> Result<Overlay, SpecError> {
    let invalid = |reason: &str| SpecError::Invalid {
        field: format!("mounts[{index}].options"),
        reason: reason.to_owned(),
    };
    // What is no option of every mount, which the agent sets, is for the kernel to judge.
    let given = mount.options().iter().flatten().map(String::as_str);
    let own: Vec<&str> = given
        .filter(|option| !MOUNT_OPTIONS.contains(option))
        .collect();
    let options = own.join(",");
    let lower = options
        .split(',')
        .find_map(|option| option.strip_prefix("lowerdir="))
        .and_then(|directories| directories.split(':').next())
        .filter(|directory| directory.starts_with('/'))
        .map(PathBuf::from)
        .ok_or_else(|| invalid("an overlay needs lowerdir=, with absolute paths on the host"))?;
    Ok(Overlay {
        target: target.to_owned(),
        lower,
        options,
    })
}

fn has_option(mount: &Mount, wanted: &[&str]) -> bool {
    // Later options win over earlier ones, as for mount(8): "ro,rw" is writable.
    let writable = mount
        .options()
        .iter()
        .flatten()
        .rfind(|option| matches!(option.as_str(), "ro" | "rro" | "rw" | "rrw"))
        .is_some_and(|option| matches!(option.as_str(), "rw" | "rrw"));
    mount.options().iter().flatten().any(|option| {
        wanted.contains(&option.as_str()) && !(writable && matches!(option.as_str(), "ro" | "rro"))
    })
}

fn bind_source(index: usize, mount: &Mount, bundle: &Path) -> Result<PathBuf, SpecError> {
    let field = format!("mounts[{index}].source");
    let given = mount
        .source()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty())
        .ok_or_else(|| SpecError::Invalid {
            field: field.clone(),
            reason: format!(
                "is missing for the bind mount at {}",
                mount.destination().display()
            ),
        })?;
    let path = bundle.join(given);
    let failed = |source| SpecError::Path {
        field: field.clone(),
        path: path.clone(),
        source,
    };
    let real = fs::canonicalize(&path).map_err(failed)?;
    let kind = fs::metadata(&real).map_err(failed)?.file_type();
    let unsupported = |reason: &str| SpecError::Unsupported {
        field: field.clone(),
        reason: format!("{} is {reason}", path.display()),
    };
    // The guest reaches what listens on a socket of the share, if it takes connections.
    if kind.is_socket() && takes_datagrams(&real).map_err(failed)? {
        return Err(unsupported(
            "a socket for datagrams, which do not cross into a guest; only stream sockets do",
        ));
    }
    if kind.is_char_device() || kind.is_block_device() {
        return Err(unsupported(
            "a device of the host, which a guest cannot open; name it in linux.devices if the \
             guest has it too, or give the mount the type ext4 or erofs for the file system on it",
        ));
    }
    if kind.is_fifo() {
        return Err(unsupported(
            "a FIFO: its other end lives on the host, not in the guest",
        ));
    }
    if let Some(name) = kernel_filesystem(&real).map_err(failed)? {
        return Err(unsupported(&format!(
            "on the host's {name}, which tells of the host's kernel; mount the guest's own with \
             a mount of that type",
        )));
    }
    Ok(real)
}

/// What the container reads of a source's place on the host: the last name, as the root of the mount.
/// `/` has none, and paths are text in what is said to the agent.
fn name_in_guest(source: &Path) -> Option<String> {
    Some(source.file_name()?.to_str()?.to_owned())
}

/// Whether somebody receives datagrams at a socket. Who listens there for connections notices nothing
/// of the question (EPROTOTYPE, unix(7)).
fn takes_datagrams(path: &Path) -> io::Result<bool> {
    let file = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // A socket's path has 107 bytes at most, so the file goes by its number.
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(connect(&socket, &address).is_ok())
}

/// The name of a file system whose files are the kernel speaking, if the path lies on one.
fn kernel_filesystem(path: &Path) -> io::Result<Option<&'static str>> {
    // statfs(2), f_type.
    const MAGIC: [(i64, &str); 14] = [
        (0x9fa0, "proc"),
        (0x6265_6572, "sysfs"),
        (0x0027_e0eb, "cgroup"),
        (0x6367_7270, "cgroup2"),
        (0x1cd1, "devpts"),
        (0x6462_6720, "debugfs"),
        (0x7472_6163, "tracefs"),
        (0x7363_6673, "securityfs"),
        (0xcafe_4a11, "bpf"),
        (0x1980_0202, "mqueue"),
        (0x6165_676c, "pstore"),
        (0xde5e_81e4, "efivarfs"),
        (0x6265_6570, "configfs"),
        (0x4249_4e4d, "binfmt_misc"),
    ];
    let kind = rustix::fs::statfs(path)?.f_type;
    let name = MAGIC
        .iter()
        .find(|(magic, _)| *magic == kind)
        .map(|(_, name)| *name);
    // The host's device nodes lie on a tmpfs by another name, which only the path tells.
    Ok(name.or_else(|| (path == Path::new("/dev")).then_some("devtmpfs")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn collected(bundle: &Path, mounts: serde_json::Value) -> Result<Share, SpecError> {
        let spec: Spec = serde_json::from_value(
            json!({"ociVersion": "1.0.0", "root": {"path": "rootfs"}, "mounts": mounts}),
        )
        .unwrap();
        collect("one", bundle, &bundle.join("rootfs"), &spec)
    }

    #[test]
    fn overlays_are_the_hosts() {
        let bundle = tempfile::tempdir().unwrap();
        let overlay = |options: &[&str]| {
            let mounts = json!([{"destination": "/o", "type": "overlay", "options": options}]);
            collected(bundle.path(), mounts)
        };
        let share = overlay(&["lowerdir=/a:/b,upperdir=/u", "ro", "workdir=/w", "odd"]).unwrap();
        let expected = Overlay {
            target: "one/0".to_owned(),
            lower: "/a".into(),
            options: "lowerdir=/a:/b,upperdir=/u,workdir=/w,odd".to_owned(),
        };
        assert_eq!(share.overlays, [expected]);
        assert_eq!(share.bind_sources[&0], "one/0");
        for bad in [&["ro"][..], &["lowerdir=relative"], &["upperdir=/u"]] {
            let error = overlay(bad).unwrap_err().to_string();
            assert!(error.contains("mounts[0].options"), "{error}");
        }
    }

    #[test]
    fn bind_mounts_become_entries() {
        let bundle = tempfile::tempdir().unwrap();
        fs::create_dir(bundle.path().join("data")).unwrap();
        fs::write(bundle.path().join("file"), b"").unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(bundle.path().join("socket")).unwrap();
        let share = collected(
            bundle.path(),
            json!([
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/d", "type": "bind", "source": "data", "options": ["rbind", "ro"]},
                {"destination": "/f", "type": "none", "source": "file", "options": ["bind"]},
                {"destination": "/g", "source": "file", "options": ["bind", "ro", "rw"]},
                {"destination": "/s", "source": "socket", "options": ["bind"]},
                {"destination": "/h", "source": "/", "options": ["bind", "ro"]},
            ]),
        )
        .unwrap();
        let shown: Vec<_> = share
            .entries
            .iter()
            .map(|entry| (entry.place(), entry.read_only, entry.recursive))
            .collect();
        assert_eq!(
            shown,
            [
                ("one/rootfs", false, true),
                ("one/1/data", true, true),
                ("one/2/file", false, false),
                ("one/3/file", false, false),
                ("one/4/socket", false, false),
                ("one/5", true, false),
            ]
            .map(|(place, read_only, recursive)| (
                place.to_owned(),
                read_only,
                recursive
            ))
        );
        assert_eq!(share.bind_sources.len(), 5);
        assert_eq!(share.bind_sources[&1], "one/1/data");
    }

    #[test]
    fn what_cannot_be_shared_is_refused_by_name() {
        let bundle = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixDatagram::bind(bundle.path().join("socket")).unwrap();
        for (source, word) in [
            ("socket", "datagrams"),
            ("/dev/null", "device"),
            ("/proc/sys", "proc"),
            ("/sys", "sysfs"),
            ("/dev", "devtmpfs"),
            ("nowhere", "nowhere"),
            ("", "missing"),
        ] {
            let error = collected(
                bundle.path(),
                json!([{"destination": "/x", "type": "bind", "source": source}]),
            )
            .unwrap_err()
            .to_string();
            assert!(
                error.contains("mounts[0].source") && error.contains(word),
                "{error}"
            );
        }
    }
}
