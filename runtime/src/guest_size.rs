//! How big a guest is for what its container may use.
//!
//! - Memory: 256 MiB, or, when the container's memory limit asks for more, the limit + 1/64 of it
//!   (the guest kernel's page tables of contents: 64 bytes a page of 4 KiB) + 64 MiB (the guest's
//!   kernel, agent and their caches). The limit itself is enforced in the guest. A guest larger
//!   than the host's memory is refused.
//! - CPUs: as many as the quota can keep busy, rounded up; without a quota as many as the cpuset
//!   names; without either, one. Never more than the host has.

use oci_spec::runtime::Spec;
use thiserror::Error;

/// Memory of a guest that nobody asked anything of, in MiB.
const DEFAULT_MEMORY: u64 = 256;
/// What the guest needs beside its container, in MiB.
const GUEST_OVERHEAD: u64 = 64;
const MIB: u64 = 1 << 20;
/// Kernel's default of cpu.cfs_period_us.
const DEFAULT_PERIOD: u64 = 100_000;

/// Size of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSize {
    /// Virtual CPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The guest would be larger than the host.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "config.json: linux.resources.memory.limit: a guest of {guest_mib} MiB of memory does not fit \
     into this host, which has {host_mib} MiB; lower the limit, or leave it out for a guest of \
     {DEFAULT_MEMORY} MiB"
)]
pub struct TooLarge {
    guest_mib: u64,
    host_mib: u64,
}

/// What the host has.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// This host.
    pub fn this() -> Self {
        let system = rustix::system::sysinfo();
        let memory = u64::from(system.mem_unit).saturating_mul(system.totalram);
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory / MIB,
        }
    }
}

/// The size of the guest for a container.
pub fn of(spec: &Spec, host: Host) -> Result<GuestSize, TooLarge> {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let limit = resources
        .and_then(|resources| resources.memory().as_ref())
        .and_then(|memory| memory.limit())
        .and_then(|limit| u64::try_from(limit).ok());
    let memory = limit.map_or(DEFAULT_MEMORY, |limit| {
        let limit = limit.div_ceil(MIB);
        DEFAULT_MEMORY.max(limit + limit / 64 + GUEST_OVERHEAD)
    });
    let too_large = || TooLarge {
        guest_mib: memory,
        host_mib: host.memory_mib,
    };
    if limit.is_some() && memory > host.memory_mib {
        return Err(too_large());
    }
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let quota = cpu.and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?)
            .ok()
            .filter(|quota| *quota > 0)?;
        let period = cpu
            .period()
            .filter(|period| *period > 0)
            .unwrap_or(DEFAULT_PERIOD);
        Some(usize::try_from(quota.div_ceil(period)).unwrap_or(usize::MAX))
    });
    let set = cpu
        .and_then(|cpu| cpu.cpus().as_deref())
        .and_then(list_length);
    let cpus = match (quota, set) {
        (Some(quota), Some(set)) => quota.min(set),
        (Some(count), None) | (None, Some(count)) => count,
        (None, None) => 1,
    };
    Ok(GuestSize {
        cpus: u8::try_from(cpus.clamp(1, host.cpus.max(1))).unwrap_or(u8::MAX),
        memory_mib: u32::try_from(memory).map_err(|_| too_large())?,
    })
}

/// How many CPUs a list like `0-3,7` names (cpuset(7), "List format"); `None` when it names none.
fn list_length(list: &str) -> Option<usize> {
    let mut count = 0_usize;
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (
            first.trim().parse::<usize>().ok()?,
            last.trim().parse().ok()?,
        );
        count = count.saturating_add(usize::checked_sub(last, first)?.saturating_add(1));
    }
    (count > 0).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn size(resources: Value) -> (u8, u32) {
        let spec = serde_json::from_value(
            json!({"ociVersion": "1.0.0", "linux": {"resources": resources}}),
        )
        .unwrap();
        let host = Host {
            cpus: 4,
            memory_mib: 2048,
        };
        let size = of(&spec, host).unwrap();
        (size.cpus, size.memory_mib)
    }

    #[test]
    fn a_guest_larger_than_the_host_is_refused() {
        let limit = json!({"memory": {"limit": 1_i64 << 46}});
        let spec = json!({"ociVersion": "1.0.0", "linux": {"resources": limit}});
        let error = of(&serde_json::from_value(spec).unwrap(), Host::this()).unwrap_err();
        assert!(error.to_string().contains("memory.limit"), "{error}");
    }

    #[test]
    fn sizes() {
        assert_eq!(size(json!({})), (1, 256));
        assert_eq!(size(json!({"memory": {"limit": 64 << 20}})), (1, 256));
        assert_eq!(size(json!({"memory": {"limit": -1}})), (1, 256));
        assert_eq!(
            size(json!({"memory": {"limit": 1_u64 << 30}})),
            (1, 1024 + 16 + 64)
        );
        assert_eq!(
            size(json!({"cpu": {"quota": 150_000, "period": 100_000}})),
            (2, 256)
        );
        assert_eq!(size(json!({"cpu": {"quota": 50_000}})), (1, 256));
        assert_eq!(size(json!({"cpu": {"quota": -1}})), (1, 256));
        assert_eq!(size(json!({"cpu": {"quota": 9_000_000}})), (4, 256));
        assert_eq!(size(json!({"cpu": {"cpus": "0-1,3"}})), (3, 256));
        assert_eq!(
            size(json!({"cpu": {"cpus": "0-1", "quota": 300_000}})),
            (2, 256)
        );
        assert_eq!(size(json!({"cpu": {"cpus": "3-1"}})), (1, 256));
    }
}
