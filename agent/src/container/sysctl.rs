//! Kernel parameters (`linux.sysctl`): only those that belong to a namespace of the container may
//! be set, as the others would change the guest for everyone.

use std::{
    collections::HashMap,
    io::Write,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{self, Mode, OFlags};

use super::namespaces::Namespaces;
use crate::error::{Attempt, Error, Result};

/// Parameters of the IPC namespace (ipc_namespaces(7)) beside fs/mqueue.
const IPC: [&str; 8] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
];

/// Checks the parameters; the paths are relative to /proc/sys.
pub(super) fn plan(
    sysctls: Option<&HashMap<String, String>>,
    namespaces: &Namespaces,
) -> Result<Vec<(PathBuf, String)>> {
    let mut planned: Vec<_> = sysctls
        .into_iter()
        .flatten()
        .map(|(name, value)| Ok((plan_one(name, namespaces)?, value.clone())))
        .collect::<Result<_>>()?;
    planned.sort();
    Ok(planned)
}

fn plan_one(name: &str, namespaces: &Namespaces) -> Result<PathBuf> {
    let field = format!("linux.sysctl {name}");
    let path = path_of(name);
    let parts = || path.split('/');
    if parts().any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::invalid(field, "is no name of a kernel parameter"));
    }
    let needed = if IPC.contains(&path.as_str()) || path.starts_with("fs/mqueue/") {
        (libc::CLONE_NEWIPC, "ipc")
    } else if path == "kernel/domainname" {
        (libc::CLONE_NEWUTS, "uts")
    } else if path == "kernel/hostname" {
        return Err(Error::unsupported(field, "set hostname instead"));
    } else if path.starts_with("net/") {
        // Every container has a network namespace that is not the guest's own.
        return Ok(path.into());
    } else {
        let reason = "it does not belong to a namespace; remove it";
        return Err(Error::unsupported(field, reason));
    };
    if !namespaces.has(needed.0) {
        let problem = format!(
            "needs an {} namespace, which linux.namespaces does not list",
            needed.1
        );
        return Err(Error::invalid(field, problem));
    }
    Ok(path.into())
}

/// `net.ipv4.ip_forward` and `net/ipv4/conf/eth0.1/forwarding`: the first separator tells which
/// it is, and the other character stands for itself (sysctl(8)).
fn path_of(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'.' => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Whether a parameter belongs to network interfaces, be it to one or to all or to those to come.
/// They are set when the interfaces are there, as elsewhere the interfaces are there first.
pub(super) fn is_of_interface(path: &Path) -> bool {
    let mut parts = path.components().map(|part| part.as_os_str());
    parts.next().is_some_and(|part| part == "net")
        && parts
            .nth(1)
            .is_some_and(|part| part == "conf" || part == "neigh")
}

/// Writes a parameter. `proc` is a procfs; whose namespaces it shows depends on the caller.
pub(crate) fn write(proc: BorrowedFd<'_>, path: &Path, value: &str) -> Result<()> {
    let action = || format!("set {} to {value:?} (linux.sysctl)", path.display());
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file =
        fs::openat(proc, Path::new("sys").join(path), flags, Mode::empty()).or_cannot(action)?;
    std::fs::File::from(file)
        .write_all(value.as_bytes())
        .or_cannot(action)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(name: &str) -> Result<PathBuf> {
        let namespaces = Namespaces {
            at_birth: u64::from(libc::CLONE_NEWIPC.unsigned_abs()),
            ..Default::default()
        };
        plan_one(name, &namespaces)
    }

    #[test]
    fn names_become_paths() {
        for (name, path) in [
            ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
            (
                "net/ipv4/conf/eth0.1/forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            (
                "net.ipv4.conf.eth0/1.forwarding",
                "net/ipv4/conf/eth0.1/forwarding",
            ),
            ("kernel.shmmax", "kernel/shmmax"),
        ] {
            assert_eq!(planned(name).expect("allowed"), Path::new(path));
        }
    }

    #[test]
    fn parameters_of_the_whole_guest_are_refused() {
        for name in [
            "kernel.core_pattern",
            "vm.swappiness",
            "fs.file-max",
            "kernel.hostname",
            "kernel.domainname",
            "net.../kernel/core_pattern",
            "net/../kernel/core_pattern",
            "net//x",
            "",
        ] {
            let error = planned(name).expect_err("refused").to_string();
            assert!(
                error.starts_with(&format!("linux.sysctl {name}")),
                "{error}"
            );
        }
    }
}
