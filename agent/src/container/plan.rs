//! Checks a spec and turns it into what the set-up of a container does, step by step. A field that
//! is not honoured is refused by its name here. Touches nothing.

use std::{collections::HashMap, path::PathBuf};

use bulkhead_agent_protocol::{
    messages::{CreateContainerRequest, Stdio},
    oci,
};
use oci_spec::runtime::{Hook, Hooks, Linux, LinuxPersonalityDomain, Process, Spec};

use super::{
    device_filter,
    devices::{self, DeviceNode},
    id_maps::{self, IdMaps},
    identity, mount_options,
    mounts::{self, MountPlan},
    namespaces::{self, Namespaces, Others},
    resources::{self, Present, Setting},
    seccomp, sysctl,
};
use crate::error::{Error, Result};

/// Everything that the set-up of a container needs to know.
#[derive(Debug)]
pub(super) struct Plan {
    /// The container's id.
    pub(super) id: String,
    /// Its root filesystem.
    pub(super) rootfs: Rootfs,
    /// Whether its root becomes read-only.
    pub(super) read_only: bool,
    /// Propagation of its root, as a flag and "recursive".
    pub(super) propagation: (u64, bool),
    /// Namespaces of its own.
    pub(super) namespaces: Namespaces,
    /// Ids of its user namespace.
    pub(super) id_maps: Option<IdMaps>,
    /// Host name in its UTS namespace.
    pub(super) hostname: Option<String>,
    /// NIS domain name in its UTS namespace.
    pub(super) domainname: Option<String>,
    /// In order.
    pub(super) mounts: Vec<MountPlan>,
    /// Nodes in /dev.
    pub(super) devices: Vec<DeviceNode>,
    /// Who may use which device.
    pub(super) device_rules: Vec<device_filter::Rule>,
    /// Files of its cgroup.
    pub(super) settings: Vec<Setting>,
    /// Kernel parameters, by path below /proc/sys.
    pub(super) sysctls: Vec<(PathBuf, String)>,
    /// Those of network interfaces, to be set when the interfaces are there.
    pub(super) interface_sysctls: Vec<(PathBuf, String)>,
    /// Paths to hide.
    pub(super) masked_paths: Vec<PathBuf>,
    /// Paths to make read-only.
    pub(super) read_only_paths: Vec<PathBuf>,
    /// System call filter of all its processes.
    pub(super) seccomp: Option<seccomp::Filter>,
    /// Execution domain.
    pub(super) personality: Option<u64>,
    /// Lines for /proc/self/timens_offsets.
    pub(super) time_offsets: Vec<String>,
    /// Hooks that run in the container before its process.
    pub(super) start_hooks: Vec<Hook>,
    /// For the state that hooks are given.
    pub(super) annotations: HashMap<String, String>,
    /// The bundle's directory on the host, for the same.
    pub(super) bundle: String,
    /// Version of the spec, for the same.
    pub(super) oci_version: String,
    /// Whether its process gets a session keyring of its own.
    pub(super) new_keyring: bool,
    /// The process.
    pub(super) process: identity::Plan,
    /// Rows and columns, if the process has a terminal.
    pub(super) terminal: Option<(u16, u16)>,
}

impl Plan {
    /// Whether the container sees its own cgroup alone, and may change it.
    pub(super) fn may_change_cgroup(&self) -> bool {
        self.namespaces.cgroup && self.mounts.iter().any(MountPlan::is_writable_cgroup)
    }
}

/// Where a root filesystem is.
#[derive(Debug)]
pub(super) enum Rootfs {
    /// Relative to the share.
    Share(String),
    /// On a disk.
    Disk(Box<MountPlan>),
}

