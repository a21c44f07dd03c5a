//! What the host side needs of a configuration, and which of its wishes only the host could
//! grant and does not: those are refused by name before anything is made.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Linux, LinuxNamespaceType, LinuxResources, Spec};

use super::{Loaded, SpecError};

fn invalid(field: impl Into<String>, reason: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> SpecError {
    SpecError::Unsupported {
        field: field.into(),
        reason: reason.into(),
    }
}

/// What the host side takes from a configuration that it can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Absolute path of the root filesystem: a directory, a block device or an image.
    pub rootfs: PathBuf,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// `linux.cgroupsPath` as it stands.
    pub cgroups_path: Option<PathBuf>,
    /// The host's network namespace whose interfaces the container gets; `None` for an empty one.
    pub network: Option<PathBuf>,
    /// Every namespace that is named by a path, that of the network included: perhaps those of
    /// another container.
    pub paths: Vec<NamespacePath>,
}

/// A namespace that exists, by `linux.namespaces[].path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespacePath {
    /// The field, for errors.
    pub field: String,
    /// Its type.
    pub kind: LinuxNamespaceType,
    /// Where it is.
    pub path: PathBuf,
}

/// Judges a configuration.
pub fn check(loaded: &Loaded) -> Result<Checked, SpecError> {
    let spec = &loaded.spec;
    version(spec.version())?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("process", "is missing: a container needs a process to run"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid(
            "process.args",
            "must not be empty: it names the program to run",
        ));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid(
            "process.cwd",
            format!("{:?} must be an absolute path", process.cwd()),
        ));
    }
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| invalid("linux", "is missing: see `bulkhead spec`"))?;
    if spec.vm().is_some() {
        return Err(unsupported(
            "vm",
            "the guest's kernel and image are chosen on the command line (--kernel, --root-image)",
        ));
    }
    if let Some(hooks) = spec.hooks() {
        crate::hooks::check(hooks)?;
    }
    let paths = namespaces(linux)?;
    let network = paths
        .iter()
        .rfind(|path| path.kind == LinuxNamespaceType::Network)
        .map(|path| path.path.clone());
    if let Some(resources) = linux.resources() {
        refuse_resources(resources)?;
    }
    if linux.intel_rdt().is_some() {
        return Err(unsupported(
            "linux.intelRdt",
            "a guest cannot partition the host's caches; remove it",
        ));
    }
    if linux.memory_policy().is_some() {
        return Err(unsupported(
            "linux.memoryPolicy",
            "nodes of the host mean nothing in a guest; remove it",
        ));
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(unsupported(
            "linux.netDevices",
            "network devices of the host cannot be moved into a guest; remove it",
        ));
    }
    Ok(Checked {
        rootfs: rootfs(spec, &loaded.bundle)?,
        terminal: process.terminal().unwrap_or(false),
        cgroups_path: linux.cgroups_path().clone(),
        network,
        paths,
    })
}

fn version(version: &str) -> Result<(), SpecError> {
    let field = "ociVersion";
    if version.is_empty() {
        return Err(invalid(field, "is missing"));
    }
    let mut numbers = version
        .split(['-', '+'])
        .next()
        .unwrap_or_default()
        .split('.');
    let mut number = || numbers.next().and_then(|part| part.parse::<u32>().ok());
    match (number(), number(), number()) {
        (Some(1), Some(_), Some(_)) => Ok(()),
        (Some(_), Some(_), Some(_)) => Err(invalid(
            field,
            format!("{version:?} is not supported: 1.x.y is"),
        )),
        _ => Err(invalid(
            field,
            format!("{version:?} is not a version in SemVer 2.0 format"),
        )),
    }
}

/// runtime-spec, config-linux "Namespaces": an entry without a path is a new namespace, a missing
/// one means the runtime's own, which for a guest is out of reach. Returns the paths; whether
/// they are other containers' is not judged here.
fn namespaces(linux: &Linux) -> Result<Vec<NamespacePath>, SpecError> {
    const NEEDED: [(LinuxNamespaceType, &str); 4] = [
        (LinuxNamespaceType::Network, "network"),
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
    ];
    let empty = Vec::new();
    let namespaces = linux.namespaces().as_ref().unwrap_or(&empty);
    let mut paths = Vec::new();
    for (index, namespace) in namespaces.iter().enumerate() {
        let Some(path) = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty())
        else {
            continue;
        };
        let field = format!("linux.namespaces[{index}].path");
        let kind = namespace.typ();
        if kind == LinuxNamespaceType::Network {
            // Judged before anything is made; entered by the monitor, which judges again.
            crate::network::open(path)
                .map_err(|error| invalid(&*field, crate::error::chain(&error)))?;
        }
        paths.push(NamespacePath {
            field,
            kind,
            path: path.clone(),
        });
    }
    for (typ, name) in NEEDED {
        if !namespaces.iter().any(|namespace| namespace.typ() == typ) {
            return Err(unsupported(
                format!("linux.namespaces without an entry of type {name:?}"),
                format!(
                    "it asks for the host's own {name} namespace, which a container in a virtual \
                     machine cannot share; add {{\"type\":\"{name}\"}}"
                ),
            ));
        }
    }
    Ok(paths)
}

/// The sizes of huge pages that a kernel has, as cgroup files name them: "2MB".
fn huge_page_sizes(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten();
    names
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib: u64 = name
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            Some(match kib {
                0..1024 => format!("{kib}KB"),
                1024..1_048_576 => format!("{}MB", kib >> 10),
                _ => format!("{}GB", kib >> 20),
            })
        })
        .collect()
}

