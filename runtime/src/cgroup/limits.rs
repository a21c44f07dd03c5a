//! The host's limits for a VM, from the resources that its container's configuration names.
//!
//! What the container itself may use is enforced in the guest; the host's limits hold the whole
//! VM: memory for the guest and the VMM, threads of the VMM (the container's processes are none of
//! the host's), CPU time, CPU sets and I/O of the host's devices. Where the configuration's number
//! can be the host's too it is, so that what reads the host's cgroup finds it there.

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice, Spec,
};

use super::{Version, devices};
use crate::guest_size::GuestSize;

/// Memory of the VMM beside its guest's, page cache of the files it serves included.
const MEMORY_OVERHEAD: u64 = 64 << 20;
/// Threads of a VMM beside one a virtual CPU: its devices, and the file server's pool.
const THREADS: u64 = 128;
/// Kernel's default of cpu.cfs_period_us.
const DEFAULT_PERIOD: u64 = 100_000;

/// A value for a file of a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Name and value: the first whose file is there (kernels differ in which I/O scheduler's file
    /// they have).
    pub(super) choices: Vec<(String, String)>,
    /// Where the kernel has no such file, there is nothing to be limited.
    pub(super) optional: bool,
}

fn setting(name: impl Into<String>, value: impl ToString) -> Setting {
    Setting {
        choices: vec![(name.into(), value.to_string())],
        optional: false,
    }
}

fn either(choices: [(&str, String); 2]) -> Setting {
    let choices = choices.map(|(name, value)| (name.to_owned(), value));
    Setting {
        choices: choices.into(),
        optional: false,
    }
}

/// A limit, or the absence of one, asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Amount {
    Unlimited,
    Of(u64),
}

impl Amount {
    fn text(self, unlimited: &str) -> String {
        match self {
            Self::Unlimited => unlimited.to_owned(),
            Self::Of(value) => value.to_string(),
        }
    }
}

/// 0 stands for "not given", below it for "unlimited", as in runc.
fn amount(value: Option<i64>) -> Option<Amount> {
    match value? {
        0 => None,
        value => Some(u64::try_from(value).map_or(Amount::Unlimited, Amount::Of)),
    }
}

/// The host's limits for a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    memory: Option<Amount>,
    swap: Option<Amount>,
    reservation: Option<Amount>,
    threads: Option<Amount>,
    shares: Option<u64>,
    idle: Option<i64>,
    quota: Option<Amount>,
    period: Option<u64>,
    burst: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
    io_weight: Option<u16>,
    /// The device and its weight.
    io_weights: Vec<(String, u16)>,
    /// Version 2's key, version 1's file, the device and the rate.
    throttles: Vec<(&'static str, &'static str, String, u64)>,
    /// Page size and limit. The VM uses no huge pages, so these hold wherever they can be set.
    huge_pages: Vec<(String, i64)>,
    /// I/O files of version 2 by name, which the guest leaves to the host.
    unified_io: Vec<(String, String)>,
    /// Class of the host's packets, and priorities of interfaces: version 1 only.
    class: Option<u32>,
    priorities: Vec<(String, u32)>,
    /// For a new cgroup; `update` changes the guest's rules alone.
    pub(super) devices: Vec<devices::Rule>,
}

