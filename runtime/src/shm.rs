//! `/dev/shm`. Engines mount a tmpfs on the host for it and name that as the source of a bind mount,
//! so that they can share it between containers. Served from the host, shared memory would be files
//! of the share: every page would cross to the host and back. So a tmpfs that an engine has made for
//! the container alone becomes one in the guest, of the same size.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use serde_json::{Value, json};

/// The mounts (index in `mounts`) that become the guest's own, and their sizes in bytes; 0 for as
/// much as there is.
pub fn of_guest(bundle: &Path, spec: &Spec) -> Vec<(usize, u64)> {
    // Whoever joins another container's IPC namespace wants that one's memory.
    let joins = spec.linux().as_ref().is_some_and(|linux| {
        let mut namespaces = linux.namespaces().iter().flatten();
        namespaces.any(|namespace| {
            namespace.typ() == LinuxNamespaceType::Ipc
                && namespace
                    .path()
                    .as_ref()
                    .is_some_and(|path| !path.as_os_str().is_empty())
        })
    });
    if joins {
        return Vec::new();
    }
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .filter_map(|(index, mount)| Some((index, size(bundle, mount)?)))
        .collect()
}

/// The size of a source that an engine has made: a tmpfs of its own by that name, still empty.
/// Anything else is somebody's directory, which is shared.
fn size(bundle: &Path, mount: &Mount) -> Option<u64> {
    // statfs(2).
    const TMPFS: i64 = 0x0102_1994;
    if !crate::share::is_bind(mount) || mount.destination() != Path::new("/dev/shm") {
        return None;
    }
    let source = source(bundle, mount)?;
    let above = source.parent()?;
    let named = source.file_name()? == "shm" && source != Path::new("/dev/shm");
    let mounted = fs::metadata(&source).ok()?.dev() != fs::metadata(above).ok()?.dev();
    let filesystem = rustix::fs::statfs(&source).ok()?;
    if !named || !mounted || filesystem.f_type != TMPFS {
        return None;
    }
    if fs::read_dir(&source).ok()?.next().is_some() {
        return None;
    }
    let unit = u64::try_from(filesystem.f_bsize).ok()?;
    Some(filesystem.f_blocks.saturating_mul(unit))
}

/// Where the source of a mount is, canonical.
pub fn source(bundle: &Path, mount: &Mount) -> Option<PathBuf> {
    fs::canonicalize(bundle.join(mount.source().as_ref()?)).ok()
}

/// The bind mounts of /dev/shm (index in `mounts`) that have this source.
pub fn of_source(wanted: &Path, bundle: &Path, spec: &Spec) -> Vec<u32> {
    let is_it = |mount: &Mount| {
        crate::share::is_bind(mount)
            && mount.destination() == Path::new("/dev/shm")
            && source(bundle, mount).as_deref() == Some(wanted)
    };
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .filter_map(|(index, mount)| u32::try_from(index).ok().filter(|_| is_it(mount)))
        .collect()
}

/// The configuration as the guest gets it: byte for byte the bundle's, but for these mounts.
pub fn rewrite(config: &[u8], mounts: &[(usize, u64)]) -> Result<Vec<u8>, serde_json::Error> {
    if mounts.is_empty() {
        return Ok(config.to_vec());
    }
    let mut config: Value = serde_json::from_slice(config)?;
    for (index, size) in mounts {
        let mount = &mut config["mounts"][index];
        let given = mount["options"].as_array().cloned().unwrap_or_default();
        let mut options = vec![json!("mode=1777")];
        options.extend((*size > 0).then(|| json!(format!("size={size}"))));
        options.extend(["nosuid", "noexec", "nodev"].map(Value::from));
        options.extend(given.into_iter().filter(|option| option == "ro"));
        mount["type"] = json!("tmpfs");
        mount["source"] = json!("shm");
        mount["options"] = json!(options);
    }
    serde_json::to_vec(&config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bundle: &Path, mount: Value, ipc: &str) -> Vec<(usize, u64)> {
        let spec = json!({"ociVersion": "1.0.0", "mounts": [mount],
            "linux": {"namespaces": [{"type": "ipc", "path": ipc}]}});
        of_guest(bundle, &serde_json::from_value(spec).unwrap())
    }

    #[test]
    fn other_directories_are_shared() {
        let bundle = tempfile::tempdir().unwrap();
        // Of the right name, and no mount.
        fs::create_dir(bundle.path().join("shm")).unwrap();
        for source in ["shm", "/dev/shm", "nowhere", "/dev"] {
            let mount = json!({"destination": "/dev/shm", "type": "bind", "source": source});
            assert!(of(bundle.path(), mount, "").is_empty(), "{source}");
        }
    }

    #[test]
    fn only_the_named_mounts_change() {
        let config = json!({"x": 1, "mounts": [
            {"destination": "/a", "type": "bind", "source": "/a"},
            {"destination": "/dev/shm", "type": "bind", "source": "/e/shm",
                "options": ["bind", "rprivate", "ro"]}]});
        let bytes = serde_json::to_vec(&config).unwrap();
        assert_eq!(rewrite(&bytes, &[]).unwrap(), bytes);
        let new: Value = serde_json::from_slice(&rewrite(&bytes, &[(1, 4096)]).unwrap()).unwrap();
        assert_eq!(new["mounts"][0], config["mounts"][0]);
        assert_eq!(
            new["mounts"][1],
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["mode=1777", "size=4096", "nosuid", "noexec", "nodev", "ro"]})
        );
    }
}