/// Checks the request.
pub(super) fn plan(
    request: &CreateContainerRequest,
    pristine: &Present,
    others: &Others,
) -> Result<Plan> {
    check_id(&request.container_id)?;
    let spec = read("config.json", oci::spec(&request.spec))?;
    refuse_foreign(&spec)?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| Error::invalid("process", "is missing"))?;
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| Error::invalid("linux", "is missing"))?;
    refuse_linux(linux)?;
    let namespaces = namespaces::plan(linux, others)?;
    check_names(&spec, &namespaces)?;
    let resources = linux.resources().as_ref();
    let (interface_sysctls, sysctls) = sysctl::plan(linux.sysctl().as_ref(), &namespaces)?
        .into_iter()
        .partition(|(path, _)| sysctl::is_of_interface(path));
    let rules = resources
        .and_then(|r| r.devices().as_deref())
        .unwrap_or_default();
    Ok(Plan {
        id: request.container_id.clone(),
        rootfs: match request.rootfs_device.as_ref() {
            Some(disk) => Rootfs::Disk(Box::new(mounts::of_root(disk)?)),
            None => Rootfs::Share(request.rootfs.clone()),
        },
        read_only: spec
            .root()
            .as_ref()
            .is_some_and(|r| r.readonly() == Some(true)),
        propagation: propagation(linux)?,
        id_maps: namespaces
            .has(libc::CLONE_NEWUSER)
            .then(|| id_maps::plan(linux))
            .transpose()?,
        namespaces,
        hostname: spec.hostname().clone().filter(|name| !name.is_empty()),
        domainname: spec.domainname().clone().filter(|name| !name.is_empty()),
        mounts: mounts::plan(
            spec.mounts().as_deref().unwrap_or_default(),
            &request.bind_sources,
            &request.block_mounts,
            &request.join_mounts,
            namespaces.has(libc::CLONE_NEWUSER),
        )?,
        devices: devices::plan(linux.devices().as_deref().unwrap_or_default())?,
        device_rules: device_filter::rules(rules)?,
        settings: resources
            .map(|resources| resources::settings(resources, pristine))
            .transpose()?
            .unwrap_or_default(),
        sysctls,
        interface_sysctls,
        masked_paths: absolute("linux.maskedPaths", linux.masked_paths().as_deref())?,
        read_only_paths: absolute("linux.readonlyPaths", linux.readonly_paths().as_deref())?,
        seccomp: linux.seccomp().as_ref().map(seccomp::compile).transpose()?,
        personality: personality(linux)?,
        time_offsets: time_offsets(linux, &namespaces)?,
        start_hooks: start_hooks(spec.hooks().as_ref())?,
        annotations: spec.annotations().clone().unwrap_or_default(),
        bundle: request.bundle.clone(),
        oci_version: spec.version().clone(),
        new_keyring: !request.no_new_keyring,
        process: identity::plan(process)?,
        terminal: terminal(process, &request.stdio)?,
    })
}

/// What a document says, with a warning about capabilities that nobody knows.
pub(super) fn read<T>(
    document: &str,
    read: std::result::Result<oci::Read<T>, oci::ReadError>,
) -> Result<T> {
    let read = read.map_err(|error| match error.field.as_str() {
        "" => Error::invalid(document, error.cause.to_string()),
        field => Error::invalid(field, error.cause.to_string()),
    })?;
    for name in read.unknown_capabilities {
        tracing::warn!("process.capabilities: {name:?} is unknown and left out");
    }
    Ok(read.value)
}

/// Ids become names of directories.
fn check_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id.len() > 200 || !id.chars().all(plain) {
        let problem = format!("{id:?} is not 1 to 200 letters, digits, _, +, - and .");
        return Err(Error::invalid("container id", problem));
    }
    Ok(())
}

/// The size of the terminal that the process is to have. What the host has connected must be what
/// the spec asks for.
pub(super) fn terminal(process: &Process, stdio: &Stdio) -> Result<Option<(u16, u16)>> {
    let wanted = process.terminal().unwrap_or(false);
    if wanted != stdio.terminal {
        let problem = format!(
            "is {wanted}, but the streams connected say {}",
            stdio.terminal
        );
        return Err(Error::invalid("process.terminal", problem));
    }
    if !wanted {
        return Ok(None);
    }
    let (mut rows, mut columns) = (u64::from(stdio.rows), u64::from(stdio.columns));
    if let Some(size) = process.console_size().filter(|_| (rows, columns) == (0, 0)) {
        (rows, columns) = (size.height(), size.width());
    }
    let cells = |name: &str, value| {
        u16::try_from(value)
            .map_err(|_| Error::invalid(format!("process.consoleSize.{name}"), "is above 65535"))
    };
    Ok(Some((cells("height", rows)?, cells("width", columns)?)))
}

