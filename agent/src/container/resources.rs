//! `linux.resources` as files of cgroup v2. The spec speaks the language of cgroup v1; values are
//! converted as runc does, so that the same spec limits the same. Pure.

use std::collections::HashMap;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};

use crate::error::{Error, Result};

/// A value for a file of the container's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Field of the spec that asks for it.
    pub field: String,
    /// File of the cgroup.
    pub file: String,
    /// What is written there.
    pub value: String,
}

/// CPUs and memory nodes of the guest, as the kernel lists them ("0-3,5").
#[derive(Clone, Debug, Default)]
pub(super) struct Available {
    /// CPUs.
    pub(super) cpus: String,
    /// Memory nodes.
    pub(super) mems: String,
}

const PREFIX: &str = "linux.resources";

/// The settings that the resources ask for, in the order in which they are written.
pub(super) fn settings(resources: &LinuxResources, available: &Available) -> Result<Vec<Setting>> {
    let mut settings = Settings::default();
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, available, &mut settings)?;
    }
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        match pids.limit() {
            0 => {}
            limit if limit < 0 => settings.add("pids.limit", "pids.max", "max"),
            limit => settings.add("pids.limit", "pids.max", limit),
        }
    }
    if let Some(block_io) = resources.block_io() {
        check_block_io(block_io)?;
    }
    for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        hugepage_settings(index, limit, &mut settings)?;
    }
    refuse_the_rest(resources)?;
    unified_settings(resources.unified().as_ref(), &mut settings)?;
    Ok(settings.0)
}

#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn add(&mut self, field: &str, file: &str, value: impl ToString) {
        self.0.push(Setting {
            field: format!("{PREFIX}.{field}"),
            file: file.to_owned(),
            value: value.to_string(),
        });
    }
}

fn invalid(field: &str, problem: impl Into<String>) -> Error {
    Error::invalid(format!("{PREFIX}.{field}"), problem)
}

fn unsupported(field: &str, reason: &str) -> Error {
    Error::unsupported(format!("{PREFIX}.{field}"), reason)
}

const V1_ONLY: &str = "cgroup v2 has no such setting; remove it";

fn cpu_settings(cpu: &LinuxCpu, available: &Available, settings: &mut Settings) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|v| v != 0) {
        return Err(unsupported("cpu.realtimeRuntime", V1_ONLY));
    }
    if cpu.realtime_period().is_some_and(|v| v != 0) {
        return Err(unsupported("cpu.realtimePeriod", V1_ONLY));
    }
    let sets = [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus(), &available.cpus),
        ("cpu.mems", "cpuset.mems", cpu.mems(), &available.mems),
    ];
    for (field, file, wanted, available) in sets {
        let wanted = wanted.as_deref().unwrap_or_default();
        let set = shared_numbers(wanted, available)
            .ok_or_else(|| invalid(field, format!("{wanted:?} is no list such as 0-3,5")))?;
        if !set.is_empty() {
            settings.add(field, file, set);
        }
    }
    if let Some(idle) = cpu.idle() {
        settings.add("cpu.idle", "cpu.idle", idle);
    }
    if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
        settings.add("cpu.shares", "cpu.weight", cpu_weight(shares));
    }
    let period = cpu.period().filter(|p| *p != 0);
    let quota = cpu.quota().filter(|q| *q != 0);
    if period.is_some() || quota.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        let value = format!("{quota} {}", period.unwrap_or(100_000));
        settings.add("cpu.quota", "cpu.max", value);
    }
    if let Some(burst) = cpu.burst() {
        settings.add("cpu.burst", "cpu.max.burst", burst);
    }
    Ok(())
}

/// The numbers of `wanted` that are `available` too. The spec names those of the host, to which
/// the host confines the whole guest; here they only choose among the guest's own, and none left
/// means no choice. Lists are as in cpuset(7), "List format".
fn shared_numbers(wanted: &str, available: &str) -> Option<String> {
    /// More than any kernel has: a list must not make a long loop.
    const MOST: u32 = 8192;
    let ranges = |list: &str| -> Option<Vec<(u32, u32)>> {
        let parts = list
            .trim()
            .split(',')
            .map(str::trim)
            .filter(|p| !p.is_empty());
        let parse = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let range = (first.parse().ok()?, last.parse().ok()?);
            (range.0 <= range.1 && range.1 < MOST).then_some(range)
        };
        parts.map(parse).collect()
    };
    let (wanted, available) = (ranges(wanted)?, ranges(available)?);
    let both = |number: &u32| {
        let within = |(first, last): &(u32, u32)| (*first..=*last).contains(number);
        wanted.iter().any(within) && available.iter().any(within)
    };
    let last = available.iter().map(|range| range.1).max().unwrap_or(0);
    let numbers: Vec<_> = (0..=last)
        .filter(both)
        .map(|number| number.to_string())
        .collect();
    Some(numbers.join(","))
}

