//! Reads the spec's `mounts`, and the disk of a root filesystem. Touches nothing.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use bulkhead_agent_protocol::messages::BlockDevice;
use oci_spec::runtime::Mount;

use super::{MountPlan, Source};
use crate::{
    container::{
        disks::DiskSource,
        id_maps,
        mount_options::{self, Bind, MountOptions},
    },
    error::{Error, Result},
};

/// Checks the spec's mounts. `bind_sources` tells where the sources of bind mounts lie.
pub(in crate::container) fn plan(
    mounts: &[Mount],
    bind_sources: &HashMap<u32, String>,
    disks: &HashMap<u32, BlockDevice>,
    joined: &HashMap<u32, String>,
    in_user_namespace: bool,
) -> Result<Vec<MountPlan>> {
    let numbered = (0u32..).zip(mounts);
    numbered
        .map(|(index, mount)| {
            let shared = bind_sources.get(&index);
            let disk = disks.get(&index);
            if joined.contains_key(&index) {
                return joined_one(index, mount);
            }
            plan_one(index, mount, shared, disk, in_user_namespace)
        })
        .collect()
}

/// What another container has at the same destination.
fn joined_one(index: u32, mount: &Mount) -> Result<MountPlan> {
    let field = format!("mounts[{index}]");
    let options = mount_options::parse(&field, mount.options().as_deref().unwrap_or_default())?;
    Ok(MountPlan {
        destination: Path::new("/").join(mount.destination()),
        id_maps: None,
        source: Source::Joined,
        options,
        field,
    })
}

fn plan_one(
    index: u32,
    mount: &Mount,
    shared: Option<&String>,
    disk: Option<&BlockDevice>,
    in_user_namespace: bool,
) -> Result<MountPlan> {
    let field = format!("mounts[{index}]");
    let destination = Path::new("/").join(mount.destination());
    if destination.file_name().is_none() {
        let problem = format!("{} cannot be mounted over", destination.display());
        return Err(Error::invalid(format!("{field}.destination"), problem));
    }
    let mut options = mount_options::parse(&field, mount.options().as_deref().unwrap_or_default())?;
    if options.bind.is_none() && mount.typ().as_deref() == Some("overlay") {
        // The host's kernel has taken them.
        options.data.clear();
    }
    let disk = disk
        .map(|disk| disk_of(&field, disk, &options))
        .transpose()?;
    let source = match disk {
        Some(disk) => Source::Disk(disk),
        None => source_of(&field, mount, &options, shared)?,
    };
    refuse_idle_options(&field, &source, &options)?;
    let id_maps = id_maps::of_mount(&field, mount)?;
    let mapped = id_maps.is_some() || options.id_map.is_some();
    if mapped && !matches!(source, Source::Share { .. } | Source::Disk(_)) {
        let reason = "only bind mounts and disks can be id-mapped; remove it";
        return Err(Error::unsupported(format!("{field}.uidMappings"), reason));
    }
    if id_maps.is_none() && options.id_map.is_some() && !in_user_namespace {
        let problem = "idmap needs uidMappings and gidMappings, or a user namespace";
        return Err(Error::invalid(format!("{field}.options"), problem));
    }
    Ok(MountPlan {
        field,
        destination,
        source,
        options,
        id_maps,
    })
}

fn source_of(
    field: &str,
    mount: &Mount,
    options: &MountOptions,
    shared: Option<&String>,
) -> Result<Source> {
    let kind = mount.typ().clone().unwrap_or_default();
    Ok(match (options.bind, kind.as_str()) {
        (None, "" | "none") => {
            let problem = "missing; name a filesystem, or add the option bind";
            return Err(Error::invalid(format!("{field}.type"), problem));
        }
        // The host has mounted an overlay: its directories are there.
        (Some(_), _) | (None, "bind" | "overlay") => Source::Share {
            path: shared.cloned().ok_or_else(|| {
                Error::invalid(format!("{field}.source"), "was not shared with the guest")
            })?,
            recursive: options.bind == Some(Bind::Recursive),
        },
        (None, "cgroup" | "cgroup2") => Source::ControlGroup,
        (None, _) => Source::Filesystem {
            source: mount
                .source()
                .as_ref()
                .map(|s| s.to_string_lossy().into_owned()),
            kind,
        },
    })
}

/// A root filesystem on a disk.
pub(in crate::container) fn of_root(disk: &BlockDevice) -> Result<MountPlan> {
    let field = "root.path".to_owned();
    let options = mount_options::parse(&field, &disk.options)?;
    let bare = BlockDevice {
        options: Vec::new(),
        ..disk.clone()
    };
    let source = Source::Disk(disk_of(&field, &bare, &options)?);
    refuse_idle_options(&field, &source, &options)?;
    let foreign = options.bind.is_some() || options.id_map.is_some();
    if foreign || !options.propagation.is_empty() {
        let problem = "an option is none of a root filesystem";
        return Err(Error::invalid(field, problem));
    }
    Ok(MountPlan {
        field,
        destination: PathBuf::from("/"),
        source,
        options,
        id_maps: None,
    })
}

fn disk_of(field: &str, disk: &BlockDevice, options: &MountOptions) -> Result<DiskSource> {
    if !disk.options.is_empty() {
        let problem = "a mount has its options in the spec only";
        return Err(Error::invalid(format!("{field}.options"), problem));
    }
    if options.data.iter().any(|option| option == "errors=panic") {
        let reason = "an error of the filesystem must not end the guest; use errors=remount-ro";
        let field = format!("{field}.options errors=panic");
        return Err(Error::unsupported(field, reason));
    }
    DiskSource::new(&format!("{field}.source"), disk)
}

/// An option that nobody would read must not look as if it held. Data of a filesystem (`mode=755`)
/// on a bind mount is the exception: kernels ignore it there, and engines leave it in.
fn refuse_idle_options(field: &str, source: &Source, options: &MountOptions) -> Result<()> {
    let field = format!("{field}.options");
    let option = options.data.first();
    match (source, option) {
        (Source::Share { .. }, Some(_)) => match options.data.iter().find(|o| !o.contains('=')) {
            Some(option) => {
                let problem = format!("{option:?} is no option of a bind mount");
                Err(Error::invalid(field, problem))
            }
            None => Ok(()),
        },
        (Source::ControlGroup, Some(option)) => {
            let problem = format!("{option:?} is no option of a cgroup mount");
            Err(Error::invalid(field, problem))
        }
        (Source::Filesystem { kind, .. }, _) if kind == "tmpfs" => Ok(()),
        _ if options.copy_up => Err(Error::invalid(field, "tmpcopyup is for tmpfs only")),
        _ => Ok(()),
    }
}
