//! The runtimes that the tests drive, and in what they differ from each other.

use std::path::Path;

use anyhow::{Result, bail};

/// A program with runc's command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    Bulkhead,
    Crun,
    Runc,
}

impl Runtime {
    pub(crate) const ALL: [Self; 3] = [Self::Bulkhead, Self::Crun, Self::Runc];

    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Bulkhead => "bulkhead",
            Self::Crun => "crun",
            Self::Runc => "runc",
        }
    }

    pub(crate) fn from_name(name: &str) -> Result<Self> {
        match Self::ALL
            .into_iter()
            .find(|runtime| runtime.program() == name)
        {
            Some(runtime) => Ok(runtime),
            None => bail!("{name} is no runtime that the tests know: use bulkhead, crun or runc"),
        }
    }

    /// The runtimes of a list such as `bulkhead,crun`.
    pub(crate) fn list(names: &str) -> Result<Vec<Self>> {
        names.split(',').map(Self::from_name).collect()
    }

    /// Whether its program is on the PATH.
    pub(crate) fn installed(self) -> bool {
        std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path).any(|directory| directory.join(self.program()).is_file())
        })
    }
}

/// Whether the host has the unified hierarchy at /sys/fs/cgroup.
pub(crate) fn unified_cgroups() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}