impl Limits {
    /// The limits for a guest of this size.
    pub fn of(spec: &Spec, guest: GuestSize) -> Self {
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| Self {
            devices: devices::rules(resources.devices().as_deref().unwrap_or_default()),
            ..Self::from_resources(resources, guest)
        })
    }

    /// The limits that these resources ask for, and no others.
    pub fn from_resources(resources: &LinuxResources, guest: GuestSize) -> Self {
        let mut limits = Self::default();
        if let Some(memory) = resources.memory() {
            limits.take_memory(memory, guest);
        }
        let pids = resources.pids().as_ref().map(|pids| pids.limit());
        limits.threads = amount(pids).map(|threads| match threads {
            // No fewer than the VMM needs.
            Amount::Of(threads) => Amount::Of(threads.max(THREADS + u64::from(guest.cpus))),
            Amount::Unlimited => Amount::Unlimited,
        });
        if let Some(cpu) = resources.cpu() {
            limits.take_cpu(cpu);
        }
        if let Some(io) = resources.block_io() {
            limits.take_io(io);
        }
        for pages in resources.hugepage_limits().iter().flatten() {
            let size = pages.page_size();
            // Judged in the guest; here it becomes part of a file's name.
            if size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                limits.huge_pages.push((size.clone(), pages.limit()));
            }
        }
        for (name, value) in resources.unified().iter().flatten() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.';
            if name.starts_with("io.") && name.chars().all(plain) {
                let lines = value.lines().map(|line| (name.clone(), line.to_owned()));
                limits.unified_io.extend(lines);
            }
        }
        limits.unified_io.sort();
        if let Some(network) = resources.network() {
            limits.class = network.class_id().filter(|class| *class != 0);
            let priorities = network.priorities().iter().flatten();
            let priorities = priorities.map(|one| (one.name().clone(), one.priority()));
            limits.priorities = priorities.collect();
        }
        limits
    }

    fn take_memory(&mut self, memory: &LinuxMemory, guest: GuestSize) {
        let limit = amount(memory.limit());
        self.memory = limit.map(|limit| match limit {
            // The guest's memory is all that it can use, whatever its container's limit.
            Amount::Of(_) => {
                let guest = u64::from(guest.memory_mib) << 20;
                Amount::Of(guest.saturating_add(MEMORY_OVERHEAD))
            }
            Amount::Unlimited => Amount::Unlimited,
        });
        // Here as in runc, `swap` is memory and swap together.
        self.swap = match (amount(memory.swap()), limit) {
            (Some(Amount::Of(both)), Some(Amount::Of(limit))) => {
                Some(Amount::Of(both.saturating_sub(limit)))
            }
            (Some(Amount::Unlimited), _) => Some(Amount::Unlimited),
            _ => None,
        };
        self.reservation = amount(memory.reservation());
    }

    fn take_cpu(&mut self, cpu: &LinuxCpu) {
        let text = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        self.shares = cpu.shares().filter(|shares| *shares > 0);
        self.idle = cpu.idle();
        self.quota = amount(cpu.quota());
        self.period = cpu.period().filter(|period| *period > 0);
        self.burst = cpu.burst();
        self.cpus = text(cpu.cpus());
        self.mems = text(cpu.mems());
    }

    fn take_io(&mut self, io: &LinuxBlockIo) {
        self.io_weight = io.weight().filter(|weight| *weight > 0);
        for device in io.weight_device().iter().flatten() {
            if let Some(weight) = device.weight().filter(|weight| *weight > 0) {
                let number = format!("{}:{}", device.major(), device.minor());
                self.io_weights.push((number, weight));
            }
        }
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
            self.throttles
                .extend(devices.map(|device: &LinuxThrottleDevice| {
                    let number = format!("{}:{}", device.major(), device.minor());
                    (key, file, number, device.rate())
                }));
        }
    }

    /// What to write into a cgroup with these controllers (version 2 has all), CPU time apart.
    pub(super) fn settings(&self, version: Version, controllers: &[String]) -> Vec<Setting> {
        match version {
            Version::Two => self.unified(),
            Version::One => controllers
                .iter()
                .flat_map(|controller| self.split(controller))
                .collect(),
        }
    }

    fn unified(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        for (name, value) in [
            ("memory.max", self.memory),
            ("memory.swap.max", self.swap),
            ("memory.low", self.reservation),
            ("pids.max", self.threads),
        ] {
            settings.extend(value.map(|value| setting(name, value.text("max"))));
        }
        let weight = self.shares.map(weight_of_shares);
        settings.extend(weight.map(|weight| setting("cpu.weight", weight)));
        settings.extend(self.idle.map(|idle| setting("cpu.idle", idle)));
        settings.extend(self.cpus.as_ref().map(|list| setting("cpuset.cpus", list)));
        settings.extend(self.mems.as_ref().map(|list| setting("cpuset.mems", list)));
        settings.extend(self.io_weight.map(|weight| {
            either([
                ("io.bfq.weight", weight.to_string()),
                ("io.weight", io_weight(weight).to_string()),
            ])
        }));
        for (device, weight) in &self.io_weights {
            settings.push(either([
                ("io.bfq.weight", format!("{device} {weight}")),
                ("io.weight", format!("{device} {}", io_weight(*weight))),
            ]));
        }
        for (key, _, device, rate) in &self.throttles {
            let rate = if *rate == 0 {
                "max".to_owned()
            } else {
                rate.to_string()
            };
            settings.push(setting("io.max", format!("{device} {key}={rate}")));
        }
        settings.extend(self.huge_pages("max", "max"));
        settings.extend(self.unified_io());
        settings
    }

    fn huge_pages(&self, file: &str, unlimited: &str) -> Vec<Setting> {
        let of = |(size, limit): &(String, i64)| {
            let value = match limit {
                ..0 => unlimited.to_owned(),
                limit => limit.to_string(),
            };
            Setting {
                optional: true,
                ..setting(format!("hugetlb.{size}.{file}"), value)
            }
        };
        self.huge_pages.iter().map(of).collect()
    }

    fn unified_io(&self) -> Vec<Setting> {
        let files = self.unified_io.iter();
        files.map(|(name, line)| setting(name, line)).collect()
    }

    fn split(&self, controller: &str) -> Vec<Setting> {
        let mut settings = Vec::new();
        match controller {
            "memory" => {
                for (name, value) in [
                    ("memory.limit_in_bytes", self.memory),
                    ("memory.soft_limit_in_bytes", self.reservation),
                ] {
                    settings.extend(value.map(|value| setting(name, value.text("-1"))));
                }
            }
            "pids" => {
                settings.extend(
                    self.threads
                        .map(|value| setting("pids.max", value.text("max"))),
                );
            }
            "cpu" => {
                settings.extend(self.shares.map(|value| setting("cpu.shares", value)));
                settings.extend(self.idle.map(|value| setting("cpu.idle", value)));
            }
            "cpuset" => {
                settings.extend(self.cpus.as_ref().map(|list| setting("cpuset.cpus", list)));
                settings.extend(self.mems.as_ref().map(|list| setting("cpuset.mems", list)));
            }
            "blkio" => {
                settings.extend(self.io_weight.map(|weight| {
                    either([
                        ("blkio.weight", weight.to_string()),
                        ("blkio.bfq.weight", weight.to_string()),
                    ])
                }));
                for (device, weight) in &self.io_weights {
                    settings.push(either([
                        ("blkio.weight_device", format!("{device} {weight}")),
                        ("blkio.bfq.weight_device", format!("{device} {weight}")),
                    ]));
                }
                for (_, file, device, rate) in &self.throttles {
                    settings.push(setting(*file, format!("{device} {rate}")));
                }
                // Files of version 2: that they are not there is the error.
                settings.extend(self.unified_io());
            }
            "net_cls" => settings.extend(self.class.map(|class| setting("net_cls.classid", class))),
            "net_prio" => {
                let priorities = self.priorities.iter();
                settings.extend(priorities.map(|(interface, priority)| {
                    setting("net_prio.ifpriomap", format!("{interface} {priority}"))
                }));
            }
            "hugetlb" => settings.extend(self.huge_pages("limit_in_bytes", "-1")),
            _ => {}
        }
        settings
    }

    /// Version 2 marks no packets: runc says nothing, we say that it has no effect.
    pub(super) fn warn_of_network(&self, has: impl Fn(&str) -> bool) {
        for (asked, field, controller) in [
            (self.class.is_some(), "classID", "net_cls"),
            (!self.priorities.is_empty(), "priorities", "net_prio"),
        ] {
            if asked && !has(controller) {
                tracing::warn!(
                    "linux.resources.network.{field} has no effect: this host has no hierarchy \
                     {controller} (cgroup version 1)"
                );
            }
        }
    }

    /// CPU time in a cgroup with these controllers.
    pub(super) fn cpu_time(&self, version: Version, controllers: &[String]) -> Vec<Setting> {
        let mut settings = Vec::new();
        match version {
            Version::Two => {
                let period = self.period.unwrap_or(DEFAULT_PERIOD);
                settings
                    .extend(self.quota.map(|quota| {
                        setting("cpu.max", format!("{} {period}", quota.text("max")))
                    }));
                settings.extend(self.burst.map(|burst| setting("cpu.max.burst", burst)));
            }
            Version::One if controllers.iter().any(|name| name == "cpu") => {
                settings.extend(self.period.map(|value| setting("cpu.cfs_period_us", value)));
                settings.extend(
                    self.quota
                        .map(|value| setting("cpu.cfs_quota_us", value.text("-1"))),
                );
                settings.extend(self.burst.map(|value| setting("cpu.cfs_burst_us", value)));
            }
            Version::One => {}
        }
        settings
    }
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

    fn v2(limits: &Limits) -> Vec<Setting> {
        let mut all = limits.settings(Version::Two, &[]);
        all.extend(limits.cpu_time(Version::Two, &[]));
        all
    }

    fn v1(limits: &Limits, controller: &str) -> Vec<Setting> {
        let controllers = [controller.to_owned()];
        let mut all = limits.settings(Version::One, &controllers);
        all.extend(limits.cpu_time(Version::One, &controllers));
        all
    }

    #[test]
    fn nothing_asked_nothing_set() {
        let limits = limits(json!({
            "memory": {"limit": 0, "swap": 0}, "cpu": {"quota": 0, "shares": 0, "cpus": ""},
            "pids": {"limit": 0}}));
        assert_eq!(limits, Limits::default());
        assert!(v2(&limits).is_empty());
    }

    #[test]
    fn no_limit_can_be_asked_for() {
        let limits = limits(json!({
            "memory": {"limit": -1, "swap": -1}, "cpu": {"quota": -1, "period": 50_000},
            "pids": {"limit": -1}}));
        for expected in [
            setting("memory.max", "max"),
            setting("memory.swap.max", "max"),
            setting("pids.max", "max"),
            setting("cpu.max", "max 50000"),
        ] {
            assert!(v2(&limits).contains(&expected), "{expected:?}");
        }
        assert_eq!(
            v1(&limits, "memory"),
            [setting("memory.limit_in_bytes", -1)]
        );
        assert!(v1(&limits, "cpu").contains(&setting("cpu.cfs_quota_us", -1)));
    }

    #[test]
    fn both_versions() {
        let limits = limits(json!({
            "memory": {"limit": 100 << 20, "swap": 150 << 20, "reservation": 50 << 20},
            "pids": {"limit": 5},
            "cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 1000, "idle": 0,
                "cpus": "0-1"},
            "blockIO": {"weight": 500, "weightDevice": [{"major": 8, "minor": 1, "weight": 10}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}]},
        }));
        for expected in [
            setting("memory.max", 335_544_320),
            setting("memory.swap.max", 52_428_800),
            setting("memory.low", 52_428_800),
            setting("pids.max", 130),
            setting("cpu.weight", 39),
            setting("cpu.idle", 0),
            setting("cpuset.cpus", "0-1"),
            setting("cpu.max", "50000 100000"),
            setting("cpu.max.burst", 1000),
            setting("io.max", "8:0 rbps=600"),
            either([
                ("io.bfq.weight", "500".to_owned()),
                ("io.weight", "4950".to_owned()),
            ]),
            either([
                ("io.bfq.weight", "8:1 10".to_owned()),
                ("io.weight", "8:1 1".to_owned()),
            ]),
        ] {
            assert!(v2(&limits).contains(&expected), "{expected:?}");
        }
        assert_eq!(v1(&limits, "pids"), [setting("pids.max", 130)]);
        assert_eq!(v1(&limits, "cpu").len(), 5);
        assert!(
            v1(&limits, "blkio").contains(&setting("blkio.throttle.read_bps_device", "8:0 600"))
        );
        assert!(v1(&limits, "freezer").is_empty());
    }

    #[test]
    fn what_the_guest_leaves_to_the_host() {
        let limits = limits(json!({
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4096}, {"pageSize": "../x", "limit": 1}],
            "unified": {"io.max": "8:0 rbps=1\n8:1 rbps=2", "memory.high": "5", "io./../x": "1"}}));
        let pages = Setting {
            optional: true,
            ..setting("hugetlb.2MB.max", 4096)
        };
        assert_eq!(
            v2(&limits),
            [
                pages,
                setting("io.max", "8:0 rbps=1"),
                setting("io.max", "8:1 rbps=2")
            ]
        );
        assert_eq!(v1(&limits, "hugetlb").len(), 1);
        assert_eq!(v1(&limits, "blkio").len(), 2);
    }

    #[test]
    fn more_processes_than_the_vmm_needs_are_the_hosts_limit_too() {
        let limits = limits(json!({"pids": {"limit": 1000}}));
        assert_eq!(v2(&limits), [setting("pids.max", 1000)]);
    }

    #[test]
    fn packets_are_marked_by_version_1() {
        let limits = limits(json!({"network": {"classID": 255,
            "priorities": [{"name": "lo", "priority": 10}]}}));
        assert!(v2(&limits).is_empty());
        assert_eq!(v1(&limits, "net_cls"), [setting("net_cls.classid", 255)]);
        let expected = setting("net_prio.ifpriomap", "lo 10");
        assert_eq!(v1(&limits, "net_prio"), [expected]);
    }

    #[test]
    fn device_rules_are_for_new_cgroups() {
        let resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
        assert!(!limits(resources.clone()).devices.is_empty());
        let guest = GuestSize::default();
        let changed = Limits::from_resources(&serde_json::from_value(resources).unwrap(), guest);
        assert_eq!(changed, Limits::default());
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
