//! `linux.resources` as files of cgroup v2. The spec speaks the language of cgroup v1; values are
//! converted as runc does, so that the same spec limits the same. Pure.

mod cpu;
mod memory;

use std::collections::HashMap;

use oci_spec::runtime::{LinuxBlockIo, LinuxHugepageLimit, LinuxPids, LinuxResources};

use crate::error::{Error, Result};

/// A value for a file of the container's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Field of the spec that asks for it.
    pub field: String,
    /// File of the cgroup.
    pub file: String,
    /// What is written there, line by line.
    pub value: String,
    /// Whether the setting holds anyway where the kernel has no such file.
    pub holds_without_file: bool,
}

/// What values are relative to: the guest, and the cgroup as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Present {
    /// The guest's CPUs, as the kernel lists them ("0-3,5").
    pub(super) cpus: String,
    /// The guest's memory nodes.
    pub(super) mems: String,
    /// First number of cpu.max, "max" for none.
    pub(super) quota: String,
    /// Second number of cpu.max.
    pub(super) period: u64,
    /// cpu.max.burst
    pub(super) burst: u64,
    /// memory.max
    pub(super) memory: Option<i64>,
    /// memory.swap.max
    pub(super) swap: Option<i64>,
    /// memory.current
    pub(super) usage: i64,
}

impl Default for Present {
    /// A new cgroup, on a guest of nothing.
    fn default() -> Self {
        Self {
            cpus: String::new(),
            mems: String::new(),
            quota: "max".to_owned(),
            period: 100_000,
            burst: 0,
            memory: None,
            swap: None,
            usage: 0,
        }
    }
}

const PREFIX: &str = "linux.resources";

/// The settings that the resources ask for, in the order in which they are written. What the
/// resources do not name has no setting.
pub(super) fn settings(resources: &LinuxResources, present: &Present) -> Result<Vec<Setting>> {
    let mut settings = Settings::default();
    if let Some(cpu) = resources.cpu() {
        cpu::settings(cpu, present, &mut settings)?;
    }
    if let Some(memory) = resources.memory() {
        memory::settings(memory, present, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        pids_settings(pids, &mut settings)?;
    }
    if let Some(block_io) = resources.block_io() {
        check_block_io(block_io)?;
    }
    for (index, limit) in resources.hugepage_limits().iter().flatten().enumerate() {
        hugepage_settings(index, limit, &mut settings)?;
    }
    refuse_the_rest(resources)?;
    unified_settings(resources.unified().as_ref(), present, &mut settings)?;
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
            holds_without_file: false,
        });
    }

    /// Like [`Settings::add`], for what a kernel without that file grants or denies anyway.
    fn add_where_possible(&mut self, field: &str, file: &str, value: impl ToString) {
        self.add(field, file, value);
        if let Some(setting) = self.0.last_mut() {
            setting.holds_without_file = true;
        }
    }
}

fn invalid(field: &str, problem: impl Into<String>) -> Error {
    Error::invalid(format!("{PREFIX}.{field}"), problem)
}

fn unsupported(field: &str, reason: &str) -> Error {
    Error::unsupported(format!("{PREFIX}.{field}"), reason)
}

const V1_ONLY: &str = "cgroup v2 has no such setting; remove it";

/// A limit: -1 stands for none (runtime-spec config-linux.md "Memory", "PIDs").
fn number_or_max(field: &str, value: i64) -> Result<String> {
    match value {
        -1 => Ok("max".to_owned()),
        0.. => Ok(value.to_string()),
        _ => Err(invalid(field, format!("{value} is neither a limit nor -1"))),
    }
}

/// 0 sets no limit, as with runc: engines write it where the user has said nothing.
fn pids_settings(pids: &LinuxPids, settings: &mut Settings) -> Result<()> {
    if pids.limit() != 0 {
        let value = number_or_max("pids.limit", pids.limit())?;
        settings.add("pids.limit", "pids.max", value);
    }
    Ok(())
}