/// Maps shares, 2 to 262144, onto the weights 1 to 10000.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn memory_settings(memory: &LinuxMemory, settings: &mut Settings) -> Result<()> {
    for (field, value) in [
        ("memory.kernel", memory.kernel()),
        ("memory.kernelTCP", memory.kernel_tcp()),
    ] {
        if value.is_some_and(|v| v > 0) {
            return Err(unsupported(field, V1_ONLY));
        }
    }
    if memory.swappiness().is_some() {
        return Err(unsupported("memory.swappiness", V1_ONLY));
    }
    if memory.disable_oom_killer() == Some(true) {
        return Err(unsupported("memory.disableOOMKiller", V1_ONLY));
    }
    let limit = memory.limit().filter(|l| *l != 0);
    if let Some(limit) = limit {
        settings.add("memory.limit", "memory.max", number_or_max(limit));
    }
    if let Some(swap) = swap_limit(memory.swap().unwrap_or(0), limit)? {
        settings.add("memory.swap", "memory.swap.max", number_or_max(swap));
    }
    if let Some(reservation) = memory.reservation().filter(|r| *r != 0) {
        settings.add(
            "memory.reservation",
            "memory.low",
            number_or_max(reservation),
        );
    }
    Ok(())
}

fn number_or_max(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// The spec's `swap` is memory and swap together; cgroup v2 wants swap alone.
fn swap_limit(both: i64, memory: Option<i64>) -> Result<Option<i64>> {
    match (both, memory) {
        (0, _) => Ok(None),
        (i64::MIN..0, _) => Ok(Some(-1)),
        (_, Some(memory)) if memory > both => Err(invalid(
            "memory.swap",
            format!("{both} is less than memory.limit ({memory}), which it includes"),
        )),
        (_, Some(memory)) if memory > 0 => Ok(Some(both - memory)),
        _ => Err(invalid("memory.swap", "needs memory.limit")),
    }
}

/// Limits of block devices name the host's devices: the host applies them to the whole guest, and
/// nothing is left to do here. What no cgroup v2 can do is refused all the same.
fn check_block_io(block_io: &LinuxBlockIo) -> Result<()> {
    if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(unsupported("blockIO.leafWeight", V1_ONLY));
    }
    let devices = block_io.weight_device().as_deref().unwrap_or_default();
    if devices
        .iter()
        .any(|device| device.leaf_weight().is_some_and(|weight| weight != 0))
    {
        return Err(unsupported("blockIO.weightDevice.leafWeight", V1_ONLY));
    }
    match block_io.weight() {
        None | Some(0 | 10..=1000) => Ok(()),
        Some(weight) => Err(invalid(
            "blockIO.weight",
            format!("{weight} is not in 10 to 1000"),
        )),
    }
}

fn hugepage_settings(
    index: usize,
    limit: &LinuxHugepageLimit,
    settings: &mut Settings,
) -> Result<()> {
    let size = limit.page_size();
    let unit = size.trim_start_matches(|c: char| c.is_ascii_digit());
    if size.len() == unit.len() || !["KB", "MB", "GB"].contains(&unit) {
        let problem = format!("{size:?} is no page size such as 2MB");
        return Err(invalid(
            &format!("hugepageLimits[{index}].pageSize"),
            problem,
        ));
    }
    let file = format!("hugetlb.{size}.max");
    settings.add(
        &format!("hugepageLimits[{index}]"),
        &file,
        number_or_max(limit.limit()),
    );
    Ok(())
}

fn refuse_the_rest(resources: &LinuxResources) -> Result<()> {
    if let Some(network) = resources.network() {
        if network.class_id().is_some_and(|id| id != 0) {
            return Err(unsupported("network.classID", V1_ONLY));
        }
        if network.priorities().as_ref().is_some_and(|p| !p.is_empty()) {
            return Err(unsupported("network.priorities", V1_ONLY));
        }
    }
    if resources.rdma().as_ref().is_some_and(|r| !r.is_empty()) {
        return Err(unsupported(
            "rdma",
            "the guest has no RDMA devices; remove it",
        ));
    }
    Ok(())
}

