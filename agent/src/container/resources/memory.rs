//! `linux.resources.memory`: limits of memory and swap.

use oci_spec::runtime::LinuxMemory;

use super::{Present, Settings, V1_ONLY, invalid, number_or_max, unsupported};
use crate::error::Result;

/// In cgroup v2 swap has a limit of its own, so the two can be written in any order.
pub(super) fn settings(
    memory: &LinuxMemory,
    present: &Present,
    settings: &mut Settings,
) -> Result<()> {
    refuse_version_1(memory)?;
    let limit = memory.limit().filter(|l| *l != 0);
    let both = memory.swap().filter(|s| *s != 0);
    if memory.check_before_update() == Some(true) {
        check_usage(limit, both, present.usage)?;
    }
    if let Some(limit) = limit {
        let value = number_or_max("memory.limit", limit)?;
        settings.add("memory.limit", "memory.max", value);
    }
    if let Some(swap) = swap_limit(both, limit, present)? {
        let value = number_or_max("memory.swap", swap)?;
        // A kernel without swap denies all of it, and has none to limit.
        if swap <= 0 {
            settings.add_where_possible("memory.swap", "memory.swap.max", value);
        } else {
            settings.add("memory.swap", "memory.swap.max", value);
        }
    }
    if let Some(reservation) = memory.reservation().filter(|r| *r != 0) {
        let value = number_or_max("memory.reservation", reservation)?;
        settings.add("memory.reservation", "memory.low", value);
    }
    Ok(())
}

fn refuse_version_1(memory: &LinuxMemory) -> Result<()> {
    #[allow(deprecated)]
    let kernel = memory.kernel();
    for (field, value) in [
        ("memory.kernel", kernel),
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
    if memory.use_hierarchy() == Some(false) {
        let reason = "cgroup v2 always accounts hierarchically; remove it";
        return Err(unsupported("memory.useHierarchy", reason));
    }
    Ok(())
}

/// `checkBeforeUpdate`: a limit that is used up already is refused rather than enforced by
/// killing (runtime-spec config-linux.md "Memory"). The words are runc's.
fn check_usage(limit: Option<i64>, both: Option<i64>, usage: i64) -> Result<()> {
    for (field, what, value) in [
        ("memory.swap", "memory+swap", both),
        ("memory.limit", "memory", limit),
    ] {
        if let Some(value) = value.filter(|value| *value > 0 && *value <= usage) {
            let problem = format!("rejecting {what} limit {value} <= usage {usage}");
            return Err(invalid(field, problem));
        }
    }
    Ok(())
}

/// The spec's `swap` is memory and swap together; cgroup v2 wants swap alone. An update of one of
/// the two leaves the other as it was, as with runc.
fn swap_limit(both: Option<i64>, limit: Option<i64>, present: &Present) -> Result<Option<i64>> {
    let both = match (both, limit) {
        // Both unlimited, as with cgroup v1.
        (None, Some(-1)) | (Some(-1), _) => return Ok(Some(-1)),
        (None, None) => return Ok(None),
        (None, Some(_)) => match (present.memory, present.swap) {
            (Some(memory), Some(swap)) => memory.saturating_add(swap),
            _ => return Ok(None),
        },
        (Some(both), _) => both,
    };
    let memory = limit.or(present.memory).filter(|memory| *memory >= 0);
    let memory = memory.ok_or_else(|| invalid("memory.swap", "needs memory.limit"))?;
    let swap = both.checked_sub(memory).filter(|swap| *swap >= 0);
    let swap = swap.ok_or_else(|| {
        let problem = format!("{both} is less than memory.limit ({memory}), which it includes");
        invalid("memory.swap", problem)
    })?;
    Ok(Some(swap))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{
        Present,
        tests::{of, on, pair},
    };

    #[test]
    fn limits_of_a_new_container() {
        let limits = json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 7}});
        let expected = [
            pair("memory.max", "1000"),
            pair("memory.swap.max", "500"),
            pair("memory.low", "7"),
        ];
        assert_eq!(of(limits).expect("valid"), expected);
        let none = json!({"memory": {"limit": 0, "swap": 0, "kernel": 0}});
        assert_eq!(of(none).expect("valid"), []);
        let unlimited = [pair("memory.max", "max"), pair("memory.swap.max", "max")];
        let both = json!({"memory": {"limit": -1, "swap": -1}});
        assert_eq!(of(both).expect("valid"), unlimited);
        let memory = json!({"memory": {"limit": -1}});
        assert_eq!(of(memory).expect("valid"), unlimited);
        let no_swap = json!({"memory": {"limit": 1000, "swap": 1000}});
        let expected = [pair("memory.max", "1000"), pair("memory.swap.max", "0")];
        assert_eq!(of(no_swap).expect("valid"), expected);
        assert!(of(json!({"memory": {"limit": 1000, "swap": 500}})).is_err());
        assert!(of(json!({"memory": {"swap": 500}})).is_err());
        assert!(of(json!({"memory": {"limit": i64::MIN, "swap": i64::MAX}})).is_err());
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let present = Present {
            memory: Some(1000),
            swap: Some(500),
            usage: 400,
            ..Present::default()
        };
        let of = |json| on(&present, json);
        let more = json!({"memory": {"limit": 1200}});
        let expected = [pair("memory.max", "1200"), pair("memory.swap.max", "300")];
        assert_eq!(of(more).expect("valid"), expected);
        let swap = json!({"memory": {"swap": 1100}});
        assert_eq!(of(swap).expect("valid"), [pair("memory.swap.max", "100")]);
        assert!(of(json!({"memory": {"limit": 1600}})).is_err());
        let low = of(json!({"memory": {"reservation": 5}}));
        assert_eq!(low.expect("valid"), [pair("memory.low", "5")]);
        for (limits, message) in [
            (
                json!({"limit": 400, "checkBeforeUpdate": true}),
                "linux.resources.memory.limit: rejecting memory limit 400 <= usage 400",
            ),
            (
                json!({"limit": 300, "swap": 350, "checkBeforeUpdate": true}),
                "linux.resources.memory.swap: rejecting memory+swap limit 350 <= usage 400",
            ),
        ] {
            let error = of(json!({"memory": limits})).expect_err("refused");
            assert_eq!(error.to_string(), message);
        }
        assert!(of(json!({"memory": {"limit": 400}})).is_ok());
    }
}