/// The numbers of `wanted` that are `available` too. The spec names those of the host, to which
/// the host confines the whole guest; here they only choose among the guest's own, and none left
/// means no choice. Lists are as in cpuset(7), "List format".
fn shared_numbers(field: &str, wanted: &str, available: &str) -> Result<String> {
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
    let (Some(wanted), Some(available)) = (ranges(wanted), ranges(available)) else {
        return Err(invalid(
            field,
            format!("{wanted:?} is no list such as 0-3,5"),
        ));
    };
    let both = |number: &u32| {
        let within = |(first, last): &(u32, u32)| (*first..=*last).contains(number);
        wanted.iter().any(within) && available.iter().any(within)
    };
    let last = available.iter().map(|range| range.1).max().unwrap_or(0);
    let numbers: Vec<_> = (0..=last)
        .filter(both)
        .map(|number| number.to_string())
        .collect();
    Ok(numbers.join(","))
}

/// Limits of block devices name the host's devices: the host applies them to the whole guest, and
/// nothing is left to do here. What no cgroup v2 can do is refused all the same.
fn check_block_io(block_io: &LinuxBlockIo) -> Result<()> {
    let weight = |field: &str, weight: Option<u16>| match weight {
        None | Some(0 | 10..=1000) => Ok(()),
        Some(weight) => Err(invalid(field, format!("{weight} is not in 10 to 1000"))),
    };
    if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(unsupported("blockIO.leafWeight", V1_ONLY));
    }
    weight("blockIO.weight", block_io.weight())?;
    for (index, device) in block_io.weight_device().iter().flatten().enumerate() {
        let field = |name: &str| format!("blockIO.weightDevice[{index}].{name}");
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(unsupported(&field("leafWeight"), V1_ONLY));
        }
        weight(&field("weight"), device.weight())?;
    }
    Ok(())
}

/// A page size that the guest does not have is one of which no page can be had: any limit holds.
fn hugepage_settings(
    index: usize,
    limit: &LinuxHugepageLimit,
    settings: &mut Settings,
) -> Result<()> {
    let field = format!("hugepageLimits[{index}]");
    let size = limit.page_size();
    let unit = size.trim_start_matches(|c: char| c.is_ascii_digit());
    if size.len() == unit.len() || !["KB", "MB", "GB"].contains(&unit) {
        let problem = format!("{size:?} is no page size such as 2MB");
        return Err(invalid(&format!("{field}.pageSize"), problem));
    }
    let value = number_or_max(&format!("{field}.limit"), limit.limit())?;
    // Reservations count apart from faults; both are limited, as with runc.
    for kind in ["max", "rsvd.max"] {
        settings.add_where_possible(&field, &format!("hugetlb.{size}.{kind}"), &value);
    }
    Ok(())
}