/// `unified`: files of cgroup v2 by name. They go last, as they override the rest.
fn unified_settings(
    unified: Option<&HashMap<String, String>>,
    settings: &mut Settings,
) -> Result<()> {
    let mut entries: Vec<_> = unified.into_iter().flatten().collect();
    entries.sort();
    for (file, value) in entries {
        let field = format!("unified.{file}");
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !file.contains('.') || file.starts_with('.') || !file.chars().all(plain) {
            return Err(invalid(&field, "is no name of a cgroup file"));
        }
        if file.starts_with("cgroup.") {
            return Err(unsupported(
                &field,
                "the runtime itself uses this file; remove it",
            ));
        }
        settings.add(&field, file, value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: serde_json::Value) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_value(json).expect("resources");
        let available = Available {
            cpus: "0-2".to_owned(),
            mems: "0".to_owned(),
        };
        let settings = settings(&resources, &available)?;
        Ok(settings.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn one(json: serde_json::Value) -> (String, String) {
        let mut settings = of(json).expect("valid");
        assert_eq!(settings.len(), 1);
        settings.remove(0)
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn cpu() {
        assert_eq!(
            one(serde_json::json!({"cpu": {"shares": 1024}})),
            pair("cpu.weight", "39")
        );
        assert_eq!(
            one(serde_json::json!({"cpu": {"shares": 2}})),
            pair("cpu.weight", "1")
        );
        let most = serde_json::json!({"cpu": {"shares": 262_144}});
        assert_eq!(one(most), pair("cpu.weight", "10000"));
        let half = serde_json::json!({"cpu": {"quota": 50_000, "period": 100_000}});
        assert_eq!(one(half), pair("cpu.max", "50000 100000"));
        assert_eq!(
            one(serde_json::json!({"cpu": {"quota": -1}})),
            pair("cpu.max", "max 100000")
        );
        assert_eq!(
            one(serde_json::json!({"cpu": {"cpus": "0-1"}})),
            pair("cpuset.cpus", "0,1")
        );
    }

    #[test]
    fn cpus_of_the_host_choose_among_those_of_the_guest() {
        for (wanted, expected) in [
            ("0-1", "0,1"),
            ("1,4-7", "1"),
            ("4-7", ""),
            ("", ""),
            ("2", "2"),
        ] {
            assert_eq!(
                shared_numbers(wanted, "0-2\n").as_deref(),
                Some(expected),
                "{wanted}"
            );
        }
        for wrong in ["x", "3-1", "0-99999999", "1-", "-"] {
            assert_eq!(shared_numbers(wrong, "0-2"), None, "{wrong}");
        }
    }

    #[test]
    fn memory() {
        let limits = serde_json::json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 7}});
        let expected = [
            pair("memory.max", "1000"),
            pair("memory.swap.max", "500"),
            pair("memory.low", "7"),
        ];
        assert_eq!(of(limits).expect("valid"), expected);
        let none = serde_json::json!({"memory": {"limit": 0, "swap": 0, "kernel": 0}});
        assert_eq!(of(none).expect("valid"), []);
        let unlimited = serde_json::json!({"memory": {"limit": -1, "swap": -1}});
        let expected = [pair("memory.max", "max"), pair("memory.swap.max", "max")];
        assert_eq!(of(unlimited).expect("valid"), expected);
        assert!(of(serde_json::json!({"memory": {"limit": 1000, "swap": 500}})).is_err());
        assert!(of(serde_json::json!({"memory": {"swap": 500}})).is_err());
    }

    #[test]
    fn others() {
        assert_eq!(
            one(serde_json::json!({"pids": {"limit": 9}})),
            pair("pids.max", "9")
        );
        assert_eq!(
            one(serde_json::json!({"pids": {"limit": -1}})),
            pair("pids.max", "max")
        );
        let host = serde_json::json!({"blockIO": {"weight": 1000, "throttleReadBpsDevice":
            [{"major": 254, "minor": 0, "rate": 4096}]}});
        assert_eq!(of(host).expect("valid"), []);
        let pages = serde_json::json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]});
        assert_eq!(one(pages), pair("hugetlb.2MB.max", "0"));
        let unified = serde_json::json!({"unified": {"memory.high": "5"}});
        assert_eq!(one(unified), pair("memory.high", "5"));
    }

    #[test]
    fn refusals_name_the_field() {
        for (json, field) in [
            (
                serde_json::json!({"memory": {"swappiness": 1}}),
                "memory.swappiness",
            ),
            (
                serde_json::json!({"memory": {"disableOOMKiller": true}}),
                "memory.disableOOMKiller",
            ),
            (
                serde_json::json!({"memory": {"kernel": 5}}),
                "memory.kernel",
            ),
            (
                serde_json::json!({"cpu": {"realtimeRuntime": 5}}),
                "cpu.realtimeRuntime",
            ),
            (
                serde_json::json!({"network": {"classID": 5}}),
                "network.classID",
            ),
            (
                serde_json::json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}}),
                "rdma",
            ),
            (
                serde_json::json!({"unified": {"../x": "5"}}),
                "unified.../x",
            ),
            (
                serde_json::json!({"unified": {"cgroup.procs": "5"}}),
                "unified.cgroup.procs",
            ),
            (
                serde_json::json!({"hugepageLimits": [{"pageSize": "../2MB", "limit": 0}]}),
                "hugepageLimits[0].pageSize",
            ),
        ] {
            let error = of(json).expect_err("refused").to_string();
            let expected = format!("linux.resources.{field}");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
}