fn refuse_foreign(spec: &Spec) -> Result<()> {
    if !spec.version().starts_with("1.") {
        let problem = format!("{:?} is not a version 1.x", spec.version());
        return Err(Error::invalid("ociVersion", problem));
    }
    let foreign = [
        ("solaris", spec.solaris().is_some()),
        ("windows", spec.windows().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
    ];
    match foreign.iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Error::unsupported(*field, "containers here are Linux's")),
        None => Ok(()),
    }
}

fn refuse_linux(linux: &Linux) -> Result<()> {
    if linux.intel_rdt().is_some() {
        let reason = "a guest has no control over the host's caches; remove it";
        return Err(Error::unsupported("linux.intelRdt", reason));
    }
    if linux.memory_policy().is_some() {
        let reason = "nodes of the host mean nothing in the guest; remove it";
        return Err(Error::unsupported("linux.memoryPolicy", reason));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        let reason = "interfaces of the host cannot move into the guest; remove it";
        return Err(Error::unsupported("linux.netDevices", reason));
    }
    Ok(())
}

fn check_names(spec: &Spec, namespaces: &Namespaces) -> Result<()> {
    if namespaces.has(libc::CLONE_NEWUTS) {
        return Ok(());
    }
    for (field, name) in [
        ("hostname", spec.hostname()),
        ("domainname", spec.domainname()),
    ] {
        if name.as_ref().is_some_and(|name| !name.is_empty()) {
            let problem = "needs a uts namespace, which linux.namespaces does not list";
            return Err(Error::invalid(field, problem));
        }
    }
    Ok(())
}

fn propagation(linux: &Linux) -> Result<(u64, bool)> {
    match linux.rootfs_propagation().as_deref() {
        None | Some("") => Ok((libc::MS_SLAVE, true)),
        Some(name) => mount_options::propagation(name).ok_or_else(|| {
            let problem = format!("{name:?} is none of private, shared, slave and unbindable");
            Error::invalid("linux.rootfsPropagation", problem)
        }),
    }
}

fn absolute(field: &str, paths: Option<&[String]>) -> Result<Vec<PathBuf>> {
    let paths = paths
        .unwrap_or_default()
        .iter()
        .map(PathBuf::from)
        .enumerate();
    paths
        .map(|(index, path)| {
            if path.is_absolute() && path.file_name().is_some() {
                return Ok(path);
            }
            let problem = format!(
                "{:?} is not an absolute path below /",
                path.display().to_string()
            );
            Err(Error::invalid(format!("{field}[{index}]"), problem))
        })
        .collect()
}

fn personality(linux: &Linux) -> Result<Option<u64>> {
    let Some(personality) = linux.personality() else {
        return Ok(None);
    };
    if personality
        .flags()
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        let reason = "the spec defines none; remove it";
        return Err(Error::unsupported("linux.personality.flags", reason));
    }
    Ok(Some(match personality.domain() {
        LinuxPersonalityDomain::PerLinux => 0,
        LinuxPersonalityDomain::PerLinux32 => 8,
    }))
}

fn time_offsets(linux: &Linux, namespaces: &Namespaces) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (clock, offset) in linux.time_offsets().iter().flatten() {
        let field = format!("linux.timeOffsets.{clock}");
        if !namespaces.time {
            let problem = "needs a time namespace, which linux.namespaces does not list";
            return Err(Error::invalid(field, problem));
        }
        if clock != "monotonic" && clock != "boottime" {
            return Err(Error::invalid(field, "is neither monotonic nor boottime"));
        }
        let seconds = offset.secs().unwrap_or(0);
        lines.push(format!(
            "{clock} {seconds} {}\n",
            offset.nanosecs().unwrap_or(0)
        ));
    }
    Ok(lines)
}

fn start_hooks(hooks: Option<&Hooks>) -> Result<Vec<Hook>> {
    let Some(hooks) = hooks else {
        return Ok(Vec::new());
    };
    // The others run on the host: not this side's matter.
    let hooks = hooks.start_container().clone().unwrap_or_default();
    for (index, hook) in hooks.iter().enumerate() {
        let field = format!("hooks.startContainer[{index}]");
        if !hook.path().is_absolute() {
            return Err(Error::invalid(
                format!("{field}.path"),
                "is not an absolute path",
            ));
        }
        if hook.timeout().is_some_and(|timeout| timeout <= 0) {
            return Err(Error::invalid(
                format!("{field}.timeout"),
                "is not more than 0",
            ));
        }
    }
    Ok(hooks)
}