fn refuse_resources(resources: &LinuxResources) -> Result<(), SpecError> {
    // Guests use no huge pages, so any limit holds; but it must be one of something that exists.
    for (index, pages) in resources.hugepage_limits().iter().flatten().enumerate() {
        let known = huge_page_sizes(Path::new("/sys/kernel/mm/hugepages"));
        if !known.contains(pages.page_size()) {
            return Err(invalid(
                format!("linux.resources.hugepageLimits[{index}].pageSize"),
                format!(
                    "{:?} is no size of huge pages on this host, which has {}",
                    pages.page_size(),
                    if known.is_empty() {
                        "none".to_owned()
                    } else {
                        known.join(", ")
                    }
                ),
            ));
        }
    }
    let network = resources.network().as_ref();
    let priorities = network.and_then(|network| network.priorities().as_ref());
    for (index, priority) in priorities.into_iter().flatten().enumerate() {
        // It becomes part of a line: netdevice(7), and names have no space and no slash.
        let name = priority.name();
        if name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '\n', '\0']) {
            return Err(invalid(
                format!("linux.resources.network.priorities[{index}].name"),
                format!("{name:?} is no name of a network interface"),
            ));
        }
    }
    if resources
        .rdma()
        .as_ref()
        .is_some_and(|rdma| !rdma.is_empty())
    {
        return Err(unsupported(
            "linux.resources.rdma",
            "guests have no RDMA devices; remove it",
        ));
    }
    Ok(())
}

fn rootfs(spec: &Spec, bundle: &Path) -> Result<PathBuf, SpecError> {
    let field = "root.path";
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| invalid("root", "is missing"))?;
    if root.path().as_os_str().is_empty() {
        return Err(invalid(field, "is empty"));
    }
    let path = bundle.join(root.path());
    let failed = |source| SpecError::Path {
        field: field.to_owned(),
        path: path.clone(),
        source,
    };
    let real = fs::canonicalize(&path).map_err(failed)?;
    if !real.is_dir() && !crate::disks::is_disk(&real) {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn bundle() -> tempfile::TempDir {
        let bundle = tempfile::tempdir().unwrap();
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        bundle
    }

    fn good() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}]},
        })
    }

    fn judge(bundle: &Path, value: &Value) -> Result<Checked, SpecError> {
        check(&Loaded::parse(
            bundle.to_owned(),
            value.to_string().into_bytes(),
        )?)
    }

    #[test]
    fn a_plain_configuration_passes() {
        let bundle = bundle();
        let checked = judge(bundle.path(), &good()).unwrap();
        assert!(!checked.terminal);
        assert!(checked.rootfs.ends_with("rootfs"));
    }

    #[test]
    fn every_mutation_is_refused_by_name() {
        let bundle = bundle();
        let cases = [
            ("/ociVersion", json!("2.0.0"), "ociVersion"),
            ("/ociVersion", json!("1"), "ociVersion"),
            ("/ociVersion", json!(""), "ociVersion"),
            ("/process", Value::Null, "process"),
            ("/process/args", json!([]), "process.args"),
            ("/process/args", json!("sh"), "process.args"),
            ("/process/cwd", json!("tmp"), "process.cwd"),
            ("/root", Value::Null, "root"),
            ("/root/path", json!("nowhere"), "root.path"),
            ("/root/path", json!(""), "root.path"),
            ("/linux", Value::Null, "linux"),
            (
                "/linux/namespaces/1",
                json!({"type": "network", "path": "/run/n"}),
                "[1].path",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "network", "path": "/proc/self/ns/net"}),
                "[1].path: /proc/self/ns/net is the host's own",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "network", "path": "/proc/self/ns/uts"}),
                "[1].path: /proc/self/ns/uts is not a network namespace",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "network", "path": "/dev/null"}),
                "[1].path: /dev/null is not a network namespace",
            ),
            (
                "/linux/namespaces/1",
                json!({"type": "cgroup"}),
                "\"network\"",
            ),
            ("/linux/namespaces/0", json!({"type": "cgroup"}), "\"pid\""),
            (
                "/linux/namespaces/0",
                json!({"type": "planet"}),
                "linux.namespaces[0].type",
            ),
        ];
        for (pointer, value, named) in cases {
            let mut config = good();
            *config.pointer_mut(pointer).unwrap() = value.clone();
            let error = judge(bundle.path(), &config).unwrap_err().to_string();
            assert!(error.contains(named), "{pointer} = {value}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn sizes_of_huge_pages() {
        let directory = tempfile::tempdir().unwrap();
        for name in [
            "hugepages-2048kB",
            "hugepages-1048576kB",
            "hugepages-64kB",
            "x",
        ] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let mut sizes = huge_page_sizes(directory.path());
        sizes.sort();
        assert_eq!(sizes, ["1GB", "2MB", "64KB"]);
    }

    #[test]
    fn host_only_resources_are_refused_by_name() {
        let bundle = bundle();
        let cases = [
            (
                json!({"hugepageLimits": [{"pageSize": "3MB", "limit": 4096}]}),
                Some("hugepageLimits[0].pageSize"),
            ),
            (
                json!({"network": {"priorities": [{"name": "a b", "priority": 1}]}}),
                Some("resources.network.priorities[0].name"),
            ),
            (json!({"network": {"classID": 1}}), None),
            (json!({"network": {}}), None),
            (
                json!({"rdma": {"mlx5": {"hcaHandles": 1}}}),
                Some("resources.rdma"),
            ),
        ];
        for (resources, named) in cases {
            let mut config = good();
            config["linux"]["resources"] = resources;
            match (judge(bundle.path(), &config), named) {
                (Ok(_), None) => {}
                (Err(error), Some(named)) => assert!(error.to_string().contains(named), "{error}"),
                (result, named) => panic!("{result:?} {named:?}"),
            }
        }
    }
}
