//! The host's limits for a VM, from the resources that its container's configuration names.
//!
//! What the container itself may use is enforced in the guest; the host's limits hold the whole
//! VM: memory for the guest and the VMM, threads of the VMM (the container's processes are none of
//! the host's), CPU time, CPU sets and I/O of the host's devices.

use oci_spec::runtime::{LinuxResources, LinuxThrottleDevice, Spec};

use crate::guest_size::GuestSize;

/// Memory of the VMM beside its guest's, page cache of the files it serves included.
const MEMORY_OVERHEAD: u64 = 64 << 20;
/// Threads of a VMM beside one a virtual CPU: its devices, and the file server's pool.
const THREADS: u64 = 128;
/// Kernel's default of cpu.cfs_period_us.
const DEFAULT_PERIOD: u64 = 100_000;

type Files = Vec<(&'static str, String)>;

/// The host's limits for a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    memory: Option<u64>,
    swap: Option<u64>,
    threads: Option<u64>,
    shares: Option<u64>,
    quota: Option<(i64, u64)>,
    cpus: Option<String>,
    mems: Option<String>,
    io_weight: Option<u16>,
    /// Version 2's key, version 1's file, the device and the rate.
    throttles: Vec<(&'static str, &'static str, String, u64)>,
}

impl Limits {
    /// The limits for a guest of this size.
    pub fn of(spec: &Spec, guest: GuestSize) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| {
            Self::from_resources(resources, guest)
        })
    }

    fn from_resources(resources: &LinuxResources, guest: GuestSize) -> Self {
        let mut limits = Self::default();
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(memory) = resources.memory() {
            let limit = memory.limit().and_then(positive);
            limits.memory =
                limit.map(|_| (u64::from(guest.memory_mib) << 20).saturating_add(MEMORY_OVERHEAD));
            // Here as in runc, `swap` is memory and swap together.
            limits.swap = memory
                .swap()
                .and_then(positive)
                .zip(limit)
                .map(|(both, limit)| both.saturating_sub(limit));
        }
        if resources
            .pids()
            .as_ref()
            .is_some_and(|pids| pids.limit() > 0)
        {
            limits.threads = Some(THREADS + u64::from(guest.cpus));
        }
        if let Some(cpu) = resources.cpu() {
            limits.shares = cpu.shares().filter(|shares| *shares > 0);
            let period = cpu
                .period()
                .filter(|period| *period > 0)
                .unwrap_or(DEFAULT_PERIOD);
            limits.quota = cpu
                .quota()
                .filter(|quota| *quota > 0)
                .map(|quota| (quota, period));
            limits.cpus = text(cpu.cpus());
            limits.mems = text(cpu.mems());
        }
        if let Some(io) = resources.block_io() {
            limits.io_weight = io.weight().filter(|weight| *weight > 0);
            let kinds = [
                (
                    "rbps",
                    "blkio.throttle.read_bps_device",
                    io.throttle_read_bps_device(),
                ),
                (
                    "wbps",
                    "blkio.throttle.write_bps_device",
                    io.throttle_write_bps_device(),
                ),
                (
                    "riops",
                    "blkio.throttle.read_iops_device",
                    io.throttle_read_iops_device(),
                ),
                (
                    "wiops",
                    "blkio.throttle.write_iops_device",
                    io.throttle_write_iops_device(),
                ),
            ];
            for (key, file, devices) in kinds {
                let devices = devices.iter().flatten();
                limits
                    .throttles
                    .extend(devices.map(|device: &LinuxThrottleDevice| {
                        let number = format!("{}:{}", device.major(), device.minor());
                        (key, file, number, device.rate())
                    }));
            }
        }
        limits
    }

    /// Files of a cgroup of version 2, CPU time apart.
    pub(super) fn unified(&self) -> Files {
        let mut files = Files::new();
        let number = |value: u64| value.to_string();
        files.extend(self.memory.map(|value| ("memory.max", number(value))));
        files.extend(self.swap.map(|value| ("memory.swap.max", number(value))));
        files.extend(self.threads.map(|value| ("pids.max", number(value))));
        files.extend(
            self.shares
                .map(|value| ("cpu.weight", number(weight_of_shares(value)))),
        );
        files.extend(self.cpus.clone().map(|value| ("cpuset.cpus", value)));
        files.extend(self.mems.clone().map(|value| ("cpuset.mems", value)));
        files.extend(
            self.io_weight
                .map(|value| ("io.weight", number(io_weight(value)))),
        );
        for (key, _, device, rate) in &self.throttles {
            let rate = if *rate == 0 {
                "max".to_owned()
            } else {
                rate.to_string()
            };
            files.push(("io.max", format!("{device} {key}={rate}")));
        }
        files
    }

    /// CPU time in a cgroup of version 2.
    pub(super) fn unified_cpu_time(&self) -> Files {
        self.quota
            .map(|(quota, period)| ("cpu.max", format!("{quota} {period}")))
            .into_iter()
            .collect()
    }

    /// Files of one controller of version 1, CPU time apart.
    pub(super) fn split(&self, controller: &str) -> Files {
        let mut files = Files::new();
        let number = |value: u64| value.to_string();
        match controller {
            "memory" => {
                files.extend(
                    self.memory
                        .map(|value| ("memory.limit_in_bytes", number(value))),
                );
            }
            "pids" => files.extend(self.threads.map(|value| ("pids.max", number(value)))),
            "cpu" => files.extend(self.shares.map(|value| ("cpu.shares", number(value)))),
            "cpuset" => {
                files.extend(self.cpus.clone().map(|value| ("cpuset.cpus", value)));
                files.extend(self.mems.clone().map(|value| ("cpuset.mems", value)));
            }
            "blkio" => {
                files.extend(
                    self.io_weight
                        .map(|value| ("blkio.bfq.weight", number(value.into()))),
                );
                for (_, file, device, rate) in &self.throttles {
                    files.push((file, format!("{device} {rate}")));
                }
            }
            _ => {}
        }
        files
    }

    /// CPU time in the controller `cpu` of version 1.
    pub(super) fn split_cpu_time(&self) -> Files {
        self.quota
            .map(|(quota, period)| {
                vec![
                    ("cpu.cfs_period_us", period.to_string()),
                    ("cpu.cfs_quota_us", quota.to_string()),
                ]
            })
            .unwrap_or_default()
    }
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// runtime-spec, config-linux "CPU": shares of 2 to 262144 stand for weights of 1 to 10000.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Weights of 10 to 1000 (version 1) for weights of 1 to 10000 (version 2).
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn limits(resources: serde_json::Value) -> Limits {
        let spec = serde_json::from_value(
            json!({"ociVersion": "1.0.0", "linux": {"resources": resources}}),
        )
        .unwrap();
        Limits::of(
            &spec,
            GuestSize {
                cpus: 2,
                memory_mib: 256,
            },
        )
    }

    #[test]
    fn nothing_asked_nothing_set() {
        let limits = limits(json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "shares": 0}}));
        assert_eq!(limits, Limits::default());
        assert!(limits.unified().is_empty() && limits.unified_cpu_time().is_empty());
    }

    #[test]
    fn both_versions() {
        let limits = limits(json!({
            "memory": {"limit": 100 << 20, "swap": 150 << 20},
            "pids": {"limit": 5},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1"},
            "blockIO": {"weight": 500, "throttleReadBpsDevice": [
                {"major": 8, "minor": 0, "rate": 600}]},
        }));
        let unified = limits.unified();
        for expected in [
            ("memory.max", "335544320"),
            ("memory.swap.max", "52428800"),
            ("pids.max", "130"),
            ("cpu.weight", "39"),
            ("cpuset.cpus", "0-1"),
            ("io.weight", "4950"),
            ("io.max", "8:0 rbps=600"),
        ] {
            assert!(
                unified.contains(&(expected.0, expected.1.to_owned())),
                "{expected:?}"
            );
        }
        assert_eq!(
            limits.unified_cpu_time(),
            [("cpu.max", "50000 100000".to_owned())]
        );
        assert_eq!(limits.split("pids"), [("pids.max", "130".to_owned())]);
        assert_eq!(limits.split("cpu"), [("cpu.shares", "1024".to_owned())]);
        assert_eq!(limits.split_cpu_time().len(), 2);
        assert!(limits.split("freezer").is_empty());
    }

    #[test]
    fn weights_keep_to_their_range() {
        assert_eq!(
            (weight_of_shares(2), weight_of_shares(262_144)),
            (1, 10_000)
        );
        assert_eq!(
            (weight_of_shares(0), weight_of_shares(u64::MAX)),
            (1, 10_000)
        );
        assert_eq!((io_weight(10), io_weight(1000)), (1, 10_000));
    }
}
