//! `linux.resources.cpu`: weights, bandwidth and CPU sets.

use oci_spec::runtime::LinuxCpu;

use super::{Present, Settings, V1_ONLY, invalid, shared_numbers, unsupported};
use crate::error::Result;

pub(super) fn settings(cpu: &LinuxCpu, present: &Present, settings: &mut Settings) -> Result<()> {
    if cpu.realtime_runtime().is_some_and(|v| v != 0) {
        return Err(unsupported("cpu.realtimeRuntime", V1_ONLY));
    }
    if cpu.realtime_period().is_some_and(|v| v != 0) {
        return Err(unsupported("cpu.realtimePeriod", V1_ONLY));
    }
    let sets = [
        ("cpu.cpus", "cpuset.cpus", cpu.cpus(), &present.cpus),
        ("cpu.mems", "cpuset.mems", cpu.mems(), &present.mems),
    ];
    for (field, file, wanted, available) in sets {
        let wanted = wanted.as_deref().unwrap_or_default();
        let set = shared_numbers(field, wanted, available)?;
        if !set.is_empty() {
            settings.add(field, file, set);
        }
    }
    weight_settings(cpu, settings)?;
    bandwidth_settings(cpu, present, settings);
    Ok(())
}

/// The kernel takes no weight for a group that is idle: it is set while the group is not.
fn weight_settings(cpu: &LinuxCpu, settings: &mut Settings) -> Result<()> {
    let idle = cpu.idle();
    if let Some(value) = idle.filter(|idle| !(0..=1).contains(idle)) {
        return Err(invalid("cpu.idle", format!("{value} is neither 0 nor 1")));
    }
    if idle == Some(0) {
        settings.add("cpu.idle", "cpu.idle", 0);
    }
    if let Some(shares) = cpu.shares().filter(|s| *s != 0) {
        settings.add("cpu.shares", "cpu.weight", weight(shares));
    }
    if idle == Some(1) {
        settings.add("cpu.idle", "cpu.idle", 1);
    }
    Ok(())
}

/// Maps shares, 2 to 262144, onto the weights 1 to 10000.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// The kernel wants a burst that is not above the quota, at every moment: a smaller burst goes
/// before the quota, a larger one after it.
fn bandwidth_settings(cpu: &LinuxCpu, present: &Present, settings: &mut Settings) {
    let period = cpu.period().filter(|p| *p != 0);
    let quota = cpu.quota().filter(|q| *q != 0);
    let burst = cpu.burst();
    let set_burst = |when: bool, settings: &mut Settings| {
        if let Some(burst) = burst.filter(|_| when) {
            settings.add("cpu.burst", "cpu.max.burst", burst);
        }
    };
    let shrinks = burst.is_some_and(|burst| burst <= present.burst);
    set_burst(shrinks, settings);
    if period.is_some() || quota.is_some() {
        let quota = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => present.quota.clone(),
        };
        let value = format!("{quota} {}", period.unwrap_or(present.period));
        settings.add("cpu.quota", "cpu.max", value);
    }
    set_burst(!shrinks, settings);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{
        Present,
        tests::{of, on, one, pair},
    };

    #[test]
    fn shares_become_weights() {
        for (shares, weight) in [(2, "1"), (1024, "39"), (262_144, "10000")] {
            let cpu = json!({"cpu": {"shares": shares}});
            assert_eq!(one(cpu), pair("cpu.weight", weight));
        }
        let idle = json!({"cpu": {"shares": 1024, "idle": 1}});
        let expected = [pair("cpu.weight", "39"), pair("cpu.idle", "1")];
        assert_eq!(of(idle).expect("valid"), expected);
        let busy = json!({"cpu": {"shares": 1024, "idle": 0}});
        let expected = [pair("cpu.idle", "0"), pair("cpu.weight", "39")];
        assert_eq!(of(busy).expect("valid"), expected);
    }

    #[test]
    fn bandwidth_of_a_new_container() {
        let half = json!({"cpu": {"quota": 50_000, "period": 100_000}});
        assert_eq!(one(half), pair("cpu.max", "50000 100000"));
        let none = json!({"cpu": {"quota": -1}});
        assert_eq!(one(none), pair("cpu.max", "max 100000"));
        let burst = json!({"cpu": {"quota": 50_000, "burst": 10_000}});
        let expected = [
            pair("cpu.max", "50000 100000"),
            pair("cpu.max.burst", "10000"),
        ];
        assert_eq!(of(burst).expect("valid"), expected);
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let present = Present {
            quota: "20000".to_owned(),
            period: 50_000,
            burst: 10_000,
            ..Present::default()
        };
        let of = |json| on(&present, json).expect("valid");
        let quota = json!({"cpu": {"quota": 30_000}});
        assert_eq!(of(quota), [pair("cpu.max", "30000 50000")]);
        let period = json!({"cpu": {"period": 100_000}});
        assert_eq!(of(period), [pair("cpu.max", "20000 100000")]);
        let less = json!({"cpu": {"quota": 5000, "burst": 4000}});
        let expected = [pair("cpu.max.burst", "4000"), pair("cpu.max", "5000 50000")];
        assert_eq!(of(less), expected);
        let more = json!({"cpu": {"quota": 40_000, "burst": 30_000}});
        let expected = [
            pair("cpu.max", "40000 50000"),
            pair("cpu.max.burst", "30000"),
        ];
        assert_eq!(of(more), expected);
    }

    #[test]
    fn sets_choose_among_the_guests() {
        let set = json!({"cpu": {"cpus": "0-1", "mems": "4"}});
        assert_eq!(one(set), pair("cpuset.cpus", "0,1"));
    }
}