fn refuse_the_rest(resources: &LinuxResources) -> Result<()> {
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
    present: &Present,
    settings: &mut Settings,
) -> Result<()> {
    let mut entries: Vec<_> = unified.into_iter().flatten().collect();
    entries.sort();
    for (file, value) in entries {
        let field = format!("unified.{file}");
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !file.contains('.') || file.starts_with('.') || !file.chars().all(plain) {
            let problem = "is no name of a cgroup file, such as memory.high";
            return Err(invalid(&field, problem));
        }
        match file.as_str() {
            "cgroup.max.depth" | "cgroup.max.descendants" => settings.add(&field, file, value),
            "cpuset.cpus" | "cpuset.mems" => {
                let available = match file.as_str() {
                    "cpuset.cpus" => &present.cpus,
                    _ => &present.mems,
                };
                let set = shared_numbers(&field, value, available)?;
                if !set.is_empty() {
                    settings.add(&field, file, set);
                }
            }
            // They name the host's devices: the host's matter, as `blockIO` is.
            _ if file.starts_with("io.") => {}
            _ if file.starts_with("cgroup.") => {
                let reason = "the runtime itself uses this file; remove it";
                return Err(unsupported(&field, reason));
            }
            _ => settings.add(&field, file, value),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present() -> Present {
        Present {
            cpus: "0-2".to_owned(),
            mems: "0".to_owned(),
            ..Present::default()
        }
    }

    /// Files and values for resources in JSON.
    pub(super) fn on(present: &Present, json: serde_json::Value) -> Result<Vec<(String, String)>> {
        let resources: LinuxResources = serde_json::from_value(json).expect("resources");
        let settings = settings(&resources, present)?;
        Ok(settings.into_iter().map(|s| (s.file, s.value)).collect())
    }

    pub(super) fn of(json: serde_json::Value) -> Result<Vec<(String, String)>> {
        on(&present(), json)
    }

    pub(super) fn one(json: serde_json::Value) -> (String, String) {
        let mut settings = of(json).expect("valid");
        assert_eq!(settings.len(), 1);
        settings.remove(0)
    }

    pub(super) fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
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
            let shared = shared_numbers("cpu.cpus", wanted, "0-2\n").expect("valid");
            assert_eq!(shared, expected, "{wanted}");
        }
        for wrong in ["x", "3-1", "0-99999999", "1-", "-"] {
            assert!(shared_numbers("cpu.cpus", wrong, "0-2").is_err(), "{wrong}");
        }
    }

    #[test]
    fn others() {
        let pids = |limit| serde_json::json!({"pids": {"limit": limit}});
        assert_eq!(one(pids(9)), pair("pids.max", "9"));
        assert_eq!(one(pids(-1)), pair("pids.max", "max"));
        assert_eq!(of(pids(0)).expect("valid"), []);
        let host = serde_json::json!({"blockIO": {"weight": 1000, "throttleReadBpsDevice":
            [{"major": 254, "minor": 0, "rate": 4096}]}, "unified": {"io.max": "8:0 rbps=1"}});
        assert_eq!(of(host).expect("valid"), []);
        let pages = serde_json::json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]});
        let expected = [
            pair("hugetlb.2MB.max", "0"),
            pair("hugetlb.2MB.rsvd.max", "0"),
        ];
        assert_eq!(of(pages).expect("valid"), expected);
        let unified = serde_json::json!({"unified": {"memory.high": "5"}});
        assert_eq!(one(unified), pair("memory.high", "5"));
        let unified = serde_json::json!({"unified": {"cpuset.cpus": "2-9"}});
        assert_eq!(one(unified), pair("cpuset.cpus", "2"));
    }

    #[test]
    fn refusals_name_the_field() {
        let json = |text: &str| serde_json::from_str(text).expect("JSON");
        for (resources, field) in [
            (r#"{"memory": {"swappiness": 1}}"#, "memory.swappiness"),
            (
                r#"{"memory": {"disableOOMKiller": true}}"#,
                "memory.disableOOMKiller",
            ),
            (r#"{"memory": {"kernel": 5}}"#, "memory.kernel"),
            (
                r#"{"memory": {"useHierarchy": false}}"#,
                "memory.useHierarchy",
            ),
            (r#"{"memory": {"limit": -7}}"#, "memory.limit"),
            (r#"{"cpu": {"realtimeRuntime": 5}}"#, "cpu.realtimeRuntime"),
            (r#"{"cpu": {"realtimePeriod": 5}}"#, "cpu.realtimePeriod"),
            (r#"{"cpu": {"idle": 2}}"#, "cpu.idle"),
            (r#"{"cpu": {"cpus": "9-1"}}"#, "cpu.cpus"),
            (r#"{"pids": {"limit": -2}}"#, "pids.limit"),
            (r#"{"blockIO": {"weight": 5}}"#, "blockIO.weight"),
            (r#"{"blockIO": {"leafWeight": 10}}"#, "blockIO.leafWeight"),
            (
                r#"{"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 2000}]}}"#,
                "blockIO.weightDevice[0].weight",
            ),
            (
                r#"{"hugepageLimits": [{"pageSize": "2", "limit": 0}]}"#,
                "hugepageLimits[0].pageSize",
            ),
            (r#"{"rdma": {"mlx5": {"hcaHandles": 1}}}"#, "rdma"),
            (
                r#"{"unified": {"../cgroup.procs": "1"}}"#,
                "unified.../cgroup.procs",
            ),
            (
                r#"{"unified": {"cgroup.procs": "1"}}"#,
                "unified.cgroup.procs",
            ),
            (r#"{"unified": {"memory": "1"}}"#, "unified.memory"),
            (
                r#"{"unified": {"cpuset.cpus": "x"}}"#,
                "unified.cpuset.cpus",
            ),
        ] {
            let error = of(json(resources)).expect_err("refused").to_string();
            assert!(
                error.starts_with(&format!("linux.resources.{field}")),
                "{error}"
            );
        }
    }
}
